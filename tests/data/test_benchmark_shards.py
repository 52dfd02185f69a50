"""The layout of clip-benchmark/wds_*: what is read, and what is said of what is missing."""

from pathlib import Path

import pytest

from hf_clip.data.benchmark_shards import find_benchmark_shards

from ..evaluation.data_sets import write_shards

ROWS = [{"bytes": bytes([place]) * 40, "label": place % 10, "caption": f"caption {place}"} for place in range(7)]


def test_rows_come_in_order_over_all_tars(tmp_path: Path):
    found = find_benchmark_shards(str(write_shards(tmp_path / "wds", ROWS, per_shard=3)))
    assert found is not None
    assert (found.kind, found.splits, found.find_split(None)) == ("classification", ["test"], "test")
    assert found.templates == ["a photo of a red {} on white paper", "the digit {} in blue ink on yellow paper"]
    rows = [entries for _, entries in found.rows("test")]
    assert [(entries["png"], int(entries["cls"])) for entries in rows] == [(row["bytes"], row["label"]) for row in ROWS]


def test_other_folders_are_of_another_layout(tmp_path: Path):
    assert find_benchmark_shards(str(tmp_path)) is None
    assert find_benchmark_shards("org/pictures") is None


def test_missing_split_is_named(tmp_path: Path):
    found = find_benchmark_shards(str(write_shards(tmp_path / "wds", ROWS)))
    assert found is not None
    with pytest.raises(ValueError, match=r"wds has no split 'train'; its splits are test\."):
        found.find_split("train")


def test_missing_tar_is_named(tmp_path: Path):
    folder = write_shards(tmp_path / "wds", ROWS, per_shard=3)
    (folder / "test" / "1.tar").unlink()
    found = find_benchmark_shards(str(folder))
    assert found is not None
    with pytest.raises(FileNotFoundError, match=r"There is no .*1\.tar, though nshards\.txt counts it; download"):
        list(found.rows("test"))


def test_tar_that_is_cut_off_is_named(tmp_path: Path):
    folder = write_shards(tmp_path / "wds", ROWS, per_shard=3)
    tar = folder / "test" / "1.tar"
    tar.write_bytes(tar.read_bytes()[:700])
    found = find_benchmark_shards(str(folder))
    assert found is not None
    with pytest.raises(ValueError, match=r"1\.tar cannot be read to its end \(.*\); download it again\."):
        list(found.rows("test"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test/nshards.txt", "many", r"test/nshards\.txt says 'many', but the number of tars is needed, at least 1\."),
        ("dataset_type.txt", "audio", r"dataset_type\.txt says 'audio', but must be one of classification, multilabel"),
    ],
)
def test_text_that_says_something_else_is_an_error(tmp_path: Path, name: str, content: str, message: str):
    folder = write_shards(tmp_path / "wds", ROWS)
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        list(find_benchmark_shards(str(folder)).rows("test"))  # type: ignore[union-attr]


def test_repository_that_cannot_be_reached_is_an_error():
    with pytest.raises(FileNotFoundError, match=r"The data set 'clip-benchmark/wds_none' cannot be read from the Hub"):
        find_benchmark_shards("clip-benchmark/wds_none")
