"""Zero-shot classification of a data set, from end to end."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score
from transformers import SiglipConfig, SiglipModel

from demo.digits import DIGITS
from hf_clip import ZeroShotClassifier
from hf_clip.evaluation import embedder as embedder_module
from hf_clip.evaluation import feature_cache
from hf_clip.evaluation.embedder import Embedder, NotFiniteFeaturesError, UnreadableImagesError
from hf_clip.evaluation.zero_shot import ZeroShotResult, evaluate_zero_shot

from ..neighbours.stock import stock_model
from .data_sets import TEMPLATES, write_class_folders, write_shards

Clip = tuple[Any, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> Path:
    """Class folders. Tests must not write there."""
    return write_class_folders(tmp_path_factory.mktemp("folders") / "digits", rows)


@pytest.fixture(scope="module")
def measured(small_clip: Clip, folder: Path) -> ZeroShotResult:
    return evaluate_zero_shot(*small_clip, folder, templates=TEMPLATES, mistakes=5, batch_size=16)


def test_figures_are_those_of_the_classifier(small_clip: Clip, folder: Path, measured: ZeroShotResult):
    classifier = ZeroShotClassifier(*small_clip, sorted(DIGITS), TEMPLATES, progress=False)
    paths = sorted(folder.rglob("*.png"))
    truth = [path.parent.name for path in paths]
    logits = classifier.logits([str(path) for path in paths])
    found = [classifier.labels[place] for place in logits.argmax(1).tolist()]
    assert measured.count == 60
    assert measured.metrics["acc1"] == pytest.approx(accuracy_score(truth, found))
    assert measured.metrics["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(truth, found))
    assert {row.name: row.images for row in measured.per_class} == {name: truth.count(name) for name in set(truth)}
    assert measured.confusion is not None
    assert measured.confusion.sum() == 60
    assert measured.confusion.trace().item() / 60 == pytest.approx(measured.metrics["acc1"])
    confidences = logits.softmax(-1).amax(1)
    wrong = sorted(((confidences[n].item(), truth[n]) for n in range(60) if truth[n] != found[n]), reverse=True)[:5]
    assert [row.label for row in measured.mistakes] == [label for _, label in wrong]
    assert [row.confidence for row in measured.mistakes] == pytest.approx([confidence for confidence, _ in wrong])


def test_result_says_how_it_was_measured(small_clip: Clip, measured: ZeroShotResult):
    assert measured.protocol == "zero-shot, 10 classes, 2 templates, averaged; confidence by softmax"
    assert measured.precision == "float32"
    assert measured.processor["size"] == {"shortest_edge": 16}
    assert measured.metric == "acc1"
    assert measured.value == measured.metrics["acc1"]


def test_shards_bring_their_templates(
    small_clip: Clip, tmp_path: Path, rows: list[dict[str, Any]], measured: ZeroShotResult
):
    found = evaluate_zero_shot(*small_clip, write_shards(tmp_path / "wds", rows))
    assert found.metrics["acc1"] == pytest.approx(measured.metrics["acc1"])
    assert "2 templates of the data set" in found.protocol


def test_stock_clip_has_the_same_figures(small_clip: Clip, folder: Path, measured: ZeroShotResult):
    model, processor = small_clip
    found = evaluate_zero_shot(stock_model(model), processor, folder, templates=TEMPLATES, batch_size=7)
    assert found.metrics == pytest.approx(measured.metrics, abs=1e-5)


def test_siglip_reads_texts_of_full_length(small_clip: Clip):
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = tower | {"vocab_size": 700, "max_position_embeddings": 24, "projection_size": 32}
    vision = tower | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    siglip = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    processor = small_clip[1]
    embedder = Embedder(siglip, processor)
    tokens = processor.tokenizer(["a red four"], padding="max_length", max_length=24, return_tensors="pt")
    with torch.no_grad():
        expected = siglip.get_text_features(input_ids=tokens["input_ids"]).pooler_output
    torch.testing.assert_close(embedder.texts(["a red four"]), expected / expected.norm(dim=-1, keepdim=True))


def test_prompts_of_each_class(small_clip: Clip, folder: Path, measured: ZeroShotResult):
    """CuPL's way: the same prompts, written out."""
    prompts = {name: [template.format(name) for template in TEMPLATES] for name in DIGITS}
    found = evaluate_zero_shot(*small_clip, folder, templates=prompts)
    assert found.metrics == pytest.approx(measured.metrics, abs=1e-6)
    assert "20 prompts of 10 classes, averaged" in found.protocol
    with pytest.raises(ValueError, match=r"templates has no prompts for 9 of 10 classes, the first is 'eight': a list"):
        evaluate_zero_shot(*small_clip, folder, templates={"zero": ["a zero"]})


