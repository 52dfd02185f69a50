"""The zero-shot classifier against the paper's recipe, run on the reference implementation."""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import tqdm
from datasets import ClassLabel, Dataset
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoProcessor

from hf_clip import HfClipModel, HfClipVisionModelWithProjection, ZeroShotClassifier
from hf_clip.model.repair_text import TextError
from hf_clip.zero_shot import text_batches
from hf_clip.zero_shot.matrix import ClassifierMatrix
from hf_clip.zero_shot.prompts import LabelError
from hf_clip.zero_shot.text_batches import TextTooLongError

from ..largest_tensor import HeldMemory

LABELS = ["cat", "man", "cup", "moon"]
TEMPLATES = ["a {}.", "the {}", "art of {}"]


@pytest.fixture
def processor(repository: Path):
    return AutoProcessor.from_pretrained(repository)


@pytest.fixture
def classifier(model: HfClipModel, processor) -> ZeroShotClassifier:
    return ZeroShotClassifier(model, processor, LABELS, TEMPLATES, progress=False)


@pytest.fixture
def images(photographs: dict[str, Image.Image]) -> list[Image.Image]:
    return list(photographs.values())


def published_recipe(reference: nn.Module, processor, names: list[list[str]], templates: list[str]) -> Tensor:
    """Label by label: every prompt padded to the context length, normalised, averaged, normalised."""
    length = reference.context_length
    columns = []
    with torch.no_grad():
        for label in names:
            prompts = [template.format(name) for name in label for template in templates]
            tokens = processor.tokenizer(prompts, padding=False).input_ids
            ids = torch.tensor([row + [0] * (length - len(row)) for row in tokens])
            features = reference.encode_text(ids)
            features = features / features.norm(dim=-1, keepdim=True)
            mean = features.mean(dim=0)
            columns.append(mean / mean.norm())
    return torch.stack(columns, dim=1)


def test_matrix_is_that_of_the_published_recipe(reference: nn.Module, classifier: ZeroShotClassifier, processor):
    expected = published_recipe(reference, processor, [[label] for label in LABELS], TEMPLATES)
    assert classifier.weights.shape == expected.shape == (48, 4)
    assert (classifier.weights - expected).abs().max() < 1e-6


@pytest.mark.parametrize("batch_size", [1, 5])
def test_several_names_are_averaged_too(reference: nn.Module, model: HfClipModel, processor, batch_size: int):
    names = [["cat", "a small kitten"], ["moon"], ["cup", "mug", "glass"]]
    found = ZeroShotClassifier(model, processor, names, TEMPLATES, batch_size=batch_size, progress=False)
    assert found.labels == ["cat", "moon", "cup"]
    assert (found.weights - published_recipe(reference, processor, names, TEMPLATES)).abs().max() < 1e-6


def test_logits_and_scores_are_those_of_the_reference(
    reference: nn.Module, classifier: ZeroShotClassifier, processor, images: list[Image.Image]
):
    pixels = processor(images=images, return_tensors="pt").pixel_values
    with torch.no_grad():
        features = reference.encode_image(pixels)
        features = features / features.norm(dim=-1, keepdim=True)
        weights = published_recipe(reference, processor, [[label] for label in LABELS], TEMPLATES)
        expected = reference.logit_scale.exp() * features @ weights
    logits = classifier.logits(images, batch_size=4)
    assert (logits - expected).norm() / expected.norm() < 1e-5
    probabilities = expected.softmax(-1)
    for row, entries in zip(probabilities, classifier.classify(images), strict=True):
        assert [entry["score"] for entry in entries] == pytest.approx(row.sort(descending=True)[0].tolist(), abs=1e-5)
        assert entries[0]["label"] == LABELS[row.argmax()]


def test_one_image_gives_one_list(classifier: ZeroShotClassifier, images: list[Image.Image], tmp_path: Path):
    images[0].save(tmp_path / "image.png")
    several = classifier.classify(images[:1], top_k=2)
    assert len(several) == 1
    assert len(several[0]) == 2
    for single in (images[0], tmp_path / "image.png", (tmp_path / "image.png").read_bytes()):
        found = classifier.classify(single, top_k=2)
        assert [entry["label"] for entry in found] == [entry["label"] for entry in several[0]]
        assert [e["score"] for e in found] == pytest.approx([e["score"] for e in several[0]], abs=1e-6)


