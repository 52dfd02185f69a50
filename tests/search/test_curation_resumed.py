"""A curation that was interrupted goes on, and ends with the rows and scores of one that was not."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_clip.search import curation, scored_rows
from hf_clip.search.curation import Curation
from hf_clip.search.image_rows import Position
from hf_clip.search.row_encoding import EmbeddedRow
from hf_clip.search.scored_rows import ScoredRows

from .conftest import make_image
from .test_curation import CAPTIONS, Small, content_of, head_of, rows_of, run, shards, write_tar  # noqa: F401

Run = Callable[..., Curation]


class KilledError(Exception):
    pass


@pytest.fixture(autouse=True)
def two_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curation, "CHUNK", 2)


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the rows that are opened and encoded."""
    found: list[int] = []
    embed_rows = curation.embed_rows

    def counting(rows: Any, *arguments: Any, **settings: Any) -> Iterator[EmbeddedRow]:
        for one in embed_rows(rows, *arguments, **settings):
            found.append(one.row.number)
            yield one

    monkeypatch.setattr(curation, "embed_rows", counting)
    return found


def equal_rows(found: Path, expected: Path) -> bool:
    """Scores are equal up to rounding, since batches were cut elsewhere."""
    both = (rows_of(found), rows_of(expected))
    scores = [[row.pop("clip_score") for row in rows] for rows in both]
    return both[0] == both[1] and np.allclose(*scores, atol=1e-6)


