"""The guard set: measured as `hf-clip evaluate zero-shot` measures, told everywhere, and chosen by."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoProcessor

from hf_clip.evaluation.zero_shot import evaluate_zero_shot
from hf_clip.training.chosen_metric import metric_of, parse_metric, value_of
from hf_clip.training.outcome import default_metric

from ..evaluation.data_sets import stored_rows, write_class_folders
from ..finetuning import records, train

METRIC = "mean(recall@10, guard_acc1)"


def measured(model: Path, data: Path) -> dict[str, float]:
    loaded = AutoModel.from_pretrained(model).eval()
    return evaluate_zero_shot(loaded, AutoProcessor.from_pretrained(model), str(data)).metrics


def test_guard_set_is_measured_throughout_and_the_result_chosen_by_it(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """With adapters, which are merged for it."""
    data = write_class_folders(tmp_path / "guard", stored_rows(digits))
    chosen = {"validation": "60", "eval_steps": 2, "metric_for_best_model": METRIC, "guard_dataset": str(data)}
    chosen |= {"max_steps": 4, "lora_rank": 2, "learning_rate": "1e-2", "average_with_pretrained": "0:1:0.5"}
    out = train(digits, tmp_path / "out", **chosen)
    found = records(out, "guard_acc1")
    run, tried = ([record for record in found if ("alpha" in record) == is_tried] for is_tried in (False, True))
    assert [record["step"] for record in run] == [0, 2, 4]
    assert all("recall@1" in record for record in found)
    best = max(run, key=lambda record: record["recall@10"] + record["guard_acc1"])
    taken = max(tried, key=lambda record: record["recall@10"] + record["guard_acc1"])
    for record, model in ((run[0], digits / "vit"), (taken, out)):
        expected = measured(model, data)
        for name in ("acc1", "acc5", "mean_per_class_recall"):
            assert record[f"guard_{name}"] == expected[name], name
    assert tried[2]["guard_acc1"] == best["guard_acc1"]  # α = 1 is the step that was kept
    assert len({record["guard_acc1"] for record in found}) > 1

    printed = capsys.readouterr().out
    assert f", guard_acc1 {run[1]['guard_acc1']:.3f}" in printed.partition("step 2: ")[2].partition("\n")[0]
    assert f"α = {taken['alpha']:g}, the best of 3 at {METRIC}" in printed
    before, after = run[0]["guard_acc1"], taken["guard_acc1"]
    assert f"guard_acc1 {before:.3f} at the start, {after:.3f} of the model that is saved." in printed
    card = ModelCard.load(out / "README.md")
    assert "60 images of `guard`, split `train`; zero-shot, 10 classes, 1 template" in card.text
    assert f"| acc1 | {100 * before:.1f} | {100 * after:.1f} |" in card.text
    (result,) = (each for each in card.data.eval_results if each.metric_type == "acc1")
    assert (result.dataset_name, result.dataset_split) == ("guard", "train")
    assert result.metric_value == pytest.approx(after, abs=1e-4)
    assert str(tmp_path) not in card.content


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guard_dataset": "several"}, "--guard_dataset: .* no column looks .* Name one with --guard_label_column."),
        (
            {"metric_for_best_model": "guard_roc_auc", "eval_steps": 2},
            "guard_roc_auc cannot be measured: these data have no guard_roc_auc, but recall@1, .*, guard_acc1, ",
        ),
    ],
)
def test_guard_set_that_does_not_fit_is_refused_before_anything_is_written(
    digits: Path, tmp_path: Path, fields: dict, message: str
):
    data = digits / fields.pop("guard_dataset", "labelled")
    with pytest.raises(ValueError, match=message):
        train(digits, tmp_path / "out", validation="60", guard_dataset=str(data), **fields)
    assert not (tmp_path / "out").exists()


def test_metric_may_be_a_mean():
    assert parse_metric(" mean( recall@1,guard_acc1 )") == ("recall@1", "guard_acc1")
    assert metric_of(("recall@1", "guard_acc1")) == "mean(recall@1, guard_acc1)"
    assert metric_of(parse_metric("recall@5")) == "recall@5"
    figures = {"recall@1": 0.25, "guard_acc1": 0.75, "guard_acc5": 1.0}
    assert value_of("mean(recall@1, guard_acc1)", figures) == 0.5
    assert value_of("guard_acc5", figures) == 1.0


def test_average_is_chosen_by_target_and_guard_where_nothing_is_named():
    assert default_metric({"recall@1": 0.1, "zero_shot_top1": 0.2}) == "recall@1"
    assert default_metric({"recall@1": 0.1, "guard_acc5": 0.9, "guard_acc1": 0.2}) == "mean(recall@1, guard_acc1)"
    assert default_metric({"recall@1": 0.1, "guard_mean_average_precision": 0.2}).endswith("average_precision)")
