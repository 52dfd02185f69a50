"""Models optimized for a GPU: the same results, whatever is recorded, and what is recorded. A CPU plays the GPU."""

import gc
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel

from hf_clip import HfClipModel, HfClipVisionModelWithProjection
from hf_clip.inference import cuda_graphs, gpu_layers, gpu_times, on_gpu, optimize
from hf_clip.inference.gpu_layers import CudnnConv2d, FusedAttention
from hf_clip.inference.layers import InferenceConv2d, SingleQueryAttentionPool
from hf_clip.inference.on_gpu import parts_by_length
from hf_clip.model import text_tower
from hf_clip.model.optimized import OptimizedModelError
from hf_clip.model.text_tower import additive_causal_mask

from ..fake_gpu import FakeGpu, Reads, replace_cuda
from ..small import CONTEXT_LENGTH, random_images, texts


@pytest.fixture
def vit(repositories: dict[str, Path]) -> HfClipModel:
    """Enough where nothing depends on the kind of the image tower."""
    return AutoModel.from_pretrained(repositories["vit"]).eval()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """Every change pays on it."""
    monkeypatch.setattr(on_gpu, "gain_of", lambda *_: 2.0)
    monkeypatch.setattr(on_gpu, "batch_that_fills_the_gpu", lambda work_of: 2)
    monkeypatch.setattr(on_gpu, "has_cudnn", lambda: False)
    monkeypatch.setattr(optimize, "suit_the_cache_", on_gpu.suit_the_gpu_)
    monkeypatch.setattr(optimize, "has_packed_operators", lambda dtype: False)
    monkeypatch.setattr(optimize, "_keep_freed_memory", lambda: False)
    return replace_cuda(monkeypatch)


