"""Wrong captions of rows: from which columns they come, what of them is in a batch, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from transformers import ProcessorMixin

from hf_clip.training.config import TrainingConfig
from hf_clip.training.data.bad_rows import BadRows
from hf_clip.training.data.collator import PairCollator
from hf_clip.training.data.load_pairs import load_pairs, with_replay
from hf_clip.training.data.loader import build_loader
from hf_clip.training.data.pairs import Pairs, PairStream
from hf_clip.training.data.survey import check_negatives, describe_negatives, look_at
from hf_clip.training.run_data import open_data

from ...finetuning import largest_difference, records, train, weights
from ..sources import loader_of, png, text_ids, write_tar

pytestmark = pytest.mark.usefixtures("prepared_here")

NAMES = ["cat", "dog", "owl"]
ROWS: dict[str, list[Any]] = {
    "caption": ["one", "two", "three", "four"],
    "wrong": ["uno", None, " ", "quattro"],
    "more": [["eins", ""], [], None, ["vier", "quattro", "IV"]],
    "label": [0, 1, None, 2],
}
EXPECTED = [["uno", "eins"], [], [], ["quattro", "vier", "IV"]]


@pytest.fixture
def source(tmp_path: Path) -> str:
    features = Features({"image": Value("binary"), "caption": Value("string"), "wrong": Value("string")})
    features |= {"more": List(Value("string")), "label": ClassLabel(names=NAMES)}
    Dataset.from_dict({"image": [png(n) for n in range(4)], **ROWS}, features=features).save_to_disk(tmp_path / "data")
    return str(tmp_path / "data")


def negatives_of(pairs: Pairs | PairStream) -> list[list[str]]:
    return [pairs.read(draw).negatives for draw in pairs.draws(0, shuffle=False)]


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_rows_have_all_texts_of_all_columns_and_may_have_none(source: str, streaming: bool):
    """The captions' column is found without its name, which the others could have been too."""
    pairs = load_pairs(source, negative_caption_column=["wrong", "more"], streaming=streaming)
    assert negatives_of(pairs) == EXPECTED
    assert [pairs.read(draw).captions for draw in pairs.draws(0, shuffle=False)] == [[text] for text in ROWS["caption"]]
    template = load_pairs(source, caption_column="caption", negative_caption_column=["no {label}"], streaming=streaming)
    assert negatives_of(template) == [["no cat"], ["no dog"], [], ["no owl"]]


def test_fields_of_a_tars_records_may_hold_them(tmp_path: Path):
    path = write_tar(tmp_path / "shard.tar", [png(0), png(1)], ["zero", "one"])
    pairs = load_pairs(str(path), caption_column="txt", negative_caption_column=["json.long"], streaming=True)
    assert negatives_of(pairs) == [["a long zero"], ["a long one"]]


def test_template_that_cannot_be_filled_is_a_bad_row(source: str):
    pairs = load_pairs(source, caption_column="caption", negative_caption_column=["{more[2]}"])
    rows = [pairs.read(draw) for draw in pairs.draws(0, shuffle=False)]
    assert rows[3].negatives == ["IV"]
    assert rows[0].reason == (
        "of its negative captions: its caption cannot be made (IndexError: list index out of range)"
    )


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("absent", "has no column 'absent'; its columns are image, caption, wrong, more, label. Name the right one "
        "with --negative_caption_column."),
        ("caption", "--negative_caption_column is 'caption', which holds the captions themselves; name a column of "),
        ("image", "image_column and negative_caption_column are both 'image'; name one for each."),
        ("label", "texts are needed: one for each row, or a list of them. Of labels a template makes captions: "
        '--negative_caption_column "a photo of a {label}."'),
        ("not {that}", "The template 'not {that}' asks for 'that', but the columns of"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_meant_are_refused(source: str, named: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_pairs(source, image_column="image", caption_column="caption", negative_caption_column=[named])


@pytest.mark.parametrize("validation", ["test", "its own"])
def test_wrong_captions_are_not_taken_for_those_to_evaluate_on(tmp_path: Path, validation: str):
    """The column of the right ones is found since it is the only other one."""
    rows = {"image": [png(n) for n in range(4)], "legend": ROWS["caption"], "wrong": ["not it"] * 4}
    for split in ("train", "test"):
        Dataset.from_dict(rows).to_parquet(tmp_path / "data" / f"{split}.parquet")
    Dataset.from_dict(rows).to_parquet(tmp_path / "own.parquet")
    named = str(tmp_path / "own.parquet") if validation == "its own" else validation
    options = {"dataset": [str(tmp_path / "data")], "negative_caption_column": ["wrong"], "validation": [named]}
    config = TrainingConfig(variant="RN50", output_dir="out", max_steps=1, **options)
    data = open_data(config)
    assert data.validation is not None
    for pairs in (data.train, data.validation):
        captions = [text for draw in pairs.draws(0, shuffle=False) for text in pairs.read(draw).captions]
        assert captions == ROWS["caption"]


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"negative_caption_column": ["caption"]}, "--negative_caption_column is 'caption', by whose name it holds the "
        "captions themselves; name another column, or name that of the captions with --caption_column."),
        ({"negative_caption_column": ["wrong", "image"]}, "--negative_caption_column is 'image', which is the column "
        "that looks like the images; name a column of texts, or name the images' own with --image_column."),
        ({"negative_caption_column": ["{image}"], "caption_column": "caption"}, "The template '{image}' makes texts of "
        "'image', which holds the images; name columns of texts or labels in it."),
        ({"caption_column": "{image}"}, "The template '{image}' makes texts of 'image', which holds the images; "),
    ],
)  # fmt: skip
def test_column_that_rather_holds_something_else_is_refused(tmp_path: Path, named: dict[str, Any], message: str):
    features = Features({"image": Image(), "caption": Value("string"), "wrong": Value("string")})
    rows = {"image": [{"bytes": png(0), "path": None}], "caption": ["one"], "wrong": ["two"]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=re.escape(message)):
        load_pairs(str(tmp_path / "data"), **named)


