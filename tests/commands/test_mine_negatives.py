"""`hf-clip mine-negatives`: from a data set to a table that the trainer takes as it stands."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset, load_from_disk
from pyarrow import parquet  # type: ignore[import-untyped]

from hf_clip.checkpoints.whole_folder import held_folder
from hf_clip.commands.program import main
from hf_clip.training.data import mined_table

from ..finetuning import train


@pytest.fixture(scope="module")
def few(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few") / "data"
    load_from_disk(str(digits / "pairs"))["train"].select(range(120)).save_to_disk(folder)
    return folder


@pytest.mark.parametrize("by", ["image", "text"])
def test_table_is_what_the_trainer_takes_and_the_same_each_time(
    by: str, digits: Path, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    table = tmp_path / "mined.parquet"
    words = ["mine-negatives", "--model", str(digits / "vit"), "--dataset", str(few), "--negatives", "2", "--by", by]
    words += ["--max-share", "3", "--device", "cpu", "--output"]
    assert main([*words, str(table)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == (
        f"{table}: hf-clip finetune --model {digits / 'vit'} --dataset {table} --negative_caption_column "
        f"negative_caption ..."
    )
    assert said[-2].startswith("2 negatives for each of 120 images, of ")
    assert said[-2].endswith(" different captions; 0 of 120 rows have none.")
    assert [line.startswith("  ") for line in said[:-2]] == [False, True, True] * 3
    rows = load_dataset("parquet", data_files=str(table), split="train")
    given = load_from_disk(str(few))
    assert rows["caption"][:] == given["caption"][:]
    for row in rows:
        assert len(set(row["negative_caption"])) == 2
        assert row["caption"] not in row["negative_caption"]
    assert main([*words, str(tmp_path / "again.parquet")]) == 0
    assert (tmp_path / "again.parquet").read_bytes() == table.read_bytes()
    if by == "image":
        chosen = {"negative_caption_column": "negative_caption", "max_steps": 1}
        train(digits, tmp_path / "out", dataset=str(table), **chosen)
        assert "2 negative captions a row; 0 of 120 rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--output", "mined.csv"),
            "error: --output is mined.csv, but the result is a table in a parquet file: name one",
        ),
        (("--output", "m.parquet", "--split", "test"), "has no split 'test'; its splits are train."),
        (("--output", "m.parquet", "--column", "caption"), "has a column 'caption' already; name another for the new"),
        (
            ("--output", "m.parquet", "--caption-column", "alt"),
            "has no column 'alt'; its columns are image, caption, targ",
        ),
        (
            ("--output", "m.parquet", "--column", "a{b}"),
            "error: --column is 'a{b}', but hf-clip finetune takes braces for a template; name",
        ),
        (("--output", "m.parquet", "--max-share", "0"), "max_share 0, but must be at least 1, at least 0 and above 0."),
        (
            ("--output", "m.parquet", "--skip-first", "500"),
            "has a wrong caption whose similarity is at most 0.95 of its own caption's, so nothing was written; raise",
        ),
        (("--output", "m.parquet", "--device", "abacus"), "error: "),
    ],
)
def test_refusals_are_one_line_and_nothing_is_written(
    words: tuple[str, ...],
    message: str,
    digits: Path,
    few: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.chdir(tmp_path)
    assert main(["mine-negatives", "--model", str(digits / "vit"), "--dataset", str(few), "--by", "text", *words]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def words(digits: Path, few: Path, tmp_path: Path) -> list[str]:
    given = [
        "mine-negatives",
        "--model",
        str(digits / "vit"),
        "--dataset",
        str(few),
        "--by",
        "text",
        "--max-share",
        "3",
    ]
    return [*given, "--device", "cpu", "--output", str(tmp_path / "out" / "mined.parquet")]


def test_signal_leaves_nothing_and_a_rerun_removes_what_a_kill_left(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def told_to_end(*given: Any) -> None:
        assert any(path.suffix == ".unfinished" for path in (tmp_path / "out").iterdir())
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(parquet.ParquetWriter, "write_table", told_to_end)
        assert main(words) == 143
    assert capsys.readouterr().err == "\nended by SIGTERM: nothing was written\n"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    for name in (f".mined.parquet-{'0f' * 16}.unfinished", f".other.parquet-{'0f' * 16}.unfinished"):
        (tmp_path / "out" / name).write_bytes(b"PAR1")
    assert main(words) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "mined.parquet",
        f".other.parquet-{'0f' * 16}.unfinished",
    }


def test_full_disk_and_another_writer_are_one_line(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def full(*given: Any) -> None:
        raise OSError(28, "Error writing bytes to file")

    monkeypatch.setattr(parquet.ParquetWriter, "write_table", full)
    monkeypatch.setattr(mined_table, "free_bytes", lambda place: 100)
    assert main(words) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: No space left for {tmp_path / 'out' / 'mined.parquet'}: it needs ")
    assert said.endswith(
        " bytes, and 100 are free. Nothing was written. Make room there, or name a folder on another disk.\n"
    )
    assert list(tmp_path.iterdir()) == []
    with held_folder(tmp_path / "out" / "mined.parquet"):
        assert main(words) == 1
    assert capsys.readouterr().err == (
        f"error: {words[-1]} is being written by another program (process {os.getpid()} on {os.uname().nodename}); "
        f"wait until it is done or end it, or name another file for --output.\n"
    )
