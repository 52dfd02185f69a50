"""Retrieval on a data set, and compositionality, from end to end."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Image

from hf_clip.data.columns import UnusableRowError
from hf_clip.data.images import ImageRegion
from hf_clip.evaluation.captioned_images import choices_table
from hf_clip.evaluation.composition import evaluate_composition
from hf_clip.evaluation.embedder import open_stored
from hf_clip.evaluation.metrics import recall_at_k
from hf_clip.evaluation.numbered_row import CaptionedRowError
from hf_clip.evaluation.retrieval import evaluate_retrieval, retrieval_metrics
from hf_clip.zero_shot.features import encode_images, encode_texts

from ..neighbours.stock import stock_model
from .data_sets import captioned, write_shards

Clip = tuple[Any, Any]


def distinct(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of which no two have equal captions."""
    return list({row["caption"]: row for row in rows}.values())


def test_metrics_checked_by_hand():
    """Images find a right text at 1, 2 and 7; texts find their image at 1, 1, 3 and 30."""
    found = retrieval_metrics(torch.tensor([0, 1, 6]), torch.tensor([0, 0, 2, 29]))
    assert found["text_retrieval_recall@1"] == pytest.approx(1 / 3)
    assert found["text_retrieval_recall@5"] == pytest.approx(2 / 3)
    assert found["text_retrieval_recall@10"] == 1
    assert found["image_retrieval_recall@1"] == 0.5
    assert found["image_retrieval_recall@10"] == 0.75
    assert found["mean_recall@1"] == pytest.approx((1 / 3 + 0.5) / 2)
    assert (found["text_retrieval_median_rank"], found["image_retrieval_median_rank"]) == (2, 2)


def test_figures_are_those_of_the_metrics(small_clip: Clip, rows: list[dict[str, Any]]):
    given = distinct(rows)
    found = evaluate_retrieval(*small_clip, captioned(given), batch_size=16)
    images = encode_images(*small_clip, [row["bytes"] for row in given])
    texts = encode_texts(*small_clip, [row["caption"] for row in given])
    ids = torch.arange(len(given))
    for k, value in recall_at_k(texts, images, ids, ids).items():
        assert found.metrics[f"image_retrieval_recall@{k}"] == pytest.approx(value)
    for k, value in recall_at_k(images, texts, ids, ids).items():
        assert found.metrics[f"text_retrieval_recall@{k}"] == pytest.approx(value)
    assert (found.images, found.texts, found.value) == (len(given), len(given), found.metrics["mean_recall@1"])
    assert found.protocol == "retrieval, captions cut at 24 tokens, equal similarities count against the model"


def test_image_in_several_rows_is_one_image(small_clip: Clip, tmp_path: Path, rows: list[dict[str, Any]]):
    """A row for each caption, a column of lists, and lines in tars: the same figures."""
    given = distinct(rows)[:12]
    captions = [[row["caption"], f"{row['caption']} once more"] for row in given]
    flat = [{**row, "caption": text} for row, texts in zip(given, captions, strict=True) for text in texts]
    lists = captioned(given).remove_columns("caption").add_column("captions", captions)
    shards = write_shards(
        tmp_path / "wds", [{**row, "captions": c} for row, c in zip(given, captions, strict=True)], "retrieval", 5
    )
    found = [evaluate_retrieval(*small_clip, source) for source in (captioned(flat), lists, shards)]
    assert [(result.images, result.texts) for result in found] == [(12, 24)] * 3
    assert found[0].metrics == found[1].metrics == found[2].metrics


def test_hubs_are_corrected_by_other_data(small_clip: Clip, rows: list[dict[str, Any]]):
    given = distinct(rows)
    found = evaluate_retrieval(
        *small_clip, captioned(given[:20]), references=captioned(given[20:]), hub_correction=0.75, hub_k=8
    )
    assert found.corrected.keys() == found.metrics.keys()
    assert found.corrected != found.metrics
    count = len(given) - 20
    assert f"corrected: 0.75 times the mean of 8 of {count} reference texts and of {count}" in found.protocol
    with pytest.raises(ValueError, match=r"The correction of hubs needs both its factor and reference queries"):
        evaluate_retrieval(*small_clip, captioned(given[:20]), hub_correction=0.75)


def test_labels_are_no_captions(small_clip: Clip, tmp_path: Path, rows: list[dict[str, Any]]):
    folder = write_shards(tmp_path / "wds", rows[:3])
    with pytest.raises(ValueError, match=r"wds has labels and no captions .*; evaluate zero-shot on it\."):
        evaluate_retrieval(*small_clip, folder)


