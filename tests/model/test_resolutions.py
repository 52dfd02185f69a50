"""Images of other sizes than the position table's: resampled on request, refused otherwise."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, CLIPConfig, CLIPModel

from hf_clip import HfClipModel
from hf_clip.model.position_table import resize_position_table

from ..closeness import assert_same_features
from ..small import IMAGE_SIZES


def test_resampled_table_keeps_its_first_row_its_mean_and_its_order():
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    table = torch.cat([torch.tensor([[-1.0, -2.0]]), torch.stack([rows, columns], dim=-1).view(64, 2)])
    new = resize_position_table(table, 8, 16, 16)
    assert torch.equal(new[0], table[0])
    grid = new[1:].view(16, 16, 2)
    assert torch.allclose(grid.mean((0, 1)), torch.tensor([3.5, 3.5]), atol=1e-4)
    assert (grid[2:14, :, 0].diff(dim=0) > 0.3).all()
    assert (grid[:, 2:14, 1].diff(dim=1) > 0.3).all()


def test_position_table_of_its_own_size_is_unchanged():
    table = torch.randn(1 + 49, 16)
    torch.testing.assert_close(resize_position_table(table, 7, 7, 7), table)


def test_rectangular_grid_keeps_height_before_width():
    table = torch.cat([torch.zeros(1, 1), torch.arange(4.0).repeat_interleave(4)[:, None]])  # varies with the row only
    grid = resize_position_table(table, 4, 8, 2)[1:].view(8, 2)
    assert torch.equal(grid[:, 0], grid[:, 1])
    assert (grid[:, 0].diff() > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("scale", [(1, 1), (2, 2), (1, 2), (3, 2)])
def test_features_of_other_sizes_have_the_same_shape(model: HfClipModel, tower: str, scale: tuple[int, int]):
    size = IMAGE_SIZES[tower]
    images = torch.randn(2, 3, size * scale[0], size * scale[1])
    features = model.encode_image(images, interpolate_pos_encoding=True)
    assert features.shape == (2, 48)
    assert torch.isfinite(features).all()
    outputs = model(pixel_values=images, interpolate_pos_encoding=True)
    assert_same_features(outputs.vision_model_output.pooler_output, features)
    if scale == (1, 1):
        torch.testing.assert_close(features, model.encode_image(images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_resnet_positions_reach_the_feature(repositories: dict[str, Path]):
    """With positions zeroed a mirrored map gives the same feature; with them it doesn't, at any size."""
    model = AutoModel.from_pretrained(repositories["resnet"]).eval()
    maps = torch.randn(2, 256, 6, 4)
    mirrored = maps.flip(-1)
    pool = model.vision_model.attnpool
    assert (pool(maps)[0] - pool(mirrored)[0]).norm() > 1e-3 * pool(maps)[0].norm()
    pool.positional_embedding.zero_()
    torch.testing.assert_close(pool(maps)[0], pool(mirrored)[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(96, 96), (48, 80), (64, 112)])
def test_vit_features_equal_stock_clips_at_other_sizes(repositories: dict[str, Path], height: int, width: int):
    ours = AutoModel.from_pretrained(repositories["vit"]).eval()
    stock = CLIPModel(CLIPConfig(**ours.config.to_dict())).eval()
    stock.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, height, width)
    expected = stock.get_image_features(images, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(ours.encode_image(images, interpolate_pos_encoding=True), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_bfloat16_positions_are_resampled(repository: Path, tower: str):
    model = AutoModel.from_pretrained(repository, dtype=torch.bfloat16).eval()
    size = IMAGE_SIZES[tower] * 2
    features = model.encode_image(torch.randn(1, 3, size, size).bfloat16(), interpolate_pos_encoding=True)
    assert features.dtype == torch.bfloat16
    assert torch.isfinite(features).all()


def test_gradients_reach_a_resampled_table(model: HfClipModel, tower: str):
    size = IMAGE_SIZES[tower]
    model.encode_image(torch.randn(1, 3, size * 2, size), interpolate_pos_encoding=True).sum().backward()
    vision = model.vision_model
    table = vision.embeddings.position_embedding.weight if tower == "vit" else vision.attnpool.positional_embedding
    assert (table.grad.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("shape", [(1, 3, 64, 48), (1, 3, 224, 224)])
def test_wrong_size_says_what_to_do(model: HfClipModel, tower: str, shape: tuple[int, ...]):
    size = IMAGE_SIZES[tower]
    expected = f"{shape[2]}x{shape[3]}, but this checkpoint's position table fits only {size}x{size}.*interpolate_pos"
    for call in (model.encode_image, lambda images: model(pixel_values=images), model.get_image_features):
        with pytest.raises(ValueError, match=expected):
            call(torch.zeros(shape))


def test_too_small_an_image_is_refused_even_so(model: HfClipModel, tower: str):
    smallest = {"vit": 16, "resnet": 32}[tower]
    with pytest.raises(ValueError, match=f"needs at least {smallest} pixels each way"):
        model.encode_image(torch.zeros(1, 3, 8, 96), interpolate_pos_encoding=True)
