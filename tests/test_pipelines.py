"""`pipeline("zero-shot-image-classification")` on a converted folder, beside the stock class on the same model."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel, pipeline
from transformers.pipelines import ZeroShotImageClassificationPipeline
from transformers.pipelines.pt_utils import KeyDataset

from hf_clip import HfClipModel, ZeroShotClassifier
from hf_clip.pipeline import MOST_MATRICES, HfClipZeroShotPipeline

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


TASK = "zero-shot-image-classification"


def make_pipelines(model: HfClipModel, repository: Path) -> tuple:
    """Ours and the stock one, on the same model."""
    processor = AutoProcessor.from_pretrained(repository)
    parts = {"model": model, "tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    return pipeline(TASK, **parts), ZeroShotImageClassificationPipeline(**parts)


@pytest.fixture
def classify(model: HfClipModel, repository: Path) -> HfClipZeroShotPipeline:
    return make_pipelines(model, repository)[0]


def assert_same(found: list, expected: list, tolerance: float = 1e-5) -> None:
    for entries, others in zip(found, expected, strict=True):
        assert [entry["label"] for entry in entries] == [entry["label"] for entry in others]
        scores = [entry["score"] for entry in entries]
        assert scores == pytest.approx([entry["score"] for entry in others], abs=tolerance)


@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_scores_are_the_stock_pipelines(
    model: HfClipModel, repository: Path, photographs: dict, batch_size: int | None
):
    ours, stock = make_pipelines(model, repository)
    assert type(ours) is HfClipZeroShotPipeline
    pictures = list(photographs.values())
    settings = {"candidate_labels": LABELS, "hypothesis_template": TEMPLATE}
    expected = stock(pictures, **settings)
    assert_same(ours(pictures, batch_size=batch_size, **settings), expected)
    assert_same([ours(pictures[0], **settings)], expected[:1])
    assert_same([ours(images=pictures[0], **settings)], expected[:1])
    default = stock(pictures, candidate_labels=["cat", "cup"])
    assert_same(ours(pictures, candidate_labels=("cat", "cup")), default)


def test_other_models_keep_the_stock_pipeline(tokenizer, repository: Path):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1}
    stock = CLIPModel(CLIPConfig(text_config=sizes, vision_config=sizes))
    processor = AutoProcessor.from_pretrained(repository)
    made = pipeline(TASK, model=stock, tokenizer=tokenizer, image_processor=processor.image_processor)
    assert type(made) is ZeroShotImageClassificationPipeline


def test_labels_are_encoded_once(classify: HfClipZeroShotPipeline, photographs: dict, monkeypatch: pytest.MonkeyPatch):
    calls = {"texts": 0, "pictures": 0}
    towers = {"texts": classify.model.text_model, "pictures": classify.model.vision_model}
    for kind, tower in towers.items():
        tower.register_forward_hook(lambda *_, kind=kind: calls.update({kind: calls[kind] + 1}))
    pictures = list(photographs.values())
    for _ in range(3):
        classify(pictures, candidate_labels=LABELS)
    classify(pictures[0], candidate_labels=LABELS)
    assert calls == {"texts": 1, "pictures": 4}
    classify(pictures[0], candidate_labels=LABELS[:2])
    classify(pictures[0], candidate_labels=LABELS, hypothesis_template="{}")
    assert calls["texts"] == 3
    for number in range(MOST_MATRICES + 3):
        classify(pictures[0], candidate_labels=[f"cat {number}", "cup"])
    assert len(classify._matrices) == MOST_MATRICES


def test_no_matrix_outlives_its_weights(classify: HfClipZeroShotPipeline, photographs: dict):
    picture = photographs["chelsea"]
    before = classify(picture, candidate_labels=LABELS)
    with torch.no_grad():
        classify.model.text_projection.weight.mul_(torch.linspace(-1, 1, 48)[:, None])
    assert [entry["score"] for entry in before] != [e["score"] for e in classify(picture, candidate_labels=LABELS)]
    fresh = HfClipZeroShotPipeline(
        model=classify.model, tokenizer=classify.tokenizer, image_processor=classify.image_processor
    )
    assert classify(picture, candidate_labels=LABELS) == fresh(picture, candidate_labels=LABELS)


def test_templates_are_averaged(classify: HfClipZeroShotPipeline, photographs: dict, repository: Path):
    pictures, templates = list(photographs.values()), ["a {}", "the {}", "art of {}"]
    processor = AutoProcessor.from_pretrained(repository)
    expected = ZeroShotClassifier(classify.model, processor, LABELS, templates, progress=False)
    found = classify(pictures, candidate_labels=LABELS, hypothesis_template=templates)
    assert_same(found, expected.classify(pictures), tolerance=1e-6)


def test_top_k_and_arguments_given_when_made(model: HfClipModel, repository: Path, photographs: dict):
    picture = photographs["chelsea"]
    made = pipeline(TASK, model=str(repository), candidate_labels=LABELS, hypothesis_template="{}", top_k=2)
    plain = pipeline(TASK, model=str(repository))
    expected = plain(picture, candidate_labels=LABELS, hypothesis_template="{}")
    assert made(picture) == expected[:2]
    assert made(picture, top_k=1) == expected[:1]
    assert made([picture]) == [expected[:2]]
    assert [e["label"] for e in made(picture, candidate_labels=["cat"])] == ["cat"]


def test_generator_yields_each_result_when_its_picture_is_read(classify: HfClipZeroShotPipeline, photographs: dict):
    read = []

    def generate() -> Iterator[Image.Image]:
        for name, picture in photographs.items():
            read.append(name)
            yield picture

    results = classify(generate(), candidate_labels=LABELS)
    next(iter(results))
    assert len(read) <= 3


def test_picture_on_its_side_is_turned_whichever_way_it_comes(
    classify: HfClipZeroShotPipeline, photographs: dict, tmp_path: Path
):
    exif, file = Image.Exif(), BytesIO()
    exif[0x0112] = 6
    photographs["chelsea"].save(file, "JPEG", exif=exif)
    (tmp_path / "picture.jpg").write_bytes(file.getvalue())
    with Image.open(tmp_path / "picture.jpg") as opened:
        upright = Image.fromarray(np.rot90(np.asarray(opened), -1))
    column = Dataset.from_dict(
        {"image": [{"bytes": file.getvalue(), "path": None}]}, features=Features({"image": ImageFeature()})
    )
    ways = [str(tmp_path / "picture.jpg"), file.getvalue(), Image.open(tmp_path / "picture.jpg"), column[0]["image"]]
    expected = classify(upright, candidate_labels=LABELS)
    for way in ways:
        for timeout in (None, 5.0):
            found = classify(way, candidate_labels=LABELS, timeout=timeout)
            assert_same([found], [expected], tolerance=1e-6)


def test_half_precision_and_compiled_models(repository: Path, photographs: dict, classify: HfClipZeroShotPipeline):
    pictures = list(photographs.values())
    expected = classify(pictures, candidate_labels=LABELS)
    half = pipeline(TASK, model=str(repository), dtype=torch.bfloat16)
    for entries, others in zip(half(pictures, candidate_labels=LABELS), expected, strict=True):
        scores = {entry["label"]: entry["score"] for entry in entries}
        assert all(abs(scores[entry["label"]] - entry["score"]) < 0.05 for entry in others)
    compiled = torch.compile(HfClipModel.from_pretrained(repository).eval(), backend="eager")
    parts = {"tokenizer": classify.tokenizer, "image_processor": classify.image_processor}
    found = pipeline(TASK, model=compiled, **parts)
    assert type(found) is HfClipZeroShotPipeline
    assert_same(found(pictures, candidate_labels=LABELS), expected)


def test_sigmoid_model_gives_sigmoid_scores(repository: Path, photographs: dict):
    model = HfClipModel.from_pretrained(repository, contrastive_loss="sigmoid").eval()
    classify, _ = make_pipelines(model, repository)
    scores = [entry["score"] for entry in classify(photographs["chelsea"], candidate_labels=LABELS)]
    assert sum(scores) != pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        (None, {"candidate_labels": LABELS}, "needs pictures"),
        ("picture", {}, "needs candidate_labels, e.g."),
        ("picture", {"candidate_labels": "cat"}, "labels is 'cat', but a list of labels"),
        ("picture", {"candidate_labels": ["cat", "cat"]}, "The label 'cat' appears twice"),
        ("picture", {"candidate_labels": LABELS, "hypothesis_template": "a photo"}, "has no placeholder"),
        ("picture", {"candidate_labels": LABELS, "top_k": 0}, "top_k is 0"),
        ("nowhere.jpg", {"candidate_labels": LABELS}, "there is no file 'nowhere.jpg'"),
    ],
)
def test_bad_calls_are_refused(classify, photographs: dict, images: object, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        classify(photographs["chelsea"] if images == "picture" else images, **settings)


def test_no_pictures_no_results(classify: HfClipZeroShotPipeline):
    assert classify([], candidate_labels=LABELS) == []


def test_labels_with_names_are_told_from_lists_of_names(classify: HfClipZeroShotPipeline, photographs: dict):
    picture, template = photographs["chelsea"], "{}"
    first = classify(picture, candidate_labels={"cat": "man", "dog": "cup"}, hypothesis_template=template)
    second = classify(picture, candidate_labels=[["cat", "man"], ["dog", "cup"]], hypothesis_template=template)
    assert first != second
    again = classify(
        picture, candidate_labels=(x for x in ("cat", "dog")), hypothesis_template=iter(["a {}", "the {}"])
    )
    expected = classify(picture, candidate_labels=["cat", "dog"], hypothesis_template=["a {}", "the {}"])
    assert again == expected
    with pytest.raises(ValueError, match="takes one picture or a flat list"):
        classify(np.zeros((2, 9, 9, 3), np.uint8), candidate_labels=["cat", "dog"])