def test_names_of_a_data_set(model: HfClipModel, processor):
    found = ZeroShotClassifier(model, processor, ClassLabel(names=LABELS), progress=False)
    assert found.labels == LABELS


def test_background_takes_part_and_comes_back_as_none(model: HfClipModel, processor, images: list[Image.Image]):
    others = ["a wall", "the sky"]
    plain = ZeroShotClassifier(model, processor, LABELS + others, progress=False)
    found = ZeroShotClassifier(model, processor, LABELS, background=others, progress=False)
    assert torch.allclose(found.logits(images), plain.logits(images), atol=1e-5)
    for entries, expected in zip(found.classify(images), plain.classify(images), strict=True):
        scores = {entry["label"]: entry["score"] for entry in expected}
        assert len(entries) == 5
        none = next(entry["score"] for entry in entries if entry["label"] is None)
        assert none == pytest.approx(scores["a wall"] + scores["the sky"], abs=1e-6)
        assert sum(entry["score"] for entry in entries) == pytest.approx(1, abs=1e-5)


def test_cosine_and_sigmoid_scores(model: HfClipModel, processor, images: list[Image.Image]):
    cosine = ZeroShotClassifier(model, processor, LABELS, scores="cosine", progress=False)
    logits = ZeroShotClassifier(model, processor, LABELS, progress=False).logits(images)
    expected = logits / model.logit_scale.exp().item()
    for row, entries in zip(expected, cosine.classify(images), strict=True):
        assert [entry["score"] for entry in entries] == pytest.approx(row.sort(descending=True)[0].tolist(), abs=1e-6)
    with pytest.warns(UserWarning, match="trained with a softmax: until `calibrate`"):
        sigmoid = ZeroShotClassifier(model, processor, LABELS, scores="sigmoid", progress=False)
    for row, entries in zip(logits.sigmoid(), sigmoid.classify(images), strict=True):
        assert [entry["score"] for entry in entries] == pytest.approx(row.sort(descending=True)[0].tolist(), abs=1e-6)