@pytest.mark.parametrize("kill_at", [0, 1, 4, 6])
def test_killed_run_goes_on_after_its_last_commit(
    kill_at: int,
    run: Run,  # noqa: F811
    shards: str,  # noqa: F811
    tmp_path: Path,
    scored: list[int],
    monkeypatch: pytest.MonkeyPatch,
):
    """The folder is put back as a kill leaves it, with what was written and not committed."""
    how = {"duplicates": True, "batch_size": 2}
    run(shards, tmp_path / "whole.parquet", **how)
    assert scored == [0, 1, 2, 3, 4, 5]
    scored.clear()
    work, left, embed = tmp_path / ".out.parquet-scores", tmp_path / "left", curation._add

    def killed(chunk: Any, table: ScoredRows, scorer: Any) -> None:
        embed(chunk, table, scorer)
        if table.position.number >= kill_at:
            table._embeddings.flush()
            shutil.copytree(work, left, dirs_exist_ok=True)
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(curation, "_add", killed)
        with pytest.raises(KilledError):
            run(shards, tmp_path / "out.parquet", **how)
    done = -(-kill_at // 2) * 2
    assert work.exists() == (done > 0), "without a row that is scored nothing is left"
    assert not (tmp_path / "out.parquet").exists()
    shutil.rmtree(work, ignore_errors=True)
    left.rename(work)
    scored.clear()
    run(shards, tmp_path / "out.parquet", **how)
    assert scored == list(range(done, 6))
    assert equal_rows(tmp_path / "out.parquet", tmp_path / "whole.parquet")
    assert not work.exists()


def test_ctrl_c_keeps_what_was_scored(
    run: Run,  # noqa: F811
    shards: str,  # noqa: F811
    tmp_path: Path,
    scored: list[int],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(curation, "CHUNK", 100)
    captions = curation.embed_captions

    def interrupted(*arguments: Any) -> Iterator[EmbeddedRow]:
        for number, one in enumerate(captions(*arguments)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield one

    with monkeypatch.context() as patch:
        patch.setattr(curation, "embed_captions", interrupted)
        with pytest.raises(KeyboardInterrupt, match="interrupted after 3 images, whose scores are kept; the same comm"):
            run(shards, tmp_path / "out.parquet")
    scored.clear()
    assert run(shards, tmp_path / "out.parquet").images == 5
    assert scored == [3, 4, 5]
    run(shards, tmp_path / "whole.parquet")
    assert equal_rows(tmp_path / "out.parquet", tmp_path / "whole.parquet")


def test_what_failed_after_the_scores_needs_no_second_pass(
    run: Run,  # noqa: F811
    shards: str,  # noqa: F811
    tmp_path: Path,
    scored: list[int],
    monkeypatch: pytest.MonkeyPatch,
):
    """Nor do duplicates, and another condition over the same scores."""
    with monkeypatch.context() as patch:
        patch.setattr(curation, "write_tars", lambda *given: (_ for _ in ()).throw(OSError("no space left on device")))
        with pytest.raises(OSError, match="No space left"):
            run(shards, tmp_path / "out", duplicates=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out-scores", "a-0.tar", "a-1.tar"]
    with pytest.raises(ValueError, match="cannot be evaluated"):
        run(shards, tmp_path / "out", duplicates=True, keep="clip_scor > 0")
    scored.clear()
    monkeypatch.setattr(scored_rows, "group_duplicates", None)
    assert run(shards, tmp_path / "out", duplicates=True, keep="id < 4").kept == 3
    assert scored == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-0.tar", "a-1.tar", "out"]


def test_run_of_other_things_begins_anew(
    run: Run,  # noqa: F811
    shards: str,  # noqa: F811
    tmp_path: Path,
    small_model: Small,
    scored: list[int],
    monkeypatch: pytest.MonkeyPatch,
):
    def fail(*arguments: Any) -> None:
        raise KilledError

    def leave(**how: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(ScoredRows, "choose", fail)
            with pytest.raises(KilledError):
                run(shards, tmp_path / "out.parquet", **how)
        scored.clear()

    head, other = (head_of(*small_model[:2]) for _ in range(2))
    other.layers[0][0].add_(1)
    for before, after in [
        ({}, {"exact": True, "duplicates": True}),
        ({"labels": ["a red one"]}, {"labels": ["a red two"]}),
        ({"heads": [head]}, {"heads": [other]}),
        ({}, {"image_folders": [str(tmp_path)]}),  # which may hold what could not be opened
    ]:
        leave(**before)
        run(shards, tmp_path / "out.parquet", **after)
        assert scored == [0, 1, 2, 3, 4, 5], (before, after)
    leave()
    run(shards, tmp_path / "out.parquet")
    assert scored == []

    leave()
    with monkeypatch.context() as patch:
        patch.setattr(scored_rows, "FORMAT", 2)
        run(shards, tmp_path / "out.parquet")
    assert scored == [0, 1, 2, 3, 4, 5], "another version left it"

    leave()
    samples = [{"png": content_of(make_image(20)), "txt": CAPTIONS[0].encode()}]
    write_tar(tmp_path / "a-1.tar", samples)
    assert run(shards, tmp_path / "out.parquet").images == 4, "the data are others"
    for damaged in (b"", b"no database at all" * 100):
        leave()
        (tmp_path / ".out.parquet-scores" / "rows.sqlite").write_bytes(damaged)
        assert run(shards, tmp_path / "out.parquet").images == 4


def test_embeddings_that_are_cut_short_are_made_anew(tmp_path: Path):
    with closing(ScoredRows(tmp_path, [], with_duplicates=True, with_tags=False)) as rows:
        values = dict.fromkeys(rows.columns, 1)
        rows.add([values], np.eye(1, 4), [7])
        rows.commit(position=Position(0, 1, 1))
        rows.add([values | {"id": 2}], np.eye(1, 4), [7])
    with closing(ScoredRows(tmp_path, [], with_duplicates=True, with_tags=False)) as rows:
        assert (len(rows), rows.position, rows.is_complete) == (1, Position(0, 1, 1), False)
    assert (tmp_path / "embeddings.float16").stat().st_size == 8
    os.truncate(tmp_path / "embeddings.float16", 7)
    with closing(ScoredRows(tmp_path, [], with_duplicates=True, with_tags=False)) as rows:
        assert (len(rows), rows.position) == (0, Position())
