"""Whatever is wrong is said in one line that says what to do, and the index stays whole."""

import errno
import os
import re
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_clip.commands.program import main
from hf_clip.search.image_index import ImageIndex
from hf_clip.search.index_table import IndexTables, SearchIndexError
from hf_clip.search.quantized_files import quantize
from hf_clip.search.row_filter import COLUMNS, FilterError, check_filter

from .conftest import make_image
from .test_index_update import paths_of


def error_of(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line that a command ends with."""
    assert main([str(word) for word in words]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("error: ").rstrip()


@pytest.fixture
def index(photos: Path, new_index: Callable[..., ImageIndex]) -> ImageIndex:
    index = new_index()
    index.add(photos)
    return index


@pytest.mark.parametrize(
    ("condition", "problem"),
    [
        ("id = 1; DROP TABLE images", "it holds ;, and may be one condition only"),
        ("id = 1) OR (1 = 1", "its parentheses do not match"),
        ("width > 1) ORDER BY (id", "its parentheses do not match"),
        ("id = 1 -- and more", "it holds --"),
        ("(id = 1", "its parentheses do not match"),
        (" ", "it is empty"),
        ("id = " + "1+" * 5000 + "1", "it has more than 200 comparisons and signs"),
        ("colour = 3", "there is no column colour"),
        ('path = "a"', "there is no column a"),
        ("path LIKE", "sql parser error"),
        ("width", "does not return a boolean"),
        ("path = 'a", "Unterminated string literal"),
        ("CAST(path AS INT) = 3", "Cannot cast string"),
        ("id IN (SELECT id FROM images)", "not supported SQL"),
    ],
)
def test_filters_that_are_no_condition(
    condition: str, problem: str, index: ImageIndex, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ImageIndex, "matrix", None)  # they are refused before anything is encoded or scored
    monkeypatch.setattr(ImageIndex, "load_model", None)
    with pytest.raises(FilterError) as found:
        index.search("three", where=condition)
    assert problem in found.value.problem
    advice = "on the columns path, width, height, size, mtime_ns and caption, with texts in single quotes, such as "
    assert f"({found.value.problem}); write a condition {advice}" in str(found.value)
    assert len(str(found.value)) < 500
    assert len(index) == 6


def test_columns_that_an_error_names_are_there(index: ImageIndex):
    assert set(COLUMNS) <= set(index.tables.images.schema.names)


def test_filters_that_are_one_condition(index: ImageIndex):
    for condition in (
        "path LIKE '%;--%' OR width > 1",
        "id IN (" + "1, " * 3000 + "2)",
        "(width = 60) AND NOT (id = 0)",
    ):
        check_filter(condition)
        assert index.tables.count(condition) > 0


def test_files_of_the_tables_that_are_cut_short_emptied_or_gone(tmp_path: Path, index: ImageIndex):
    """Each in turn. Files of earlier versions are not read any more."""
    index.tables.add(rows_like(index, [20, 21]))
    index.tables.put(rows_like(index, [2]))
    index.tables.remove([3])
    place, told = Path(index.tables.place), 0
    for path in sorted(path for path in place.rglob("*.lance/*/*") if path.is_file()):
        content = path.read_bytes()
        for damaged in (content[: len(content) // 2], b"", None):
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            try:
                tables = IndexTables.open(str(place))
                tables.rows(["id", "path", "embedding", "thumbnail"], "id > 0")
                tables.rows(["id"])
                tables.noted("folders")
                tables.problem_rows()
            except SearchIndexError as error:
                told += 1
                assert str(error).startswith(f"The index {place} is damaged (")  # noqa: PT017
                assert "take it from a copy, or remove it and make it anew" in str(error)  # noqa: PT017
                assert len(str(error)) < 600  # noqa: PT017
        path.write_bytes(content)
    assert told > 20
    assert len(IndexTables.open(str(place)).rows(["id"])) == 7


def rows_like(index: ImageIndex, ids: list[int]) -> list[dict[str, Any]]:
    row = index.tables.rows(index.tables.images.schema.names).to_pylist()[0]
    return [row | {"id": id} for id in ids]


@pytest.mark.parametrize("table", ["images", "problems", "notes"])
def test_tables_that_are_gone(table: str, index: ImageIndex, capsys: pytest.CaptureFixture[str]):
    place = index.tables.place
    shutil.rmtree(Path(place) / f"{table}.lance")
    expected = "There is no index at" if table == "images" else f"The index {place} is damaged (its table {table} is"
    assert error_of(capsys, "search", "three", "--index", place).startswith(expected)


def test_column_that_is_gone(index: ImageIndex, capsys: pytest.CaptureFixture[str]):
    index.tables.images.drop_columns(["thumbnail"])
    for words in (["search", "three"], ["duplicates"]):
        assert error_of(capsys, *words, "--index", index.tables.place).startswith(
            f"The index {index.tables.place} is damaged (its table images has no column thumbnail): take it from a copy"
        )


def test_mark_that_is_gone(index: ImageIndex):
    (Path(index.tables.place) / "hf_clip_index.json").unlink()
    assert len(IndexTables.open(index.tables.place).rows(["id"])) == 6


def test_index_of_a_newer_version(index: ImageIndex, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hf_clip.search.index_table.FORMAT", 0)
    with pytest.raises(SearchIndexError, match=r"has layout 1, and this version reads layout 0: update hf-clip\.$"):
        IndexTables.open(index.tables.place)


@contextmanager
def files_of_at_most(room: int) -> Iterator[None]:
    """The system refuses to write more than some bytes into a file, as a disk does that is full."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("room", [20_000, 500, 0])
def test_disk_that_is_full(room: int, photos: Path, index: ImageIndex):
    before = paths_of(index)
    for seed in range(30):
        make_image(100 + seed).save(photos / f"new-{seed}.png")
    with files_of_at_most(room), pytest.raises(SearchIndexError) as found:
        index.add(photos)
    assert str(found.value) == (
        f"There is no space left for the index {index.tables.place}: it holds what was written before. Make room "
        f"there, and run the same command again."
    )
    reader = IndexTables.open(index.tables.place)
    assert reader.rows(["path"])["path"].to_pylist() == list(before)
    assert index.add(photos).added == 30


def test_results_for_which_there_is_no_room(
    photos: Path, index: ImageIndex, small_model: Any, capsys: pytest.CaptureFixture[str]
):
    """Each is one line that names the file, and nothing half-written is left."""
    out, model = photos.parent / "out", ["--model", small_model[2]]
    out.mkdir()
    found = ["search", "--more-like", "1", "--index", index.tables.place]
    for name, words in {
        "q.safetensors": ["quantize", index.tables.place, "--to", "int8", "--into", out / "q.safetensors"],
        "page.html": [*found, "--html", out / "page.html"],
        "sheet.png": [*found, "--montage", out / "sheet.png"],
        "embeddings": ["embed", photos, out / "embeddings", *model],
        "scores.parquet": ["curate", photos, out / "scores.parquet", "--duplicates", *model],
    }.items():
        with files_of_at_most(200):
            message = error_of(capsys, *words)
        if name == "scores.parquet":
            assert message.startswith(f"The scores cannot be kept in {out} (")
        else:
            assert re.match(rf"No space left for {out}.*\. Nothing was written\. Make room there", message), name
        assert {path.name for path in out.rglob("*") if path.is_file()} <= {"embeddings.lock"}


@contextmanager
def without_privileges() -> Iterator[Path]:
    """A folder that everyone may read; inside the block the process may write nothing that belongs to others."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    user = os.geteuid()
    try:
        yield folder
    finally:
        os.seteuid(user)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o755)
        shutil.rmtree(folder)


def make_readable_only(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.geteuid() == 0:
        os.seteuid(65534)


def test_index_that_may_only_be_read(photos: Path, new_index: Any, small_model: Any):
    with without_privileges() as folder:
        model, processor, _ = small_model
        index = ImageIndex.open(folder / "index", model=model, processor=processor)
        index.add(photos)
        make_readable_only(folder)
        opened = ImageIndex.open(folder / "index", model=model, processor=processor)
        assert len(opened.search("three", folded=False)) == 6
        assert len(opened.search("three", where="path LIKE '%/inner/%'", folded=False)) == 3
        assert opened.duplicates() == []
        with pytest.raises(SearchIndexError, match=r"cannot be written: its lock .*index\.lock cannot be opened"):
            opened.tables.writing().__enter__()
        with pytest.raises(SearchIndexError, match=r"Permission was denied for a file of the index"):
            opened.tables.note("number", 1)


def test_index_that_may_not_be_read(photos: Path, small_model: Any):
    with without_privileges() as folder:
        ImageIndex.open(folder / "index", model=small_model[0], processor=small_model[1]).add(photos)
        make_readable_only(folder)
        os.seteuid(0) if os.geteuid() == 65534 else None
        (folder / "index").chmod(0o000)
        os.seteuid(65534) if os.geteuid() == 0 else None
        with pytest.raises(SearchIndexError, match="Permission was denied for a file of the index"):
            IndexTables.open(str(folder / "index"))


def test_medium_that_is_read_only(index: ImageIndex, monkeypatch: pytest.MonkeyPatch):
    """As the system says it; a model that is then found elsewhere is no reason to fail."""

    class ReadOnly:
        def __getattr__(self, name: str) -> Any:
            raise OSError(errno.EROFS, "Read-only file system (os error 30)")

    monkeypatch.setattr(index.tables, "notes", ReadOnly())
    with pytest.raises(SearchIndexError, match="on a medium that can only be read: it can be searched"):
        index.tables.note("number", 1)


def test_model_that_was_moved(
    photos: Path, tmp_path: Path, small_model: tuple[Any, Any, str], capsys: pytest.CaptureFixture[str]
):
    first, second, place = tmp_path / "first", tmp_path / "second", tmp_path / "index"
    shutil.copytree(small_model[2], first)
    ImageIndex.open(place, model=first).add(photos)
    first.rename(second)
    assert error_of(capsys, "search", "three", "--index", place) == (
        f"The model of the index {place} is no longer at {first}: say with --model where it is."
    )
    assert main(["search", "three", "--index", str(place), "--model", str(second)]) == 0
    assert main(["search", "three", "--index", str(place)]) == 0  # is remembered
    capsys.readouterr()
    assert "no model" in error_of(capsys, "search", "three", "--index", place, "--model", first)


def test_queries_that_are_wrong(
    photos: Path, index: ImageIndex, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(ImageIndex, "model", property(lambda self: index._model))
    monkeypatch.setattr(ImageIndex, "processor", property(lambda self: index._processor))
    for words, message in [
        (["three", "--top", 0], "Invalid value for '--top': Input should be greater than or equal to 1"),
        (["--more-like", 999], "The index has no image with the id 999; a search shows ids."),
        (['nan:"three"'], "cannot be read"),
        (['inf:"three" + "two"'], "cannot be read"),
        ([f'{"9" * 400}:"three" + "two"'], "The parts of the query cancel one another: give them other weights."),
        (['0:"three"'], "The query only subtracts"),
        (['"three" - "three"'], "The parts of the query cancel one another"),
        ([photos / "missing.png"], f"{photos / 'missing.png'}"),
        ([photos / "broken.png"], f"{photos / 'broken.png'}"),
        (
            [photos / "inner"],
            f"{photos / 'inner'} is a folder, but a query is a text or an image: name an image in it.",
        ),
        (["http://127.0.0.1:1/x.png"], "http://127.0.0.1:1/x.png"),
    ]:
        assert message in error_of(capsys, "search", *words, "--index", index.tables.place)


@pytest.mark.parametrize("command", ["index", "embed"])
def test_what_stands_in_the_way_of_a_folder(
    command: str, photos: Path, small_model: Any, capsys: pytest.CaptureFixture[str]
):
    os.mkfifo(photos.parent / "pipe")
    for file in (photos / "a.png", photos.parent / "pipe"):
        for out in (file, file / "inner", file / "inner" / "more"):
            words = [command, photos, *(["--into"] if command == "index" else []), out, "--model", small_model[2]]
            assert error_of(capsys, *words).startswith(f"{file} is a file, but a")


def test_pipe_is_no_query(photos: Path, index: ImageIndex, capsys: pytest.CaptureFixture[str]):
    os.mkfifo(photos / "pipe.png")
    assert error_of(capsys, "search", photos / "pipe.png", "--index", index.tables.place) == (
        f"{photos / 'pipe.png'} is a pipe or a device, which may never end, but an image is needed: name its file."
    )


def test_names_and_kinds_of_files_in_a_folder(
    tmp_path: Path, small_model: Any, capfd: pytest.CaptureFixture[str], new_index: Callable[..., ImageIndex]
):
    """What is no file is left out, and does not hang; a name may hold anything but a slash."""
    folder = tmp_path / "images"
    folder.mkdir()
    names = ["new\nline.png", "\N{GRINNING FACE}.png", "x" * 250 + ".png", os.fsdecode(b"\xe9.png"), "#17.png", "-.png"]
    for seed, name in enumerate(names):
        make_image(seed).save(folder / name)
    os.mkfifo(folder / "pipe.png")
    (folder / "linked.png").symlink_to("pipe.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "folder.png").mkdir()
    (folder / "circle.png").symlink_to("circle.png")
    for words in (
        ["index", folder, "--into", tmp_path / "index"],
        ["embed", folder, tmp_path / "embeddings"],
        ["curate", folder, tmp_path / "scores.parquet", "--duplicates"],
        ["tag", folder, "--labels", "one,two", "--output", tmp_path / "tags.csv"],
    ):
        assert main([str(word) for word in [*words, "--model", small_model[2]]]) == 2, "the circle cannot be opened"
        out, err = capfd.readouterr()
        assert "6 " in out
        assert err.count("\n") == 1
    assert len(ImageIndex.open(tmp_path / "index")) == len(names)


@pytest.mark.parametrize("kind", ["empty", "another", "no table", "nothing"])
def test_tables_without_images_leave_nothing(
    kind: str, tmp_path: Path, small_model: Any, capsys: pytest.CaptureFixture[str]
):
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = tmp_path / "data.parquet"
    columns = {"empty": {"image": pa.array([], pa.binary())}, "another": {"text": ["a", "b"]}}
    if kind in columns:
        pq.write_table(pa.table(columns[kind]), source)
    else:
        source.write_bytes(b"PAR1 and so on" if kind == "no table" else b"")
    problem = {
        "empty": "it has no rows",
        "another": "no column looks like the images; its columns are text",
        "no table": "Parquet magic bytes not found",
        "nothing": "is empty",
    }
    for words in (
        ["index", source, "--into", tmp_path / "index"],
        ["embed", source, tmp_path / "embeddings"],
        ["curate", source, tmp_path / "scores.parquet", "--duplicates"],
    ):
        assert problem[kind] in error_of(capsys, *words, "--model", small_model[2])
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"} == {"data.parquet"}


@pytest.mark.parametrize("kind", ["width", "whole numbers", "flat"])
def test_embeddings_that_are_none_leave_nothing(
    kind: str, tmp_path: Path, small_model: Any, capsys: pytest.CaptureFixture[str]
):
    width = small_model[0].config.projection_dim
    arrays = {"width": np.ones((2, width + 1), "f4"), "whole numbers": np.ones((2, width), int), "flat": np.ones(2)}
    place = foreign_embeddings(tmp_path / "theirs", arrays[kind])
    problem = f"embeddings of {width + 1} numbers" if kind == "width" else "but embeddings are rows of floating-point"
    words = ["index", place, "--model", small_model[2], "--into", tmp_path / "index"]
    assert problem in error_of(capsys, *words)
    assert not (tmp_path / "index").exists()


def foreign_embeddings(place: Path, vectors: np.ndarray) -> Path:
    """Embeddings in clip-retrieval's layout, of images that are named by their numbers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for folder in ("img_emb", "metadata"):
        (place / folder).mkdir(parents=True)
    np.save(place / "img_emb" / "img_emb_0.npy", vectors)
    pq.write_table(
        pa.table({"image_path": [f"{row}.png" for row in range(len(vectors))]}), place / "metadata/0.parquet"
    )
    return place


@pytest.mark.filterwarnings("error")
def test_embeddings_that_are_not_finite_are_told_and_left_out(
    tmp_path: Path, small_model: Any, new_index: Callable[..., ImageIndex]
):
    vectors = np.random.default_rng(0).standard_normal((5, small_model[0].config.projection_dim)).astype(np.float32)
    vectors[1, 3], vectors[2], vectors[3] = np.nan, 0, 1e38
    place = foreign_embeddings(tmp_path / "theirs", vectors)
    index = new_index()
    changes = index.add_embeddings(place)
    assert (changes.added, changes.problems) == (
        2,
        {f"{row}.png": "its embedding is zero or not finite" for row in (1, 2, 3)},
    )
    assert [result.path for result in index.search("three", folded=False)] in (["0.png", "4.png"], ["4.png", "0.png"])
    assert quantize(place, "bits").images == 5
