"""Every source that can be named: opened, its columns found, its rows read, as a table and as a stream."""

import base64
import http.server
import re
import sys
import threading
import zipfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from fsspec.registry import known_implementations

from hf_clip.data.columns import UnusableRowError, describe_feature, find_image_column
from hf_clip.data.images import find_image_places, image_content, open_content
from hf_clip.data.sources import Source, expand_braces, parse_sources, readable
from hf_clip.training.data.load_pairs import load_pairs, with_replay
from hf_clip.training.data.pair_table import Row
from hf_clip.training.data.pairs import Pairs, PairStream

from ..sources import SMALL, WRITERS, captions, jpeg, png, write_pictures, write_table, write_tar

pytestmark = [
    pytest.mark.usefixtures("prepared_here"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # `datasets` leaves tables open
]

STREAMING = pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])


def rows_of(pairs: Pairs | PairStream, **how: Any) -> list[Row]:
    return [pairs.read(draw) for draw in pairs.draws(0, **({"shuffle": False} | how))]


def grey(row: Row) -> int:
    """What the images of `png` show."""
    return open_content(image_content(row.image, row.places)).convert("RGB").getpixel((0, 0))[0]


@pytest.mark.parametrize("kind", WRITERS)
@STREAMING
def test_source_is_read_without_being_told_its_columns(kind: str, streaming: bool, tmp_path: Path):
    pairs = load_pairs(WRITERS[kind](tmp_path), streaming=streaming)
    rows = rows_of(pairs)
    assert [row.captions for row in rows] == [[caption] for caption in captions()]
    assert [grey(row) for row in rows] == [10 * index for index in range(SMALL)]
    assert all(row.reason is None for row in rows)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object, **kwargs: object):
            super().__init__(*args, directory=str(tmp_path), **kwargs)  # type: ignore[misc]

        def log_message(self, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@STREAMING
def test_images_are_fetched_by_their_urls(streaming: bool, tmp_path: Path, server: str):
    urls = [f"{server}/{name}" for name in write_pictures(tmp_path)]
    table = write_table(tmp_path / "table.csv", {"url": [*urls, f"{server}/missing.png"], "caption": captions(7)})
    rows = rows_of(load_pairs(str(table), streaming=streaming))
    assert [grey(row) for row in rows[:-1]] == [10 * index for index in range(SMALL)]
    with pytest.raises(UnusableRowError, match=r"its image 'http://127.*missing.png' cannot be read .*404"):
        image_content(rows[-1].image)


def test_image_within_an_archive_is_read(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("some/image.png", png(4))
    places = find_image_places(str(tmp_path), tmp_path)
    address = f"zip://some/image.png::{tmp_path / 'images.zip'}"
    for stored in (address, {"bytes": None, "path": address}, "zip://some/image.png::images.zip"):
        assert image_content(stored, places) == png(4)
    assert image_content("data:image/png;base64," + base64.b64encode(png(5)).decode()) == png(5)
    with pytest.raises(UnusableRowError, match="image 'zip://other.png"):
        image_content(f"zip://other.png::{tmp_path / 'images.zip'}", places)
    with pytest.raises(UnusableRowError, match="its image is missing"):
        image_content({"bytes": None, "path": None})


def test_configuration_of_a_repository_is_named_behind_a_colon(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def load_dataset(*names: object, streaming: bool) -> dict:
        asked.append((*names, streaming))
        return {"train": Dataset.from_dict({"image": [png(0)], "caption": ["a"]})}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_pairs("user/pairs:small")
    load_pairs("user/pairs")
    assert asked == [("user/pairs", "small", False), ("user/pairs", None, False)]


def test_relative_paths_begin_at_the_tables_folder_and_else_where_the_program_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "here.png").write_bytes(png(1))
    (tmp_path / "b" / "here.png").write_bytes(png(2))
    (tmp_path / "b" / "there.png").write_bytes(png(3))
    monkeypatch.chdir(tmp_path / "b")
    columns = {"image": ["here.png", "there.png"], "caption": ["one", "two"]}
    source = str(write_table(tmp_path / "a" / "table.csv", columns))
    rows = rows_of(load_pairs(source, image_folders=["."]))
    assert [grey(row) for row in rows] == [10, 30]
    rows = rows_of(load_pairs(source))
    assert grey(rows[0]) == 10
    with pytest.raises(UnusableRowError, match=r"^there is no image 'there.png'$"):
        image_content(rows[1].image, rows[1].places)
    monkeypatch.chdir(tmp_path)
    columns = {"image": ["a/here.png"], "caption": ["from the folder above"]}
    (row,) = rows_of(load_pairs(str(write_table(tmp_path / "a" / "table.csv", columns))))
    assert grey(row) == 10


@STREAMING
def test_folders_that_are_classes_become_captions_by_a_template(streaming: bool, tmp_path: Path):
    for label in ("cat", "dog"):
        write_pictures(tmp_path / "train" / label, 2)
    pairs = load_pairs(str(tmp_path), caption_column="a photo of a {label}.", label_column="label", streaming=streaming)
    rows = rows_of(pairs)
    assert [row.captions for row in rows] == [["a photo of a cat."]] * 2 + [["a photo of a dog."]] * 2
    assert [row.label for row in rows] == [0, 0, 1, 1]


def test_template_takes_several_columns_and_what_is_within_them(tmp_path: Path):
    source = str(write_tar(tmp_path / "shard.tar", [png(0)], ["a cat"]))
    (row,) = rows_of(load_pairs(source, caption_column="{txt}: {json[long]} {{}}"))
    assert row.captions == ["a cat: a long a cat {}"]


def test_label_without_a_name_makes_no_caption(tmp_path: Path):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["cat", "dog"]), "note": Value("string")})
    rows = {"image": [{"bytes": png(0), "path": None}] * 4, "label": [1, -1, None, 0], "note": ["x", "x", "x", " "]}
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    read = rows_of(load_pairs(str(tmp_path / "data"), caption_column="a {label}, {note}"))
    assert [row.captions for row in read] == [["a dog, x"], [], [], []]
    assert [row.reason for row in read] == [
        None, "its label is -1, which has no name", "its label is empty", "its note is empty",
    ]  # fmt: skip


