"""Classifiers and pipelines over the first numbers of features."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import pipeline

from hf_clip import HfClipModel, HfClipProcessor, ZeroShotClassifier
from hf_clip.zero_shot.features import truncated
from hf_clip.zero_shot.matrix import ClassifierMatrix

from ..small import random_images

LABELS = ["one", "two", "three"]


@pytest.fixture
def clip(repositories: dict[str, Path]) -> tuple[Any, Any]:
    model = HfClipModel.from_pretrained(repositories["vit"]).eval()
    model.config.matryoshka_dims = [model.config.projection_dim, 6]
    return model, HfClipProcessor.from_pretrained(repositories["vit"])


def test_classifier_compares_the_first_numbers(clip: tuple[Any, Any], tmp_path: Path):
    """Of each prompt's feature, which is normalised by itself before it is averaged. It is the same from its file."""
    classifier = ZeroShotClassifier(*clip, LABELS, ["a {}", "the {}."], progress=False, truncate_dim=6)
    assert classifier.weights.shape == (6, 3)
    prompts = [prompt for label in LABELS for prompt in (f"a {label}", f"the {label}.")]
    whole = ZeroShotClassifier(*clip, prompts, ["{}"], progress=False)
    of_prompts = truncated(whole.weights.T, 6).view(3, 2, 6).sum(1)
    assert torch.allclose(classifier.weights, normalize(of_prompts, dim=-1).T, atol=1e-6)
    with torch.no_grad():
        features = clip[0].encode_image(random_images("vit", 4))
    expected = normalize(features[:, :6], dim=-1) @ classifier.weights
    assert torch.equal(classifier.matrix.cosines(features), expected)
    assert torch.equal(classifier.matrix.cosines(features[:, :6]), expected)
    with pytest.raises(ValueError, match=r"The features have shape \(6,\), but this classifier was made for"):
        classifier.matrix.cosines(features[0])

    classifier.save(tmp_path / "c.safetensors")
    again = ZeroShotClassifier.load(tmp_path / "c.safetensors", *clip)
    assert again.matrix.truncate_dim == 6
    assert torch.equal(again.matrix.score(features), classifier.matrix.score(features))
    classifier.matrix.truncate_dim = 5
    classifier.matrix.save(tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match="is damaged: its truncate_dim is 5, and its weights have 6 rows"):
        ClassifierMatrix.load(tmp_path / "d.safetensors")


def test_pipeline_compares_the_first_numbers(clip: tuple[Any, Any]):
    model, processor = clip
    parts: dict[str, Any] = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    classify = pipeline("zero-shot-image-classification", model=model, device="cpu", **parts)
    picture = Image.effect_mandelbrot((64, 48), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    classifier = ZeroShotClassifier(model, processor, LABELS, "This is a photo of {}.", progress=False, truncate_dim=6)
    expected = classifier.classify(picture)
    found = classify(picture, candidate_labels=LABELS, truncate_dim=6)
    assert [row["label"] for row in found] == [row["label"] for row in expected]
    assert [row["score"] for row in found] == pytest.approx([row["score"] for row in expected], rel=1e-4)
    assert classify(picture, candidate_labels=classifier) == found
    assert [row["score"] for row in classify(picture, candidate_labels=LABELS)] != [row["score"] for row in found]
    with pytest.raises(ValueError, match="truncate_dim cannot be changed where candidate_labels is a ZeroShotClassif"):
        classify(picture, candidate_labels=classifier, truncate_dim=6)
    with pytest.raises(ValueError, match="truncate_dim is 0, but this model's features have"):
        classify(picture, candidate_labels=LABELS, truncate_dim=0)
