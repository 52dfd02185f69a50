"""Truncated features: what a width gives, which widths are refused or warned of, and where the trained ones stand."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoModel, CLIPConfig

from hf_clip import HfClipConfig, HfClipModel
from hf_clip.checkpoints.describe import describe
from hf_clip.checkpoints.stock import stock_config
from hf_clip.commands.info import in_words
from hf_clip.hub.model_card import architecture_table
from hf_clip.model.matryoshka import truncate

from ..small import random_images, texts


@pytest.fixture
def matryoshka(repository: Path) -> HfClipModel:
    model = AutoModel.from_pretrained(repository).eval()
    full = model.config.projection_dim
    model.config.matryoshka_dims = [full, full // 2, 4]
    return model


@pytest.mark.parametrize("width", [4, "full"])
def test_truncated_features_are_the_first_numbers(matryoshka: HfClipModel, tower: str, width: Any):
    model, pixels, ids = matryoshka, random_images(tower), texts()
    width = model.config.projection_dim if width == "full" else width
    with torch.no_grad():
        images, captions = model.encode_image(pixels), model.encode_text(ids)
        for found, whole in (
            (model.encode_image(pixels, truncate_dim=width), images),
            (model.encode_text(ids, truncate_dim=width), captions),
            (model.get_image_features(pixels, truncate_dim=width).pooler_output, images),
            (model.get_text_features(ids, truncate_dim=width).pooler_output, captions),
        ):
            assert torch.equal(found, whole[:, :width])
        outputs = model(input_ids=ids, pixel_values=pixels, truncate_dim=width, return_loss=True)
    first, second = normalize(images[:, :width], dim=-1), normalize(captions[:, :width], dim=-1)
    assert torch.equal(outputs.image_embeds, first)
    assert torch.equal(outputs.text_embeds, second)
    assert torch.allclose(outputs.logits_per_image, first @ second.T * model.logit_scale.exp(), atol=1e-5)


def test_optimized_model_truncates_too(repositories: dict[str, Path]):
    model = AutoModel.from_pretrained(repositories["vit"], matryoshka_dims=[4]).eval()
    pixels, ids = random_images("vit"), texts()
    with torch.no_grad():
        expected = model.encode_image(pixels, truncate_dim=4), model.encode_text(ids, truncate_dim=4)
        model.optimize_for_inference()
        found = model.encode_image(pixels, truncate_dim=4), model.encode_text(ids, truncate_dim=4)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("width", [0, -1, 4.0, True, "4", 1000])
def test_width_that_is_out_of_range_is_refused(matryoshka: HfClipModel, width: Any):
    full = matryoshka.config.projection_dim
    expected = f"truncate_dim is {width!r}, but this model's features have {full} numbers: a whole number from 1 to"
    for call in (matryoshka.encode_text, matryoshka.get_text_features, matryoshka):
        with pytest.raises(ValueError, match=re.escape(expected)):
            call(texts(), truncate_dim=width)


def test_width_that_was_not_trained_is_warned_of(matryoshka: HfClipModel):
    full = matryoshka.config.projection_dim
    with pytest.warns(UserWarning, match=f"was trained at the widths {full}, {full // 2}, 4: the first 3 numbers"):
        matryoshka.encode_text(texts(), truncate_dim=3)
    matryoshka.config.matryoshka_dims = None
    with pytest.warns(UserWarning, match=f"at the full width of {full} alone.* Take a width .* --matryoshka_dims"):
        matryoshka.encode_text(texts(), truncate_dim=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        matryoshka.encode_text(texts(), truncate_dim=full)


@pytest.mark.parametrize("width", [4, 3])
def test_truncation_compiles_without_graph_breaks(matryoshka: HfClipModel, width: int):
    """And without a warning of a width that was not trained, which would break the graph."""
    torch.compiler.reset()
    compiled = torch.compile(lambda found: truncate(found, width, matryoshka.config), fullgraph=True, backend="eager")
    features = torch.randn(2, matryoshka.config.projection_dim)
    assert torch.equal(compiled(features), features[:, :width])


def test_widths_are_kept(matryoshka: HfClipModel, tower: str, tmp_path: Path):
    """In the folder, by `hf-clip info`, on cards, and in stock CLIP's configuration, which passes over them."""
    dims = matryoshka.config.matryoshka_dims
    matryoshka.save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path).config.matryoshka_dims == dims
    said = dict(in_words(describe(tmp_path)))["embedding"]
    shown = ", ".join(map(str, dims))
    assert said == f"{dims[0]}, trained at the widths {shown}"
    assert f"{dims[0]} dimensions; trained at the widths {shown}, see `truncate_dim`" in architecture_table(
        matryoshka.config
    )
    if tower == "vit":
        stock = CLIPConfig.from_dict(json.loads(json.dumps(stock_config(matryoshka.config).to_dict())))
        assert HfClipConfig.from_dict(stock.to_dict() | {"model_type": "hf_clip"}).matryoshka_dims == dims


def test_model_without_widths_says_nothing_of_them():
    config = HfClipConfig.from_variant("ViT-B/32")
    assert config.matryoshka_dims is None
    assert "matryoshka_dims" not in stock_config(config).to_dict()
    assert "widths" not in architecture_table(config)


def test_widths_have_an_order():
    assert HfClipConfig(projection_dim=64, matryoshka_dims=(16, 64, 32)).matryoshka_dims == [64, 32, 16]


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ([], "matryoshka_dims is empty, but at least one width is needed; leave it out for the full width"),
        ([64, 0], "matryoshka_dims has 0, but a feature has 64 numbers: widths from 1 to 64 are needed"),
        ([65], "matryoshka_dims has 65, but a feature has 64 numbers"),
        ([64, 8, 8], r"matryoshka_dims is \[64, 8, 8\], in which a width stands twice: name each once"),
        ([8] * 3000, r"matryoshka_dims is \[[8, ]{70,80}, in which a width stands twice: name each once\.$"),
        ("64,8", "matryoshka_dims"),
        ([8.0], "matryoshka_dims"),
    ],
)
def test_impossible_widths_are_refused(dims: Any, message: str):
    with pytest.raises(ValueError, match=message):
        HfClipConfig.from_dict({"projection_dim": 64, "matryoshka_dims": dims})