@STREAMING
def test_empty_captions_are_no_error_yet_and_have_a_reason(streaming: bool, tmp_path: Path):
    columns = {"image": [png(0)] * 3, "caption": ["a cat", None, "  "]}
    rows = rows_of(load_pairs(str(write_table(tmp_path / "table.parquet", columns)), streaming=streaming))
    assert [row.reason for row in rows] == [None, "its caption is empty", "its caption is empty"]


@STREAMING
def test_all_captions_of_an_image_make_a_row_each(streaming: bool, tmp_path: Path):
    columns = {"image": [png(index) for index in range(4)], "captions": [["a", "b"], ["c"], [], ["d", None, "e"]]}
    source = str(write_table(tmp_path / "table.parquet", columns))
    pairs = load_pairs(source, captions="all", streaming=streaming)
    drawn = [(draw.row, draw.caption) for draw in pairs.draws(0, shuffle=False)]
    empty = -1 if streaming else 0  # of a row without captions, which is drawn to be reported
    assert drawn == [(0, 0), (0, 1), (1, 0), (2, empty), (3, 0), (3, 1), (3, 2)]
    assert [row.captions for row in rows_of(load_pairs(source, streaming=streaming))] == [
        ["a", "b"], ["c"], [], ["d", "", "e"],
    ]  # fmt: skip


# --- mixing ----------------------------------------------------------------------------------------------------------


def two_sources(folder: Path, sizes: tuple[int, int] = (30, 10)) -> list[str]:
    """One with stored images and captions, one with paths and texts."""
    first = {"image": [png(1)] * sizes[0], "caption": [f"first {index}" for index in range(sizes[0])]}
    (folder / "image.png").write_bytes(png(2))
    second = {"path": ["image.png"] * sizes[1], "text": [f"second {index}" for index in range(sizes[1])]}
    tables = [write_table(folder / "first.parquet", first), write_table(folder / "second.csv", second)]
    return [str(table) for table in tables]


