"""Rows that cannot be used: skipped, counted, logged, replaced; too many of them end the run."""

import logging
import os
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import ProcessorMixin

from hf_clip.data.columns import UnusableRowError
from hf_clip.data.images import ImagePlaces, find_image_places, image_content
from hf_clip.training.data.bad_rows import BadRows, find_refusal, part_cut
from hf_clip.training.data.load_pairs import load_pairs

from ..sources import COUNT, captions, loader_of, png, text_ids, write_table

pytestmark = [
    pytest.mark.usefixtures("prepared_here"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # `datasets` leaves tables open
]

CPU = torch.device("cpu")
STREAMING = pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])


@STREAMING
@pytest.mark.parametrize("workers", [0, 1])
def test_training_goes_past_images_that_cannot_be_decoded(
    shard_with_bad_rows: str,
    processor: ProcessorMixin,
    streaming: bool,
    workers: int,
    caplog: pytest.LogCaptureFixture,
):
    """A truncated file, a text and an empty file are skipped; an image with a damaged EXIF block is shown."""
    bad_rows = BadRows(0.2)
    pairs = load_pairs(shard_with_bad_rows, streaming=streaming)
    loader = loader_of(pairs, processor, 11, num_workers=workers, bad_rows=bad_rows)
    with caplog.at_level(logging.WARNING):
        batches = list(loader.epoch())
    assert [len(batch["text_ids"]) for batch in batches] == [11, 11]
    counts = Counter(number for batch in batches for number in batch["text_ids"].tolist())
    good = [text for index, text in enumerate(captions(COUNT)) if index not in (3, 4, 9)]
    assert set(counts) == set(text_ids(processor, good))
    assert (bad_rows.bad, bad_rows.drawn) == (3, 22)
    lines = sorted(record.getMessage() for record in caplog.records if record.name == "hf_clip.training.data.bad_rows")
    assert len(lines) == 3
    for place in (3, 4, 9):
        start = f"({place:05d}.jpg) in epoch 0: " if streaming else f"skipped: row {place} of "
        assert sum(start in line for line in lines) == 1, lines
    assert sum("cannot identify image file" in line for line in lines) == 2
    assert sum("truncated" in line for line in lines) == 1
    assert not any("0x" in line or "leave it out" in line for line in lines)


@STREAMING
def test_row_behind_the_batch_steps_in(tmp_path: Path, processor: ProcessorMixin, streaming: bool):
    images = [png(index) for index in range(12)]
    images[1] = images[2] = images[5] = b"bad"  # 5 is the first that would step in for 1
    source = str(write_table(tmp_path / "table.parquet", {"image": images, "caption": captions(12)}))
    pairs = load_pairs(source, streaming=streaming)
    in_order = pairs.draws
    pairs.draws = lambda epoch, **how: in_order(epoch, **(how | {"shuffle": False}))  # type: ignore[method-assign]
    batch = next(loader_of(pairs, processor, 4).epoch())
    assert batch["text_ids"].tolist() == text_ids(processor, [f"caption number {index}" for index in (0, 6, 6, 3)])


def test_batch_that_loses_all_rows_is_full_all_the_same(tmp_path: Path, processor: ProcessorMixin):
    images = [b"bad"] * 2 + [png(index) for index in range(2, 12)]
    source = str(write_table(tmp_path / "table.parquet", {"image": images, "caption": captions(12)}))
    pairs = load_pairs(source, streaming=True, buffer=1)
    bad_rows = BadRows(1.0)
    loaders = [
        loader_of(pairs, processor, 2, num_processes=2, process_index=index, bad_rows=bad_rows) for index in range(2)
    ]
    first, second = (next(loader.epoch()) for loader in loaders)
    assert first["text_ids"].tolist() == text_ids(processor, [f"caption number {index}" for index in (4, 5)])
    assert second["text_ids"].tolist() == text_ids(processor, [f"caption number {index}" for index in (2, 3)])
    assert bad_rows.bad == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_data_without_a_usable_row_is_refused_in_one_line(tmp_path: Path, processor: ProcessorMixin, workers: int):
    columns = {"image": [b"bad"] * 12, "caption": captions(12)}
    pairs = load_pairs(str(write_table(tmp_path / "table.parquet", columns)))
    with pytest.raises(ValueError, match=r"row \d+ of .* cannot be used .*, nor can any of the 8 rows that") as error:
        next(loader_of(pairs, processor, num_workers=workers).epoch())
    assert len(str(error.value).splitlines()) == 1


