"""Pairs held out for validation, and streams read ahead of time."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest

from hf_clip.training import run_data
from hf_clip.training.config import TrainingConfig
from hf_clip.training.data.load_pairs import hold_out, load_pairs, read_validation
from hf_clip.training.data.pairs import Pairs, PairStream
from hf_clip.training.data.read_ahead import read_ahead
from hf_clip.training.data.survey import Look

from ..sources import COUNT, captions, png, write_table

pytestmark = [
    pytest.mark.usefixtures("prepared_here"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # `datasets` leaves tables open
]


def texts_of(pairs: Pairs | PairStream, **how: Any) -> list[str]:
    return [pairs.read(draw).captions[0] for draw in pairs.draws(0, **how)]


@pytest.mark.parametrize(("amount", "count"), [(5, 5), (0.25, 6)])
def test_rows_are_held_out_by_seed(shard: str, amount: float, count: int):
    pairs = load_pairs(shard)
    train, held = hold_out(pairs, amount, seed=3)
    assert (len(train), len(held)) == (COUNT - count, count)
    assert sorted(texts_of(train) + texts_of(held)) == sorted(captions(COUNT))
    assert texts_of(hold_out(pairs, amount, seed=3)[1]) == texts_of(held)
    assert texts_of(hold_out(pairs, amount, seed=4)[1]) != texts_of(held)


def test_all_captions_of_a_row_are_held_out_together(tmp_path: Path):
    texts = [[f"{row} {text}" for text in range(row % 3 + 1)] for row in range(9)]
    source = str(write_table(tmp_path / "table.parquet", {"image": [png(0)] * 9, "captions": texts}))
    train, held = hold_out(load_pairs([source, source], captions="all"), 6)
    rows = [{(draw.source, draw.row) for draw in part.draws(0)} for part in (train, held)]
    assert not rows[0] & rows[1]
    assert len(rows[1]) == 6
    assert len(train) + len(held) == 2 * 18


def test_first_rows_of_a_stream_are_held_out(shard: str):
    train, held = hold_out(load_pairs(shard, streaming=True), 5)
    assert texts_of(held, shuffle=False) == captions(COUNT)[:5]
    assert sorted(texts_of(train)) == sorted(captions(COUNT)[5:])
    assert texts_of(train) != texts_of(train, shuffle=False)


def test_rows_held_out_of_a_mixture_of_streams_are_never_trained_on(tmp_path: Path):
    sources = []
    for name, count, weight in (("first", 30, 0.8), ("second", 12, 0.2)):
        columns = {"image": [png(0)] * count, "caption": [f"{name} {index}" for index in range(count)]}
        sources.append(f"{write_table(tmp_path / f'{name}.csv', columns | {'image': ['x.png'] * count})}={weight}")
    train, held = hold_out(load_pairs(sources, streaming=True), 5)
    kept = texts_of(held, shuffle=False)
    assert sorted(kept) == ["first 0", "first 1", "first 2", "second 0", "second 1"]
    for epoch in range(3):
        trained = {train.read(draw).captions[0] for draw in train.draws(epoch, seed=epoch)}
        assert not trained & set(kept)
        assert len(trained) == 42 - 5


def test_validation_data_may_be_a_source_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Named by a path; of its splits the one that is for this is taken."""
    for name, texts in (("train", ["a cat", "a dog"]), ("other", ["a bird"] * 3)):
        write_table(tmp_path / f"{name}.csv", {"image": [f"{name}.png"] * len(texts), "caption": texts})
    splits = tmp_path / "splits"
    splits.mkdir()
    for name in ("train", "test"):
        write_table(splits / f"{name}.csv", {"image": ["x.png"], "caption": [f"of {name}"]})
    chosen = {"model": "m", "output_dir": "o", "max_steps": 1, "dataset": [str(tmp_path / "train.csv")]}
    monkeypatch.setattr(run_data, "look_at", lambda *_: Look(draws=2))
    for validation, expected in ((tmp_path / "other.csv", ["a bird"] * 3), (splits, ["of test"])):
        data = run_data.open_data(TrainingConfig(**chosen, validation=str(validation), per_device_train_batch_size=2))
        assert texts_of(data.train, shuffle=False) == ["a cat", "a dog"]
        assert data.validation is not None
        assert texts_of(data.validation, shuffle=False) == expected
    with pytest.raises(ValueError, match=r"--validation .*train.csv is a source that is trained on: name another"):
        run_data.open_data(TrainingConfig(**chosen, validation=chosen["dataset"][0]))
    monkeypatch.chdir(tmp_path)
    for dataset, validation in (("train.csv", "./train.csv"), ("splits", "splits/train.csv")):
        with pytest.raises(ValueError, match=f"--validation {validation} is a source that is trained on: name another"):
            run_data.open_data(TrainingConfig(**chosen | {"dataset": [dataset]}, validation=validation))
    with pytest.raises(ValueError, match=r"has no split 'splits'.* the file or folder of that name, write ./splits."):
        run_data.open_data(TrainingConfig(**chosen, validation="splits"))
    tables = {name: datasets.Dataset.from_dict({"image": ["x.png"], "caption": ["a"]}) for name in ("one", "two")}
    datasets.DatasetDict(tables).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"saved has the splits one, two, of which none is called validation or test"):
        run_data.open_data(TrainingConfig(**chosen, validation="./saved"))


