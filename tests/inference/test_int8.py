"""Models whose products are computed in 8-bit integers: the same sums as in plain integers, near features, refusals."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel

from hf_clip import HfClipModel, HfClipTextModel, HfClipViTModel
from hf_clip.inference import int8, int8_layers
from hf_clip.inference.int8_layers import (
    Int8Attention,
    Int8Conv2d,
    Int8Linear,
    Int8MLP,
    Int8Stage,
    has_int8_operators,
    quantize_activated,
    quantize_map,
    quantize_rows,
)
from hf_clip.model.attention import HfClipMLP
from hf_clip.model.optimized import OptimizedModelError

from ..small import random_images, texts

DTYPES = [torch.float32, torch.bfloat16]

pytestmark = pytest.mark.skipif(not has_int8_operators(torch.float32), reason="this torch has no products of integers")


def distance(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def in_integers(rows: Tensor, weight: Tensor) -> Tensor:
    """Both scaled to −127 … 127 by row, rounded, multiplied exactly, and scaled back, in float64."""
    p, r = (matrix.double() for matrix in (rows, weight))
    s, t = (matrix.abs().amax(1, keepdim=True) / 127 for matrix in (p, r))
    return ((p / s).round() @ (r / t).round().T) * s * t.T


# --- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize("count", [1, 7, 300])
def test_linear_map_is_the_product_of_integers(count: int, dtype: torch.dtype):
    torch.manual_seed(0)
    first, second = nn.Linear(96, 64).to(dtype), nn.Linear(96, 32, bias=False).to(dtype)
    rows = (torch.randn(count, 96) * torch.logspace(-3, 3, count)[:, None]).to(dtype)
    found = Int8Linear.replace(first, second)(rows.view(1, count, 96))
    expected = torch.cat([in_integers(rows, first.weight) + first.bias.double(), in_integers(rows, second.weight)], 1)
    assert found.shape == (1, count, 96)
    assert found.dtype == dtype
    for one, right in zip(found[0], expected, strict=True):  # each row, however small
        assert distance(one, right) < (2e-3 if dtype == torch.float32 else 2e-2)
    assert distance(found[0], expected) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_each_row_has_its_own_scale_and_none_is_cut():
    rows = torch.tensor([[1.0, -2.0, 0.5], [1e-3, 2e-3, -3e-3], [0.0, 0.0, 0.0], [-1e4, 1.0, 0.0]])
    integers, scales = quantize_rows(rows)
    assert integers.dtype == torch.uint8
    assert (integers.int() - 128).tolist() == [[64, -127, 32], [42, 85, -127], [0, 0, 0], [-127, 0, 0]]
    assert torch.allclose(scales[:, 0], torch.tensor([2 / 127, 3e-3 / 127, 1e-12 / 127, 1e4 / 127]))
    assert torch.equal(rows[0], torch.tensor([1.0, -2.0, 0.5]))
    assert Int8Linear.replace(nn.Linear(3, 4))(rows[:0]).shape == (0, 4)


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_activations_stay_above_their_bounds(hidden_act: str):
    activation, slope, bound = int8_layers.ACTIVATIONS[hidden_act]
    x = torch.linspace(-20, 20, 100_001)
    exact = functional.gelu(x) if hidden_act == "gelu" else x * torch.sigmoid(1.702 * x)
    found = activation(x * slope)
    assert distance(found / slope, exact) < 1e-6
    assert -bound <= found.min() < -0.99 * bound
    rows = torch.stack([found[:1000], found[-1000:], found[49_000:50_000]])
    integers, scales = quantize_activated(rows.clone(), bound)
    assert ((integers.int() - 128) * scales - rows).abs().le(0.501 * scales).all()


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_mlp(model: HfClipModel, hidden_act: str):
    config = model.config.text_config
    config.hidden_act = hidden_act
    mlp, rows = HfClipMLP(config), torch.randn(2, 50, config.hidden_size)
    with torch.no_grad():
        expected = mlp(rows)
        assert distance(Int8MLP(mlp, hidden_act)(rows), expected) < 0.03


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@pytest.mark.parametrize("size", [1, 3])
def test_convolution_is_that_of_integers(size: int, dtype: torch.dtype):
    torch.manual_seed(0)
    weight, bias = torch.randn(24, 16, size, size), torch.randn(24)
    maps = torch.rand(3, 16, 9, 7) * torch.tensor([1.0, 50.0, 0.01])[:, None, None, None]
    maps = maps.to(dtype).contiguous(memory_format=torch.channels_last)
    found = Int8Conv2d(weight, bias, (1, 1), (size // 2,) * 2, True, dtype)(maps)
    s, t = maps.double().amax((1, 2, 3), keepdim=True) / 255, weight.double().abs().amax((1, 2, 3)) / 127
    r = (weight.double() / t[:, None, None, None]).round() * t[:, None, None, None]
    sums = functional.conv2d((maps.double() / s).round(), r, padding=size // 2) * s
    expected = (sums + bias.double()[:, None, None]).relu()
    for one, right in zip(found, expected, strict=True):
        assert distance(one, right) < (1e-5 if dtype == torch.float32 else 1e-2)
    alone = Int8Conv2d(weight, bias, (1, 1), (size // 2,) * 2, True, dtype)(maps[1:2])
    assert torch.equal(alone, found[1:2])


def test_map_without_activations():
    integers, scale = quantize_map(torch.zeros(1, 4, 3, 3))
    assert integers.sum() == 0
    assert scale > 0


def test_operators_that_saturate_or_are_missing_are_not_used(monkeypatch: pytest.MonkeyPatch):
    right = torch.ops.onednn

    class Saturating:  # as on processors that add products in 16 bits
        qlinear_prepack, qconv_prepack, qconv_pointwise = (
            right.qlinear_prepack,
            right.qconv_prepack,
            right.qconv_pointwise,
        )

        class qlinear_pointwise:  # noqa: N801
            binary = right.qlinear_pointwise.binary

            def __new__(cls, *args):
                return right.qlinear_pointwise(*args).clamp(-32768, 32767)

    monkeypatch.setattr(torch.ops, "onednn", Saturating)
    assert not has_int8_operators.__wrapped__(torch.float32)
    monkeypatch.setattr(torch.ops, "onednn", object())
    assert not has_int8_operators.__wrapped__(torch.bfloat16)
    assert not has_int8_operators.__wrapped__(torch.float16)


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=["f32", "bf16"])
@torch.no_grad()
def test_features_are_near_and_do_not_depend_on_the_batch(model: HfClipModel, tower: str, dtype: torch.dtype):
    images, ids = random_images(tower), texts()
    expected = model.encode_image(images), model.encode_text(ids)
    model.to(dtype)
    done = model.optimize_for_inference(precision="int8")
    assert "computed in int8" in done[0]
    assert ("convolutions" in done[0]) == (tower == "resnet")
    assert model.optimize_for_inference(precision="int8") == model.optimize_for_inference() == done
    found = model.encode_image(images.to(dtype)), model.encode_text(ids)
    whole = model(input_ids=ids, pixel_values=images.to(dtype))
    ends = (whole.image_embeds, whole.text_embeds)
    for ours, right, normed in zip(found, expected, ends, strict=True):
        assert ours.dtype == dtype
        assert functional.cosine_similarity(ours.float(), right).min() > 0.999
        assert functional.cosine_similarity(normed.float(), right).min() > 0.999
    alone = model.encode_image(images[:1].to(dtype)), model.encode_text(ids[:1])
    for ours, one in zip(found, alone, strict=True):
        assert distance(one, ours[:1]) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert model.encode_image(images[:0].to(dtype)).shape == (0, expected[0].shape[1])


@torch.no_grad()
def test_features_are_not_finite_where_images_are_not(model: HfClipModel, tower: str):
    images = random_images(tower)
    images[1, 0, 5, 5], images[2] = float("nan"), float("inf")
    model.optimize_for_inference(precision="int8")
    assert model.encode_image(images).isfinite().all(1).tolist() == [True, False, False, True]


def test_every_product_of_the_towers_is_replaced_and_its_weight_freed(model: HfClipModel, tower: str):
    before = sum(parameter.numel() for parameter in model.parameters())
    model.optimize_for_inference(precision="int8")
    linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    pool = [f"vision_model.attnpool.{name}_proj" for name in "qkv"] if tower == "resnet" else []
    assert sorted(linears) == sorted([*pool, "visual_projection", "text_projection"])
    assert not [name for name, module in model.named_modules() if type(module) is nn.Conv2d]
    kinds = {type(module) for module in model.modules()}
    assert {Int8Attention, Int8MLP} <= kinds
    assert (Int8Stage in kinds) == (tower == "resnet")
    kept = sum(parameter.numel() for parameter in model.parameters())
    assert kept < 0.45 * before


@torch.no_grad()
def test_hidden_states_and_attentions(model: HfClipModel, tower: str):
    images = random_images(tower)
    model.set_attn_implementation("eager")
    expected = model.vision_model(images, output_hidden_states=True, output_attentions=True)
    model.optimize_for_inference(precision="int8")
    found = model.vision_model(images, output_hidden_states=True, output_attentions=True)
    for ours, right in zip(
        (*found.hidden_states, *found.attentions), (*expected.hidden_states, *expected.attentions), strict=True
    ):
        assert distance(ours, right) < 0.05


@torch.no_grad()
def test_towers_alone(repositories: dict[str, Path]):
    for kind, input in ((HfClipViTModel, random_images("vit")), (HfClipTextModel, texts())):
        tower = kind.from_pretrained(repositories["vit"]).eval()
        expected = tower(input).pooler_output
        tower.optimize_for_inference(precision="int8")
        assert functional.cosine_similarity(tower(input).pooler_output, expected).min() > 0.999


@torch.no_grad()
def test_layers_with_hooks_and_adapters_stay(repositories: dict[str, Path]):
    model = AutoModel.from_pretrained(repositories["vit"]).eval()
    first, second = model.text_model.encoder.layers[:2]
    seen: list[Tensor] = []
    first.self_attn.q_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    first.mlp.register_forward_hook(lambda module, inputs, output: seen.append(output))
    second.mlp.fc1 = nn.Sequential(second.mlp.fc1)  # what stands for an adapter
    expected = model.encode_text(texts())
    per_call, done = len(seen), model.optimize_for_inference(precision="int8")
    assert "2 linear maps left as before: they are hooked or adapted" in done
    seen.clear()
    assert functional.cosine_similarity(model.encode_text(texts()), expected).min() > 0.999
    assert len(seen) >= per_call == 2
    assert type(first.self_attn.q_proj) is nn.Linear
    assert type(first.self_attn.k_proj) is Int8Linear
    assert type(first.mlp) is HfClipMLP
    assert type(first.mlp.fc1) is Int8Linear
    assert type(second.mlp.fc1) is nn.Sequential
    resnet = AutoModel.from_pretrained(repositories["resnet"]).eval()
    resnet.vision_model.layer2[0].conv1.register_forward_hook(lambda *_: None)
    assert "the ResNet left as before: layer2.0.conv1 is hooked or adapted" in resnet.optimize_for_inference(
        precision="int8"
    )


# --- refusals -------------------------------------------------------------------------------------------------------


def test_refusals_leave_the_model_as_it_was(model: HfClipModel, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="precision='int4' is not known: pass precision=\"int8\", or leave it out"):
        model.optimize_for_inference(precision="int4")
    with pytest.raises(ValueError, match='compile=True and precision="int8" exclude each other.*leave one of them out'):
        model.optimize_for_inference(compile=True, precision="int8")
    with pytest.raises(OptimizedModelError, match="in training; call .eval\\(\\) before"):
        model.train().optimize_for_inference(precision="int8")
    model.eval()
    for dtype, name in ((torch.float16, "float16"), (torch.float64, "float64")):
        with pytest.raises(OptimizedModelError, match=f"needs a model in float32 or bfloat16.* this one is in {name}"):
            model.to(dtype).optimize_for_inference(precision="int8")
    model.float()
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "device", torch.device("cuda:0"))
        with pytest.raises(OptimizedModelError, match="computed on CPUs only, and this model is on cuda:0: move it"):
            model.optimize_for_inference(precision="int8")
    with monkeypatch.context() as patch:
        patch.setattr(int8, "has_int8_operators", lambda dtype: False)
        with pytest.raises(
            OptimizedModelError, match="torch .* has none on this machine that compute what they should"
        ):
            model.optimize_for_inference(precision="int8")
    assert model.optimizations is None
    model.train()


def test_second_call_with_another_precision(model: HfClipModel, tmp_path: Path):
    model.optimize_for_inference()
    with pytest.raises(OptimizedModelError, match='cannot be optimized with precision="int8" any more; load it again'):
        model.optimize_for_inference(precision="int8")


def test_int8_model_refuses_what_optimized_models_refuse(model: HfClipModel, tower: str, tmp_path: Path):
    model.optimize_for_inference(precision="int8")
    for refused, call in (
        ("saved", lambda: model.save_pretrained(tmp_path / "model")),
        ("trained", model.train),
        ("moved from torch.float32 on cpu to torch.bfloat16 on cpu", model.bfloat16),
    ):
        with pytest.raises(OptimizedModelError, match=f"cannot be {refused} any more; load it again"):
            call()
    assert not (tmp_path / "model").exists()
    images = random_images(tower).requires_grad_()
    with pytest.raises(OptimizedModelError, match="gives no gradients"):
        model.encode_image(images)


def test_model_without_layers_to_compute_is_refused(repositories: dict[str, Path]):
    tower = HfClipTextModel.from_pretrained(repositories["vit"]).eval()
    for module in tower.modules():
        if type(module) is nn.Linear:
            module.register_forward_hook(lambda *_: None)
    with pytest.raises(OptimizedModelError, match="has nothing to do: .* hooks or adapters. Remove the hooks"):
        tower.optimize_for_inference(precision="int8")
    assert tower.optimizations is None