@STREAMING
def test_sources_without_weights_are_read_once_each(streaming: bool, tmp_path: Path):
    pairs = load_pairs(two_sources(tmp_path), streaming=streaming)
    for shuffle in (False, True):
        rows = rows_of(pairs, shuffle=shuffle)
        expected = [f"first {index}" for index in range(30)] + [f"second {index}" for index in range(10)]
        assert sorted(row.captions[0] for row in rows) == sorted(expected)
        assert all(grey(row) == (10 if row.captions[0].startswith("first") else 20) for row in rows)


def test_weights_are_shares_of_every_epoch_and_rows_of_a_source_come_equally_often(tmp_path: Path):
    first, second = two_sources(tmp_path)
    pairs = load_pairs([f"{first}=1", f"{second}=3"])
    seen: list[str] = []
    for epoch in range(4):
        texts = [pairs.read(draw).captions[0] for draw in pairs.draws(epoch, seed=5)]
        assert len(texts) == len(pairs) == 40
        assert sum(text.startswith("first") for text in texts) == 10
        seen += texts
    counts = {text: seen.count(text) for text in seen}
    assert {counts[f"first {index}"] for index in range(30)} == {1, 2}  # 40 draws of 30 rows
    assert {counts[f"second {index}"] for index in range(10)} == {12}
    assert len({(draw.row, draw.round) for draw in pairs.draws(0, seed=5) if draw.source == 1}) == 30
    drawn = [{draw.row for draw in pairs.draws(0, seed=seed) if draw.source == 0} for seed in (5, 6)]
    assert drawn[0] != drawn[1] != set(range(10))  # what an epoch has no room for depends on the seed


def test_weights_are_probabilities_of_a_stream_that_ends_when_all_was_read(tmp_path: Path):
    first, second = two_sources(tmp_path, (300, 10))
    pairs = load_pairs([f"{first}=0.75", f"{second}=0.25"], streaming=True)
    texts = [row.captions[0] for row in rows_of(pairs, seed=1, shuffle=True)]
    assert {text for text in texts if text.startswith("first")} == {f"first {index}" for index in range(300)}
    share = sum(text.startswith("second") for text in texts) / len(texts)
    assert 0.18 < share < 0.32  # 0.25, give or take three standard deviations
    assert texts == [row.captions[0] for row in rows_of(pairs, seed=1, shuffle=True)]
    assert len(rows_of(pairs)) == 310  # in evaluation every row comes once


def test_replayed_pairs_have_their_share_and_the_others_come_as_without_them(tmp_path: Path):
    first, second = two_sources(tmp_path)
    new, old = load_pairs(first), load_pairs(second)
    pairs = with_replay(new, old, 0.25)
    assert len(pairs) == 40  # of which 30 rows are new
    seen: list[str] = []
    for epoch in range(2):
        texts = [pairs.read(draw).captions[0] for draw in pairs.draws(epoch, seed=5)]
        assert {text for text in texts if text.startswith("first")} == {f"first {index}" for index in range(30)}
        assert len(texts) == 40
        seen += texts
    assert {seen.count(f"second {index}") for index in range(10)} == {2}
    both = with_replay(load_pairs([f"{first}=1", f"{first}=2"]), old, 0.4)
    assert both.shares() == [20, 40, 40]


def test_replayed_pairs_of_a_stream_have_their_share(tmp_path: Path):
    first, second = two_sources(tmp_path, (300, 10))
    old = load_pairs(second, streaming=True)
    pairs = with_replay(load_pairs(first, streaming=True), old, 0.25)
    texts = [row.captions[0] for row in rows_of(pairs, seed=1, shuffle=True)]
    assert len({text for text in texts if text.startswith("first")}) == 300
    assert 0.18 < sum(text.startswith("second") for text in texts) / len(texts) < 0.32
    with pytest.raises(ValueError, match="other sources need theirs: give each --dataset a weight, as in .*=1"):
        with_replay(load_pairs([first, second], streaming=True), old, 0.25)