def test_column_of_a_captions_name_is_taken_where_the_captions_are_named(source: str):
    pairs = load_pairs(source, caption_column="wrong", negative_caption_column=["caption"])
    assert negatives_of(pairs)[0] == ["one"]


def test_column_without_any_text_is_refused(source: str, processor: ProcessorMixin):
    collator = PairCollator(processor)
    named = ["wrong", "more"]
    pairs = load_pairs(source, negative_caption_column=named)
    check_negatives(look_at(pairs), named)
    note = (
        "note: 1.25 negative captions a row; 2 of 4 rows that were looked at have none. The reported accuracy is among "
        "the pairs alone."
    )
    assert describe_negatives(look_at(pairs), collator, is_masked=True) == [note]
    assert describe_negatives(look_at(pairs), collator, is_masked=False)[1].startswith(
        "note: --mask_duplicates off: an image is"
    )
    for source_table in pairs.sources:
        source_table.rows = source_table.rows[1:3]
    message = (
        "--negative_caption_column wrong more would have no effect: none of the 2 rows that were looked at has a text "
        "there. Name another column, or leave it out."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_negatives(look_at(pairs), named)
    without = load_pairs(source, caption_column="caption")
    check_negatives(look_at(without), [])
    assert describe_negatives(look_at(without), collator, is_masked=True) == []


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
def test_batch_has_their_tokens_behind_those_of_the_pairs(source: str, processor: ProcessorMixin, streaming: bool):
    pairs = load_pairs(source, negative_caption_column=["wrong", "more"], streaming=streaming)
    counts = BadRows()
    loader = loader_of(pairs, processor, training=False, augmentation=None, bad_rows=counts)
    (batch,) = loader.epoch()
    wrong = [text for row in EXPECTED for text in row]
    assert batch["negative_text_ids"].tolist() == text_ids(processor, wrong)
    assert batch["text_ids"].tolist() == text_ids(processor, ROWS["caption"])
    assert len(batch["pixel_values"]) == 4
    assert len(batch["input_ids"]) == len(batch["attention_mask"]) == 4 + len(wrong)
    tokens = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert tokens == [processor.tokenizer(text).input_ids for text in ROWS["caption"] + wrong]
    assert (counts.drawn, counts.negatives, counts.cut) == (4, 5, 0)
    again = BadRows()
    again.load_state_dict(counts.state_dict())
    assert again.negatives == 5


def test_negative_that_equals_any_caption_of_its_row_is_left_out(tmp_path: Path, processor: ProcessorMixin):
    """Whichever is drawn, and as the model reads them. `--mask_duplicates off` keeps it."""
    rows = {"image": [png(0), png(1)], "caption": [["one", "A  One", ""], ["two"]]}
    rows["wrong"] = [["a one", "two", "ten"], ["one", "Two"]]  # "two" and "one" are of the other row
    Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    pairs = load_pairs(str(tmp_path / "data"), negative_caption_column=["wrong"])

    def negatives_in(keep_own: bool) -> list[int]:
        collator = PairCollator(processor, keep_own=keep_own)
        (batch,) = build_loader(pairs, collator, 2, training=False, bad_rows=BadRows()).epoch()
        return batch["negative_text_ids"].tolist()

    assert negatives_in(keep_own=False) == text_ids(processor, ["two", "ten", "one"])
    assert negatives_in(keep_own=True) == text_ids(processor, ["a one", "two", "ten", "one", "Two"])
    collator = PairCollator(processor)
    note = "note: 2 of 5 negative captions that were looked at equal a caption of their own row"
    assert describe_negatives(look_at(pairs), collator, is_masked=True)[1:] == [f"{note}, and are left out."]
    said = describe_negatives(look_at(pairs), collator, is_masked=False)
    assert said[1] == f"{note}; --mask_duplicates off keeps them."
    (look := look_at(pairs)).texts[0].negatives = ["one", "a one", "A  one"]
    look.texts[1].negatives = ["two", "Two"]
    said = describe_negatives(look, collator, is_masked=True)
    assert said[1].startswith("warning: all 5 negative captions that were looked at equal a caption of their own row, ")


def test_negative_that_is_too_long_is_cut_and_its_row_counted(tmp_path: Path, processor: ProcessorMixin):
    longest = processor.tokenizer.model_max_length
    rows = {"image": [png(0), png(1)], "caption": ["one", "two"], "wrong": ["one " * 100, "one"]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    pairs, counts = load_pairs(str(tmp_path / "data"), negative_caption_column=["wrong"]), BadRows()
    (batch,) = loader_of(pairs, processor, 2, training=False, bad_rows=counts).epoch()
    assert batch["attention_mask"].sum(1).tolist()[2] == longest
    assert counts.cut == 1


def test_replayed_pairs_need_none(source: str, tmp_path: Path):
    Dataset.from_dict({"image": [png(9)], "caption": ["old"]}).save_to_disk(tmp_path / "old")
    both = with_replay(load_pairs(source, negative_caption_column=["wrong"]), load_pairs(str(tmp_path / "old")), 0.5)
    rows = [both.read(draw) for draw in both.draws(0)]
    assert sum(row.captions == ["old"] for row in rows) == 4
    assert all(row.negatives == [] for row in rows if row.captions == ["old"])
    assert sorted(text for row in rows for text in row.negatives) == ["quattro", "uno"]


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swapped(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, of which all but every tenth have a wrong caption of another colour."""
    from datasets import load_from_disk

    pairs = load_from_disk(str(digits / "pairs"))["train"]
    wrong = [
        None if number % 10 == 0 else text.replace("red", "green") if "red" in text else f"{text} in red"
        for number, text in enumerate(pairs["caption"])
    ]
    folder = tmp_path_factory.mktemp("swapped") / "pairs"
    pairs.add_column("wrong", wrong).save_to_disk(folder)
    return folder


def test_run_learns_from_them_in_parts_and_goes_on_as_if_never_interrupted(
    digits: Path, swapped: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Held-out rows are measured as without them, and micro-batches change nothing but rounding."""
    chosen: dict[str, Any] = {"dataset": str(swapped), "negative_caption_column": "wrong", "validation": "100"}
    chosen |= {"max_steps": 3, "save_steps": 2, "logging_steps": 1, "optim": "SGD", "learning_rate": "1e-2"}
    whole = train(digits, tmp_path / "whole", **chosen)
    said = capsys.readouterr().err
    assert "negative captions a row; " in said
    assert "note: captions are those of caption, since no --caption_column is given.\n" in said
    assert all(record["negative_captions"] == pytest.approx(0.9, abs=0.05) for record in records(whole))
    shorter = {"negative_caption_column": None, "max_steps": 1, "save_steps": None}
    without = train(digits, tmp_path / "without", **(chosen | shorter))
    assert "negative_captions" not in records(without)[0]
    pairs = [records(folder, "recall@1")[0] for folder in (whole, without)]
    assert pairs[0] == pairs[1]  # before the first step
    assert records(whole)[0]["loss"] > records(without)[0]["loss"]
    parts = train(digits, tmp_path / "parts", micro_batch_size=24, **chosen)
    assert largest_difference(weights(whole), weights(parts)) < 1e-6
    uninterrupted, before = weights(whole), records(whole)
    train(digits, whole, resume_from_checkpoint="latest", **chosen)
    assert largest_difference(weights(whole), uninterrupted) == 0
    assert [record["negative_captions"] for record in records(whole)] == [r["negative_captions"] for r in before]
    assert "| negative caption column | wrong |" in (whole / "README.md").read_text()
    assert json.loads((whole / "training_config.json").read_text())["negative_caption_column"] == ["wrong"]


def test_stored_features_of_images_change_nothing(digits: Path, swapped: Path, tmp_path: Path):
    chosen: dict[str, Any] = {"dataset": str(swapped), "negative_caption_column": "wrong", "lock": "image"}
    chosen |= {"max_steps": 2, "augmentation": "none", "optim": "SGD", "learning_rate": "1e-2"}
    plain = train(digits, tmp_path / "plain", **chosen)
    stored = train(digits, tmp_path / "stored", cache_frozen_features=True, **chosen)
    assert largest_difference(weights(plain), weights(stored)) < 1e-6
    assert records(plain)[-1]["negative_captions"] == records(stored)[-1]["negative_captions"] > 0