def test_several_labels_of_an_image(small_clip: Clip, tmp_path: Path, rows: list[dict[str, Any]]):
    given = [{**row, "labels": sorted({row["label"], (row["label"] + 3) % 10})} for row in rows]
    found = evaluate_zero_shot(*small_clip, write_shards(tmp_path / "wds", given, kind="multilabel"))
    classifier = ZeroShotClassifier(*small_clip, DIGITS, TEMPLATES, progress=False)
    is_right = np.array([[place in row["labels"] for place in range(10)] for row in given])
    logits = classifier.logits([row["bytes"] for row in given])
    assert found.metric == "mean_average_precision"
    assert found.value == pytest.approx(average_precision_score(is_right, logits.numpy()), abs=1e-5)
    assert found.confusion is None
    with pytest.raises(ValueError, match=r"The metric 'acc1' is one that these data cannot be measured by: there are"):
        evaluate_zero_shot(*small_clip, tmp_path / "wds", metric="acc1")


def test_metric_that_the_task_does_not_have(small_clip: Clip, folder: Path):
    with pytest.raises(
        ValueError, match=r"The metric 'bleu' is one that this task does not have: there are acc1, acc5,"
    ):
        evaluate_zero_shot(*small_clip, folder, templates=TEMPLATES, metric="bleu")


def test_model_comes_back_in_its_mode(small_clip: Clip, folder: Path, measured: ZeroShotResult):
    model = copy.deepcopy(small_clip[0]).train()
    found = evaluate_zero_shot(model, small_clip[1], folder, templates=TEMPLATES)
    assert model.training
    assert found.metrics == pytest.approx(measured.metrics, abs=1e-5)


def with_broken(rows: list[dict[str, Any]], count: int, broken: int) -> Dataset:
    images = [{"bytes": rows[place % 60]["bytes"], "path": None} for place in range(count)]
    for place in range(broken):
        images[7 * place + 3] = {"bytes": b"no image", "path": None}
    labels = [DIGITS[rows[place % 60]["label"]] for place in range(count)]
    return Dataset.from_dict({"image": images, "label": labels}).cast_column("image", datasets.Image())


def test_few_images_that_cannot_be_opened_are_counted(small_clip: Clip, rows: list[dict[str, Any]]):
    found = evaluate_zero_shot(*small_clip, with_broken(rows, 100, 1), class_names=DIGITS, templates=TEMPLATES)
    assert found.count == 99
    assert found.unreadable[0].startswith("row 3 of the data set: its image cannot be opened")


@pytest.mark.parametrize("is_stream", [False, True])
def test_many_images_that_cannot_be_opened_end_the_task(small_clip: Clip, rows: list[dict[str, Any]], is_stream: bool):
    data = with_broken(rows, 100, 2)
    data = data.to_iterable_dataset() if is_stream else data
    with pytest.raises(
        UnreadableImagesError, match=r"2 of 100 images cannot be opened, more than 1%, so the"
    ) as caught:
        evaluate_zero_shot(*small_clip, data, class_names=DIGITS, templates=TEMPLATES)
    assert (caught.value.count, caught.value.total) == (2, 100)


def test_feature_that_is_nan_names_its_image(small_clip: Clip, folder: Path):
    model = copy.deepcopy(small_clip[0])
    model.visual_projection.weight.data[0, 0] = torch.nan
    with pytest.raises(
        NotFiniteFeaturesError, match=r"The model's feature of eight/\d+\.png holds NaN: its weights are"
    ):
        evaluate_zero_shot(model, small_clip[1], folder, templates=TEMPLATES)


def with_little_memory(real: Callable[..., torch.Tensor], seen: list[int]) -> Callable[..., torch.Tensor]:
    """The same for at most two inputs at once."""

    def encode(batch: Any) -> torch.Tensor:
        seen.append(len(batch["input_ids"] if isinstance(batch, dict) else batch))
        if seen[-1] > 2:
            raise torch.OutOfMemoryError
        return real(batch)

    return encode