def test_weight_is_told_from_a_path_with_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "year=2020").mkdir()
    assert Source.parse("org/name=0.5") == Source("org/name", 0.5)
    assert Source.parse("year=2020") == Source("year=2020")
    assert Source.parse("year=2020=2") == Source("year=2020", 2.0)
    assert Source.parse("day=mon/x.csv") == Source("day=mon/x.csv")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["a=1", "b"], "b has no weight, but others have; write path=weight for all, or for none"),
        (["a.csv=x", "b=1"], "a.csv=x: there is no such file, and 'x' is no weight: write path=weight with a number"),
        (["a="], "a=: there is no such file, and '' is no weight"),
        (["a=nan"], "a=nan: the weight of a source must be above 0"),
        (["a=0", "b=1"], "a=0: the weight of a source must be above 0"),
        ([], "There is no data set to read"),
    ],
)
def test_wrong_weights_are_refused(sources: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        parse_sources(sources)


def test_sources_may_be_paths_and_come_in_any_list():
    expected = [Source("a"), Source("b/c")]
    for given in (
        ["a", Path("b/c")],
        np.array(["a", "b/c"]),
        (name for name in ("a", "b/c")),
        Dataset.from_dict({"name": ["a", "b/c"]})["name"],
    ):
        assert parse_sources(given) == expected
    assert parse_sources(Path("b/c")) == expected[1:]


# --- names of files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("{008..011}.tar", ["008.tar", "009.tar", "010.tar", "011.tar"]),
        ("{8..11}.tar", ["8.tar", "9.tar", "10.tar", "11.tar"]),
        ("{0..10..5}.tar", None),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}-{0..1}.tar", ["a-0.tar", "a-1.tar", "b-0.tar", "b-1.tar"]),
        ("{a,b{0..1},c{x,y}}.tar", ["a.tar", "b0.tar", "b1.tar", "cx.tar", "cy.tar"]),
        ("https://host/{00..01}.tar", ["https://host/00.tar", "https://host/01.tar"]),
        ("open{0.tar", ["open{0.tar"]),
        ("x{,2}.tar", ["x.tar", "x2.tar"]),
        ("{one}.tar", None),
    ],
)  # fmt: skip
def test_braces_mean_what_they_mean_in_a_shell(name: str, expected: list[str] | None):
    if expected is None:
        with pytest.raises(ValueError, match=r"is no range \{000..012\} and no list \{a,b\}; write one, or no braces"):
            expand_braces(name)
    else:
        assert expand_braces(name) == expected


@STREAMING
def test_tars_are_named_by_braces_and_none_may_be_missing(streaming: bool, tmp_path: Path):
    for name, start in (("part-a", 0), ("part-b", 4)):
        (tmp_path / name).mkdir()
        for half in (0, 2):
            place = start + half
            write_tar(
                tmp_path / name / f"{half // 2:03}.tar", [png(place), png(place + 1)], captions(8)[place : place + 2]
            )
    pairs = load_pairs(str(tmp_path / "part-{a,b}" / "{000..001}.tar"), streaming=streaming)
    rows = rows_of(pairs)
    assert [row.captions for row in rows] == [[caption] for caption in captions(8)]
    assert [grey(row) for row in rows] == [10 * index for index in range(8)]
    with pytest.raises(FileNotFoundError, match=r"no file has this name: .*part-a/002.tar"):
        load_pairs(str(tmp_path / "part-{a,b}" / "{000..002}.tar"), streaming=streaming)
    with pytest.raises(ValueError, match=r"are files of different kinds; name them apart"):
        load_pairs(str(tmp_path / "part-a" / "{000.tar,001.csv}"), streaming=streaming)


def test_relative_paths_begin_where_the_files_of_a_pattern_lie_together(tmp_path: Path):
    """Rows of one folder never take the images of another that are called alike."""
    for index, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(png(index))
        write_table(tmp_path / name / "table.csv", {"image": [f"{name}/x.png"], "caption": [name]})
    for pattern in ("{a,b}/table.csv", "[ab]/table.csv"):
        rows = rows_of(load_pairs(str(tmp_path / pattern)))
        assert [grey(row) for row in rows] == [0, 10]
    assert find_image_places("https://host/x/{a,b}/{0..3}.csv", None).remote == ("https://host/x/",)


def test_file_with_braces_in_its_name_is_that_file(tmp_path: Path):
    table = write_table(tmp_path / "a{1,2}.csv", {"image": ["x.png"], "caption": ["a cat"]})
    assert rows_of(load_pairs(str(table)))[0].captions == ["a cat"]