def test_one_image_is_nothing_to_search_among(small_clip: Clip, rows: list[dict[str, Any]]):
    with pytest.raises(ValueError, match=r"has 1 images, but at least 2 are needed to search among\."):
        evaluate_retrieval(*small_clip, captioned(rows[:1]))


def test_cached_features_give_the_same_figures(small_clip: Clip, tmp_path: Path, rows: list[dict[str, Any]]):
    folder = write_shards(tmp_path / "wds", distinct(rows), "retrieval")
    first, second = (evaluate_retrieval(*small_clip, folder, feature_cache=tmp_path / "cache") for _ in range(2))
    assert first.metrics == second.metrics
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1


def two_images(rows: list[dict[str, Any]], count: int) -> Dataset:
    """Winoground's layout."""
    sides = {
        f"image_{side}": [{"bytes": row["bytes"], "path": None} for row in rows[side : 2 * count : 2]]
        for side in (0, 1)
    }
    texts = {f"caption_{side}": [row["caption"] for row in rows[side : 2 * count : 2]] for side in (0, 1)}
    return Dataset.from_dict(sides | texts).cast_column("image_0", Image()).cast_column("image_1", Image())


def test_composition_with_two_images(small_clip: Clip, rows: list[dict[str, Any]]):
    given = distinct(rows)
    found = evaluate_composition(*small_clip, two_images(given, 15))
    images = encode_images(*small_clip, [row["bytes"] for row in given[:30]])
    texts = encode_texts(*small_clip, [row["caption"] for row in given[:30]])
    right = {"text_score": 0, "image_score": 0, "group_score": 0}
    for pair in range(0, 30, 2):
        (a, b), (c, d) = (images[pair : pair + 2] @ texts[pair : pair + 2].T).tolist()
        text, image = a > b and d > c, a > c and d > b
        right = {
            name: right[name] + is_right for name, is_right in zip(right, (text, image, text and image), strict=True)
        }
    assert found.metrics == pytest.approx({name: number / 15 for name, number in right.items()})
    assert found.count == 15


@pytest.mark.parametrize("columns", [("caption", "negative_caption"), ("true_caption", "false_caption")])
def test_composition_with_wrong_captions(small_clip: Clip, rows: list[dict[str, Any]], columns: tuple[str, str]):
    given = distinct(rows)[:20]
    wrong = [given[place - 1]["caption"] for place in range(20)]
    data = captioned(given).rename_column("caption", "x").add_column(columns[1], wrong).rename_column("x", columns[0])
    images = encode_images(*small_clip, [row["bytes"] for row in given])
    texts = encode_texts(*small_clip, [row["caption"] for row in given])
    similarities = images @ texts.T
    right = sum(bool(similarities[place, place] > similarities[place, place - 1]) for place in range(20))
    found = evaluate_composition(*small_clip, data)
    assert found.metrics == {"text_score": pytest.approx(right / 20)}
    assert found.protocol.startswith(f"composition, an image, {columns[0]} and {columns[1]}; equal")
    stock = evaluate_composition(stock_model(small_clip[0]), small_clip[1], data)
    assert stock.metrics == found.metrics


def with_options(rows: list[dict[str, Any]], place: int, count: int = 3) -> Dataset:
    """ARO's layout: the right caption stands at one place among all."""
    options = [
        [rows[(number + side) % len(rows)]["caption"] for side in range(count)][::-1] for number in range(len(rows))
    ]  # of row 0: captions 2, 1, 0
    options = [[*texts[:-1][:place], texts[-1], *texts[:-1][place:]] for texts in options]
    return captioned(rows).remove_columns("caption").add_column("caption_options", options)


def test_right_caption_stands_at_a_place_among_the_options(small_clip: Clip, rows: list[dict[str, Any]]):
    given = distinct(rows)[:12]
    similarities = (
        encode_images(*small_clip, [row["bytes"] for row in given])
        @ encode_texts(*small_clip, [row["caption"] for row in given]).T
    )
    others = [[(place + 1) % 12, (place + 2) % 12] for place in range(12)]
    right = sum(
        bool((similarities[place, place] > similarities[place, wrong]).all()) for place, wrong in enumerate(others)
    )
    for place in range(3):
        found = evaluate_composition(*small_clip, with_options(given, place), right_index=place)
        assert found.metrics == {"text_score": pytest.approx(right / 12)}
    assert found.protocol.startswith("composition, an image, caption_options, of which 2 is right; equal")


