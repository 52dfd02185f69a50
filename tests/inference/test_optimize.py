"""Linear maps by convolution, and optimized models: the same results, and refusals instead of wrong ones."""

import copy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoProcessor, pipeline

from conversion.parity import random_texts
from hf_clip import VARIANTS, HfClipConfig, HfClipModel
from hf_clip.inference import layers, optimize, parts, replace
from hf_clip.inference.layers import PackedMLP, SingleQueryAttentionPool, has_packed_operators
from hf_clip.inference.measure import Comparison
from hf_clip.inference.needed_positions import skips_padding
from hf_clip.model import linear_map
from hf_clip.model.attention import HfClipEncoderLayer, HfClipQuickGELU
from hf_clip.model.linear_map import apply_linear, apply_patch_embedding
from hf_clip.model.optimized import OptimizedModelError

from ..small import CONTEXT_LENGTH, random_images, texts

LARGER = [name for name in VARIANTS if name not in ("RN50", "ViT-B/32")]


def measure_as(gain: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every measurement say that the replacement is so many times as fast."""
    for measured in ("compare_packed", "compare_attention", "_compare_fused"):
        monkeypatch.setattr(replace, measured, lambda *_: Comparison(gain, 1.0))


def set_parts(monkeypatch: pytest.MonkeyPatch, positions: int, map_bytes: int = 2**22) -> None:
    """Let parts have so many positions, or so many bytes for the widest feature map, with the present threads."""
    for measured, size in (("measure_positions", positions), ("measure_map_bytes", map_bytes)):
        part = parts.PartSize(size // torch.get_num_threads(), "as the test wishes")
        monkeypatch.setattr(optimize, measured, lambda *_, part=part: part)


@pytest.fixture
def everything_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_as(2.0, monkeypatch)


@pytest.fixture
def number_of_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


needs_onednn = pytest.mark.skipif(not has_packed_operators(torch.float32), reason="this torch has no fused oneDNN")


def distance(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


# --- linear maps and activation -------------------------------------------------------------------------------------


@pytest.fixture
def by_convolution(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Take the way of AMD processors on any; returns the shapes of the convolutions that are computed."""
    shapes: list[tuple[int, ...]] = []
    convolve = functional.conv2d
    monkeypatch.setattr(linear_map, "multiplies_faster_by_convolution", lambda: True)
    monkeypatch.setattr(functional, "conv2d", lambda x, *rest: (shapes.append(tuple(x.shape)), convolve(x, *rest))[1])
    return shapes


@pytest.mark.parametrize("shape", [(4000, 64), (5, 800, 64), (2, 3, 700, 64)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("threads", [1, 2])
def test_linear_map_and_its_gradients(
    by_convolution: list, shape: tuple[int, ...], bias: bool, threads: int, number_of_threads: Callable[[int], None]
):
    number_of_threads(threads)
    torch.manual_seed(0)
    linear, plain = nn.Linear(64, 96, bias=bias), nn.Linear(64, 96, bias=bias)
    plain.load_state_dict(linear.state_dict())
    plain.double()
    rows = torch.randn(shape, requires_grad=True)
    exact = rows.detach().double().requires_grad_()
    output, expected = apply_linear(linear, rows), plain(exact)
    (output * output.detach().sin()).sum().backward()
    (expected * expected.detach().sin()).sum().backward()
    ((images, channels, cells, width),) = by_convolution
    assert (channels, images * cells, width) == (64, rows[..., 0].numel(), 1)
    assert images == 1 if threads > 1 else 16 <= images <= 32  # oneDNN takes no fewer from a single thread
    assert output.shape == expected.shape
    assert output.is_contiguous()
    assert distance(output, expected) < 1e-6
    assert distance(rows.grad, exact.grad) < 1e-5
    for found, wanted in zip(linear.parameters(), plain.parameters(), strict=True):
        assert distance(found.grad, wanted.grad) < 1e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(48, 48), (50, 70)], ids=["whole", "with a rest"])
def test_patches_and_their_gradients(size: tuple[int, int], layout: torch.memory_format):
    torch.manual_seed(0)
    patches, plain = (nn.Conv2d(3, 32, 16, stride=16, bias=False) for _ in range(2))
    plain.double()
    plain.load_state_dict(patches.state_dict())
    images = torch.randn(2, 3, *size).contiguous(memory_format=layout).requires_grad_()
    exact = images.detach().double().requires_grad_()
    found, expected = apply_patch_embedding(patches, images), plain(exact)
    assert found.shape == expected.shape
    (found * found.detach().sin()).sum().backward()
    (expected * expected.detach().sin()).sum().backward()
    pairs = ((found, expected), (images.grad, exact.grad), (patches.weight.grad, plain.weight.grad))
    assert all(distance(ours, theirs) < 1e-5 for ours, theirs in pairs)


@pytest.mark.parametrize(("rows", "count"), [(16 * 50, 16), (17 * 197, 17), (4 * 197, 0)])
def test_one_thread_hands_rows_over_as_many_images(by_convolution: list, rows: int, count: int):
    """torch gives a 1×1 convolution of few images to oneDNN only if there are several threads."""
    linear, input = nn.Linear(256, 512), torch.randn(rows, 256)
    expected = functional.linear(input, linear.weight, linear.bias)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = apply_linear(linear, input)
    finally:
        torch.set_num_threads(threads)
    assert distance(found, expected) < 1e-6
    assert by_convolution == ([(count, 256, rows // count, 1)] if count else [])


def test_rows_that_are_not_contiguous(by_convolution: list):
    linear, rows = nn.Linear(64, 96), torch.randn(64, 50, 80).transpose(0, 2)
    assert distance(apply_linear(linear, rows), functional.linear(rows, linear.weight, linear.bias)) < 1e-6
    assert len(by_convolution) == 1


@pytest.mark.parametrize(
    ("rows", "dtype"), [(10, torch.float32), (4000, torch.bfloat16), (4000, torch.float64)], ids=["few", "bf16", "f64"]
)
def test_small_and_other_products_stay_linear(by_convolution: list, rows: int, dtype: torch.dtype):
    linear = nn.Linear(64, 96).to(dtype)
    apply_linear(linear, torch.randn(rows, 64, dtype=dtype))
    assert by_convolution == []


def test_autocast_stays_linear(by_convolution: list):
    with torch.autocast("cpu", torch.bfloat16):
        assert apply_linear(nn.Linear(64, 96), torch.randn(4000, 64)).dtype == torch.bfloat16
    assert by_convolution == []


def test_weights_of_other_kinds_stay_linear(by_convolution: list):
    class Quantised(Tensor):
        pass

    linear = nn.Linear(64, 96)
    linear.weight = nn.Parameter(torch.randn(96, 64).as_subclass(Quantised))
    apply_linear(linear, torch.randn(4000, 64))
    assert by_convolution == []


def test_traced_compiled_and_exported_maps_are_linear(by_convolution: list):
    class Applied(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 96).requires_grad_(False)

        def forward(self, rows: Tensor) -> Tensor:
            return apply_linear(self.linear, rows)

    applied, rows = Applied(), torch.randn(4000, 64)
    expected = functional.linear(rows, applied.linear.weight, applied.linear.bias)
    assert "convolution" not in str(torch.jit.trace(applied, rows, check_trace=False).inlined_graph)
    assert "conv" not in str(torch.export.export(applied, (rows,)).graph)
    torch.compiler.reset()
    assert distance(torch.compile(applied, fullgraph=True, backend="eager")(rows), expected) < 1e-6
    assert by_convolution == []


@pytest.mark.parametrize(
    ("content", "expected"), [("vendor_id : AuthenticAMD", True), ("vendor_id : GenuineIntel", False)]
)
def test_choice_follows_the_processor(monkeypatch: pytest.MonkeyPatch, content: str, expected: bool):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    monkeypatch.setattr(Path, "read_text", lambda path: content)
    assert linear_map.multiplies_faster_by_convolution.__wrapped__() is expected
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert linear_map.multiplies_faster_by_convolution.__wrapped__() is False


def test_activation_and_its_gradient():
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64, requires_grad=True)
    expected = x * torch.sigmoid(1.702 * x)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    activation = HfClipQuickGELU()
    assert torch.allclose(activation(x), expected, rtol=1e-12, atol=1e-15)
    (found,) = torch.autograd.grad(activation(x).sum(), x)
    assert torch.allclose(found, slope, rtol=1e-12, atol=1e-15)
    with torch.no_grad():
        before = x.clone()
        assert torch.allclose(activation(x), expected, rtol=1e-12, atol=1e-15)
        assert torch.equal(x, before)  # hooks may hold it


# --- optimized models -----------------------------------------------------------------------------------------------


def outputs_of(model: HfClipModel, tower: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    images, ids = random_images(tower).to(dtype), texts()
    mask = (torch.arange(ids.shape[1])[None] < torch.tensor([[3], [7], [12], [CONTEXT_LENGTH]])).long()
    with torch.no_grad():
        whole = model(input_ids=ids, pixel_values=images, attention_mask=mask)
        return {
            "logits": whole.logits_per_image,
            "image": model.encode_image(images),
            "text": model.encode_text(ids),
            "masked text": model.encode_text(ids, mask),
            "cells": whole.vision_model_output.last_hidden_state,
            "tokens": whole.text_model_output.last_hidden_state,
        }


@pytest.mark.parametrize("rows_at_once", [1600, 40], ids=["whole", "parts"])
@pytest.mark.parametrize("has_operators", [True, False], ids=["fused", "public"])
def test_optimized_model_computes_the_same(
    model: HfClipModel,
    tower: str,
    monkeypatch: pytest.MonkeyPatch,
    rows_at_once: int,
    has_operators: bool,
    everything_pays: None,
):
    set_parts(monkeypatch, rows_at_once, rows_at_once * 128)
    if not has_operators:
        monkeypatch.setattr(optimize, "has_packed_operators", lambda dtype: False)
    expected = outputs_of(model, tower)
    done = model.optimize_for_inference()
    assert any("BatchNorm" in line for line in done) == (tower == "resnet")
    if has_operators and has_packed_operators(torch.float32):
        assert any("oneDNN's order" in line for line in done)
    for name, found in outputs_of(model, tower).items():
        assert distance(found, expected[name]) < 1e-5, name


@needs_onednn
def test_bfloat16_is_as_near_as_before(model: HfClipModel, tower: str, everything_pays: None):
    """Measured against float64: optimizing costs nothing beyond the type's own rounding."""
    exact = outputs_of(copy.deepcopy(model).double(), tower, torch.float64)
    half = model.to(torch.bfloat16)
    before = outputs_of(half, tower, torch.bfloat16)
    half.optimize_for_inference()
    for name, found in outputs_of(half, tower, torch.bfloat16).items():
        assert distance(found, exact[name]) < 1.5 * distance(before[name], exact[name]) + 1e-3, name


def test_fine_tuned_statistics_are_folded(model: HfClipModel, tower: str):
    if tower == "vit":
        pytest.skip("has no BatchNorm")
    generator = torch.Generator().manual_seed(0)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    expected = outputs_of(model, tower)["image"]
    model.optimize_for_inference()
    assert distance(outputs_of(model, tower)["image"], expected) < 1e-5
    assert isinstance(model.vision_model.attnpool, SingleQueryAttentionPool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_what_does_not_pay_is_left_out(
    model: HfClipModel, tower: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    model.to(dtype)
    expected = outputs_of(model, tower, dtype)
    monkeypatch.setattr(optimize, "has_packed_operators", lambda dtype: True)
    measure_as(1.04, monkeypatch)
    done = model.optimize_for_inference()
    assert all("1.04" in line for line in done if "left as before" in line)
    # Attention's linear maps, the MLPs, and a ViT's patches and attention, or a ResNet's blocks.
    left = [line for line in done if "left as before" in line]
    assert len(left) == (4 if tower == "vit" else 3)
    assert any("ReLU and sums left as before; in the convolutions' pass 1.04 times" in line for line in left) == (
        tower == "resnet"
    )
    assert any("attention left as before; as two matrix products 1.04 times" in line for line in left) == (
        tower == "vit"
    )
    for module in model.modules():
        assert not isinstance(module, (layers.PackedLinear, PackedMLP, layers.PackedPatches))
        assert not (isinstance(module, layers.InferenceConv2d) and module.is_fused)
    assert model.vision_model.config._attn_implementation == "sdpa"
    for name, found in outputs_of(model, tower, dtype).items():
        assert distance(found, expected[name]) < (1e-5 if dtype == torch.float32 else 5e-2), name


def test_model_that_gains_nothing_stays_as_it_was(repositories: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(optimize, "has_packed_operators", lambda dtype: False)
    monkeypatch.setattr(optimize, "suit_the_cache_", lambda model: [])
    monkeypatch.setattr(optimize, "_keep_freed_memory", lambda: False)
    model = AutoModel.from_pretrained(repositories["vit"]).eval()
    assert model.optimize_for_inference() == []
    assert all(parameter.requires_grad for parameter in model.train().parameters())
    model = AutoModel.from_pretrained(repositories["resnet"]).eval()
    model.vision_model.bn1.register_forward_hook(lambda *_: None)
    assert model.optimize_for_inference() == ["the ResNet left as before: bn1 is hooked or adapted"]
    assert all(parameter.requires_grad for parameter in model.train().parameters())


def test_interrupted_optimization_leaves_a_model_that_refuses_to_be_saved(
    model: HfClipModel, tower: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def interrupt(*_) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(optimize, "suit_the_cache_", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.optimize_for_inference()
    for refused, call in (
        ("saved", lambda: model.save_pretrained(tmp_path / "model")),
        ("saved", lambda: model.vision_model.save_pretrained(tmp_path / "model")),
        ("trained", model.train),
        ("optimized to the end", model.optimize_for_inference),
    ):
        with pytest.raises(OptimizedModelError, match=f"cannot be {refused} any more; load it again"):
            call()
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["RN50", "ViT-B/32", *(pytest.param(n, marks=pytest.mark.slow) for n in LARGER)])
@torch.no_grad()
def test_optimized_models_of_full_size_compute_the_same(name: str):
    """Relative to the output, at most 1e-5; as many images and texts as are taken in parts."""
    torch.manual_seed(0)
    model = HfClipModel(HfClipConfig.from_variant(name)).eval()
    size = model.config.vision_config.image_size
    images = torch.randn(3 if size > 300 else 40 if name == "ViT-B/32" else 20, 3, size, size)
    ids = random_texts((5, 20, 12, 77, 9, 31), 49408, 77)
    expected = model.encode_image(images), model.encode_text(ids)
    model.optimize_for_inference()
    for found, wanted in zip((model.encode_image(images), model.encode_text(ids)), expected, strict=True):
        assert distance(found, wanted) < 1e-5


def test_parts_grow_with_the_threads(
    repositories: dict[str, Path], monkeypatch: pytest.MonkeyPatch, number_of_threads: Callable[[int], None]
):
    """Also where the number of threads is changed after the model was optimized."""
    monkeypatch.setattr(optimize, "measure_positions", lambda *_: parts.PartSize(800, ""))
    model = AutoModel.from_pretrained(repositories["vit"]).eval()
    model.optimize_for_inference()
    sizes: list[int] = []
    model.vision_model.pre_layrnorm.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    images = random_images("vit", 330)
    for threads in (1, 2):
        number_of_threads(threads)
        sizes.clear()
        model.encode_image(images)
        assert sum(sizes) == 330
        assert len(sizes) == -(-330 // (threads * 80))  # of ten positions


def test_model_loaded_in_half_precision_is_optimized(repository: Path, tower: str, everything_pays: None):
    """`from_pretrained(dtype=...)` leaves BatchNorm in float32, where `.to(...)` does not."""
    exact = AutoModel.from_pretrained(repository).eval().double()
    half = AutoModel.from_pretrained(repository, dtype=torch.bfloat16).eval()
    images, ids = random_images(tower), texts()
    with torch.no_grad():
        wanted = exact.encode_image(images.double()), exact.encode_text(ids)
        before = half.encode_image(images.bfloat16()), half.encode_text(ids)
        half.optimize_for_inference()
        found = half.encode_image(images.bfloat16()), half.encode_text(ids)
    for ours, theirs, right in zip(found, before, wanted, strict=True):
        assert ours.dtype == torch.bfloat16
        assert distance(ours, right) < 1.5 * distance(theirs, right) + 1e-3


def test_operators_that_compute_something_else_are_not_used(monkeypatch: pytest.MonkeyPatch):
    class Wrong:  # an operator that leaves out the activation, as another version might
        _reorder_linear_weight = staticmethod(lambda weight, rows: weight)
        _linear_pointwise = staticmethod(lambda input, weight, bias, *rest: functional.linear(input, weight, bias))

    monkeypatch.setattr(torch.ops, "mkldnn", Wrong())
    assert not has_packed_operators.__wrapped__(torch.float32)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not has_packed_operators.__wrapped__(torch.float32)
    assert not has_packed_operators.__wrapped__(torch.float16)


@needs_onednn
def test_adapters_and_hooked_layers_stay(repositories: dict[str, Path], everything_pays: None):
    model = AutoModel.from_pretrained(repositories["vit"]).eval()
    first, second = model.vision_model.encoder.layers[0], model.vision_model.encoder.layers[1]
    seen: list[Tensor] = []
    first.self_attn.q_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    first.mlp.activation_fn.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model.text_model.encoder.layers[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output))
    second.mlp.fc1 = nn.Sequential(second.mlp.fc1)  # what stands for an adapter
    expected = outputs_of(model, "vit")
    per_call, _ = len(seen), model.optimize_for_inference()
    seen.clear()
    for name, found in outputs_of(model, "vit").items():
        assert distance(found, expected[name]) < 1e-5
    assert len(seen) == per_call
    assert isinstance(second.mlp.fc1, nn.Sequential)


@pytest.mark.parametrize("hooked", [None, "", "encoder", "encoder.layers.2", "encoder.layers.2.self_attn"])
def test_last_layer_of_image_features_is_computed_for_the_class_token(
    repositories: dict[str, Path], monkeypatch: pytest.MonkeyPatch, hooked: str | None
):
    model = AutoModel.from_pretrained(repositories["vit"]).eval()
    set_parts(monkeypatch, 20)  # two images of ten positions
    seen: list[str] = []
    if hooked is not None:
        model.vision_model.get_submodule(hooked).register_forward_hook(lambda *_: seen.append("hook"))
    images = random_images("vit", 5)
    narrow = images[..., :32, :40]  # 2 × 2 patches of 16
    expected = model.encode_image(images)
    expected_of_narrow = model.encode_image(narrow, interpolate_pos_encoding=True)
    seen.clear()
    rows: list[int] = []
    last = model.vision_model.encoder.layers[-1]
    last.layer_norm2.register_forward_pre_hook(lambda _, given: rows.append(given[0][..., 0].numel()))
    done = model.optimize_for_inference()
    with torch.no_grad():
        found = model.encode_image(images)
        assert distance(found, expected) < 1e-5
        assert any("class token alone" in line for line in done)
        assert rows == ([2, 2, 1] if hooked is None else [20, 20, 10])
        assert bool(seen) == (hooked is not None)
        with pytest.raises(ValueError, match="fits only 48x48"):
            model.encode_image(images[..., :32, :32])
        assert distance(model.encode_image(narrow, interpolate_pos_encoding=True), expected_of_narrow) < 1e-5
        if hooked is None:  # later, somebody listens
            model.vision_model.encoder.layers[-1].register_forward_hook(lambda *_: seen.append("hook"))
            assert distance(model.encode_image(images), expected) < 1e-5
            assert seen == ["hook"] * 3


@needs_onednn
@pytest.mark.parametrize("hooked", [None, "self_attn", "self_attn.out_proj", "mlp", "mlp.fc2"])
def test_packed_layers_call_hooks_that_are_added_later(
    repositories: dict[str, Path], everything_pays: None, hooked: str | None
):
    model = AutoModel.from_pretrained(repositories["vit"]).eval()
    expected = outputs_of(model, "vit")
    model.optimize_for_inference()
    for tower in (model.vision_model, model.text_model):
        kinds = [type(layer) for layer in tower.encoder.layers]
        # The last layer's maps stay apart, since its queries are needed at one position.
        assert kinds == [layers.PackedEncoderLayer, layers.PackedEncoderLayer, HfClipEncoderLayer]
        assert isinstance(tower.encoder.layers[2].self_attn.q_proj, layers.PackedLinear)
    seen: list[Tensor] = []
    if hooked is not None:
        part = model.text_model.encoder.layers[0].get_submodule(hooked)
        part.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for name, found in outputs_of(model, "vit").items():
        assert distance(found, expected[name]) < 1e-5, name
    assert len(seen) == (0 if hooked is None else 3)  # texts with and without mask, and both towers together


@pytest.mark.parametrize("hooked", [None, "", "encoder", "encoder.layers.2", "encoder.layers.2.self_attn"])
def test_last_layer_of_text_features_is_computed_at_the_ends(
    repositories: dict[str, Path], monkeypatch: pytest.MonkeyPatch, hooked: str | None
):
    model = AutoModel.from_pretrained(repositories["vit"]).eval()
    set_parts(monkeypatch, 40)
    seen: list[str] = []
    if hooked is not None:
        model.text_model.get_submodule(hooked).register_forward_hook(lambda *_: seen.append("hook"))
    ids = texts((12, 3, CONTEXT_LENGTH, 7, 3))
    expected, alone = model.encode_text(ids), model.encode_text(ids[3:4])
    rows: list[int] = []
    last = model.text_model.encoder.layers[-1]
    last.layer_norm2.register_forward_pre_hook(lambda _, given: rows.append(given[0][..., 0].numel()))
    done = model.optimize_for_inference()
    seen.clear()
    with torch.no_grad():
        assert distance(model.encode_text(ids), expected) < 1e-5
        assert (sum(rows) == len(ids)) == (hooked is None)
        rows.clear()
        assert distance(model.encode_text(ids[3:4]), alone) < 1e-5
        assert rows == [1 if hooked is None else 7]
    assert any("at the ends of texts alone" in line for line in done)
    assert bool(seen) == (hooked is not None)


@pytest.mark.parametrize("hooked", [None, "0", "1.mlp.fc1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@needs_onednn
def test_texts_that_differ_in_length_are_computed_without_padding(
    repositories: dict[str, Path],
    everything_pays: None,
    monkeypatch: pytest.MonkeyPatch,
    hooked: str | None,
    dtype: torch.dtype,
):
    model = AutoModel.from_pretrained(repositories["vit"], dtype=dtype).eval()
    lengths = (12, 3, CONTEXT_LENGTH, 7, 3)
    ids = texts(lengths)
    with torch.no_grad():
        expected = model.encode_text(ids)
    model.optimize_for_inference()
    rows, seen, compute = [], [], layers.PackedLinear.forward

    def counted(self: Any, input: Tensor) -> Tensor:
        rows.append(input[..., 0].numel())
        return compute(self, input)

    monkeypatch.setattr(layers.PackedLinear, "forward", counted)
    if hooked is not None:
        part = model.text_model.encoder.layers.get_submodule(hooked)
        part.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[:2]))
    assert skips_padding(model) == (hooked is None)
    with torch.no_grad():
        assert distance(model.encode_text(ids), expected) < (1e-5 if dtype == torch.float32 else 3e-2)
        assert rows.count(sum(lengths)) == (0 if hooked else 4)  # q, k, v and the MLP of all layers but the last
        assert seen == ([(len(lengths), CONTEXT_LENGTH)] if hooked else [])
        rows.clear()
        model.encode_text(ids[[0, 0, 0, 0]])
        assert 4 * lengths[0] in rows


@pytest.mark.parametrize("change", ["adapter", "hook on a block", "hook on the stem"])
def test_changed_resnets_stay(repositories: dict[str, Path], everything_pays: None, change: str):
    model = AutoModel.from_pretrained(repositories["resnet"]).eval()
    tower, seen = model.vision_model, []
    if change == "adapter":
        tower.layer3[0].conv2 = nn.Sequential(tower.layer3[0].conv2)
        tower.layer3[0].conv2[0].register_forward_hook(lambda *_: seen.append(1))
    else:
        part = tower.layer4[-1] if "block" in change else tower.bn2
        part.register_forward_hook(lambda *_: seen.append(1))
    expected = outputs_of(model, "resnet")
    seen.clear()
    done = model.optimize_for_inference()
    name = {"adapter": "layer3.0.conv2.0", "hook on a block": "layer4.0", "hook on the stem": "bn2"}[change]
    assert any(f"the ResNet left as before: {name} is hooked or adapted" in line for line in done)
    for name, found in outputs_of(model, "resnet").items():
        assert distance(found, expected[name]) < 1e-5
    assert seen


def test_towers_alone_can_be_optimized(repository: Path, tower: str):
    from hf_clip import HfClipTextModelWithProjection, HfClipVisionModelWithProjection

    whole = AutoModel.from_pretrained(repository).eval()
    vision = HfClipVisionModelWithProjection.from_pretrained(repository).eval()
    text = HfClipTextModelWithProjection.from_pretrained(repository).eval()
    vision.optimize_for_inference()
    text.optimize_for_inference()
    with torch.no_grad():
        assert distance(vision(random_images(tower)).image_embeds, whole.encode_image(random_images(tower))) < 1e-5
        assert distance(text(texts()).text_embeds, whole.encode_text(texts())) < 1e-5


def test_outputs_of_all_layers_are_those_of_the_whole_batch(
    model: HfClipModel, tower: str, monkeypatch: pytest.MonkeyPatch
):
    set_parts(monkeypatch, 20, 20)
    expected = model.vision_model(random_images(tower), output_hidden_states=True).hidden_states
    expected_text = model.text_model(texts(), output_hidden_states=True).hidden_states
    model.optimize_for_inference()
    with torch.no_grad():
        found = model.vision_model(random_images(tower), output_hidden_states=True).hidden_states
        found_text = model.text_model(texts(), output_hidden_states=True).hidden_states
        as_tuple = model.vision_model(random_images(tower), return_dict=False)
    assert len(found) == len(expected)
    for ours, theirs in [*zip(found, expected, strict=True), *zip(found_text, expected_text, strict=True)]:
        assert distance(ours, theirs) < 1e-5
        assert isinstance(as_tuple, tuple)
        assert model.vision_model(random_images(tower), return_dict=None).pooler_output is not None
        assert model.text_model(texts(), torch.ones_like(texts())).pooler_output is not None  # by place


def test_stages_of_a_resnet_take_as_many_images_as_suit_the_cache(
    repositories: dict[str, Path], monkeypatch: pytest.MonkeyPatch, everything_pays: None
):
    monkeypatch.setattr(optimize, "has_packed_operators", lambda dtype: False)
    model = AutoModel.from_pretrained(repositories["resnet"]).eval().vision_model
    images = random_images("resnet", 7)
    expected = model(images).pooler_output
    widest = 4 * model.config.stem_width * (model.config.image_size // 4) ** 2 * 4
    set_parts(monkeypatch, 20, widest)  # 1, 2, 4 and 8 images
    model.optimize_for_inference()
    taken: dict[str, list[int]] = {name: [] for name in parts.STAGES}
    for name, counts in taken.items():
        model.get_submodule(name).register_forward_pre_hook(lambda _, given, c=counts: c.append(len(given[0])))
    with torch.no_grad():
        found = model(images)
        assert taken == {"layer1": [1] * 7, "layer2": [2, 2, 2, 1], "layer3": [4, 3], "layer4": [7]}
        assert distance(found.pooler_output, expected) < 1e-5
        assert found.last_hidden_state.shape == (7, model.config.hidden_size, 3, 3)
        with pytest.raises(ValueError, match="fits only 96x96"):
            model(images[..., :64, :64])
        assert model(images[..., :64, :64], interpolate_pos_encoding=True).last_hidden_state.shape[-2:] == (2, 2)


def test_ways_of_subclasses_and_patches_are_kept(repositories: dict[str, Path]):
    class Normalising(HfClipModel):
        def encode_image(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
            return functional.normalize(super().encode_image(pixel_values, interpolate_pos_encoding), dim=-1)

    for tower in ("vit", "resnet"):
        own, patched = (kind.from_pretrained(repositories[tower]).eval() for kind in (Normalising, HfClipModel))
        forward = patched.vision_model.forward
        calls: list[int] = []
        patched.vision_model.forward = lambda *args, f=forward, c=calls, **kwargs: (c.append(1), f(*args, **kwargs))[1]
        for model in (own, patched):
            expected = model.encode_image(random_images(tower))
            model.optimize_for_inference()
            calls.clear()
            with torch.no_grad():
                assert distance(model.encode_image(random_images(tower)), expected) < 1e-5
        assert calls


def test_hooks_of_transformers_are_no_reason_to_leave_layers(repository: Path, tower: str, everything_pays: None):
    fresh, asked = (AutoModel.from_pretrained(repository).eval() for _ in range(2))
    asked.vision_model(random_images(tower), output_hidden_states=True, output_attentions=True)
    reports = [model.optimize_for_inference() for model in (asked, fresh)]
    of_asked, of_fresh = ([line for line in report if "pages" not in line] for report in reports)
    assert of_asked == of_fresh


def test_smallest_resnet_is_measured():
    """Its last stage is one block, which halves the map, and leaves one cell."""
    vision = {"image_size": 32, "depths": [1, 1, 1, 1], "stem_width": 16, "hidden_size": 512, "num_attention_heads": 8}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = HfClipConfig(text_config=text, vision_config={"model_type": "hf_clip_resnet"} | vision, projection_dim=64)
    model = HfClipModel(model).eval()
    images = torch.randn(3, 3, 32, 32)
    expected = model.encode_image(images)
    model.optimize_for_inference()
    with torch.no_grad():
        assert distance(model.encode_image(images), expected) < 1e-5


@needs_onednn
def test_convolutions_hold_their_weights_for_few_sizes():
    torch.manual_seed(0)
    convolution = nn.Conv2d(16, 24, 3, padding=1, bias=False)
    fused = layers.InferenceConv2d(convolution.weight.detach(), torch.zeros(24), (1, 1), (1, 1), False, True)
    with torch.no_grad():
        for shape in ((1, 16, 7, 7), (5, 16, 7, 7), (1, 16, 7, 7), (2, 16, 9, 9), (5, 16, 7, 7)):
            maps = torch.randn(shape).contiguous(memory_format=torch.channels_last)
            assert distance(fused(maps), convolution(maps)) < 1e-5
    assert len(fused.packed) == layers.SIZES_PACKED


FETCHED_PAGES = """
import ctypes, resource, sys, torch
from hf_clip.inference.optimize import _keep_freed_memory
getattr(ctypes.CDLL(None), "prctl", print)(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: all pages are small
getattr(ctypes.CDLL(None), "mallopt", print)(-3, 1 << 20)  # blocks above 1 MiB are given back at once
if sys.argv[1] == "kept" and not _keep_freed_memory():
    sys.exit("no glibc")
def layers():
    blocks = [torch.ones(5 << 20) for _ in range(2)]  # 20 MiB each
for turn in range(9):
    if turn == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    layers()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
def test_freed_memory_is_kept_for_the_next_layer():
    def count(wish: str) -> int:
        ended = subprocess.run([sys.executable, "-c", FETCHED_PAGES, wish], capture_output=True, text=True)
        if "no glibc" in ended.stderr:
            pytest.skip("another C library")
        assert ended.returncode == 0, ended.stderr
        return int(ended.stdout)

    assert count("kept") < 500 < count("as before")  # 10,240 pages of 4 KiB a turn


def test_attention_weights_of_an_optimized_pool(repositories: dict[str, Path]):
    model = AutoModel.from_pretrained(repositories["resnet"], attn_implementation="eager").eval()
    expected = model.vision_model(random_images("resnet"), output_attentions=True).attentions
    model.optimize_for_inference()
    with torch.no_grad():
        found = model.vision_model(random_images("resnet"), output_attentions=True).attentions
    assert distance(found[0], expected[0]) < 1e-5


def test_padding_on_the_left_is_masked(model: HfClipModel):
    ids = texts((4, 9))
    padded = torch.cat([torch.zeros(2, 3, dtype=ids.dtype), ids], dim=1)[:, :12]
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    with torch.no_grad():
        expected = model.encode_text(padded, mask)
        model.optimize_for_inference()
        assert distance(model.encode_text(padded, mask), expected) < 1e-5


def test_texts_longer_than_the_position_table_are_refused_as_before(model: HfClipModel):
    ids = functional.pad(texts((3, 7)), (0, 5))
    with pytest.raises(ValueError, match="25 tokens per text, but this model's position table has 20") as plain:
        model.encode_text(ids)
    model.optimize_for_inference()
    with pytest.raises(ValueError, match="25 tokens per text") as optimized:
        model.encode_text(ids)
    assert str(optimized.value) == str(plain.value)


def test_mask_that_hides_a_texts_end_is_heeded(model: HfClipModel):
    """As `ids != pad_token_id` does where padding is the end of text."""
    ids = texts()
    mask = (ids != int(ids.max())).long()
    with torch.no_grad():
        expected, whole = model.encode_text(ids, mask), model.encode_text(ids)
        assert distance(whole, expected) > 1e-3
        model.optimize_for_inference()
        assert distance(model.encode_text(ids, mask), expected) < 1e-5


def test_autocast_and_compile_do_not_reach_an_optimized_model(model: HfClipModel, tower: str, everything_pays: None):
    expected = outputs_of(model, tower)
    model.optimize_for_inference()
    with torch.autocast("cpu", torch.bfloat16):
        for name, found in outputs_of(model, tower).items():
            assert distance(found, expected[name]) < 3e-2, name
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        found = compiled(input_ids=texts(), pixel_values=random_images(tower)).image_embeds
    assert distance(found, model(input_ids=texts(), pixel_values=random_images(tower)).image_embeds) < 1e-5


def test_model_with_an_optimized_tower_refuses_the_same(repository: Path, tower: str, tmp_path: Path):
    model = AutoModel.from_pretrained(repository).eval()
    state = model.state_dict()
    model.vision_model.optimize_for_inference()
    calls = {
        "optimized as a whole": model.optimize_for_inference,
        "given other weights": lambda: model.load_state_dict(state, strict=False),
        "saved": lambda: model.save_pretrained(tmp_path / "saved"),
        "trained": model.train,
        "moved": lambda: model.to(torch.bfloat16),
    }
    for words, call in calls.items():
        with pytest.raises(OptimizedModelError, match=f"cannot be {words}"):
            call()
    around = nn.ModuleDict({"model": model})
    with pytest.raises(OptimizedModelError, match="cannot be given other weights"):
        around.load_state_dict({f"model.{name}": tensor for name, tensor in state.items()}, strict=False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.text_model.training
    assert not (tmp_path / "saved").exists()


def test_model_on_several_devices_is_refused(repository: Path):
    model = AutoModel.from_pretrained(repository).eval()
    model.text_model.to("meta")
    with pytest.raises(OptimizedModelError, match="spread over cpu, meta, and only one that is whole on one device"):
        model.optimize_for_inference()


def test_other_models_of_the_same_configuration_are_left_alone(repositories: dict[str, Path], everything_pays: None):
    config = HfClipConfig.from_pretrained(repositories["vit"])
    other, optimized = HfClipModel(config).eval(), HfClipModel(config).to(torch.bfloat16).eval()
    optimized.optimize_for_inference()
    assert optimized.vision_model.config._attn_implementation == layers.PRODUCT_ATTENTION
    assert other.vision_model.config._attn_implementation == "sdpa"


def test_what_an_optimized_model_refuses(model: HfClipModel, tower: str, tmp_path: Path):
    with pytest.raises(OptimizedModelError, match="in training; call .eval"):
        model.train().optimize_for_inference()
    model.eval()
    done = model.optimize_for_inference()
    assert model.optimize_for_inference() == done == model.optimizations
    again = "load it again with from_pretrained and do that before optimize_for_inference"
    with pytest.raises(OptimizedModelError, match=f"cannot be saved any more; {again}"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    with pytest.raises(OptimizedModelError, match="cannot be saved"):
        model.vision_model.state_dict()
    with pytest.raises(OptimizedModelError, match="given other weights"):
        model.load_state_dict({})
    with pytest.raises(OptimizedModelError, match=f"cannot be trained any more; {again}"):
        model.train()
    with pytest.raises(OptimizedModelError, match=r"moved from torch.float32 on cpu to torch.bfloat16 on cpu"):
        model.to(torch.bfloat16)
    with pytest.raises(OptimizedModelError, match="moved"):
        model.to("meta")
    with pytest.raises(OptimizedModelError, match=f"cannot be copied or pickled any more; {again}"):
        copy.deepcopy(model)
    assert model.to("cpu") is model.float().eval()


@needs_onednn
@torch.no_grad()
@needs_onednn
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_are_not_finite_where_images_are_not(
    repositories: dict[str, Path], everything_pays: None, dtype: torch.dtype
):
    """oneDNN's ReLU makes 0 of NaN, so that a damaged image would get an ordinary feature."""
    model = HfClipModel.from_pretrained(repositories["resnet"], dtype=dtype).eval()
    model.optimize_for_inference()
    images = random_images("resnet", 3).to(dtype)
    images[1, 0, 5, 5] = torch.nan
    with torch.no_grad():
        for features in (
            model.encode_image(images),
            model.vision_model(images).pooler_output,
            model.vision_model(images, return_dict=False)[1],
            model.vision_model(images, output_hidden_states=True).pooler_output,
        ):
            assert features.isfinite().all(dim=1).tolist() == [True, False, True]
            assert features[1].isnan().all()


def test_empty_batch_of_an_optimized_model(model: HfClipModel, tower: str, everything_pays: None):
    model.optimize_for_inference()
    images, ids = random_images(tower, 0), texts()[:0]
    assert model.encode_image(images).shape == model.encode_text(ids).shape == (0, 48)
    assert model.get_image_features(images).pooler_output.shape == model.get_text_features(ids).pooler_output.shape
    assert model(input_ids=texts(), pixel_values=images).logits_per_image.shape == (0, 4)


def test_threads_that_optimize_one_model_at_once(model: HfClipModel, tower: str, everything_pays: None):
    """One does it, and the others find it done; the result is one optimization, not several on top of one another."""
    expected, together = outputs_of(model, tower), threading.Barrier(8)

    def optimize(_: int) -> list[str]:
        together.wait()
        return model.optimize_for_inference()

    with ThreadPoolExecutor(8) as pool:
        reports = list(pool.map(optimize, range(8)))
    assert all(report == model.optimizations for report in reports)
    for name, found in outputs_of(model, tower).items():
        assert distance(found, expected[name]) < 1e-5, name


def test_gradients_through_an_optimized_model_are_refused(model: HfClipModel, tower: str, everything_pays: None):
    model.optimize_for_inference()
    with pytest.raises(OptimizedModelError, match="gives no gradients"):
        model.encode_image(random_images(tower).requires_grad_())
    with pytest.raises(Exception, match="neither compiled nor exported"):
        torch.export.export(model.vision_model, (random_images(tower),))


def test_optimized_model_in_the_pipeline(repository: Path, tower: str, photographs: dict[str, Image.Image]):
    labels = ["a cat", "a dog", "a big red rocket"]
    images = [photographs["chelsea"], photographs["rocket"]]
    expected = pipeline("zero-shot-image-classification", model=str(repository))(images, candidate_labels=labels)
    model, processor = AutoModel.from_pretrained(repository).eval(), AutoProcessor.from_pretrained(repository)
    model.optimize_for_inference()
    parts = {"model": model, "tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    found = pipeline("zero-shot-image-classification", **parts)(images, candidate_labels=labels)
    for ours, theirs in zip(found, expected, strict=True):
        assert {e["label"]: e["score"] for e in ours} == pytest.approx(
            {e["label"]: e["score"] for e in theirs}, rel=1e-4
        )


def test_feature_maps_have_channels_last_unless_a_batch_s_statistics_are_taken(repositories: dict[str, Path]):
    model = AutoModel.from_pretrained(repositories["resnet"])
    for is_training in (False, True):
        cells = model.train(is_training).vision_model(random_images("resnet")).last_hidden_state
        assert cells.is_contiguous(memory_format=torch.channels_last) is not is_training