@pytest.mark.parametrize(
    ("streaming", "amount", "message"),
    [
        (False, 0, "--validation 0 would hold out 0 of 22 rows"),
        (False, 22, "would hold out 22 of 22 rows; take at least 2, and leave at least 1"),
        (False, 1, "--validation 1 would hold out 1 of 22 rows; take at least 2"),
        (False, 0.01, "would hold out 0 of 22 rows"),
        (False, 1.0, "would hold out 22 of 22"),
        (True, 0.1, "the length of a stream isn't known; hold out a number of its rows, or a split"),
        (True, 0, "the length of a stream isn't known"),
    ],
)
def test_impossible_amounts_are_refused(shard: str, streaming: bool, amount: float, message: str):
    with pytest.raises(ValueError, match=message):
        hold_out(load_pairs(shard, streaming=streaming), amount)


def test_validation_is_a_split_a_number_or_a_part():
    assert read_validation("validation") == "validation"
    assert read_validation("500") == 500
    assert isinstance(read_validation("500"), int)
    assert read_validation("0.05") == 0.05
    assert read_validation("nan") == "nan"


# --- reading ahead ---------------------------------------------------------------------------------------------------


def test_reading_ahead_keeps_order_and_depth():
    read: list[int] = []

    def items() -> Iterator[int]:
        for index in range(100):
            read.append(index)
            yield index

    ahead = read_ahead(items(), 3)
    assert next(ahead) == 0
    time.sleep(0.3)
    assert len(read) <= 1 + 3 + 1  # taken, waiting, and one in the reader's hand
    assert list(ahead) == list(range(1, 100))


def test_error_of_the_stream_comes_where_it_happened():
    def items() -> Iterator[int]:
        yield 1
        raise OSError("the line went dead")

    ahead = read_ahead(items(), 5)
    assert next(ahead) == 1
    with pytest.raises(OSError, match="the line went dead"):
        next(ahead)


def test_reader_ends_when_nobody_wants_more():
    before = set(threading.enumerate())
    ahead = read_ahead(iter(range(10**9)), 2)
    next(ahead)
    (reader,) = (thread for thread in set(threading.enumerate()) - before if thread.name == "hf_clip reader")
    ahead.close()
    assert not reader.is_alive()


def test_replayed_pairs_are_not_held_out_and_have_columns_of_their_own(tmp_path: Path):
    count = 12
    new = {"photo": [png(0)] * count, "alt": [f"new {row}" for row in range(count)], "note": ["x"] * count}
    old = {"image": [png(1)] * 4, "text": [f"old {row}" for row in range(4)]}
    sources = [str(write_table(tmp_path / f"{name}.parquet", rows)) for name, rows in (("new", new), ("old", old))]
    chosen = {"model": "m", "dataset": sources[:1], "output_dir": "o", "max_steps": 1, "caption_column": "alt"}
    data = run_data.open_data(TrainingConfig(**chosen, validation="3", replay=f"{sources[1]}=0.25"))
    assert isinstance(data.train, Pairs)
    assert data.train.shares() == [9, 3]
    assert data.validation is not None
    assert {text.split()[0] for text in texts_of(data.validation)} == {"new"}
    with pytest.raises(ValueError, match="is a source that is trained on: name another"):
        run_data.open_data(TrainingConfig(**chosen, validation=sources[1], replay=f"{sources[1]}=0.25"))