def test_empty_caption_counts_as_a_bad_row(tmp_path: Path, processor: ProcessorMixin, caplog: pytest.LogCaptureFixture):
    columns = {"image": [png(index) for index in range(4)], "caption": ["a", " ", "c", "d"]}
    pairs = load_pairs(str(write_table(tmp_path / "table.parquet", columns)))
    bad_rows = BadRows()
    list(loader_of(pairs, processor, 2, bad_rows=bad_rows).epoch())
    refusal = find_refusal([bad_rows], CPU)  # after the epoch, so of four rows and not of a thousand
    assert refusal.startswith("1 of 4 rows cannot be used, more than --max_bad_fraction 0.01 allows; the f")
    assert "row 1 of" in caplog.text
    assert "its caption is empty" in caplog.text


def test_a_few_bad_rows_among_the_first_end_no_run_and_too_many_do():
    bad = [("row 7", "broken")]
    rows = BadRows(0.01)
    for _ in range(10):
        rows.add(10, bad)
    assert find_refusal([rows], CPU) == ""
    rows.add(10, bad)
    assert find_refusal([rows], CPU).startswith("11 of 110 rows cannot be used, ")
    rows = BadRows(0.01)
    rows.add(2000, bad * 20)
    rows.complete()
    assert find_refusal([rows], CPU) == ""
    rows.add(50, bad)
    assert find_refusal([rows], CPU).startswith("21 of 2050 rows")
    rows = BadRows(0.0)
    rows.add(5, [])
    rows.complete()
    assert find_refusal([rows], CPU) == ""
    rows.add(5, bad)
    assert find_refusal([rows], CPU).startswith("1 of 10 rows")
    with pytest.raises(ValueError, match="max_bad_fraction is 2, but must be from 0 to 1"):
        BadRows(2)


def test_run_counts_and_leaves_it_to_the_processes_to_stop_together(caplog: pytest.LogCaptureFixture):
    rows, others = BadRows(0.01), BadRows(0.01)
    with caplog.at_level(logging.WARNING):
        for _ in range(10):
            rows.add(100, [("row 7", "broken")])
        assert find_refusal([others, rows], CPU) == ""  # ten of a thousand
        rows.add(100, [("row 8", "empty")])
        assert len(caplog.records) == 2  # each row once
    assert (rows.bad, rows.drawn) == (11, 1100)
    assert find_refusal([others, rows], CPU) == ""
    rows.add(0, [("row 9", "empty")])
    message = "12 of 1100 rows cannot be used, more than --max_bad_fraction 0.01 allows; the first is row 7: broken."
    assert find_refusal([others, rows], CPU) == message
    others.add(50, [("row 1", "broken")])
    assert find_refusal([others], CPU) == ""
    others.complete()  # those were all
    assert find_refusal([others], CPU).startswith("1 of 50 rows cannot be used")
    others.restart()
    others.complete()
    assert find_refusal([others], CPU) == ""


def test_count_of_bad_rows_outlives_an_interruption():
    rows, later = BadRows(0.5), BadRows(0.5)
    rows.add(10, [("row 1", "broken")])
    later.load_state_dict(rows.state_dict())
    assert (later.drawn, later.bad, later.first) == (10, 1, "row 1: broken")


# --- rows that point out of their data set ---------------------------------------------------------------------------


@pytest.fixture
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with an image that no data set is to find, and the folder of a data set beside it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "private.png").write_bytes(png(1))
    with zipfile.ZipFile(tmp_path / "home" / "private.zip", "w") as archive:
        archive.write(tmp_path / "home" / "private.png", "private.png")
    (tmp_path / "data" / "images").mkdir(parents=True)
    (tmp_path / "data" / "images" / "own.png").write_bytes(png(2))
    (tmp_path / "data" / "images" / "link.png").symlink_to(tmp_path / "home" / "private.png")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def ways_to(file: Path) -> list[str]:
    """Every way in which a row may name a file of this machine that lies beside its data set's folder."""
    archive, name = file.with_suffix(".zip"), file.name
    return [
        str(file), f"file://{file}", f"local://{file}", f"~/{name}", f"../{file.parent.name}/{name}", name,
        f"images/../../{file.parent.name}/{name}", "images/link.png", f"linked/{name}", f"simplecache::file://{file}",
        f"simplecache::{file}", f"filecache://{file}", f"simplecache://{name}::file://{file}", f"reference://::{file}",
        f"zip://{name}::{archive}", f"zip://{name}::file://{archive}", f"zip://{name}::~/{archive.name}",
        f"zip://{name}::simplecache::file://{archive}", f"dir://{name}::file://{file.parent}",
        "hf://datasets/somebody/private/image.png", "s3://bucket/image.png", "ssh://host/image.png",
    ]  # fmt: skip


