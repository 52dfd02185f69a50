"""Attention rollout: equal to the product of weights that other libraries return, for all nine architectures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel
from transformers.modeling_utils import AttentionInterface

from hf_clip import VARIANTS, HfClipConfig, HfClipImageProcessor, HfClipModel, HfClipProcessor
from hf_clip.model.optimized import OptimizedModelError
from hf_clip.zero_shot.attention_rollout import attention_rollout
from hf_clip.zero_shot.relevance import relevance_map

from ..small import IMAGE_SIZES


def processor_for(tower: str) -> HfClipImageProcessor:
    return HfClipImageProcessor.for_image_size(IMAGE_SIZES[tower])


def noise(seed: int = 0, size: tuple[int, int] = (90, 120)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def sharpen(model: Any) -> None:
    """Random weights attend nearly evenly, so that a wrong computation would hardly be seen."""
    with torch.no_grad():
        for name, weight in model.vision_model.named_parameters():
            if "q_proj" in name:
                weight.mul_(8 if "encoder" in name else 50)


def rollout_of_stock_weights(folder: Path, pixels: Tensor) -> Tensor:
    """The paper's product of whole matrices, from the weights that transformers' own CLIP returns."""
    stock = CLIPModel.from_pretrained(folder, attn_implementation="eager").eval()
    sharpen(stock)
    with torch.no_grad():
        attentions = stock.vision_model(pixel_values=pixels, output_attentions=True).attentions
    whole = torch.eye(attentions[0].shape[-1], dtype=torch.float64)
    for weights in attentions:
        added = weights[0].double().mean(dim=0) + torch.eye(len(whole), dtype=torch.float64)
        whole = added / added.sum(dim=-1, keepdim=True) @ whole
    side = int((len(whole) - 1) ** 0.5)
    return (whole[0, 1:] / whole[0, 1:].sum()).view(side, side).float()


@pytest.mark.parametrize("attention", ["eager", "sdpa", "of_a_user"])
def test_vit_equals_product_of_the_weights_that_transformers_returns(repositories: dict[str, Path], attention: str):
    AttentionInterface.register("of_a_user", lambda *_, **__: pytest.fail("weights must not depend on it"))
    processor = processor_for("vit")
    pixels = processor(noise(), return_tensors="pt")["pixel_values"]
    expected = rollout_of_stock_weights(repositories["vit"], pixels)
    model = HfClipModel.from_pretrained(repositories["vit"], attn_implementation="sdpa").eval()
    sharpen(model)
    if attention != "of_a_user":
        model.set_attn_implementation(attention)
    shares = attention_rollout(model, processor, noise())
    assert shares.shape == (3, 3)
    assert shares.dtype == torch.float32
    assert expected.max() > 1.3 * expected.min()
    torch.testing.assert_close(shares, expected, atol=1e-6, rtol=1e-4)


def test_resnet_equals_the_weights_of_the_reference(references: dict[str, nn.Module], repositories: dict[str, Path]):
    processor = processor_for("resnet")
    visual = references["resnet"].visual
    pool, maps = visual.attnpool, []
    handle = pool.register_forward_pre_hook(lambda module, inputs: maps.append(inputs[0]))
    with torch.no_grad():
        visual(processor(noise(), return_tensors="pt")["pixel_values"])
    handle.remove()
    cells = maps[0].flatten(2).permute(2, 0, 1)
    tokens = torch.cat([cells.mean(dim=0, keepdim=True), cells]) + pool.positional_embedding[:, None]
    attention = nn.MultiheadAttention(tokens.shape[-1], pool.num_heads)
    with torch.no_grad():
        projections = (pool.q_proj, pool.k_proj, pool.v_proj)
        attention.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        attention.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
        width = tokens.shape[-1]
        attention.in_proj_weight[:width] *= 50  # as `sharpen` does
        attention.in_proj_bias[:width] *= 50
        weights = attention(tokens[:1], tokens, tokens, need_weights=True)[1][0, 0, 1:]
    model = HfClipModel.from_pretrained(repositories["resnet"]).eval()
    sharpen(model)
    shares = attention_rollout(model, processor, noise())
    torch.testing.assert_close(shares, (weights / weights.sum()).view(3, 3), atol=1e-6, rtol=1e-4)
    assert shares.max() > 1.3 * shares.min()


@pytest.mark.parametrize("name", VARIANTS)
def test_all_nine_architectures(name: str, digits: Path):
    """Of rollout and of `relevance_map`, on the meta device, which computes shapes and no numbers."""
    with torch.device("meta"):
        model = HfClipModel(HfClipConfig.from_variant(name)).eval()
    size = model.config.vision_config.image_size
    tokenizer = HfClipProcessor.from_pretrained(digits / "vit").tokenizer
    processor = HfClipProcessor(HfClipImageProcessor.for_image_size(size), tokenizer)
    image = Image.new("RGB", (300, 200))
    cell = 32 if name.startswith("RN") else int(name.split("/")[1].split("@")[0])
    assert attention_rollout(model, processor, image).shape == (size // cell, size // cell)
    assert relevance_map(model, processor, image, ["a", "b"]).shape == (2, size // cell, size // cell)


def test_finer_map(model: HfClipModel, tower: str):
    cell = {"vit": 16, "resnet": 32}[tower]
    shares = attention_rollout(model, processor_for(tower), noise(), image_size=5 * cell)
    assert shares.shape == (5, 5)
    assert shares.sum().item() == pytest.approx(1)
    assert not shares.requires_grad
    coarse = attention_rollout(model, processor_for(tower), noise())
    assert coarse.sum().item() == pytest.approx(1)


def test_what_is_refused(model: HfClipModel, tower: str):
    cell = {"vit": 16, "resnet": 32}[tower]
    with pytest.raises(ValueError, match=f"image_size is 20, but must be a multiple of {cell}"):
        attention_rollout(model, processor_for(tower), noise(), image_size=20)
    model.vision_model.optimizations = ["something"]
    with pytest.raises(OptimizedModelError, match="shows no attention; load it again"):
        attention_rollout(model, processor_for(tower), noise())