def distance(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def mask_of(ids: Tensor, lengths: tuple[int, ...] = (3, 7, 12, CONTEXT_LENGTH)) -> Tensor:
    return (torch.arange(ids.shape[1])[None] < torch.tensor(lengths)[:, None]).long()


Call = Callable[[HfClipModel, Tensor, Tensor], Tensor]

CALLS: dict[str, Call] = {
    "encode_image": lambda model, images, ids: model.encode_image(images),
    "encode_text": lambda model, images, ids: model.encode_text(ids),
    "encode_text, masked": lambda model, images, ids: model.encode_text(ids, mask_of(ids)),
    "logits": lambda model, images, ids: model(ids, images, mask_of(ids)).logits_per_image,
    "cells": lambda model, images, ids: model.vision_model(pixel_values=images).last_hidden_state,
    "tokens": lambda model, images, ids: model.text_model(ids, attention_mask=mask_of(ids)).last_hidden_state,
    "tuple": lambda model, images, ids: model.text_model(input_ids=ids, return_dict=False)[1],
}


@torch.no_grad()
def test_the_same_before_and_within_graphs(model: HfClipModel, tower: str, gpu: FakeGpu):
    """Three calls each: kernels one by one, recorded, replayed with other input. What was returned stays as it was."""
    inputs = [(random_images(tower, seed=seed), texts(seed=seed)) for seed in range(4)]
    expected = {name: [call(model, *given) for given in inputs] for name, call in CALLS.items()}
    done = model.optimize_for_inference()
    assert any("encode_image for 1 x 3" in line and "2.00 times as fast here" in line for line in done)
    for name, call in CALLS.items():
        before = gpu.replays
        found = [call(model, *given) for given in inputs]
        assert gpu.replays >= before + 3, name
        for ours, theirs in zip(found, expected[name], strict=True):
            assert distance(ours, theirs) < 1e-5, name


def test_no_call_waits_once_it_is_recorded(model: HfClipModel, tower: str, gpu: FakeGpu):
    images, ids = random_images(tower), texts()
    with torch.no_grad(), Reads() as before:
        for call in CALLS.values():
            call(model, images, ids)
    assert before.found == []  # the models as loaded do not wait on a GPU either
    model.optimize_for_inference()
    with torch.no_grad():
        for _ in range(2):
            for call in CALLS.values():
                call(model, images, ids)
        waits, replays = gpu.waits, gpu.replays
        with Reads() as after:
            for call in CALLS.values():
                call(model, images, ids)
    assert after.found == []
    assert gpu.waits == waits
    assert gpu.replays >= replays + len(CALLS)


def test_reads_are_counted_where_there_are_some():
    with Reads() as reads:
        flags = torch.tensor([1, 0])
        assert bool(flags.any())
        flags.tolist()
        flags.nonzero()
    assert reads.found == ["_local_scalar_dense", "tolist", "nonzero"]


@pytest.mark.parametrize("is_masked", [False, True])
def test_forward_reads_nothing_on_a_device_without_numbers(model: HfClipModel, tower: str, is_masked: bool):
    """On torch's device without numbers every attempt to read one is an error, whatever makes it."""
    there, images, ids = model.to("meta"), random_images(tower).to("meta"), texts().to("meta")
    mask = mask_of(texts()).to("meta") if is_masked else None
    outputs = there(input_ids=ids, pixel_values=images, attention_mask=mask)
    assert outputs.logits_per_image.device.type == "meta"
    assert there.encode_text(ids, mask).shape == (4, 48)
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(ids.any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_mask_that_is_not_read_is_that_of_transformers(
    vit: HfClipModel, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    vit, ids, lengths = vit.to(dtype), texts(), (3, 7, 12, CONTEXT_LENGTH)
    right, holes = mask_of(ids), mask_of(ids).bool()
    holes[:, 1] = False
    on_the_left = [torch.stack([row.roll(-n) for row, n in zip(given, lengths, strict=True)]) for given in (ids, right)]
    pairs = [(ids, right), (ids, torch.ones_like(ids)), (ids, holes), on_the_left]
    with torch.no_grad():
        expected = [vit.text_model(*pair).last_hidden_state for pair in pairs]
        monkeypatch.setattr(text_tower, "must_wait_for", lambda tensor: True)
        monkeypatch.setattr(text_tower, "create_causal_mask", lambda **_: pytest.fail("it would read the mask"))
        for pair, want in zip(pairs, expected, strict=True):
            found = vit.text_model(*pair).last_hidden_state
            assert torch.allclose(found, want, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.02, equal_nan=True)


@pytest.mark.parametrize("length", [1, 7, 8, 13])
def test_rows_of_the_mask_lie_where_kernels_need_them(length: int):
    mask = additive_causal_mask(torch.ones(2, length, dtype=torch.long), torch.bfloat16)
    assert mask.shape == (2, 1, length, length)
    assert all(stride % 8 == 0 for stride in mask.stride()[:-1])
    assert torch.equal(mask[0, 0] == 0, torch.ones(length, length).tril().bool())
    assert torch.equal(mask.isneginf(), mask != 0)


# --- what is recorded -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_shape_is_recorded_when_it_comes_again(repositories: dict[str, Path], gpu: FakeGpu):
    model = AutoModel.from_pretrained(repositories["vit"]).eval()
    model.optimize_for_inference()
    recorded = gpu.recorded
    for count in (2, 3, 4, 5):
        model.encode_image(random_images("vit", count))
    assert gpu.recorded == recorded
    model.encode_image(random_images("vit", 3))
    model.encode_image(random_images("vit", 3).bfloat16())  # another type, for the first time
    assert gpu.recorded == recorded + 1
    assert model.optimizations[-1].startswith("CUDA graph of encode_image for 3 x 3 x 48 x 48 (float32): 2.00 times")


@torch.no_grad()
def test_texts_of_nearby_lengths_share_a_graph(vit: HfClipModel, gpu: FakeGpu):
    expected = [vit.encode_text(texts((length, 3))[:, :length]) for length in (9, 11, 16, 13, 20)]
    vit.optimize_for_inference()
    recorded = gpu.recorded
    found = [vit.encode_text(texts((length, 3))[:, :length]) for length in (9, 11, 16, 13, 20)]
    assert gpu.recorded == recorded + 1  # 16 columns; 20 are all that the model has, and came once
    for ours, theirs in zip(found, expected, strict=True):
        assert distance(ours, theirs) < 1e-5


@torch.no_grad()
def test_number_of_graphs_has_a_bound(repositories: dict[str, Path], gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    model = AutoModel.from_pretrained(repositories["vit"]).eval()
    model.optimize_for_inference()
    monkeypatch.setattr(cuda_graphs, "MOST_GRAPHS", gpu.recorded + 1)
    recorded = gpu.recorded
    for count in (2, 2, 3, 3, 2, 3):
        model.encode_image(random_images("vit", count))
    assert gpu.recorded == recorded + 1


@torch.no_grad()
def test_what_gains_nothing_is_not_kept(repositories: dict[str, Path], gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    model = AutoModel.from_pretrained(repositories["vit"]).eval()
    monkeypatch.setattr(cuda_graphs, "gain_of", lambda *_: 1.04)
    done = model.optimize_for_inference()
    assert any("encode_image" in line and "left as before; it is 1.04 times as fast" in line for line in done)
    monkeypatch.setattr(cuda_graphs, "share_of_launching", lambda work: 0.2)
    recorded, replays = gpu.recorded, gpu.replays
    for _ in range(3):
        model.encode_image(random_images("vit", 2))
    assert (gpu.recorded, gpu.replays) == (recorded, replays)
    assert "the GPU takes longer to compute than Python to launch" in model.optimizations[-1]


@torch.no_grad()
def test_graph_that_cannot_be_made_is_said(repositories: dict[str, Path], gpu: FakeGpu):
    model = AutoModel.from_pretrained(repositories["vit"]).eval()
    expected = model.encode_image(random_images("vit"))
    gpu.is_broken = True
    with pytest.warns(UserWarning, match="could not be made; results are the same without it: CUDA error: the driver"):
        done = model.optimize_for_inference()
    (line,) = [line for line in done if "could not be made" in line]
    assert line.endswith(
        "left as before, and so is every later one; it could not be made: CUDA error: the driver has no graphs"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            assert distance(model.encode_image(random_images("vit")), expected) < 1e-5
    assert gpu.recorded == 0
    assert gpu.current is gpu.default


@torch.no_grad()
def test_graph_with_another_output_is_not_used(
    repositories: dict[str, Path], gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
):
    model = AutoModel.from_pretrained(repositories["vit"]).eval()
    expected = model.encode_image(random_images("vit"))
    monkeypatch.setattr("tests.fake_gpu.Recording.replay", lambda self: self.calls[-1][3].zero_())
    with pytest.warns(UserWarning, match="its output differs"):
        model.optimize_for_inference()
    assert distance(model.encode_image(random_images("vit")), expected) < 1e-5


@torch.no_grad()
def test_operation_that_reads_while_it_is_recorded_ends_graphs(
    repositories: dict[str, Path], gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
):
    model = AutoModel.from_pretrained(repositories["vit"]).eval()
    original = type(model.vision_model.embeddings).forward

    def reading(self, pixels: Tensor) -> Tensor:
        assert pixels.isfinite().all()
        return original(self, pixels)

    monkeypatch.setattr(type(model.vision_model.embeddings), "forward", reading)
    with pytest.warns(UserWarning, match="operation not permitted when stream is capturing"):
        model.optimize_for_inference()
    assert model.encode_image(random_images("vit")).isfinite().all()


# --- what is not recorded, and who may look -------------------------------------------------------------------------


def optimized(repository: Path, gpu: FakeGpu) -> tuple[HfClipModel, Callable[[], int]]:
    """A model that has encoded two images twice, and a function that does it again and counts replays."""
    model = AutoModel.from_pretrained(repository).eval()
    model.optimize_for_inference()
    images = random_images("vit", 2)

    def replays() -> int:
        before = gpu.replays
        model.encode_image(images)
        return gpu.replays - before

    with torch.no_grad():
        replays(), replays()
    assert replays() == 1
    return model, replays


def test_hooks_that_come_later_are_called(repositories: dict[str, Path], gpu: FakeGpu):
    model, replays = optimized(repositories["vit"], gpu)
    seen: list[int] = []
    handle = model.vision_model.encoder.layers[1].mlp.fc1.register_forward_hook(lambda *_: seen.append(1))
    assert (replays(), seen) == (0, [1])
    handle.remove()
    assert (replays(), seen) == (1, [1])
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
    try:
        assert replays() == 0
    finally:
        everywhere.remove()
    assert len(seen) > 10
    assert replays() == 1


def test_layers_that_are_replaced_later_are_used(repositories: dict[str, Path], gpu: FakeGpu):
    model, replays = optimized(repositories["vit"], gpu)
    images, layer = random_images("vit", 2), model.vision_model.encoder.layers[0]
    before = model.encode_image(images)
    for owner, name in ((layer.mlp, "fc1"), (layer.self_attn, "v_proj")):
        whole = getattr(owner, name)
        setattr(owner, name, nn.Sequential(whole, nn.Dropout(0.0), nn.ReLU()))
        assert replays() == 0
        assert distance(model.encode_image(images), before) > 1e-3
        setattr(owner, name, whole)
    assert distance(model.encode_image(images), before) < 1e-5
    layer.mlp.forward = lambda states: torch.zeros_like(states)
    assert distance(model.encode_image(images), before) > 1e-3
    assert replays() == 0


def test_gradients_autocast_and_other_graphs_go_one_by_one(repositories: dict[str, Path], gpu: FakeGpu):
    model, _ = optimized(repositories["vit"], gpu)
    images = random_images("vit", 2).requires_grad_()
    before = gpu.replays
    model.encode_image(images).sum().backward()
    assert images.grad is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
        model.encode_image(random_images("vit", 2))
    gpu.thread.is_capturing = True  # the user's own graph
    model.encode_image(random_images("vit", 2))
    gpu.thread.is_capturing = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # attention is slow within vmap
        mapped = torch.vmap(model.encode_image)(random_images("vit", 2)[:, None])
    assert distance(mapped[:, 0], model.encode_image(random_images("vit", 2))) < 1e-5
    assert gpu.replays == before + 1


def test_inference_mode_within_and_outside(repositories: dict[str, Path], gpu: FakeGpu):
    model = AutoModel.from_pretrained(repositories["vit"]).eval()
    images = random_images("vit", 2)
    expected = model.encode_image(images).detach()
    with torch.inference_mode():
        model.optimize_for_inference()
        for _ in range(3):
            found = model.encode_image(images.clone())
    assert found.is_inference()
    plain = model.encode_image(images)
    assert not plain.is_inference()
    assert not plain.requires_grad
    plain += 0  # which inference mode would not allow
    for each in (found, plain):
        assert distance(each, expected) < 1e-5


def test_streams_and_threads_do_not_meet_in_the_shared_memory(repositories: dict[str, Path], gpu: FakeGpu):
    """The played GPU refuses a replay that does not wait for those before."""
    model, _ = optimized(repositories["vit"], gpu)
    images = [random_images("vit", 2, seed) for seed in range(8)]
    with torch.no_grad():
        expected = [model.encode_image(each) for each in images]
    together = threading.Barrier(4)

    def work(number: int) -> list[Tensor]:
        together.wait()
        stream = torch.cuda.Stream()
        stream.wait_stream(gpu.default)
        with torch.cuda.stream(stream), torch.no_grad():
            return [model.encode_image(each) for each in images]

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(work, range(4)):
            for ours, theirs in zip(found, expected, strict=True):
                assert distance(ours, theirs) < 1e-5


def test_all_layers_outputs_are_given(repositories: dict[str, Path], gpu: FakeGpu):
    model = AutoModel.from_pretrained(repositories["vit"], attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model.vision_model(random_images("vit"), output_hidden_states=True, output_attentions=True)
        model.optimize_for_inference()
        for _ in range(3):
            found = model.vision_model(random_images("vit"), output_hidden_states=True, output_attentions=True)
    assert isinstance(model.vision_model.encoder.layers[0].self_attn, FusedAttention)
    for ours, theirs in zip(
        found.hidden_states + found.attentions, expected.hidden_states + expected.attentions, strict=True
    ):
        assert distance(ours, theirs) < 1e-5


def test_subclasses_and_patches_are_kept(repositories: dict[str, Path], gpu: FakeGpu):
    class Normalising(HfClipModel):
        def encode_image(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
            return functional.normalize(super().encode_image(pixel_values, interpolate_pos_encoding), dim=-1)

    own, patched = (kind.from_pretrained(repositories["vit"]).eval() for kind in (Normalising, HfClipModel))
    calls: list[int] = []
    forward = patched.vision_model.encoder.forward
    patched.vision_model.encoder.forward = lambda *args, **kwargs: (calls.append(1), forward(*args, **kwargs))[1]
    for model in (own, patched):
        expected = model.encode_image(random_images("vit"))
        done = model.optimize_for_inference()
        assert any("graphs of encode_image: left as before; a part has hooks" in line for line in done) == (
            model is patched
        )
        calls.clear()
        with torch.no_grad():
            for _ in range(3):
                assert distance(model.encode_image(random_images("vit")), expected) < 1e-5
    assert len(calls) == 3


def test_optimized_for_a_gpu_it_refuses_what_cannot_be_undone(vit: HfClipModel, tmp_path: Path, gpu: FakeGpu):
    vit.optimize_for_inference()
    for words, call in {
        "saved": lambda: vit.save_pretrained(tmp_path / "model"),
        "trained": vit.train,
        "moved": lambda: vit.to(torch.bfloat16),
        "given other weights": lambda: vit.load_state_dict({}),
    }.items():
        with pytest.raises(OptimizedModelError, match=f"cannot be {words}"):
            call()


@torch.no_grad()
def test_weights_that_graphs_read_are_not_freed(
    repositories: dict[str, Path], gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
):
    graphs, recorded = [], cuda_graphs.Recorded
    monkeypatch.setattr(cuda_graphs, "Recorded", lambda *parts: (graphs.append(recorded(*parts)), graphs[-1])[1])
    model, replays = optimized(repositories["vit"], gpu)
    before = model.encode_image(random_images("vit", 2))
    weight = model.vision_model.embeddings.patch_embedding.weight
    place = weight.data_ptr()
    model.to(memory_format=torch.channels_last)  # gives the patch embedding a weight elsewhere
    assert weight.data_ptr() != place
    assert place in {held.data_ptr() for held in graphs[-1].weights}
    assert replays() == 1
    assert distance(model.encode_image(random_images("vit", 2)), before) < 1e-6


@pytest.mark.slow
@torch.no_grad()
def test_graphs_are_left_out_of_compiled_models(vit: HfClipModel, gpu: FakeGpu):
    expected = vit.text_model(texts(), mask_of(texts())).pooler_output
    vit.optimize_for_inference()
    before = gpu.replays
    torch.compiler.reset()
    compiled = torch.compile(vit.text_model, backend="eager", fullgraph=True)
    assert distance(compiled(texts(), attention_mask=mask_of(texts())).pooler_output, expected) < 1e-5
    assert gpu.replays == before


def test_nothing_is_freed_while_a_graph_is_recorded():
    with cuda_graphs.no_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


# --- texts by length ------------------------------------------------------------------------------------------------


def test_parts_have_multiples_of_eight_columns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(on_gpu, "LEAST_POSITIONS_OF_A_PART", 32)
    assert parts_by_length([3] * 6 + [9] * 1 + [17] * 5 + [77]) == [(0, 6, 8), (6, 12, 24), (12, 13, 80)]
    assert parts_by_length([5]) == [(0, 1, 8)]
    assert parts_by_length([8, 16]) == [(0, 2, 16)]
    lengths = sorted(torch.randint(1, 78, (500,), generator=torch.Generator().manual_seed(0)).tolist())
    parts = parts_by_length(lengths)
    assert [first for first, _, _ in parts] == [0, *(last for _, last, _ in parts[:-1])]
    assert parts[-1][1] == 500
    assert all(lengths[last - 1] <= columns < lengths[last - 1] + 8 for _, last, columns in parts)


@pytest.mark.parametrize("kind", ["no mask", "right", "left", "hides an end"])
@torch.no_grad()
def test_many_texts_are_sorted_by_length(vit: HfClipModel, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, kind: str):
    """One read tells all lengths. A mask that changes features is heeded."""
    lengths = (20, 3, 12, 7, 9, 3, 17, 5, 4, 11)
    ids = texts(lengths)
    mask = None if kind == "no mask" else mask_of(ids, lengths)
    if kind == "left":
        ids, mask = (
            torch.stack([row.roll(-n) for row, n in zip(given, lengths, strict=True)]) for given in (ids, mask)
        )
    elif kind == "hides an end":
        mask = (ids != int(ids.max())).long()
    expected = vit.encode_text(ids, mask)
    vit.optimize_for_inference()
    monkeypatch.setattr(on_gpu, "POSITIONS_WORTH_SORTING", 100)
    monkeypatch.setattr(on_gpu, "LEAST_POSITIONS_OF_A_PART", 16)
    shapes: list[tuple[int, ...]] = []
    vit.text_model.embeddings.register_forward_hook(lambda _, given, __: shapes.append(tuple(given[0].shape)))
    with Reads() as reads:
        found = vit.encode_text(ids, mask)
    assert distance(found, expected) < 1e-5
    assert reads.found == ["tolist"]
    if kind in ("no mask", "right"):
        assert shapes == [(5, 8), (3, 16), (2, 20)]
    else:
        assert shapes == [(10, 20)]
    assert vit.encode_text(ids, mask, truncate_dim=48).shape == (10, 48)


@torch.no_grad()
def test_text_without_an_end_is_no_number_in_any_way(vit: HfClipModel, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch):
    ids = texts((5, 9, 20, 3))
    endless = ids.clone()
    endless[1][ids[1] == ids.max()] = 5
    late = ids.clone()
    late[2] = torch.cat([torch.tensor([7]), ids[2, :-1]])
    late[2, -1] = ids.max()
    vit.optimize_for_inference()
    for rows, wrong in ((endless, 1), (late, 2)):
        found = [vit.encode_text(rows[:, :width]) for width in (20, 20, 20)]
        monkeypatch.setattr(on_gpu, "POSITIONS_WORTH_SORTING", 10)
        found.append(vit.encode_text(rows))
        monkeypatch.setattr(on_gpu, "POSITIONS_WORTH_SORTING", 4096)
        for features in found:
            assert features[wrong].isnan().all()
            assert features[[n for n in range(4) if n != wrong]].isfinite().all()


# --- what is chosen -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_does_not_pay_on_the_gpu_is_undone(
    model: HfClipModel, tower: str, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
):
    expected = model.encode_image(random_images(tower)), model.encode_text(texts())
    monkeypatch.setattr(on_gpu, "gain_of", lambda *_: 1.01)
    done = model.optimize_for_inference()
    left = [line for line in done if "left as before; with 2" in line and "1.01 times as fast here" in line]
    assert len(left) == 3
    for module in model.modules():
        assert not isinstance(module, (FusedAttention, CudnnConv2d, SingleQueryAttentionPool))
        if isinstance(module, InferenceConv2d) and module.weight.shape[-1] > 1:
            assert module.weight.is_contiguous()
    for found, wanted in zip(
        (model.encode_image(random_images(tower)), model.encode_text(texts())), expected, strict=True
    ):
        assert distance(found, wanted) < 1e-5


@torch.no_grad()
def test_fused_projections_share_their_weights(repositories: dict[str, Path], gpu: FakeGpu):
    model = AutoModel.from_pretrained(repositories["vit"]).eval()
    hooked = model.vision_model.encoder.layers[2].self_attn
    handle = hooked.k_proj.register_forward_hook(lambda *_: None)
    done = model.optimize_for_inference()
    handle.remove()
    assert not isinstance(hooked, FusedAttention)
    assert any(line.startswith("queries, keys and values of 2 layers in one product; with 2 images") for line in done)
    attention = model.vision_model.encoder.layers[0].self_attn
    storages = {
        part.weight.untyped_storage().data_ptr() for part in (attention.q_proj, attention.k_proj, attention.v_proj)
    }
    assert storages == {attention.fused_weight.untyped_storage().data_ptr()}
    states = torch.randn(2, 10, 128)
    whole, _ = attention(states)
    seen: list[int] = []
    attention.v_proj.register_forward_hook(lambda *_: seen.append(1))
    assert distance(attention(states)[0], whole) < 1e-6
    assert seen == [1]


@torch.no_grad()
def test_towers_alone_become_graphs(repository: Path, tower: str, gpu: FakeGpu):
    vision = HfClipVisionModelWithProjection.from_pretrained(repository).eval()
    expected = [vision(random_images(tower, seed=seed)).image_embeds for seed in range(3)]
    done = vision.optimize_for_inference()
    assert any("CUDA graph of the image tower for 1 x 3" in line for line in done)
    before = gpu.replays
    found = [vision(random_images(tower, seed=seed)).image_embeds for seed in range(3)]
    assert gpu.replays > before
    for ours, theirs in zip(found, expected, strict=True):
        assert distance(ours, theirs) < 1e-5


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """cuDNN's operators, computed step by step; returns the calls."""
    calls: list[str] = []

    def relu(input, weight, bias, stride, padding, dilation, groups) -> Tensor:
        calls.append("relu")
        return functional.conv2d(input, weight, bias, stride, padding, dilation, groups).relu()

    def add_relu(input, weight, z, alpha, bias, stride, padding, dilation, groups) -> Tensor:
        calls.append("add")
        return (functional.conv2d(input, weight, bias, stride, padding, dilation, groups) + alpha * z).relu()

    monkeypatch.setattr(on_gpu, "has_cudnn", lambda: True)
    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    return calls


@pytest.fixture
def resnet(repositories: dict[str, Path]) -> HfClipModel:
    return AutoModel.from_pretrained(repositories["resnet"]).eval()


@torch.no_grad()
def test_relu_and_sums_in_one_pass(resnet: HfClipModel, gpu: FakeGpu, cudnn: list[str]):
    expected = resnet.encode_image(random_images("resnet"))
    done = resnet.optimize_for_inference()
    assert any(
        line.startswith("ReLU and sums in cuDNN's pass of the convolutions; with 2 images 2.00") for line in done
    )
    cudnn.clear()
    assert distance(resnet.encode_image(random_images("resnet")), expected) < 1e-5
    blocks = sum(resnet.vision_model.config.depths)
    assert (cudnn.count("relu"), cudnn.count("add")) == (2 * blocks, blocks)
    with pytest.raises(OptimizedModelError, match="gives no gradients"), torch.enable_grad():
        resnet.encode_image(random_images("resnet").requires_grad_())


@pytest.mark.parametrize("fault", ["wrong", "leaks what lay there", "no kernel"])
@torch.no_grad()
def test_operators_of_cudnn_are_checked(
    resnet: HfClipModel, gpu: FakeGpu, cudnn: list[str], fault: str, monkeypatch: pytest.MonkeyPatch
):
    right = torch.cudnn_convolution_relu

    def faulty(*args) -> Tensor:
        if fault == "no kernel":
            raise RuntimeError("Unable to find an engine to execute this computation")
        return right(*args) * (1.1 if fault == "wrong" else float("nan"))

    monkeypatch.setattr(torch, "cudnn_convolution_relu", faulty)
    if fault == "no kernel":
        monkeypatch.setattr(torch, "cudnn_convolution_add_relu", faulty)
    expected = resnet.encode_image(random_images("resnet"))
    done = resnet.optimize_for_inference()
    assert any(
        line.startswith("ReLU and sums") and line.endswith("cuDNN has no kernels for them here, or wrong ones")
        for line in done
    )
    assert distance(resnet.encode_image(random_images("resnet")), expected) < 1e-5


@torch.no_grad()
def test_layer_without_a_kernel_goes_on_step_by_step(monkeypatch: pytest.MonkeyPatch, cudnn: list[str]):
    layer = InferenceConv2d(torch.randn(4, 3, 3, 3), torch.randn(4), (1, 1), (1, 1), has_relu=True, is_fused=False)
    maps, sums = torch.randn(2, 3, 5, 5), torch.randn(2, 4, 5, 5)
    expected, added = layer(maps), layer.add_to(sums, maps)
    layer.__class__ = CudnnConv2d
    assert torch.equal(layer(maps), expected)
    assert distance(layer.add_to(sums, maps), added) < 1e-6

    def refuse(*_: object) -> Tensor:
        cudnn.append("refused")
        raise RuntimeError("no engine")

    for name in ("cudnn_convolution_relu", "cudnn_convolution_add_relu"):
        monkeypatch.setattr(torch, name, refuse)
    for _ in range(2):
        assert torch.equal(layer(maps), expected)
        assert torch.equal(layer.add_to(sums, maps), added)
    assert cudnn.count("refused") == 1


# --- times ----------------------------------------------------------------------------------------------------------


def test_times_are_the_gpus(gpu: FakeGpu):
    def work_of(seconds: float) -> Callable[[], None]:
        def work() -> None:
            gpu.clock += seconds

        return work

    switched: list[bool] = []
    assert gpu_times.seconds_of(work_of(0.25)) == pytest.approx(0.25)
    assert gpu_times.gain_of(work_of(0.3), work_of(0.1), switched.append, repeats=2) == pytest.approx(3)
    assert switched == [False, True] * 3
    assert gpu_times.batch_that_fills_the_gpu(lambda count: work_of(count * 1e-4)) == 64
    assert gpu_times.batch_that_fills_the_gpu(lambda count: work_of(count * 1e-9)) == 256

    def runs_out(count: int) -> Callable[[], None]:
        if count > 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return work_of(1e-9)

    assert gpu_times.batch_that_fills_the_gpu(runs_out) == 16


def test_share_of_launching(monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu):
    now = [0.0]
    monkeypatch.setattr(gpu_times.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: now.__setitem__(0, now[0] + 0.3))
    assert gpu_times.share_of_launching(lambda: now.__setitem__(0, now[0] + 0.1)) == pytest.approx(0.25)


def test_operators_of_cudnn_have_the_names_that_are_used():
    """A torch without them takes the public ones."""
    assert isinstance(gpu_layers.has_cudnn(), bool)
    for name in ("cudnn_convolution_relu", "cudnn_convolution_add_relu"):
        assert callable(getattr(torch, name))


def test_changes_that_memory_does_not_suffice_to_time_are_left():
    line = on_gpu._describe("a change", 0.0, 64, "images")
    assert line == f"a change: {on_gpu.LEFT}; there is not enough memory to time it with 64 images"