@STREAMING
def test_rows_that_point_out_of_their_data_set_are_bad_rows(private: Path, streaming: bool):
    data = private.parent / "data"
    ways = ways_to(private / "private.png")
    columns = {"image": ["images/own.png", str(data / "images" / "own.png"), *ways], "caption": captions(len(ways) + 2)}
    pairs = load_pairs(str(write_table(data / "table.csv", columns)), streaming=streaming)
    first, second, *others = [pairs.read(draw) for draw in pairs.draws(0, shuffle=False)]
    assert image_content(first.image, first.places) == image_content(second.image, second.places) == png(2)
    for row in others:
        with pytest.raises(UnusableRowError) as error:
            image_content(row.image, row.places)
        if row.image in ("private.png", f"simplecache::{private}/private.png"):  # none such in `data`
            assert str(error.value) == f"there is no image {row.image!r}"
        else:
            outside = f"its image {row.image!r} lies outside of the data set's folder {data}; if you trust the rows, al"
            assert str(error.value).startswith(outside)


def test_rows_from_elsewhere_name_no_file_of_this_machine(private: Path):
    for source in ("user/pairs", "user/pairs:small", "https://example.org/pairs.csv", "hf://datasets/user/pairs/*.csv"):
        places = find_image_places(source, None)
        for way in ways_to(private / "private.png"):
            for stored in (way, {"bytes": None, "path": way}):
                with pytest.raises(UnusableRowError, match=r"^its image '.*' lies outside of the data set; if you tr"):
                    image_content(stored, places)
    with pytest.raises(UnusableRowError, match="lies outside of the data set"):
        image_content(str(private / "private.png"), ImagePlaces())


def test_rows_of_a_repository_find_what_was_downloaded_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hf_clip.data.images.HF_HUB_CACHE", str(tmp_path))
    blob, snapshot = (tmp_path / "datasets--user--pairs" / name for name in ("blobs", "snapshots/1a2b"))
    for folder in (blob, snapshot):
        folder.mkdir(parents=True)
    (blob / "3c4d").write_bytes(png(3))
    (snapshot / "a.png").symlink_to("../../blobs/3c4d")  # as huggingface_hub keeps them
    places = find_image_places("user/pairs:small", None)
    assert image_content(str(snapshot / "a.png"), places) == png(3)
    for address, is_of_it in (("pairs/a.png", True), ("pairs@1a2b/a.png", True), ("pairs-2/a.png", False)):
        assert f"hf://datasets/user/{address}".startswith(places.remote) == is_of_it
    with pytest.raises(UnusableRowError, match="lies outside of the data set"):
        image_content(str(snapshot / "a.png"), find_image_places("user/other", None))


def test_folders_that_the_user_names_are_allowed(private: Path):
    data = private.parent / "data"
    ways = ways_to(private / "private.png")
    columns = {"image": ways, "caption": captions(len(ways))}
    source = str(write_table(data / "table.csv", columns))
    pairs = load_pairs(source, image_folders=["~", "memory://bucket"])
    found = []
    for draw in pairs.draws(0, shuffle=False):
        row = pairs.read(draw)
        try:
            found.append((row.image, image_content(row.image, row.places)))
        except UnusableRowError as error:
            assert "lies outside of" in str(error) or "there is no" in str(error)  # noqa: PT017
    assert {content for _, content in found} == {png(1)}
    names = {name for name, _ in found}
    assert names >= {str(private / "private.png"), "~/private.png", "../home/private.png", "images/link.png"}
    assert not any("cache" in name or name.startswith(("hf:", "s3:", "ssh:", "dir:")) for name in names)
    import fsspec

    with fsspec.open("memory://bucket/a.png", "wb") as file:
        file.write(png(4))
    places = find_image_places(source, data, ["memory://bucket"])
    assert image_content("memory://bucket/a.png", places) == png(4)
    for address in ("memory://bucket/../a.png", "memory://bucketeer/a.png"):
        with pytest.raises(UnusableRowError, match="lies outside of the data set's folder"):
            image_content(address, places)
    with pytest.raises(ValueError, match=r"--image_folders names .*nowhere, which is no folder; check the path"):
        load_pairs(source, image_folders=[str(private / "nowhere")])


