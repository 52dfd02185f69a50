"""Features as a file: what was written is read, by any program, and what is wrong is said."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_clip.evaluation.feature_file import read_features, write_features
from hf_clip.evaluation.linear_probe import probe_features
from hf_clip.evaluation.split_features import ProbeFeatures

from .test_probe_protocols import clouds


@pytest.fixture
def features() -> ProbeFeatures:
    made = ProbeFeatures([*"abcdef"], clouds(60, 0), clouds(60, 1), clouds(36, 2), texts=torch.eye(6, 8))
    return replace(made, model="mine", dataset="CIFAR10", processor={"size": 16}, unreadable=["a: b"], tower="vit")


def by_hand() -> dict[str, Tensor]:
    """What another program may write."""
    train, test = clouds(30, 0), clouds(30, 1)
    return {
        "train.features": train.projected.half(),
        "train.labels": train.labels.int(),
        "test.features": test.projected,
        "test.labels": test.labels.to(torch.uint8),
    }


def test_features_come_back(features: ProbeFeatures, tmp_path: Path):
    write_features(tmp_path / "f.safetensors", features)
    found = read_features(tmp_path / "f.safetensors")
    for name in ("model", "dataset", "processor", "unreadable", "tower", "class_names", "precision"):
        assert getattr(found, name) == getattr(features, name)
    assert found.texts is not None
    assert torch.equal(found.texts, torch.eye(6, 8))
    for name, split in features.splits.items():
        other = found.splits[name]
        assert other.name == split.name
        for part in ("projected", "labels", "pooled"):
            assert torch.equal(getattr(other, part), getattr(split, part))
    result, expected = probe_features(tmp_path / "f.safetensors"), probe_features(features)
    assert result.metrics == pytest.approx(expected.metrics, abs=1e-6)
    for name in ("protocol", "tried", "processor", "unreadable", "precision", "labels"):
        assert getattr(result, name) == getattr(expected, name)


def test_file_of_another_program_needs_four_tensors(tmp_path: Path):
    save_file(by_hand(), tmp_path / "f.safetensors")
    found = read_features(tmp_path / "f.safetensors")
    assert found.class_names == [f"class {place}" for place in range(6)]
    assert probe_features(found, protocol="openai").value > 0.5
    assert "features as they are" in probe_features(found).protocol


def test_file_that_is_cut_off_damaged_or_of_another_kind(features: ProbeFeatures, tmp_path: Path):
    path = tmp_path / "f.safetensors"
    with pytest.raises(FileNotFoundError, match=r"There is no file of features '.*'; `hf-clip evaluate linear-probe"):
        read_features(path)
    write_features(path, features)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot be read as safetensors \(.*\): it is of another kind, or cut off"):
        read_features(path)
    path.write_bytes(b"features")
    with pytest.raises(ValueError, match=r"cannot be read as safetensors \(.*\): it is of another kind, or cut off"):
        read_features(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"is damaged: its content does not fit its checksum\. Write it again"):
        read_features(path)
    save_file({"visual.conv1.weight": torch.zeros(2)}, path)
    with pytest.raises(
        ValueError, match=r"has no train\.features, so it is no file of features: .* Its tensors are visual\.conv1\.we"
    ):
        read_features(path)


def with_nan(tensors: dict[str, Tensor]) -> None:
    tensors["test.features"][7, 3] = torch.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train.labels": torch.zeros(30)}, "train.labels are torch.float32 of shape (30,), but whole numbers"),
        ({"train.labels": torch.zeros(30).long()}, "all images of its split 'train' are of one class, 'class 0': a"),
        ({"test.labels": torch.arange(29)}, "'test' has 30 features, but 29 labels"),
        ({"test.features": torch.zeros(30, 7)}, "features of 'test' have shape (30, 7) and those of 'train' (30, 8)"),
        (
            {"test.features": torch.zeros(0, 8), "test.labels": torch.zeros(0).long()},
            "has no images in its split 'test', but a linear probe needs some",
        ),
        ({"train.labels": 2 * torch.ones(30, 6).long()}, "train.labels of shape (30, 6) must be zeros and ones"),
        ({"texts": torch.zeros(5, 8)}, "texts have shape (5, 8), but (6, 8) is needed: a feature for each class"),
        ({"validation.features": torch.zeros(3, 8)}, "has validation.features, but no validation.labels"),
        ({"validation.labels": torch.zeros(3).long()}, "has validation.labels, but no validation.features"),
        ({"test.labels": torch.arange(30) % 6 + 3}, "row 3 of 'test' has the label 6, but there are 6 classes"),
        (
            {"train.labels": 200_000 * (torch.arange(30) % 2)},
            "train.labels hold 200000, but not 1. Without",
        ),
        ({"test.features": torch.ones(30, 8) * 1j}, "test.features are torch.complex64, but real numbers are needed."),
        (
            {"train.features": torch.zeros(30, 0), "test.features": torch.zeros(30, 0)},
            "features of 'train' have width 0, but at least 1 is needed.",
        ),
        (
            {"train.features": torch.zeros(0, 8), "test.features": torch.zeros(0, 8)}
            | {"train.labels": torch.zeros(0).long(), "test.labels": torch.zeros(0).long()},
            "has no images in its split 'train', but a linear probe needs some",
        ),
        ({"texts": torch.full((6, 8), torch.nan)}, "row 0 of texts holds NaN or infinity: look for the prompt"),
        (
            {"texts": torch.zeros(6, 8)},
            "row 0 of texts is zero, so it has no dir",
        ),
        (
            {"train.pooled": torch.zeros(30, 9)},
            "pooled features of 'test' have shape None and those of 'train' (30,",
        ),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Tensor], message: str, tmp_path: Path):
    save_file(by_hand() | change, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_features(tmp_path / "f.safetensors")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("class_names", "5", "its metadata 'class_names' must be a list of texts as JSON, but are 5."),
        ("class_names", '"abcdef"', "its metadata 'class_names' must be a list of texts as JSON"),
        ("class_names", "[1, 2]", "its metadata 'class_names' must be a list of texts as JSON"),
        (
            "class_names",
            '["a", "a", "b", "c", "d", "e"]',
            "class_names must be a list of texts, each once, but are [",
        ),
        (
            "class_names",
            json.dumps([str(place) for place in range(40_000)]),
            "has 40,000 classes, but images of at most",
        ),
        ("class_names", "[" * 100_000, "its metadata 'class_names' must be a list of texts as JSON, but are [[["),
        ("class_names", "[", "its metadata 'class_names' are no JSON ("),
        ("unreadable", "5", "its metadata 'unreadable' must be a list of texts as JSON, but are 5."),
        ("processor", '{"a":' * 40 + "1" + "}" * 40, "its metadata 'processor' must be an object as JSON"),
    ],
)
def test_metadata_of_another_kind(name: str, text: str, message: str, tmp_path: Path):
    save_file(by_hand(), tmp_path / "f.safetensors", {name: text})
    with pytest.raises(ValueError, match=re.escape(message)):
        read_features(tmp_path / "f.safetensors")


def test_control_characters_of_a_stranger_are_not_shown(tmp_path: Path):
    save_file(by_hand(), tmp_path / "f.safetensors", {"model": "\x1b[31mred", "test_split": "a\nb"})
    found = read_features(tmp_path / "f.safetensors")
    assert (found.model, found.test.name) == ("\ufffd[31mred", "a b")


@pytest.mark.parametrize(
    ("path", "message"), [("~nobody-of-this-name/x", "There is no file"), (".", ". is a folder, but")]
)
def test_path_that_is_no_file(path: str, message: str):
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        read_features(path)


def test_wrong_rows_are_named(tmp_path: Path):
    path, tensors = tmp_path / "f.safetensors", by_hand()
    save_file(tensors, path, {"class_names": json.dumps(["a", "b", "c", "d", "e"])})
    with pytest.raises(ValueError, match=r"row 5 of 'train' has the label 5, but there are 5 classes: a number from 0"):
        read_features(path)
    with_nan(tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"row 7 of 'test' has features that hold NaN or infinity: look for the image"):
        read_features(path)
    assert load_file(path)["test.features"].isnan().any()