def test_model_trained_by_the_sigmoid_loss_scores_so(repository: Path, processor, images: list[Image.Image]):
    model = HfClipModel.from_pretrained(repository, contrastive_loss="sigmoid").eval()
    classifier = ZeroShotClassifier(model, processor, LABELS, "a {}", progress=False)
    inputs = processor(text=[f"a {label}" for label in LABELS], images=images, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
    assert torch.allclose(classifier.logits(images), expected, atol=1e-4)
    best = [entries[0]["score"] for entries in classifier.classify(images)]
    assert best == pytest.approx(expected.sigmoid().amax(-1).tolist(), abs=1e-6)


def test_saved_classifier_needs_no_text_tower(
    classifier: ZeroShotClassifier, repository: Path, processor, images: list[Image.Image], tmp_path: Path
):
    classifier.calibrate(images, [LABELS[i % 4] for i in range(len(images))], progress=False)
    classifier.save(tmp_path / "new folder" / "classifier.safetensors")
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["classifier.safetensors"]
    tower = HfClipVisionModelWithProjection.from_pretrained(repository).eval()
    loaded = ZeroShotClassifier.load(
        tmp_path / "new folder" / "classifier.safetensors", tower, processor.image_processor
    )
    assert loaded.labels == LABELS
    assert loaded.matrix.templates == TEMPLATES
    assert torch.equal(loaded.weights, classifier.weights)
    assert loaded.thresholds == classifier.thresholds
    torch.testing.assert_close(loaded.logits(images), classifier.logits(images), rtol=1e-5, atol=1e-4)
    # Thresholds lie half-way between scores that were met, so that rounding takes none across.
    found, expected = (kind.classify(images, thresholds=True) for kind in (loaded, classifier))
    for entries, others in zip(found, expected, strict=True):
        assert [entry["label"] for entry in entries] == [entry["label"] for entry in others]
        assert [e["score"] for e in entries] == pytest.approx([e["score"] for e in others], abs=1e-5)


def test_matrix_is_the_same_however_many_prompts_are_read_at_once(
    model: HfClipModel, processor, monkeypatch: pytest.MonkeyPatch
):
    names = [["cat", "a small kitten"], ["moon"], ["cup", "mug", "a large glass of water"]]
    whole = ZeroShotClassifier(model, processor, names, TEMPLATES, progress=False)
    monkeypatch.setattr(text_batches, "TEXTS_AT_ONCE", 4)
    parts = ZeroShotClassifier(model, processor, names, TEMPLATES, progress=False)
    assert (parts.weights - whole.weights).abs().max() < 1e-6


def test_memory_grows_with_labels_and_not_with_prompts(repositories: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    model = HfClipModel.from_pretrained(repositories["vit"]).eval()
    processor = AutoProcessor.from_pretrained(repositories["vit"])
    monkeypatch.setattr(text_batches, "TEXTS_AT_ONCE", 64)
    labels, most = [f"thing {number}" for number in range(100, 150)], []
    for templates in (2, 30):  # whose prompts are all of one length, as every digit is a token
        texts = [f"no. {number} of {{}}" for number in range(10, 10 + templates)]
        with HeldMemory() as memory:
            ZeroShotClassifier(model, processor, labels, texts, progress=False)
        most.append(memory.most)
    features_of_all = 28 * len(labels) * 48 * 4
    assert most[1] - most[0] < features_of_all / 5  # which label each prompt belongs to


def test_nothing_to_classify_gives_nothing(classifier: ZeroShotClassifier, model: HfClipModel, processor):
    background = ZeroShotClassifier(model, processor, LABELS, background=["the sky"], progress=False)
    for empty in ([], (), iter([])):
        assert classifier.logits(empty).shape == (0, 4)
        assert classifier.classify(empty) == []
        assert background.classify(empty, top_k=1) == []
    assert background.logits([]).shape == (0, 5)
    with pytest.raises(ValueError, match="There are no images to calibrate on; pass some with their labels"):
        classifier.calibrate([], [], progress=False)
    with pytest.raises(ValueError, match="There are no labels; pass at least one"):
        ZeroShotClassifier(model, processor, [])


def test_truth_comes_in_many_ways(classifier: ZeroShotClassifier, images: list[Image.Image]):
    truth = ["cat", "man", "cup", "moon", "cat", "cat"]
    numbers = [LABELS.index(label) for label in truth]
    expected = classifier.calibrate(images, truth, progress=False)
    is_right = np.eye(4, dtype=bool)[numbers]
    column = Dataset.from_dict({"label": truth})["label"]
    for given in (np.array(truth), np.array(numbers), torch.tensor(numbers), is_right, column, iter(truth), numbers):
        assert classifier.calibrate(images, given, progress=False) == pytest.approx(expected, rel=1e-4)


def test_calibration_that_fails_changes_nothing(classifier: ZeroShotClassifier, images: list[Image.Image]):
    classifier.calibrate(images, LABELS + LABELS[:2], progress=False)
    before = classifier.matrix
    with pytest.raises(LabelError, match="Image 5 has the label 'dog'") as caught:
        classifier.calibrate(images, [*LABELS, "cat", "dog"], progress=False)
    assert caught.value.index == 5
    with pytest.raises(LabelError, match="Image 4 has several labels") as caught:
        classifier.calibrate(images, [*LABELS, ["cat", "man"], "cat"], progress=False)
    assert caught.value.index == 4
    assert classifier.matrix is before


def test_classifier_is_whole_while_another_thread_calibrates_and_saves(
    classifier: ZeroShotClassifier, images: list[Image.Image], tmp_path: Path
):
    """Two calibrations take turns; every classification is that of one of them, and so is every file."""
    ranked = [[entry["label"] for entry in entries] for entries in classifier.classify(images)]
    truths = [[row[0] for row in ranked], [row[-1] for row in ranked]]
    path, expected, scales = tmp_path / "classifier", [], []
    for truth in truths:
        scales.append(classifier.calibrate(images, truth, progress=False)["logit_scale"])
        expected.append([row[0]["score"] for row in classifier.classify(images)])
    assert abs(scales[0] - scales[1]) > 1e-3 * scales[0]
    stop = threading.Event()

    def calibrate() -> None:
        while not stop.is_set():
            for truth in truths:
                classifier.calibrate(images, truth, progress=False)

    def save(_: int) -> None:
        for _ in range(10):
            classifier.save(path)
            found = ClassifierMatrix.load(path)
            assert any(found.logit_scale == pytest.approx(scale, rel=1e-4) for scale in scales)

    thread = threading.Thread(target=calibrate)
    thread.start()
    try:
        with ThreadPoolExecutor(2) as pool:
            saving = list(pool.map(save, range(2)))
            for _ in range(5):
                found = [row[0]["score"] for row in classifier.classify(images)]
                assert any(found == pytest.approx(scores, abs=1e-4) for scores in expected)
    finally:
        stop.set()
        thread.join()
    assert saving == [None, None]
    assert [file.name for file in tmp_path.iterdir()] == ["classifier"]


def test_what_is_no_classifier_is_not_loaded(
    classifier: ZeroShotClassifier, repository: Path, model: HfClipModel, processor, tmp_path: Path
):
    with pytest.raises(FileNotFoundError, match="There is no classifier .*none"):
        ZeroShotClassifier.load(tmp_path / "none", model, processor)
    with pytest.raises(ValueError, match="is no zero-shot classifier of hf_clip's"):
        ZeroShotClassifier.load(repository / "model.safetensors", model, processor)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="is no readable safetensors file"):
        ZeroShotClassifier.load(tmp_path / "text", model, processor)
    with pytest.raises(IsADirectoryError, match="name a file"):
        classifier.save(tmp_path)
    classifier.save(tmp_path / "classifier")
    with safe_open(tmp_path / "classifier", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    damages: list[tuple[dict[str, str], dict[str, Tensor], str]] = [
        ({"labels": "[["}, {}, r"is damaged \(JSONDecodeError: "),
        ({"labels": "[" * 100_000}, {}, r"is damaged \(RecursionError: "),
        ({"labels": "[1, 2]"}, {}, "its labels are no list of texts"),
        ({"labels": json.dumps(["a"] * 99)}, {}, "it has 99 labels and weights of torch.float32 and shape "),
        ({"scores": "best"}, {}, "its scores are 'best', none of softmax, sigmoid, cosine"),
        ({}, {"weights": tensors["weights"].int()}, "weights of torch.int32"),
        ({}, {"logit_scale": torch.zeros(2)}, r"is damaged \(RuntimeError: "),
        ({}, {"thresholds": torch.zeros(99)}, r"thresholds of shape \(99,\)"),
    ]
    for changed, others, message in damages:
        save_file(tensors | others, tmp_path / "damaged", metadata | changed)
        with pytest.raises(ValueError, match=message) as caught:
            ZeroShotClassifier.load(tmp_path / "damaged", model, processor)
        assert "\n" not in str(caught.value)
    model.config.projection_dim = 7
    with pytest.raises(ValueError, match="made by a model with features of 48, but this one has 7"):
        ZeroShotClassifier.load(tmp_path / "classifier", model, processor)


def image_of(classifier: ZeroShotClassifier, column: int, seed: int) -> Tensor:
    """Features that lie near a column of the matrix."""
    noise = torch.randn(48, generator=torch.Generator().manual_seed(seed))
    return classifier.weights[:, column] + 0.05 * noise


class NearColumns(nn.Module):
    """Stands for an image tower whose images' colour says what is in them; the columns are set far apart."""

    def __init__(self, classifier: ZeroShotClassifier):
        super().__init__()
        columns = torch.randn(classifier.weights.shape, generator=torch.Generator().manual_seed(0))
        classifier.matrix.weights = torch.linalg.qr(columns)[0]
        self.visual_projection = classifier.model.visual_projection
        self.classifier, self.device, self.dtype = classifier, torch.device("cpu"), torch.float32
        self.config = classifier.model.config

    def forward(self, pixel_values: Tensor):
        columns = (pixel_values[:, 0, 0, 0] * 255).round().int().tolist()
        rows = [image_of(self.classifier, c % 10, seed) for seed, c in enumerate(columns)]
        return type("Output", (), {"image_embeds": torch.stack(rows)})


def coloured(columns: list[int], size: int) -> list[Image.Image]:
    return [Image.new("RGB", (size, size), (column, 0, 0)) for column in columns]


@pytest.mark.parametrize("scores", ["softmax", "sigmoid", "cosine"])
@pytest.mark.filterwarnings("ignore:This model was trained with a softmax")
def test_calibration_makes_scores_that_tell_labels_apart(model: HfClipModel, processor, scores: str, tmp_path: Path):
    classifier = ZeroShotClassifier(model, processor, LABELS, scores=scores, progress=False)
    classifier.model = NearColumns(classifier)
    columns = [0, 1, 2, 3] * 6
    images = coloured(columns, processor.image_processor.crop_size.height)
    settings = {"do_normalize": False}
    before = classifier.matrix.logit_scale
    report = classifier.calibrate(images, [LABELS[c] for c in columns], progress=False, **settings)
    assert report["f1"] == 1
    assert math.isfinite(report["logit_scale"])
    assert (report["logit_scale"] == before) == (scores == "cosine")
    for column, entries in zip(columns, classifier.classify(images, thresholds=True, **settings), strict=True):
        assert [entry["label"] for entry in entries] == [LABELS[column]]
    best = [entries[0]["score"] for entries in classifier.classify(images, top_k=1, **settings)]
    if scores != "cosine":
        assert min(best) > 0.6
    classifier.save(tmp_path / "classifier")
    loaded = ZeroShotClassifier.load(tmp_path / "classifier", classifier.model, processor)
    assert loaded.matrix.logit_scale == report["logit_scale"]
    assert loaded.matrix.logit_bias == report["logit_bias"]


@pytest.mark.filterwarnings("ignore:This model was trained with a softmax")
def test_calibration_with_several_labels_and_with_none(model: HfClipModel, processor):
    size, settings = processor.image_processor.crop_size.height, {"do_normalize": False, "progress": False}
    classifier = ZeroShotClassifier(model, processor, LABELS, scores="sigmoid", progress=False)
    classifier.model = NearColumns(classifier)
    images = coloured([0, 1, 2, 3], size)
    classifier.calibrate(images, [["cat"], {"man"}, "cup", None], **settings)
    assert classifier.thresholds is not None
    assert list(classifier.thresholds) == LABELS
    as_tensor = torch.eye(4).bool() & torch.tensor([True, True, True, False])[:, None]
    first = classifier.matrix.thresholds
    classifier.calibrate(images, as_tensor, **settings)
    assert torch.equal(classifier.matrix.thresholds, first)
    softmax = ZeroShotClassifier(model, processor, LABELS, background=["the sky"], progress=False)
    softmax.model = NearColumns(softmax)
    softmax.calibrate(coloured([0, 1, 2, 3, 4], size), [*LABELS, None], **settings)
    assert [e["label"] for e in softmax.classify(coloured([4], size), top_k=1, do_normalize=False)[0]] == [None]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "dog"], "Image 1 has the label 'dog', which is none of this classifier's"),
        (["cat", 4], "Image 1 has the label 4"),
        (["cat", 1.5], "Image 1 has the label 1.5"),
        ([[True, False], [False, True]], "Image 0 has the label True"),
        (["cat"], "There are 2 images and the labels of 1"),
        ("cat", "labels is a str, but for each image its label is needed"),
        (["cat", None], "Image 1 has none of the labels, but there are no background labels"),
        (["cat", ["cat", "man"]], "Image 1 has several labels, but a softmax"),
        (torch.zeros(2, 3, dtype=torch.bool), r"labels have shape \(2, 3\), but \(images, 4\)"),
    ],
)
def test_bad_truth_is_refused(classifier: ZeroShotClassifier, images: list[Image.Image], labels: object, message: str):
    with pytest.raises(ValueError, match=message):
        classifier.calibrate(images[:2], labels, progress=False)


