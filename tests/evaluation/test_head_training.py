"""Training and measuring a head on a model's embeddings of real images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image
from sklearn.linear_model import RidgeCV

from demo.digits import DIGITS
from hf_clip.evaluation.correlation import spearman
from hf_clip.evaluation.embedder import UnreadableImagesError
from hf_clip.evaluation.head_fits import LAMBDAS
from hf_clip.evaluation.head_training import evaluate_head
from hf_clip.evaluation.scored_images import ScoreError, open_scored
from hf_clip.model.open_image import open_image
from hf_clip.zero_shot.features import encode_images

from ..neighbours.stock import stock_model
from .data_sets import write_class_folders

Clip = tuple[Any, Any]


def brightness(row: dict[str, Any]) -> float:
    """What a head can learn of an image: how much red it has, from 0 to 10."""
    return round(float(np.asarray(open_image(row["bytes"]))[..., 0].mean()) / 25.5, 1)


def table_of(rows: list[dict[str, Any]], **columns: list[Any]) -> Dataset:
    images = [{"bytes": row["bytes"], "path": None} for row in rows]
    return Dataset.from_dict({"image": images, **columns}).cast_column("image", Image())


def scored(rows: list[dict[str, Any]]) -> Dataset:
    return table_of(rows, score=[brightness(row) for row in rows], digit=[row["label"] for row in rows])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> Path:
    """40 images to train on and 20 to measure on. Tests must not write there."""
    folder = tmp_path_factory.mktemp("scored") / "data"
    DatasetDict(train=scored(rows[:40]), test=scored(rows[40:])).save_to_disk(folder)
    return folder


def test_scores_are_those_of_ridge_regression(small_clip: Clip, place: Path, rows: list[dict[str, Any]]):
    found = evaluate_head(*small_clip, place, score_column="score")
    features = encode_images(*small_clip, [row["bytes"] for row in rows]).double()
    scores = torch.tensor([brightness(row) for row in rows], dtype=torch.float64)
    ridge = RidgeCV(LAMBDAS).fit(
        features[:40].numpy(), ((scores[:40] - scores[:40].mean()) / scores[:40].std()).numpy()
    )
    predicted = torch.from_numpy(ridge.predict(features[40:].numpy()))
    assert found.metrics["spearman"] == pytest.approx(spearman(predicted, scores[40:]))
    assert found.value == found.metrics["spearman"] > 0.5
    expected = predicted * scores[:40].std() + scores[:40].mean()
    assert found.metrics["mean_absolute_error"] == pytest.approx(float((expected - scores[40:]).abs().mean()), abs=1e-4)
    torch.testing.assert_close(found.head.score(features[40:])[:, 0].double(), expected, rtol=1e-4, atol=1e-4)
    assert (found.count, found.trained_on, found.split, found.precision) == (20, 40, "test", "float32")
    assert found.protocol.startswith("linear head on normalised features, ridge regression, λ = ")
    assert found.protocol.endswith("trained on 40 images of train, measured on the split test")
    found.head.check_model(*small_clip)
    stock = evaluate_head(stock_model(small_clip[0]), small_clip[1], place, score_column="score")
    stock.head.check_model(*small_clip)  # `classify` loads the same files as a model of ours


def test_one_split_is_divided(small_clip: Clip, rows: list[dict[str, Any]]):
    found = evaluate_head(*small_clip, scored(rows), score_column="score", hidden=16)
    assert (found.count, found.trained_on) == (12, 48)
    assert found.protocol.startswith("MLP head on normalised features, 16 hidden units, ")
    assert found.protocol.endswith("measured on a fifth of it, held out at random")
    again = evaluate_head(*small_clip, scored(rows), score_column="score", hidden=16)
    assert again.metrics == found.metrics


def test_one_split_by_two_names_is_divided(small_clip: Clip, tmp_path: Path, rows: list[dict[str, Any]]):
    write_class_folders(tmp_path / "data" / "val", rows)
    found = evaluate_head(*small_clip, tmp_path / "data", train_split="val", split="validation")
    assert (found.count, found.trained_on) == (12, 48)


def test_labels(small_clip: Clip, rows: list[dict[str, Any]]):
    table = table_of(rows, label=[row["label"] % 2 for row in rows])
    table = table.cast_column("label", ClassLabel(names=["even", "odd"]))
    found = evaluate_head(*small_clip, table)
    assert found.head.labels == ["even", "odd"]
    assert set(found.metrics) == {"acc1", "mean_per_class_recall", "roc_auc"}
    assert found.count == 12
    assert "logistic regression, C = " in found.protocol
    of_ten = table_of(rows, label=[row["label"] for row in rows]).cast_column("label", ClassLabel(names=DIGITS))
    assert set(evaluate_head(*small_clip, of_ten).metrics) == {"acc1", "acc5", "mean_per_class_recall"}


def test_score_that_is_no_number_names_its_row(small_clip: Clip, rows: list[dict[str, Any]]):
    for value in (float("nan"), None):
        scores = [brightness(row) for row in rows]
        scores[7] = value  # type: ignore[call-overload]
        message = rf"row 7 of the data set has {value} in its column 'score', but a score, a finite number, is needed"
        with pytest.raises(ScoreError, match=message) as caught:
            evaluate_head(*small_clip, table_of(rows, score=scores), score_column="score")
        assert caught.value.index == 7


def test_columns_and_splits_that_do_not_fit(small_clip: Clip, place: Path, rows: list[dict[str, Any]]):
    with pytest.raises(
        ValueError, match=r"has no column 'beauty'; its columns are image, score, digit\. Name the right"
    ):
        evaluate_head(*small_clip, place, score_column="beauty")
    with pytest.raises(ValueError, match=r"has no split 'training'; its splits are train, test"):
        evaluate_head(*small_clip, place, score_column="score", train_split="training")
    with pytest.raises(
        ValueError, match="A head is trained on scores or on labels: name a column of scores, or labels"
    ):
        evaluate_head(*small_clip, place, score_column="score", label_column="digit")
    with pytest.raises(ValueError, match="The hidden layer has width 0, but at least 1 is needed"):
        evaluate_head(*small_clip, place, score_column="score", hidden=0)
    texts = table_of(rows, score=[row["caption"] for row in rows])
    with pytest.raises(ValueError, match=r"the column 'score' holds .*string.*, but scores, numbers, are needed"):
        open_scored(texts, score_column="score")
    classes = scored(rows).cast_column("digit", ClassLabel(names=DIGITS))
    with pytest.raises(ValueError, match=r"the column 'digit' holds ClassLabel.* Of classes a head is trained with"):
        open_scored(classes, score_column="digit")


def test_what_nothing_can_be_measured_on(small_clip: Clip, tmp_path: Path, rows: list[dict[str, Any]]):
    constant = table_of(rows[40:], score=[5.0] * 20, digit=[0] * 20)
    DatasetDict(train=scored(rows[:40]), test=constant).save_to_disk(tmp_path / "data")
    with pytest.raises(
        ValueError, match="All 20 held-out images have one score, so nothing can be measured: check the"
    ):
        evaluate_head(*small_clip, tmp_path / "data", score_column="score")
    with pytest.raises(ValueError, match="All 20 training images have the score 5, so there is nothing to learn"):
        evaluate_head(*small_clip, tmp_path / "data", score_column="score", train_split="test", split="train")
    two = table_of(rows[:2], score=[1.0, 2.0], digit=[0, 1])
    with pytest.raises(ValueError, match="There are 1 training images beside the 1 held out, but a head needs at lea"):
        evaluate_head(*small_clip, two, score_column="score")
    large = table_of(rows[:20], score=[1.0] * 19 + [-1e39])
    message = r"row 19 of the data set has -1e\+39 in its column 'score', but a score from -1e\+30 to 1e\+30 is needed"
    with pytest.raises(ScoreError, match=message):
        evaluate_head(*small_clip, large, score_column="score")
    one = table_of(rows, label=["zero"] * 60)
    with pytest.raises(ValueError, match="There is only one class, 'zero': every image would be right"):
        evaluate_head(*small_clip, one)


def test_splits_with_other_classes(small_clip: Clip, tmp_path: Path, rows: list[dict[str, Any]]):
    def split(chosen: list[dict[str, Any]]) -> Dataset:
        return table_of(chosen, label=[DIGITS[row["label"]] for row in chosen])

    fewer = [row for row in rows[40:] if row["label"] != 3]
    DatasetDict(train=split(rows[:40]), test=split(fewer)).save_to_disk(tmp_path / "data")
    with pytest.raises(
        ValueError, match=r"The splits 'train' and 'test' of .* have different classes: '\w+' is not in"
    ):
        evaluate_head(*small_clip, tmp_path / "data")
    names = [DIGITS[place] for place in range(10)]
    assert evaluate_head(*small_clip, tmp_path / "data", class_names=names).head.labels == names


def test_images_that_cannot_be_opened_end_the_task(small_clip: Clip, rows: list[dict[str, Any]]):
    broken = [{**row, "bytes": b"no image"} if place < 5 else row for place, row in enumerate(rows)]
    table = table_of(broken, score=[brightness(row) for row in rows])
    with pytest.raises(UnreadableImagesError, match="images cannot be opened, more than 1%"):
        evaluate_head(*small_clip, table, score_column="score")
