"""Figures of truncated features: those of the classifier and of features that are truncated by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from demo.digits import DIGITS
from hf_clip import ZeroShotClassifier, encode_images, encode_texts
from hf_clip.commands import program
from hf_clip.evaluation.ranking import rank_both_ways
from hf_clip.evaluation.retrieval import evaluate_retrieval, retrieval_metrics
from hf_clip.evaluation.widths import split_name
from hf_clip.evaluation.zero_shot import evaluate_zero_shot

from .data_sets import TEMPLATES, captioned, write_class_folders

Clip = tuple[Any, Any]
FULL = 32


@pytest.fixture
def matryoshka(small_clip: Clip, monkeypatch: pytest.MonkeyPatch) -> Clip:
    """A model that says that it was trained at the widths 32 and 5."""
    monkeypatch.setattr(small_clip[0].config, "matryoshka_dims", [FULL, 5])
    return small_clip


def test_zero_shot_at_widths_is_the_classifiers(matryoshka: Clip, tmp_path: Path, rows: list[dict[str, Any]]):
    folder = write_class_folders(tmp_path / "digits", rows)
    found = evaluate_zero_shot(*matryoshka, folder, templates=TEMPLATES, truncate_dim=[5, FULL, 3], mistakes=2)
    whole = evaluate_zero_shot(*matryoshka, folder, templates=TEMPLATES)
    assert list(found.widths) == [5, FULL, 3]
    assert found.widths[FULL] == whole.metrics
    assert found.widths[5] == found.metrics != whole.metrics
    paths = sorted(folder.rglob("*.png"))
    classifier = ZeroShotClassifier(*matryoshka, sorted(DIGITS), TEMPLATES, progress=False, truncate_dim=5)
    taken = [classifier.labels[place] for place in classifier.logits([str(path) for path in paths]).argmax(1).tolist()]
    right = [name == path.parent.name for name, path in zip(taken, paths, strict=True)]
    assert found.metrics["acc1"] == pytest.approx(sum(right) / len(right))
    assert len(found.mistakes) == 2
    assert found.protocol == f"{whole.protocol}; first 5, 32, 3 of 32 numbers, not trained at 3"
    assert not whole.widths


def test_retrieval_at_widths_is_that_of_truncated_features(matryoshka: Clip, rows: list[dict[str, Any]]):
    given = list({row["caption"]: row for row in rows}.values())
    data, others = captioned(given[:30]), captioned(given[30:])
    chosen: dict[str, Any] = {"hub_correction": 0.5, "references": others, "hub_k": 4}
    found = evaluate_retrieval(*matryoshka, data, truncate_dim=[FULL, 5], **chosen)
    whole = evaluate_retrieval(*matryoshka, data, **chosen)
    assert (found.metrics, found.corrected) == (whole.metrics, whole.corrected)
    images = encode_images(*matryoshka, [row["bytes"] for row in given[:30]], truncate_dim=5)
    texts = encode_texts(*matryoshka, [row["caption"] for row in given[:30]], truncate_dim=5)
    assert images.shape == texts.shape == (30, 5)
    assert torch.allclose(images.norm(dim=-1), torch.ones(30))
    ids = torch.arange(30)
    expected = retrieval_metrics(*rank_both_ways(images, texts, ids, ids))
    assert {name: value for name, value in found.widths[5].items() if not name.endswith("corrected")} == expected
    assert found.widths[5]["mean_recall@1_hub_corrected"] >= 0
    assert evaluate_retrieval(*matryoshka, data, truncate_dim=5).metrics == expected


@pytest.mark.parametrize("width", [33, 0, [FULL, 2.5]])
def test_width_that_features_do_not_have_is_refused(matryoshka: Clip, rows: list[dict[str, Any]], width: Any):
    wrong = width[1] if isinstance(width, list) else width
    message = f"truncate_dim is {wrong}, but this model's features have 32 numbers: a whole number from 1 to 32"
    with pytest.raises(ValueError, match=message):
        evaluate_retrieval(*matryoshka, captioned(rows), truncate_dim=width)
    with pytest.raises(ValueError, match=message):
        encode_texts(*matryoshka, "one", truncate_dim=wrong)


@pytest.mark.parametrize("task", ["zero-shot", "retrieval"])
def test_table_records_card_and_picture_have_each_width(
    digits: Path, tmp_path: Path, rows: list[dict[str, Any]], task: str, capsys: pytest.CaptureFixture[str]
):
    if task == "zero-shot":
        write_class_folders(tmp_path / "data", rows[:20])
    else:
        captioned(rows[:20]).save_to_disk(tmp_path / "data")
    (tmp_path / "mine").symlink_to(digits / "vit")
    words = ["evaluate", task, "--model", tmp_path / "mine", "--dataset", tmp_path / "data", "--output", tmp_path]
    assert program.main([*map(str, words), "--truncate_dim", "32,8", "4"]) == 0
    out = capsys.readouterr().out.splitlines()
    metric = "acc1" if task == "zero-shot" else "mean_recall@1"
    names = [metric, f"{metric}_dim8", f"{metric}_dim4"]
    assert [line.split()[2] for line in out[1:4]] == names
    (record,) = json.loads((tmp_path / "results.json").read_text())
    assert record["metric"] == metric
    assert record["widths"] == dict(zip(("32", "8", "4"), names, strict=True))
    shown = [f"{100 * record['metrics'][name]:.1f}" for name in names]
    assert [line.split()[4] for line in out[1:4]] == shown
    assert record["protocol"].endswith("; first 32, 8, 4 of 32 numbers, not trained at 8, 4")
    assert f"| {metric}_dim4 | {shown[2]} % |" in (tmp_path / "results.md").read_text()
    (picture,) = (tmp_path / "cells").rglob("widths.png")
    with Image.open(picture) as drawn:
        assert len(drawn.convert("RGB").resize((64, 64)).getcolors(64 * 64) or []) > 20


def test_single_width_stands_behind_its_metrics(digits: Path, tmp_path: Path, rows: list[dict[str, Any]]):
    """So that a card has it beside the full width's, and not in its place."""
    captioned(rows[:20]).save_to_disk(tmp_path / "data")
    words = ["evaluate", "retrieval", "--model", digits / "vit", "--dataset", tmp_path / "data", "--output", tmp_path]
    assert program.main([*map(str, words), "--truncate-dim", "4"]) == 0
    (record,) = json.loads((tmp_path / "results.json").read_text())
    assert record["metric"] == "mean_recall@1_dim4"
    assert {split_name(name)[1] for name in record["metrics"]} == {4}
    assert not list(tmp_path.rglob("*.png"))


def test_word_that_is_no_width_is_refused(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["evaluate", "retrieval", "--model", str(digits / "vit"), "--dataset", "data", "--output", str(tmp_path)]
    assert program.main([*words, "--truncate-dim", "all"]) == 1
    assert "error: --truncate-dim has 'all', but widths are needed, such as 512 256 64." in capsys.readouterr().err