def test_batch_of_images_that_does_not_fit_is_divided(small_clip: Clip, monkeypatch: pytest.MonkeyPatch):
    embedder, seen = Embedder(*small_clip, batch_size=8), list[int]()
    pixels = torch.stack([embedder.prepare(Image.new("RGB", (20, 20), (n, 0, 99))) for n in range(8)])
    expected = embedder.encode(pixels)
    monkeypatch.setattr(embedder, "_image_features", with_little_memory(embedder._image_features, seen))
    torch.testing.assert_close(embedder.encode(pixels), expected)
    assert seen == [8, 4, 2, 2, 2, 2]
    embedder.encode(pixels)
    assert seen[6:] == [2, 2, 2, 2]  # what fits is remembered


@pytest.mark.parametrize("is_ours", [True, False])
def test_batch_of_texts_that_does_not_fit_is_divided(is_ours: bool, small_clip: Clip, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embedder_module, "_is_ours", lambda model: is_ours)
    embedder, seen = Embedder(*small_clip, batch_size=3), list[int]()
    texts = ["a red zero", "seven", "a photo of a nine", "one", "two", "three", "four on white paper"]
    expected = embedder.texts(texts)
    monkeypatch.setattr(embedder, "_text_features", with_little_memory(embedder._text_features, seen))
    torch.testing.assert_close(embedder.texts(texts), expected)
    assert seen == [6, 3, 2, 2, 2, 1]
    one_text = Embedder(*small_clip)
    monkeypatch.setattr(one_text, "_text_features", lambda tokens: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        one_text.texts(["one"])


def test_features_are_kept_and_found_again(
    small_clip: Clip, folder: Path, measured: ZeroShotResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(feature_cache, "ROWS_AT_LEAST", 16)

    def measure(model: Any = small_clip[0], processor: Any = small_clip[1]) -> ZeroShotResult:
        return evaluate_zero_shot(
            model, processor, folder, templates=TEMPLATES, batch_size=16, mistakes=5, feature_cache=tmp_path
        )

    assert measure().metrics == measured.metrics
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert [file.name for file in files] == [f"{number:05d}.safetensors" for number in range(4)]
    files[3].unlink()  # as after an interruption
    damaged = bytearray(files[2].read_bytes())
    damaged[-1] ^= 1
    files[2].write_bytes(damaged)
    encoded: list[int] = []
    real = Embedder.encode
    monkeypatch.setattr(Embedder, "encode", lambda self, pixels: encoded.append(len(pixels)) or real(self, pixels))
    again = measure()
    assert sum(encoded) == 60 - 32
    assert again.metrics == measured.metrics
    assert [row.name for row in again.mistakes] == [row.name for row in measured.mistakes]
    encoded.clear()
    assert measure().metrics == measured.metrics
    assert encoded == []
    # Another resize, other weights: other features.
    processor = copy.deepcopy(small_clip[1])
    processor.image_processor.resample = 2
    measure(processor=processor)
    assert sum(encoded) == 60
    model = copy.deepcopy(small_clip[0])
    model.visual_projection.weight.data *= -1
    measure(model=model)
    assert sum(encoded) == 120
    assert len(list(tmp_path.iterdir())) == 3


def test_cache_of_another_model_is_an_error(small_clip: Clip, folder: Path, tmp_path: Path):
    evaluate_zero_shot(*small_clip, folder, templates=TEMPLATES, feature_cache=tmp_path)
    description = next(tmp_path.rglob("cache.json"))
    description.write_text(description.read_text().replace('"weights": "', '"weights": "0'))
    with pytest.raises(ValueError, match=r"was made of something else \(weights differ\): it is of another model or"):
        evaluate_zero_shot(*small_clip, folder, templates=TEMPLATES, feature_cache=tmp_path)


def test_data_that_may_change_unseen_are_not_kept(small_clip: Clip, rows: list[dict[str, Any]], tmp_path: Path):
    with pytest.raises(ValueError, match=r"The features of these data cannot be kept, since it isn't known when"):
        evaluate_zero_shot(*small_clip, with_broken(rows, 5, 0), class_names=DIGITS, feature_cache=tmp_path)


def test_model_without_both_towers_is_an_error(folder: Path):
    with pytest.raises(ValueError, match=r"The model is a SimpleNamespace, which has no get_image_features: load a"):
        evaluate_zero_shot(SimpleNamespace(), None, folder)
