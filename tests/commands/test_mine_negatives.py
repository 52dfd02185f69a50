"""`hf-clip mine-negatives`: from a data set to a table that the trainer takes as it stands."""

from pathlib import Path

import pytest
from datasets import load_dataset, load_from_disk

from hf_clip.commands.app import main

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
