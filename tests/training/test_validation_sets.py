"""Several validation sets: each measured as it would be alone, named everywhere, and chosen by."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import DatasetDict, load_from_disk
from huggingface_hub import ModelCard

from hf_clip.training.chosen_metric import Figure, read_figure
from hf_clip.training.config import TrainingConfig
from hf_clip.training.run_data import open_data
from hf_clip.training.validation_sets import ValidationSet, place_of

from ..finetuning import LABELLED_CAPTION, options, records, train

METRIC = "mean(mine_recall@5, other_zero_shot_top1)"


@pytest.fixture(scope="module")
def other(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 labelled images in a folder of their own."""
    folder = tmp_path_factory.mktemp("sets") / "away"
    rows = load_from_disk(str(digits / "labelled"))["train"].select(range(40))
    DatasetDict(test=rows).save_to_disk(folder)
    return folder


def test_each_set_is_measured_as_it_would_be_alone(
    digits: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    chosen: dict[str, Any] = {"dataset": [str(digits / "labelled")], "caption_column": LABELLED_CAPTION}
    chosen |= {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 32}
    given = ["mine=60", f"other={other}"]
    out = train(digits, tmp_path / "out", validation=given, metric_for_best_model=METRIC, **chosen)
    found = records(out, "recall@1")
    assert [record["step"] for record in found] == [0, 2, 4]
    alone = records(train(digits, tmp_path / "mine", validation="60", **chosen), "recall@1")
    assert alone == [{name: value for name, value in r.items() if not name.startswith("other_")} for r in found]
    (start, _) = records(
        train(digits, tmp_path / "other", validation=str(other), **chosen | {"max_steps": 1, "save_steps": None}),
        "recall@1",
    )
    assert {name: value for name, value in found[0].items() if name.startswith("other_")} == {
        f"other_{name}": value for name, value in start.items() if name != "step"
    }
    best = max(found, key=lambda record: record["recall@5"] + record["other_zero_shot_top1"])

    printed = capsys.readouterr().out
    assert "validation on mine, 60 pairs; other, 40 pairs. " in printed
    assert f", other_recall@1 {found[1]['other_recall@1']:.3f}, other_zero_shot_top1 " in printed
    card = ModelCard.load(out / "README.md")
    assert "| validation | mine (60), other (away) |" in card.text
    assert "On the validation pairs (mine (60)), with the weights that are here." in card.text
    before, after = (100 * record["other_recall@5"] for record in (found[0], best))
    assert (
        f"| recall@5 | {before:.1f} | {after:.1f} |" in card.text.partition("On the validation pairs other (away)")[2]
    )
    (result,) = (r for r in card.data.eval_results if r.metric_type == "recall_at_5" and r.dataset_name == "away")
    assert result.metric_value == pytest.approx(best["other_recall@5"], abs=1e-4)
    assert str(other) not in card.content
    stored = json.loads((out / "training_config.json").read_text())
    assert stored["validation"] == given
    assert stored["metric_for_best_model"] == "mean(recall@5, other_zero_shot_top1)"

    resumed = {"resume_from_checkpoint": "latest", "validation": given, "metric_for_best_model": METRIC}
    assert records(train(digits, out, **resumed, **chosen), "recall@1") == found


def test_each_set_has_stored_features_of_its_own(digits: Path, other: Path, tmp_path: Path):
    """Where locked towers leave memory, captions and class prompts of each set are stored."""
    chosen: dict[str, Any] = {"dataset": [str(digits / "labelled")], "caption_column": LABELLED_CAPTION}
    chosen |= {"lock": "image,text", "max_steps": 1, "validation": [f"other={other}", "60"], "augmentation": "none"}
    (start, plain), (again, stored) = (
        records(train(digits, tmp_path / str(is_stored), cache_frozen_features=is_stored, **chosen), "recall@1")
        for is_stored in (False, True)
    )
    assert again == pytest.approx(start)
    assert stored == pytest.approx(plain)
    assert {"zero_shot_top1", "held_out_zero_shot_top1"} < stored.keys()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"validation": ["5", "DATA"]}, "is a source that is trained on: name another"),
        ({"validation": ["5", "again=absent"]}, "has no split 'absent'"),
        (
            {"validation": ["5", "other=OTHER"], "metric_for_best_model": "other_zero_shot_top1"},
            "--metric_for_best_model other_zero_shot_top1 cannot be measured: zero-shot accuracy needs captions made",
        ),
    ],
)
def test_sets_that_a_run_cannot_have_are_refused(digits: Path, tmp_path: Path, fields: dict[str, Any], message: str):
    captioned = load_from_disk(str(digits / "pairs"))["held_out_images"].select(range(20))
    captioned.save_to_disk(tmp_path / "captioned")
    places = {"DATA": str(digits / "pairs"), "other=OTHER": f"other={tmp_path / 'captioned'}"}
    fields["validation"] = [places.get(word, word) for word in fields["validation"]]
    with pytest.raises(ValueError, match=message):
        train(digits, tmp_path / "out", eval_steps=2, **fields)
    assert not (tmp_path / "out").exists()


def test_rows_are_held_out_once_wherever_the_number_stands(digits: Path, other: Path):
    given = {"dataset": [str(digits / "labelled")], "caption_column": LABELLED_CAPTION}
    found = [
        open_data(TrainingConfig(**options(digits, Path("out"), validation=words, **given)))
        for words in ("60", [f"other={other}", "60"])
    ]
    first, second = (data.validation_sets[-1] for data in found)
    assert (first.name, second.name, len(found[1].train)) == ("held_out", "held_out", len(found[0].train))
    assert list(first.pairs.draws(0)) == list(second.pairs.draws(0))


def test_names_of_figures_are_read_by_their_parts():
    assert read_figure("recall@1") == Figure("recall@1")
    assert read_figure("image_to_text_recall@1") == Figure("image_to_text_recall@1")
    assert read_figure("my_set_text_to_image_recall@1_dim8") == Figure("text_to_image_recall@1", 8, "my_set")
    assert read_figure("a-b.c_zero_shot_top5") == Figure("zero_shot_top5", None, "a-b.c")
    for name in ("guard_acc1", "loss", "recall@1_dim0", "recall@1_dim", "_recall@1", "acc1_dim8"):
        assert read_figure(name) is None, name
    for name in ("recall@10", "recall@5_dim16", "x_recall@1", "x_y_recall@1_dim2"):
        figure = read_figure(name)
        assert figure is not None
        assert figure.name == name
    sets = [ValidationSet(name, name) for name in ("first", "a", "a_b")]
    assert [place_of(name, sets) for name in ("recall@1", "a_recall@1", "a_b_recall@1", "b_x")] == [0, 1, 2, 0]