@pytest.mark.filterwarnings("ignore:This model was trained with a softmax")
def test_sigmoid_cannot_be_calibrated_on_one_kind(model: HfClipModel, processor, images: list[Image.Image]):
    classifier = ZeroShotClassifier(model, processor, ["cat"], scores="sigmoid", progress=False)
    with pytest.raises(ValueError, match="All 1 pairs of image and label are right; to calibrate"):
        classifier.calibrate(images[0], ["cat"], progress=False)
    assert math.isfinite(classifier.matrix.logit_scale)
    with pytest.raises(ValueError, match="batch_size is 0"):
        classifier.classify(images, batch_size=0)
    with pytest.raises(ValueError, match=r"images\[1\] holds several images; pass one image or a flat"):
        classifier.classify([images[0], images[:2]])


def test_bad_calls_are_refused(classifier: ZeroShotClassifier, model: HfClipModel, processor, images: list):
    with pytest.raises(ValueError, match="top_k is 0"):
        classifier.classify(images, top_k=0)
    with pytest.raises(ValueError, match="thresholds is 0.5, but True or False is needed"):
        classifier.classify(images, thresholds=0.5)
    with pytest.raises(TypeError, match="'threshold' is neither an argument here nor a setting of the image processor"):
        classifier.classify(images, threshold=0.5)
    with pytest.raises(ValueError, match="no thresholds yet; `calibrate` finds them"):
        classifier.classify(images, thresholds=True)
    with pytest.raises(ValueError, match="scores is 'argmax', but must be one of"):
        ZeroShotClassifier(model, processor, LABELS, scores="argmax")
    with pytest.raises(ValueError, match="background is a single text"):
        ZeroShotClassifier(model, processor, LABELS, background="sky")
    with pytest.raises(ValueError, match="'cat' is both a label and a background label"):
        ZeroShotClassifier(model, processor, LABELS, background=["cat"])


