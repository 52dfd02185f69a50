"""An index at an address: the same as in a folder, whole after kills, with one writer at a time, errors in one line."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_clip.commands.program import main
from hf_clip.search import approximate_scan, index_encoding, index_writer
from hf_clip.search.image_index import ImageIndex
from hf_clip.search.index_errors import SearchIndexError
from hf_clip.search.index_table import IndexTables

from ..waiting import LONGEST_WAIT, until
from .conftest import make_image
from .object_store import Answer, ObjectStore, serve_object_store
from .test_approximate_scan import embeddings_of, rows_of
from .test_index_update import paths_of
from .test_interrupted_update import PROGRAM, check_equal

PLACE = "s3://bucket/my index"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    with serve_object_store() as store:
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("OBJECT_STORE_CLIENT_MAX_RETRIES", "1")
        monkeypatch.setattr(index_writer, "SETTLE_SECONDS", 0.2)  # this store is near
        yield store


@pytest.fixture
def at_address(store: ObjectStore, small_model: tuple[Any, Any, str]) -> Callable[[], ImageIndex]:
    model, processor, _ = small_model
    return lambda: ImageIndex.open(PLACE, model=model, processor=processor)


def test_an_index_at_an_address_equals_one_in_a_folder(
    photos: Path, at_address: Callable[[], ImageIndex], new_index: Callable[..., ImageIndex]
):
    index, expected = at_address(), new_index("in a folder")
    assert index.add(photos) == expected.add(photos)
    (photos / "a.png").rename(photos / "renamed.png")
    (photos / "c.webp").unlink()
    make_image(90).save(photos / "b.jpg")
    assert index.add(photos) == expected.add(photos)
    opened = at_address()
    check_equal(opened, expected)
    assert opened.tables.description == expected.tables.description
    assert opened.tables.noted("folders") == [str(photos)]
    text = "a blue three on yellow paper"
    assert [result.path for result in opened.search(text)] == [result.path for result in expected.search(text)]
    assert opened.search(text, where="path LIKE '%/inner/%'") == expected.search(text, where="path LIKE '%/inner/%'")
    assert opened.duplicates() == expected.duplicates()


@pytest.mark.slow  # each command opens the address anew; what they call is tested above
def test_commands(photos: Path, store: ObjectStore, small_model: Any, capsys: pytest.CaptureFixture[str]):
    (photos / "broken.png").unlink()
    for words, expected in [
        (["search", "x", "--index", PLACE], (1, "", f"error: There is no index at {PLACE}: make one")),
        (
            ["index", photos, "--model", small_model[2], "--into", PLACE],
            (0, f"{photos}: 6 added\n6 images in {PLACE}", ""),
        ),
        (["index", "--into", PLACE], (0, f"{photos}: 6 unchanged\n6 images in {PLACE}", "")),
        (["search", photos / "c.webp", "--index", PLACE, "--top", 1], (0, "1.0000  3  ", "")),
        (["duplicates", "--index", PLACE], (0, "0 groups", "")),
    ]:
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        assert (status, captured.out[: len(expected[1])], captured.err[: len(expected[2])]) == expected


@pytest.mark.slow
def test_approximate_scan(at_address: Callable[[], ImageIndex], small_model: Any, monkeypatch: pytest.MonkeyPatch):
    index = at_address()
    width = index.tables.description.width
    monkeypatch.setattr("tests.search.test_approximate_scan.WIDTH", width)
    index.tables.add(rows_of(list(range(1000))))
    for name, value in (("IMAGES_OF_A_PARTITION", 250), ("QUERIES", 5), ("PROBES", (4,))):
        monkeypatch.setattr(approximate_scan, name, value)
    scan = index.build_approximate_scan()
    opened = at_address()
    assert opened.approximate_scan() == scan
    assert opened.search(embeddings_of([7])[0], top=1)[0].id == 7


def test_two_writers(photos: Path, at_address: Callable[[], ImageIndex]):
    index, other = at_address(), at_address()
    with (
        index.tables.writing(),
        pytest.raises(
            SearchIndexError,
            match=r"Another process \(process \d+ on .*\) is writing to the index s3://bucket/my index: .* 15 minutes",
        ),
    ):
        other.add(photos)
    assert other.add(photos).added == 6
    assert index.add(photos).unchanged == 6


def test_writers_that_begin_at_once(at_address: Callable[[], ImageIndex]):
    from concurrent.futures import ThreadPoolExecutor

    at_address()
    going = []

    def write(number: int) -> str:
        try:
            with IndexTables.open(PLACE).writing():
                going.append(number)
                time.sleep(0.3)
                assert going == [number]
                going.remove(number)
                return "wrote"
        except SearchIndexError as error:
            return str(error)

    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(write, range(5)))
    assert "wrote" in found
    assert all(text == "wrote" or "is writing to the index" in text for text in found)
    with IndexTables.open(PLACE).writing():
        pass


def test_table_that_is_created_twice_forgets_nobody(store: ObjectStore, monkeypatch: pytest.MonkeyPatch):
    """Of two that find none and create it, the slower one puts its own table in the place of the other's.

    The time in which both wait for that is over here when the slower one has done so, or has failed.
    """
    from concurrent.futures import ThreadPoolExecutor
    from threading import Event

    import lancedb

    both_create, one_has_created, rows, created, taken = Event(), Event(), [], [], []

    def settle(seconds: float) -> None:
        created.append(seconds)
        one_has_created.set()
        until(lambda: len(created) > 1, "the other's table")

    def before(method: str, name: str) -> Answer | None:
        if method == "PUT" and "/writer.lance/data/" in name:
            rows.append(name)
            if len(rows) == 1:
                assert both_create.wait(LONGEST_WAIT)
                assert one_has_created.wait(LONGEST_WAIT)  # and takes it at once, if it does not wait
            both_create.set()
        return None

    def take() -> bool:
        claim = index_writer._Claim(PLACE, lancedb.connect(PLACE))
        try:
            claim.take()
        except SearchIndexError:
            return False
        finally:
            created.append(0.0)
            one_has_created.set()
        taken.append(claim)
        return True

    monkeypatch.setattr(index_writer, "time", SimpleNamespace(time=time.time, sleep=settle))
    store.before = before
    with ThreadPoolExecutor(2) as pool:
        found = [each.result() for each in (pool.submit(take), pool.submit(take))]
    for claim in taken:
        claim.release()
    assert sorted(found) == [False, True]


@pytest.mark.slow
def test_claim_of_a_process_that_is_gone_or_silent_is_taken_over(
    photos: Path, at_address: Callable[[], ImageIndex], monkeypatch: pytest.MonkeyPatch
):
    index = at_address()
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: process.pid)
        claim = index_writer._Claim(PLACE, index.tables.database)
    claim.take()  # and is never released
    with at_address().tables.writing():
        pass
    monkeypatch.setattr("socket.gethostname", lambda: "another machine")
    silent = index_writer._Claim(PLACE, index.tables.database)
    silent.take()
    with pytest.raises(SearchIndexError, match="on another machine"), at_address().tables.writing():
        pass
    monkeypatch.setattr(index_writer, "STALE_AFTER", 0.0)
    with at_address().tables.writing():
        pass
    silent.release()


def test_writer_that_was_overtaken_writes_nothing_more(
    at_address: Callable[[], ImageIndex], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(index_writer, "RENEW_AFTER", 0.3)
    index, other = at_address(), at_address()
    with index.tables.writing():
        monkeypatch.setattr(index_writer, "STALE_AFTER", -1.0)
        with other.tables.writing():
            with pytest.raises(SearchIndexError, match="Another process took over the index .* Run the same command"):
                until(lambda: (index.tables.note("number", 1), time.sleep(0.1))[1])
            other.tables.note("number", 2)
    assert other.tables.noted("number") == 2


@pytest.mark.slow
def test_storage_that_answers_an_error_now_and_then(
    photos: Path, store: ObjectStore, at_address: Callable[[], ImageIndex]
):
    index, count = at_address(), 0

    def now_and_then(method: str, name: str) -> Answer | None:
        nonlocal count
        count += 1
        return Answer(503, b"<Error><Code>SlowDown</Code></Error>") if count % 7 == 0 else None

    store.before = now_and_then
    assert index.add(photos).added == 6
    assert count > 14


@pytest.mark.slow
def test_storage_that_is_lost_at_every_write_in_turn(
    photos: Path, store: ObjectStore, at_address: Callable[[], ImageIndex], monkeypatch: pytest.MonkeyPatch
):
    """Each write is refused in turn, with all that follow: the index holds whole commits and the next run goes on."""
    monkeypatch.setattr(index_encoding, "COMMIT_AT", 2)
    monkeypatch.setattr(index_writer, "STALE_AFTER", -1.0)  # the claim cannot be released either
    (photos / "broken.png").unlink()
    at_address()
    limit, kept = 0, 0
    messages: set[str] = set()
    while True:
        left = limit

        def refuse(method: str, name: str) -> Answer | None:
            nonlocal left
            left -= method in ("PUT", "POST")
            return Answer(403, b"<Error><Code>AccessDenied</Code></Error>") if left < 0 and method != "GET" else None

        store.before = refuse
        try:
            ImageIndex.open(PLACE, model=None)
            index = at_address()
            index.add(photos, batch_size=2)
            break
        except SearchIndexError as error:
            messages.add(str(error).partition(":")[0])
        store.before = lambda method, name: None
        count = len(at_address())
        assert count in (kept, kept + 2)
        kept, limit = count, limit + 1
    assert limit > 6
    assert messages == {"Access to the index s3"}
    assert len(paths_of(index)) == 6


def commits_of(store: ObjectStore) -> int:
    with store.lock:
        return sum("/images.lance/_versions/" in name for name in store.objects)


@pytest.mark.slow
def test_kills(tmp_path: Path, store: ObjectStore, new_index: Callable[..., ImageIndex], small_model: Any):
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(40):
        make_image(number).save(folder / f"{number:02}.png")
    expected = new_index("whole")
    expected.add(folder)
    words = [sys.executable, "-c", PROGRAM, PLACE, small_model[2], str(folder)]
    kept = 0
    for kill in range(5):
        written = commits_of(store)
        with subprocess.Popen(words) as process:
            while process.poll() is None and commits_of(store) < written + 1 + kill % 2:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
        try:
            count = len(ImageIndex.open(PLACE))
        except SearchIndexError:
            continue
        assert count >= kept
        assert count % 4 == 0
        kept = count
    subprocess.run(words, check=True)
    assert kept > 0
    check_equal(ImageIndex.open(PLACE), expected)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"AWS_ACCESS_KEY_ID": "other"}, "Access to the index s3://bucket/x was denied: check AWS_ACCESS_KEY_ID"),
        pytest.param(
            {"AWS_ENDPOINT": "http://127.0.0.1:1"},
            "The object storage of the index s3://bucket/x does not answer",
            marks=pytest.mark.slow,  # it is asked several times
        ),
    ],
)
def test_errors_are_one_line(
    variables: dict[str, str],
    message: str,
    store: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["search", "x", "--index", "s3://bucket/x"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_address_of_an_unknown_kind(capsys: pytest.CaptureFixture[str]):
    assert main(["search", "x", "--index", "nowhere://x"]) == 1
    assert capsys.readouterr().err.startswith(
        "error: The index nowhere://x cannot be reached (No object store provider found for scheme: 'nowhere'"
    )
