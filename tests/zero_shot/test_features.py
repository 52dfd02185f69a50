"""Features of texts and images: order, batches, and independence from who else is in the batch."""

import pickle
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoModel, AutoProcessor

from hf_clip import HfClipModel, HfClipTextModelWithProjection, HfClipVisionModelWithProjection, UnreadableImageError
from hf_clip.model.repair_text import TextError
from hf_clip.zero_shot import text_batches
from hf_clip.zero_shot.features import encode_images, encode_texts
from hf_clip.zero_shot.text_batches import TextTooLongError

TEXTS = ["a cat", "the man on the moon", "coffee", "it’s a rocket", "a", "two dogs"]


@pytest.fixture
def processor(repository: Path):
    return AutoProcessor.from_pretrained(repository)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_texts_come_back_in_their_order(model: HfClipModel, processor, batch_size: int):
    found = encode_texts(model, processor, TEXTS, batch_size=batch_size)
    for row, text in zip(found, TEXTS, strict=True):
        alone = model(**processor(text=[text], return_tensors="pt")).text_embeds
        assert relative(row[None], alone) < 5e-6
    assert torch.allclose(found.norm(dim=-1), torch.ones(len(TEXTS)))


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_images_come_back_in_their_order(model: HfClipModel, processor, photographs: dict, batch_size: int):
    images = list(photographs.values())
    found = encode_images(model, processor, iter(images), batch_size=batch_size)
    for row, image in zip(found, images, strict=True):
        assert relative(row[None], encode_images(model, processor, image)) < 5e-6


def test_bad_image_is_named_by_its_place_among_all(model: HfClipModel, processor, photographs: dict):
    images = [*list(photographs.values())[:5], "nowhere.jpg"]
    for given in (images, iter(images)):
        with pytest.raises(UnreadableImageError, match=r"^images\[5\]: there is no file 'nowhere.jpg'") as caught:
            encode_images(model, processor, given, batch_size=2)
        assert caught.value.index == 5
    with pytest.raises(UnreadableImageError, match=r"^the image: there is no file 'nowhere.jpg'") as caught:
        encode_images(model, processor, "nowhere.jpg")
    assert caught.value.index is None


def test_data_set_that_cannot_give_an_image_says_which(model: HfClipModel, processor, photographs: dict):
    content = BytesIO()
    photographs["chelsea"].save(content, "PNG")
    rows = [{"bytes": content.getvalue(), "path": None}] * 5 + [{"bytes": b"text", "path": None}]
    column = Dataset.from_dict({"image": rows}, features=Features({"image": ImageFeature()}))["image"]
    assert encode_images(model, processor, column[:5]).shape == (5, 48)
    with pytest.raises(UnreadableImageError, match=r"^images\[5\] could not be read from where it comes") as caught:
        encode_images(model, processor, column, batch_size=2)
    assert caught.value.index == 5


def test_nothing_gives_no_features(repository: Path, processor):
    parts = (HfClipVisionModelWithProjection, HfClipTextModelWithProjection)
    tower, text_tower = (part.from_pretrained(repository).eval() for part in parts)
    model = HfClipModel.from_pretrained(repository).eval()
    for empty in ([], (), iter([])):
        found = [encode_texts(kind, processor, empty) for kind in (model, text_tower)]
        found += [encode_images(kind, processor, empty) for kind in (model, tower)]
        assert {(rows.shape, rows.dtype) for rows in found} == {((0, 48), torch.float32)}
    assert encode_images(model, processor, np.zeros((0, 9, 9, 3), np.uint8)).shape == (0, 48)


def test_single_text_is_one_text(model: HfClipModel, processor):
    assert torch.allclose(encode_texts(model, processor, "a cat"), encode_texts(model, processor, ["a cat"]))


