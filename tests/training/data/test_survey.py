"""What is seen of the data before anything is loaded or written."""

from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from transformers import ProcessorMixin

from hf_clip.training.data.collator import PairCollator
from hf_clip.training.data.load_pairs import load_pairs
from hf_clip.training.data.survey import OPENED, describe_captions, look_at

from ..sources import captions, png, write_pictures, write_table

pytestmark = [
    pytest.mark.usefixtures("prepared_here"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # `datasets` leaves tables open
]

STREAMING = pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])


def table_of(folder: Path, **columns: list) -> str:
    write_pictures(folder)
    return str(write_table(folder / "table.csv", columns))


NAMES = [f"image{index}.png" for index in range(6)]
SWAPPED = {"image_column": "text", "caption_column": "image"}


@STREAMING
@pytest.mark.parametrize(
    ("columns", "chosen", "message"),
    [
        (
            {"image": NAMES, "text": captions()},
            SWAPPED,
            "the captions are paths or URLs of images, such as 'image0.png', and no image was found either: the two "
            r"columns may be swapped \(image_column is 'text' and caption_column 'image'\)",
        ),
        (
            {"image": ["https://host/a", "https://host/b"], "text": captions(2)},
            SWAPPED,
            "the captions are paths or URLs of images, such as 'https://host/a', and no image was found either",
        ),
        (
            {"image": NAMES, "other": NAMES},
            {"caption_column": "other"},
            r"paths or URLs of images, such as 'image0.png' \(image_column is 'image' and caption_column 'other'\)",
        ),
        (
            {"image": ["a.png", "b.png"], "text": captions(2)},
            {},
            "none of the 2 rows that were looked at can be used; row 0 .*: there is no image 'a.png'",
        ),
        ({"image": NAMES, "text": [" "] * 6}, {}, "none of the 6 rows .* can be used; row 0 .*: its caption is empty"),
    ],
    ids=["swapped", "swapped URLs", "two of names", "no files", "no captions"],
)
def test_columns_that_cannot_be_meant_are_refused(
    columns: dict, chosen: dict, message: str, streaming: bool, tmp_path: Path
):
    pairs = load_pairs(table_of(tmp_path, **columns), streaming=streaming, **chosen)
    with pytest.raises(ValueError, match=message) as error:
        look_at(pairs)
    assert len(str(error.value).splitlines()) == 1
    assert "--image_column and --caption_column" in str(error.value)


@STREAMING
def test_one_usable_row_is_enough_and_servers_are_not_asked(streaming: bool, tmp_path: Path):
    texts = ["a.png of a cat", "b.png", *captions(4)]
    pairs = load_pairs(table_of(tmp_path, image=["no.png"] * 5 + NAMES[:1], text=texts), streaming=streaming)
    look = look_at(pairs)
    assert (look.draws, look.is_whole, look.captions) == (6, True, texts)
    urls = ["http://127.0.0.1:9/never.png"] * 6
    look_at(load_pairs(table_of(tmp_path / "urls", image=urls, text=captions()), streaming=streaming))


@STREAMING
def test_every_source_is_looked_at(streaming: bool, tmp_path: Path):
    good = table_of(tmp_path / "good", image=NAMES, text=captions())
    bad = table_of(tmp_path / "bad", image=["no.png"] * 6, text=captions())
    with pytest.raises(ValueError, match="bad/table.csv: none of the 6 rows that were looked at can be used"):
        look_at(load_pairs([good, bad], streaming=streaming))


def test_rows_of_a_table_are_taken_from_all_of_it_and_of_a_stream_from_its_beginning(tmp_path: Path):
    """A sorted table whose first rows cannot be used is no table whose columns are wrong."""
    count = 20 * OPENED
    columns = {"image": [b"bad"] * (count // 2) + [png(1)] * (count // 2), "caption": captions(count)}
    source = str(write_table(tmp_path / "table.parquet", columns))
    look = look_at(load_pairs(source), 40)
    assert (look.draws, look.is_whole, len(look.captions)) == (count, True, 40)
    assert look.captions[0] == "caption number 0"
    assert look.captions[-1] == f"caption number {count - 1}"
    with pytest.raises(ValueError, match="none of the 16 rows that were looked at can be used"):
        look_at(load_pairs(source, streaming=True), 40)
    columns["image"].reverse()
    reversed_ = str(write_table(tmp_path / "reversed.parquet", columns))
    look = look_at(load_pairs(reversed_, streaming=True), 40)
    assert (look.draws, look.is_whole, look.captions) == (40, False, captions(40))


# --- captions --------------------------------------------------------------------------------------------------------


def lines_of(processor: ProcessorMixin, texts: list[str], is_masked: bool = True) -> list[str]:
    return describe_captions(texts, PairCollator(processor), is_masked=is_masked)


LONG = " ".join("a" * 30)
"""30 tokens and two special ones, where the model takes 20."""


def test_captions_that_fit_and_differ_need_no_words(processor: ProcessorMixin):
    assert lines_of(processor, captions(10)) == []
    assert lines_of(processor, []) == []
    exact = " ".join("a" * 18)
    assert len(processor.tokenizer(exact).input_ids) == 20  # what just fits is not cut
    assert lines_of(processor, [exact, *captions(3)]) == []


def test_cut_captions_are_counted(processor: ProcessorMixin):
    assert lines_of(processor, [LONG, *captions(99)]) == [
        "note: 1 of 100 captions that were looked at are cut at the model's 20 tokens. Shorten them, or take a model "
        "of longer texts (--max_text_length)."
    ]
    (line,) = lines_of(processor, [f"{index} {LONG}" for index in range(4)] + captions(96))
    assert line.startswith("warning: 4 of 100 captions that were looked at are cut at the model's 20 tokens. ")


def test_captions_that_become_equal_by_the_cut_are_warned_of(processor: ProcessorMixin):
    lines = lines_of(processor, [f"{LONG} cat", f"{LONG} dog", *captions(198)])
    assert lines[0].startswith(
        "warning: 2 of 200 captions that were looked at are cut at the model's 20 tokens, and 2 of those differ from "
        "others only behind the cut. "
    )
    assert lines[1].startswith("note: 2 of 200 captions that were looked at come several times")
    lines = lines_of(processor, [f"{LONG} {index}" for index in range(50)])
    assert "50 of 50 captions" in lines[0]
    assert lines[1:] == ["warning: all 50 captions that were looked at are one text to the model; it learns nothing."]


def test_repeated_captions_are_said_with_what_becomes_of_them(processor: ProcessorMixin):
    texts = ["a photo of a cat.", "a photo of a dog."] * 5 + ["a bird", "A CAT", "a cat"]
    how = "12 of 13 captions that were looked at come several times; equal ones in a batch are"
    assert lines_of(processor, texts) == [
        f"note: {how} no negatives of each other (--mask_duplicates off makes them so)."
    ]
    assert lines_of(processor, texts, is_masked=False) == [
        f"note: {how} negatives of each other, as --mask_duplicates off says."
    ]


def test_classes_of_folders_are_captions_that_repeat(tmp_path: Path, processor: ProcessorMixin):
    features = Features({"image": Value("binary"), "label": ClassLabel(names=["cat", "dog"])})
    rows = {"image": [png(0)] * 40, "label": [0] * 20 + [1] * 20}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    look = look_at(load_pairs(str(tmp_path / "data"), caption_column="a photo of a {label}."))
    (line,) = lines_of(processor, look.captions)
    assert line.startswith("note: 40 of 40 captions that were looked at come several times")