def test_place_of_the_right_caption_is_not_guessed(rows: list[dict[str, Any]]):
    data = with_options(rows[:4], 0)
    with pytest.raises(ValueError, match=r"has caption_options, and not which of them is right: name its place with"):
        choices_table(data)
    with pytest.raises(ValueError, match=r"^row 0 of the data set has 3 caption_options, but a wrong one and one at "):
        next(choices_table(data, right_index=3).rows())
    with pytest.raises(ValueError, match=r"--right-index is 1, but the data set has no column caption_options; its"):
        choices_table(captioned(rows[:2]), right_index=1)


def test_box_of_aro_is_what_the_model_sees(rows: list[dict[str, Any]]):
    """In the columns of visual_genome_relation.json, and with the four wrong captions of the tests of order."""
    data = captioned(rows[:1]).rename_column("caption", "correct_caption")
    for name, value in {"bbox_x": 3, "bbox_y": 1, "bbox_w": 9, "bbox_h": 14}.items():
        data = data.add_column(name, [value])
    for number in (1, 2):
        data = data.add_column(f"hard_text_{number}", [f"wrong {number}"])
    found = choices_table(data)
    (row,) = found.rows()
    assert row.captions == [rows[0]["caption"], "wrong 1", "wrong 2"]
    assert found.layout == "the box of an image, correct_caption and hard_text_1, hard_text_2"
    whole = np.asarray(open_stored({"bytes": rows[0]["bytes"]}))
    assert np.array_equal(np.asarray(open_stored(row.images[0])), whole[1:15, 3:12])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bbox_x": None}, "row 1 of the data set has the box [None, 1.0, 9.0, 14.0], but pixels are needed, bbox_x"),
        ({"bbox_y": math.inf}, "row 1 of the data set has the box [3.0, inf, 9.0, 14.0], but pixels are needed"),
        ({"bbox_x": 1e12}, "row 1 of the data set has the box [1000000000000.0, 1.0, 9.0, 14.0], but pixels"),
        ({"bbox_w": -4.0}, "row 1 of the data set has a box of -4x14 pixels, but one from 1x1 to 67,108,864 pixels"),
        ({"bbox_w": 2e5, "bbox_h": 2e5}, "row 1 of the data set has a box of 200000x200000 pixels, but one from"),
        ({"wrong_caption": None}, "row 1 of the data set has the caption None, but a text is needed; leave the row"),
    ],
)
def test_row_that_cannot_be_chosen_from_is_named(rows: list[dict[str, Any]], changed: dict[str, Any], message: str):
    data = captioned(rows[:2])
    given = {"bbox_x": 3.0, "bbox_y": 1.0, "bbox_w": 9.0, "bbox_h": 14.0, "wrong_caption": "wrong"}
    for name, value in given.items():
        data = data.add_column(name, [value, changed.get(name, value)])
    with pytest.raises(CaptionedRowError, match=re.escape(message)) as caught:
        list(choices_table(data).rows())
    assert caught.value.index == 1


def test_box_outside_of_its_image_cannot_be_opened(rows: list[dict[str, Any]]):
    with pytest.raises(UnusableRowError, match=r"its box \(999, 0, 1008, 9\) lies outside of its image of \d+x\d+"):
        open_stored(ImageRegion({"bytes": rows[0]["bytes"]}, (999, 0, 1008, 9)))


def test_options_of_captions_without_effect(rows: list[dict[str, Any]]):
    data = with_options(rows[:4], 0)
    with pytest.raises(ValueError, match=r"--right-index is 0, a place in the column caption_options: leave --right-c"):
        choices_table(data, right_index=0, right_column="caption_options")
    numbers = captioned(rows[:2]).add_column("caption_options", [1, 2])
    with pytest.raises(ValueError, match=r"the column 'caption_options' holds Value\('int64'\), but texts are needed"):
        choices_table(numbers, right_index=0)
    pair = captioned(rows[:1]).rename_columns({"image": "image_0", "caption": "caption_0"})
    pair = pair.add_column("image_1", [b"x"]).add_column("caption_1", ["y"])
    with pytest.raises(ValueError, match=r"of which each caption is right for one image: leave --right-column"):
        choices_table(pair, right_index=0)


def test_composition_without_wrong_captions_is_an_error(small_clip: Clip, rows: list[dict[str, Any]]):
    with pytest.raises(
        ValueError, match=r"no column looks like the wrong captions .*; its columns are image, caption\."
    ):
        evaluate_composition(*small_clip, captioned(rows[:2]))