@STREAMING
@pytest.mark.parametrize("mark", [";", "\t", "|"], ids=["semicolon", "tab", "bar"])
def test_table_with_other_separators_than_commas_is_read(mark: str, streaming: bool, tmp_path: Path):
    (tmp_path / "table.csv").write_text(f"image{mark}caption\nx.png{mark}a cat, asleep\ny.png{mark}a dog\n")
    rows = rows_of(load_pairs(str(tmp_path / "table.csv"), streaming=streaming))
    assert [(row.image, row.captions) for row in rows] == [("x.png", ["a cat, asleep"]), ("y.png", ["a dog"])]


def test_table_that_came_as_one_column_is_told_what_is_in_the_way():
    with pytest.raises(ValueError, match="its columns are image;caption. .*or write the table with commas, where it h"):
        find_image_column("data", {"image;caption": Value("string")}, None)


# --- fields within columns -------------------------------------------------------------------------------------------


@STREAMING
@pytest.mark.parametrize("column", ["json.long", "{json.long}", "{json[long]}"])
def test_captions_are_fields_of_a_tars_json(column: str, streaming: bool, tmp_path: Path):
    source = str(write_tar(tmp_path / "shard.tar", [png(0), png(1)], ["a cat", "a dog"]))
    pairs = load_pairs(source, caption_column=column, streaming=streaming)
    assert [row.captions for row in rows_of(pairs)] == [["a long a cat"], ["a long a dog"]]
    with pytest.raises(ValueError, match="has no column 'json.short'; its columns are .*json.id, json.long"):
        load_pairs(source, caption_column="json.short", streaming=streaming)
    with pytest.raises(ValueError, match=r"asks for 'long', but the columns of .* Did you mean \{json\.long\}\?$"):
        load_pairs(source, caption_column="a {long}", streaming=streaming)
    with pytest.raises(ValueError, match="the column 'json.id' holds .*int64.*, but texts are needed"):
        load_pairs(source, caption_column="json.id", streaming=streaming)


@STREAMING
def test_fields_are_found_without_being_named_and_may_hold_several_captions(streaming: bool, tmp_path: Path):
    about = [{"captions": ["a", "b"], "url": "x.png"}, {"captions": ["c"], "url": "y.png"}]
    table = Dataset.from_dict({"image": [png(0), png(1)], "json": about})
    table.save_to_disk(tmp_path / "data")
    pairs = load_pairs(str(tmp_path / "data"), captions="all", streaming=streaming)
    assert [(draw.row, draw.caption) for draw in pairs.draws(0, shuffle=False)] == [(0, 0), (0, 1), (1, 0)]
    assert rows_of(pairs)[0].captions == ["a", "b"]
    rows = rows_of(load_pairs(str(tmp_path / "data"), image_column="json.url", streaming=streaming))
    assert [row.image for row in rows] == ["x.png", "y.png"]


# --- what is there, and what isn't -----------------------------------------------------------------------------------


def test_images_stay_undecoded(tmp_path: Path):
    features = Features({"image": ImageFeature(), "caption": Value("string")})
    rows = {"image": [{"bytes": png(0), "path": None}], "caption": ["a"]}
    datasets.DatasetDict(train=Dataset.from_dict(rows, features=features)).save_to_disk(tmp_path / "data")
    for streaming in (False, True):
        pairs = load_pairs(str(tmp_path / "data"), streaming=streaming)
        (row,) = rows_of(pairs)
        assert image_content(row.image) == png(0)
        assert pairs.sources[0].table.features["image"] == ImageFeature(decode=False)