def test_progress_is_shown_while_prompts_are_encoded(model: HfClipModel, processor, monkeypatch: pytest.MonkeyPatch):
    bars = []
    real = tqdm.tqdm
    monkeypatch.setattr(tqdm, "tqdm", lambda **settings: bars.append(settings) or real(**settings))
    ZeroShotClassifier(model, processor, LABELS, progress=True)
    ZeroShotClassifier(model, processor, LABELS, progress=False)
    assert [bar["total"] for bar in bars] == [len(LABELS)]  # none where none is shown: see `progress_bar`
    assert "disable" not in bars[0]  # as TQDM_DISABLE says


def test_parts_that_do_not_fit_are_refused(repository: Path, model: HfClipModel, processor):
    tower = HfClipVisionModelWithProjection.from_pretrained(repository)
    with pytest.raises(ValueError, match="which HfClipVisionModelWithProjection doesn't have; pass an HfClipModel, or"):
        ZeroShotClassifier(tower, processor, LABELS)
    with pytest.raises(ValueError, match="load it first, with AutoModel.from_pretrained"):
        ZeroShotClassifier(str(repository), processor, LABELS)
    with pytest.raises(ValueError, match="processor is of type HfClipImageProcessor, but the model's HfClipProcessor"):
        ZeroShotClassifier(model, processor.image_processor, LABELS)
    with pytest.raises(ValueError, match="processor is of type NoneType, but the model's HfClipProcessor"):
        ZeroShotClassifier(model, None, LABELS)
    with pytest.raises(
        TextTooLongError, match=r"^The prompt 'a photo of a cat cat .* has \d+ tokens, .* takes 20. Shorten the"
    ) as caught:
        ZeroShotClassifier(model, processor, ["dog", "cat " * 30], ["a photo of a {}", "the {}"])
    assert caught.value.index == 1
    unending = "&#x3" * 4_000 + "5" + ";" * 4_000
    with pytest.raises(TextError, match=r"^The prompt 'the &#x3.*' cannot be tokenized: its .* after 64 rounds") as bad:
        ZeroShotClassifier(model, processor, ["dog", "cat", unending], ["the {}", "a {}"])
    assert bad.value.index == 2


def test_classifier_of_another_model_is_noticed(
    classifier: ZeroShotClassifier, repository: Path, processor, images: list[Image.Image], tmp_path: Path
):
    classifier.save(tmp_path / "classifier")
    half = AutoModel.from_pretrained(repository, dtype=torch.bfloat16)
    ZeroShotClassifier.load(tmp_path / "classifier", half, processor)  # the same, rounded
    other = HfClipModel(half.config)
    with pytest.warns(UserWarning, match="made by a model with another visual projection"):
        ZeroShotClassifier.load(tmp_path / "classifier", other, processor)


def test_compiled_model_classifies_the_same(
    classifier: ZeroShotClassifier, repository: Path, processor, images: list[Image.Image]
):
    compiled = torch.compile(AutoModel.from_pretrained(repository).eval(), backend="eager")
    found = ZeroShotClassifier(compiled, processor, LABELS, TEMPLATES, progress=False).logits(images)
    assert torch.allclose(found, classifier.logits(images), atol=1e-4)