@pytest.mark.parametrize("texts_at_once", [1, 4, 100])
def test_texts_that_cannot_be_read_are_told_before_any_is_encoded(
    model: HfClipModel, processor, texts_at_once: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(text_batches, "TEXTS_AT_ONCE", texts_at_once)
    calls = []
    model.text_model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(
        TextTooLongError, match=r"^texts\[5\] \('cat cat .*'\) has 62 tokens, .* model takes 20. Sho"
    ) as caught:
        encode_texts(model, processor, [*TEXTS[:5], "cat " * 30, "a cat"])
    assert (caught.value.index, caught.value.length, caught.value.limit) == (5, 62, 20)
    with pytest.raises(ValueError, match=r"^texts\[5\] is 7, a int, but a text is needed"):
        encode_texts(model, processor, [*TEXTS[:5], 7])
    with pytest.raises(
        TextError, match=r"^texts\[5\] \('&#x3.*'\) cannot be tokenized: its .* 64 rounds of"
    ) as unending:
        encode_texts(model, processor, [*TEXTS[:5], "&#x3" * 4_000 + "5" + ";" * 4_000, "a cat"])
    assert unending.value.index == 5
    copy = pickle.loads(pickle.dumps(unending.value))
    assert (str(copy), copy.index, copy.problem) == (str(unending.value), 5, unending.value.problem)
    assert calls == []
    cut = encode_texts(model, processor, [*TEXTS[:5], "cat " * 30], truncation=True)
    assert relative(cut[5:], encode_texts(model, processor, ["cat " * 9])) < 5e-6
    assert relative(cut[:5], encode_texts(model, processor, TEXTS[:5])) < 5e-6


@pytest.mark.parametrize("backend", ["pil", "torch"])
@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("nowhere.jpg", ": there is no file 'nowhere.jpg'"),
        (b"text", " cannot be opened"),
        (np.full((9, 9, 3), np.nan), " has values that are not finite"),
        (np.full((9, 9, 3), 255.0), " holds floats from .* to 255"),
        (np.zeros((9, 9, 3), np.int64), "of .*int64"),
        (np.zeros((9, 9, 4), np.uint8), " is an array of shape"),
        (7, " is of type int"),
    ],
    ids=["no-file", "no-image", "nan", "to-255", "int64", "four-channels", "number"],
)
def test_unreadable_image_is_told_by_an_index(processor, photographs: dict, backend: str, bad: object, problem: str):
    images = [*list(photographs.values())[:3], bad]
    with pytest.raises(UnreadableImageError, match=problem) as caught:
        processor.image_processor(images, return_tensors="pt", backend=backend)
    error = pickle.loads(pickle.dumps(caught.value))
    for found in (error, caught.value):
        assert found.index == 3
        assert str(found).startswith("images[3]")
        assert isinstance(found, ValueError)


def test_text_features_do_not_depend_on_padding(model: HfClipModel, processor):
    ids = processor(text=TEXTS, return_tensors="pt").input_ids
    with torch.no_grad():
        narrow = model.encode_text(ids)
        wide = torch.full((len(ids), 20), processor.tokenizer.pad_token_id)
        wide[:, : ids.shape[1]] = ids
        assert relative(model.encode_text(wide), narrow) < 5e-6
        mask = processor(text=TEXTS, return_tensors="pt").attention_mask
        assert relative(model.encode_text(ids, mask), narrow) < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["RN50", "ViT-B/32"])
def test_features_do_not_depend_on_company_at_full_size(variant: str, tokenizer):
    """Alone, in a batch of 16, and beside a text of 77 tokens."""
    from conversion.parity import random_texts
    from conversion.reference import build_reference, reference_dimensions
    from hf_clip import VARIANTS, HfClipConfig
    from hf_clip.checkpoints.keys import convert_names

    row = VARIANTS[variant]
    reference = build_reference(reference_dimensions(row), seed=0)
    model = HfClipModel(HfClipConfig.from_variant(variant)).eval()
    model.load_state_dict(convert_names(reference.state_dict(), model.config))
    images = torch.randn(16, 3, row.image_size, row.image_size, generator=torch.Generator().manual_seed(0))
    ids = random_texts((*range(3, 18), 77), 49408, 77)
    with torch.no_grad():
        together, texts = model.encode_image(images), model.encode_text(ids)
        for place in (0, 7, 15):
            alone = model.encode_image(images[place : place + 1])
            assert relative(alone, together[place : place + 1]) < 5e-6
        for place in (0, 7, 14):
            alone = model.encode_text(ids[place : place + 1, : 3 + place])
            assert relative(alone, texts[place : place + 1]) < 5e-6


def test_other_dtypes_give_features_in_float32(repository: Path, photographs: dict[str, Image.Image]):
    model = AutoModel.from_pretrained(repository, dtype=torch.bfloat16).eval()
    exact = AutoModel.from_pretrained(repository).eval()
    processor = AutoProcessor.from_pretrained(repository)
    images = list(photographs.values())
    found, expected = (encode_images(m, processor, images) for m in (model, exact))
    assert found.dtype == torch.float32
    assert (found * expected).sum(-1).min() > 0.995
    found, expected = (encode_texts(m, processor, TEXTS) for m in (model, exact))
    assert (found * expected).sum(-1).min() > 0.995