def test_what_is_no_plain_file_is_not_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "endless.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "circle.png").symlink_to("circle.png")
    for name in ("endless.png", "folder.png", "circle.png", "a\0b.png", "x" * 5000):
        with pytest.raises(UnusableRowError, match=r"^there is no image|^its image .* cannot be read") as error:
            image_content(name, find_image_places(str(tmp_path), tmp_path))
        assert len(str(error.value)) < 1000


def test_archive_member_is_limited_as_an_address_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hf_clip.data.images.MAX_BYTES", 2**20)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(2**20 + 1))
    with pytest.raises(UnusableRowError, match=r"its image 'zip://a.png::a.zip' cannot be read \(it is larger than 1 "):
        image_content("zip://a.png::a.zip", find_image_places(str(tmp_path), tmp_path))


# --- captions that cannot be tokenized -------------------------------------------------------------------------------

HOSTILE = f"a cat &#{'9' * 5000}; on a mat"
"""Python refuses to make a number of so many digits; a tokenizer may too."""


@STREAMING
@pytest.mark.parametrize(
    ("error", "workers"),
    [(ValueError, 0), (ValueError, 1), (OverflowError, 0), (RecursionError, 0), (KeyError, 0), (None, 0)],
    ids=["value", "in a worker", "overflow", "recursion", "key", "the tokenizer's own"],
)
def test_caption_that_cannot_be_tokenized_counts_as_a_bad_row(
    tmp_path: Path,
    processor: ProcessorMixin,
    streaming: bool,
    workers: int,
    error: type[Exception] | None,
    monkeypatch: pytest.MonkeyPatch,
):
    """Whatever is raised, or nothing: the others are trained on, and the accounting knows the row."""
    if error is not None:
        encode = type(processor.tokenizer).__call__

        def refuse(self, text, *args, **kwargs):
            if HOSTILE in (text if isinstance(text, list) else [text]):
                raise error(f"int has 5000 digits: {text}")
            return encode(self, text, *args, **kwargs)

        monkeypatch.setattr(type(processor.tokenizer), "__call__", refuse)
    texts = captions(12)
    texts[5] = HOSTILE
    source = str(write_table(tmp_path / "table.parquet", {"image": [png(i) for i in range(12)], "caption": texts}))
    bad_rows = BadRows(0.05)
    loader = loader_of(load_pairs(source, streaming=streaming), processor, 4, num_workers=workers, bad_rows=bad_rows)
    batches = list(loader.epoch())
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 4]
    assert (bad_rows.drawn, bad_rows.bad) in ([(12, 1)] if error else [(12, 0), (12, 1)])
    if error is not None:
        assert find_refusal([bad_rows], CPU).startswith(
            "1 of 12 rows cannot be used, more than --max_bad_fraction 0.05"
        )
        assert f"its caption cannot be tokenized ({error.__name__}: " in bad_rows.first
        assert len(bad_rows.first) < 400  # and not five thousand digits


def test_data_of_which_no_caption_can_be_tokenized_is_refused_in_one_line(
    tmp_path: Path, processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*args, **kwargs):
        raise TypeError("no tokenizer")

    source = str(write_table(tmp_path / "table.parquet", {"image": [png(0)] * 12, "caption": captions(12)}))
    monkeypatch.setattr(type(processor.tokenizer), "__call__", refuse)
    with pytest.raises(
        ValueError, match=r"cannot be used \(its caption cannot be tokenized \(TypeError: no tokenizer\)"
    ):
        next(loader_of(load_pairs(source), processor).epoch())


# --- captions that are cut -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_cut_captions_are_counted_over_all_processes_and_interruptions(
    tmp_path: Path, processor: ProcessorMixin, workers: int
):
    texts = captions(12)
    for place in (1, 4, 7):
        texts[place] = " ".join(["word"] * 40)
    texts[9] = " ".join("a" * 18)  # 20 tokens, which is what the model takes
    source = str(write_table(tmp_path / "table.parquet", {"image": [png(i) for i in range(12)], "caption": texts}))
    bad_rows = BadRows()
    loader = loader_of(load_pairs(source), processor, 4, num_workers=workers, bad_rows=bad_rows)
    list(loader.epoch())
    assert (bad_rows.cut, bad_rows.bad) == (3, 0)
    assert part_cut(bad_rows, CPU) == 3 / 12
    later = BadRows()
    assert part_cut(later, CPU) == 0
    later.load_state_dict(bad_rows.state_dict())
    assert part_cut(later, CPU) == 3 / 12
    later.load_state_dict({"drawn": 1, "bad": 0, "first": ""})  # of a run before they were counted
    assert part_cut(later, CPU) == 0