def wrong_tables(folder: Path) -> str:
    columns = {
        "image": ["a.png"], "picture": ["b.png"], "caption": ["a"], "text": ["b"], "number": [1], "list": [[1, 2]],
    }  # fmt: skip
    return str(write_table(folder / "table.parquet", columns))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({}, "table.parquet: image and picture could all be the images; name one with --image_column"),
        ({"image_column": "image"}, "caption and text could all be the captions; name one with --caption_column"),
        ({"image_column": "photo"}, "has no column 'photo'; its columns are image, picture, .*list.*--image_column"),
        ({"image_column": "image", "caption_column": "title"}, "has no column 'title'; its col.*--caption_column"),
        ({"image_column": "number"}, "the column 'number' holds .*int64.*, but images are needed"),
        ({"image_column": "image", "caption_column": "list"}, "the column 'list' holds .*, but texts are needed"),
        ({"image_column": "image", "caption_column": "image"}, "image_column and caption_column are both 'image'"),
        ({"image_column": "image", "caption_column": "a {label}"}, "asks for 'label', but the columns of .* are image"),
        ({"image_column": "image", "caption_column": "a {text"}, "The template 'a {text' cannot be read"),
        (
            {"image_column": "image", "caption_column": "text", "label_column": "class"},
            "has no column 'class'.*--label_column",
        ),
        (
            {"image_column": "image", "caption_column": "text", "label_column": "list"},
            "the column 'list' holds .*, but labels are needed",
        ),
        ({"captions": "some"}, "captions is 'some', but must be 'one' .* or 'all'"),
    ],
)
def test_wrong_columns_name_those_that_there_are(names: dict, message: str, tmp_path: Path):
    for streaming in (False, True):
        with pytest.raises(ValueError, match=message):
            load_pairs(wrong_tables(tmp_path), streaming=streaming, **names)


def test_no_column_of_captions_advises_a_template(tmp_path: Path):
    for label in ("cat", "dog"):
        write_pictures(tmp_path / label, 2)
    with pytest.raises(ValueError, match=r"no column looks like the captions; its columns are image, label\.") as error:
        load_pairs(str(tmp_path))
    assert 'or a template such as --caption_column "a photo of a {label}."' in str(error.value)
    with pytest.raises(ValueError, match='holds ClassLabel.*makes captions: --caption_column "a photo of a {label}."'):
        load_pairs(str(tmp_path), caption_column="label")


def test_split_that_is_missing_names_those_that_there_are(tmp_path: Path):
    table = Dataset.from_dict({"image": [png(0)], "caption": ["a"]})
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "data")
    assert len(load_pairs(str(tmp_path / "data"), split="test")) == 1
    with pytest.raises(ValueError, match="no split 'validation'; its splits are train, test"):
        load_pairs(str(tmp_path / "data"), split="validation")


@STREAMING
@pytest.mark.parametrize(
    "kind", ["paths in .csv", "paths in .json", "webdataset", "save_to_disk", "folder with metadata.csv"]
)
def test_table_without_splits_is_its_split_train_and_no_other(kind: str, streaming: bool, tmp_path: Path):
    source = WRITERS[kind](tmp_path)
    assert len(rows_of(load_pairs(source, streaming=streaming))) == SMALL
    for split in ("trian", "no-such-split", "test", "train[:10]"):
        with pytest.raises(ValueError, match=f"has no split '{re.escape(split)}'; its splits are train") as error:
            load_pairs(source, split=split, streaming=streaming)
        assert "hold out a number (--validation 500) or a part (--validation 0.05)" in str(error.value)
    with pytest.raises(ValueError, match="Did you mean 'train'"):
        load_pairs(source, split="trian", streaming=streaming)


@STREAMING
def test_configuration_that_is_missing_names_those_that_there_are(streaming: bool, tmp_path: Path):
    folder = WRITERS["folder with metadata.csv"](tmp_path)
    with pytest.raises(ValueError, match=f"{folder}:smal has no configuration 'smal'; its configurations are default."):
        load_pairs(f"{folder}:smal", streaming=streaming)


@pytest.mark.parametrize("name", ["/no/such/folder", "no/such/table.csv", "some-user/some-data"])
def test_data_set_that_is_not_there(name: str):
    with pytest.raises(FileNotFoundError, match=f"There is no data set '{name}': name a repository on the Hub, a fold"):
        load_pairs(name)


def test_name_that_is_mistyped_is_told_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "flowers").mkdir()
    (tmp_path / "flowers.csv").touch()
    monkeypatch.chdir(tmp_path)
    for given, meant in (("flower", "flowers"), ("flower.csv", "flowers.csv"), (f"{tmp_path}/flowrs/", "flowers")):
        with pytest.raises(
            FileNotFoundError, match=rf"There is no data set '{given}' \(did you mean .*{meant}\?\): name"
        ):
            load_pairs(given)


@pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])
@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet", "tar", "arrow"])
def test_file_that_is_something_else_is_refused(
    tmp_path: Path, ending: str, streaming: bool, capfd: pytest.CaptureFixture
):
    path = tmp_path / f"table.{ending}"
    for content, message in ((b"", f"{path} is empty. Check the file"), (b"\xff\x81 no table", "")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"The data set '{path}' cannot be read: {message}"):
            load_pairs(str(path), streaming=streaming)
    assert capfd.readouterr().err == ""


def test_damaged_files_of_save_to_disk_are_refused(tmp_path: Path):
    Dataset.from_dict({"image": [png(0)] * 9, "caption": ["a"] * 9}).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"The data set '{tmp_path}/saved' cannot be read: .*Check the file, or write"):
        load_pairs(str(tmp_path / "saved"))


def test_saved_data_set_without_rows_is_refused(tmp_path: Path):
    empty = Dataset.from_dict({"image": [], "caption": []})
    empty.save_to_disk(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"empty' cannot be read: it has no rows. Check the file, or write it"):
        load_pairs(str(tmp_path / "empty"))
    datasets.DatasetDict(train=Dataset.from_dict({"caption": ["one"]}), test=empty).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="splits' cannot be read: its split 'test' has no rows. Check the file"):
        load_pairs(str(tmp_path / "splits"))


def test_data_set_without_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "table.csv").write_text("image,caption\n")
    with pytest.raises(ValueError, match=r"table.csv has no rows in its split 'train'"):
        load_pairs(str(tmp_path / "table.csv"), streaming=True)
    with pytest.raises(ValueError, match=r"table.csv' cannot be read: it has no rows. Check the file, or write it"):
        load_pairs(str(tmp_path / "table.csv"))
    nothing = Dataset.from_dict({"image": [png(0)], "caption": ["a"]}).select([])
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **settings: {"train": nothing})
    with pytest.raises(ValueError, match="user/pairs has no rows in its split 'train'"):
        load_pairs("user/pairs")


def test_columns_are_told_by_what_they_hold():
    assert describe_feature(ImageFeature()) == "image"
    assert describe_feature({"bytes": Value("binary"), "path": Value("string")}) == "stored image"
    assert describe_feature([Value("string")]) == "texts"
    assert describe_feature({"bytes": Value("binary"), "caption": Value("string")}) == "other"


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r'Reading data needs datasets, which this .* pip install "hf-clip\[train\]"'):
        load_pairs("user/pairs")


def test_address_without_what_opens_addresses_is_one_line():
    message = (
        r"data set 'https://host/a\.csv' cannot be read: an address needs aiohttp, .* pip install aiohttp, or download"
    )
    with pytest.raises(ImportError, match=message), readable("https://host/a.csv"):
        raise ImportError(known_implementations["https"]["err"])  # as fsspec does where it is missing


# --- streams ---------------------------------------------------------------------------------------------------------


def test_stream_is_shuffled_within_a_buffer_anew_in_every_epoch(tmp_path: Path):
    columns = {"image": [png(0)] * 100, "caption": captions(100)}
    source = str(write_table(tmp_path / "table.parquet", columns))
    pairs = load_pairs(source, streaming=True, buffer=20)

    def order(epoch: int, seed: int = 0, first: int = 0) -> list[str]:
        return [pairs.read(draw).captions[0] for draw in pairs.draws(epoch, seed=seed, first=first)]

    orders = [order(0), order(1), order(0, seed=1)]
    assert all(sorted(found) == sorted(captions(100)) for found in orders)
    assert len(set(map(tuple, [*orders, captions(100)]))) == 4
    assert orders[1] == order(1)
    assert order(1, first=37) == orders[1][37:]


def test_stream_names_its_rows_by_where_they_are(tmp_path: Path):
    source = str(write_tar(tmp_path / "shard.tar", [jpeg(0), jpeg(1)], ["a", "b"]))
    pairs = load_pairs(source, streaming=True)
    names = [pairs.read(draw).name for draw in islice(pairs.draws(3, shuffle=False), 2)]
    assert names[1].startswith("row 1 that was read of ")
    assert names[1].endswith("(00001.jpg) in epoch 3")
