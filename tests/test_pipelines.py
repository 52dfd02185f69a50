"""The stock zero-shot pipeline on a converted folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline
from transformers.pipelines.pt_utils import KeyDataset

LABELS = ["a cat", "an astronaut", "a cup of coffee", "a rocket"]
TEMPLATE = "a photo of {}"


@pytest.fixture
def expected(repository: Path, photographs: dict[str, Image.Image]) -> list[dict[str, float]]:
    """Label probabilities computed without a pipeline."""
    model, processor = AutoModel.from_pretrained(repository).eval(), AutoProcessor.from_pretrained(repository)
    texts = [TEMPLATE.format(label) for label in LABELS]
    inputs = processor(text=texts, images=list(photographs.values()), return_tensors="pt")
    with torch.no_grad():
        probabilities = model(**inputs).logits_per_image.softmax(-1)
    return [dict(zip(LABELS, row.tolist(), strict=True)) for row in probabilities]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("source", ["list", "generator", "column", "paths"])
def test_zero_shot_pipeline(
    repository: Path,
    photographs: dict[str, Image.Image],
    expected: list[dict[str, float]],
    source: str,
    batch_size: int,
    tmp_path: Path,
):
    def generate() -> Iterator[Image.Image]:
        yield from photographs.values()

    def column() -> KeyDataset:
        rows = {"image": list(photographs.values())}
        return KeyDataset(Dataset.from_dict(rows, features=Features({"image": ImageFeature()})), "image")

    def paths() -> list[str]:
        for name, picture in photographs.items():
            picture.save(tmp_path / f"{name}.png")
        return [str(tmp_path / f"{name}.png") for name in photographs]

    sources = {"list": lambda: list(photographs.values()), "generator": generate, "column": column, "paths": paths}
    classify = pipeline("zero-shot-image-classification", model=str(repository))
    results = classify(sources[source](), candidate_labels=LABELS, hypothesis_template=TEMPLATE, batch_size=batch_size)
    for found, scores in zip(results, expected, strict=True):
        assert [entry["label"] for entry in found] == sorted(scores, key=scores.__getitem__, reverse=True)
        for entry in found:
            assert entry["score"] == pytest.approx(scores[entry["label"]], rel=1e-3, abs=1e-5)
