"""Batches: what is in them, their order over workers, processes and interruptions, and rows that cannot be used."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoProcessor, ProcessorMixin

from hf_clip.training.augment import Augmentation
from hf_clip.training.collator import PairCollator
from hf_clip.training.content import content_id
from hf_clip.training.data import BadRows, PairLoader, Position, build_loader
from hf_clip.training.pairs import Pairs, PairStream, hold_out, load_pairs, read_validation
from hf_clip.training.read_ahead import read_ahead

from .sources import broken, captions, corrupt_exif, jpeg, png, write_table, write_tar

pytestmark = [
    pytest.mark.usefixtures("prepared_here"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # `datasets` leaves tables open
]

STREAMING = pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])

STRONG = Augmentation(crop=0.5, flip=0.5, jitter=0.3)
COUNT = 22


@pytest.fixture(scope="module")
def processor(repositories: dict[str, Path]) -> ProcessorMixin:
    """Of a model of 48 pixels and 20 tokens."""
    return AutoProcessor.from_pretrained(repositories["vit"])


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    pictures = [jpeg(index) for index in range(COUNT)]
    return str(write_tar(tmp_path_factory.mktemp("shard") / "shard.tar", pictures, captions(COUNT)))


@pytest.fixture(scope="module")
def shard_with_bad_rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """22 pictures, of which those in places 3, 4 and 9 cannot be decoded, and 6 has a damaged EXIF block."""
    pictures = [jpeg(index) for index in range(COUNT)]
    bad = broken()
    pictures[3], pictures[4], pictures[9], pictures[6] = bad["truncated"], bad["text"], bad["nothing"], corrupt_exif()
    return str(write_tar(tmp_path_factory.mktemp("bad") / "shard.tar", pictures, captions(COUNT)))


def loader_of(pairs: Pairs | PairStream, processor: ProcessorMixin, batch_size: int = 4, **settings: Any) -> PairLoader:
    collator = PairCollator(processor, settings.pop("augmentation", STRONG), seed=settings.get("seed", 0))
    return build_loader(pairs, collator, batch_size, **settings)


def joined(batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Local batches as one; texts are as long as the longest."""
    length = max(batch["input_ids"].shape[1] for batch in batches)
    fill = {"input_ids": 999, "attention_mask": 0}
    whole = {}
    for name in batches[0]:
        parts = [batch[name] for batch in batches]
        if name in fill:
            parts = [
                torch.nn.functional.pad(part, (0, length - part.shape[1]), value=fill[name]) for part in parts
            ]  # fmt: skip
        whole[name] = torch.cat(parts)
    return whole


def assert_equal(first: Sequence[dict[str, Tensor]], second: Sequence[dict[str, Tensor]]) -> None:
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert torch.equal(one[name], other[name]), name


# --- what is in a batch ----------------------------------------------------------------------------------------------


def test_batch_has_what_model_and_loss_need(shard: str, processor: ProcessorMixin):
    batches = list(loader_of(load_pairs(shard), processor).epoch())
    assert len(batches) == 5
    for batch in batches:
        assert set(batch) == {"pixel_values", "input_ids", "attention_mask", "image_ids", "text_ids"}
        assert batch["pixel_values"].shape == (4, 3, 48, 48)
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert batch["image_ids"].shape == batch["text_ids"].shape == (4,)
        assert batch["image_ids"].dtype == batch["text_ids"].dtype == torch.int64


@STREAMING
def test_a_pair_stays_a_pair_and_evaluation_prepares_as_the_processor_does(
    shard: str, processor: ProcessorMixin, streaming: bool
):
    pairs = load_pairs(shard, streaming=streaming)
    (batch,) = loader_of(pairs, processor, COUNT, training=False, augmentation=None).epoch()
    expected = processor(text=captions(COUNT), images=[jpeg(index) for index in range(COUNT)], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    length = expected["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], expected["input_ids"])
    assert batch["image_ids"].tolist() == [content_id(jpeg(index)) for index in range(COUNT)]
    assert batch["text_ids"].tolist() == [content_id(caption) for caption in captions(COUNT)]


def test_training_keeps_pairs_together_too(shard: str, processor: ProcessorMixin):
    texts = {content_id(jpeg(index)): content_id(caption) for index, caption in enumerate(captions(COUNT))}
    for batch in loader_of(load_pairs(shard), processor).epoch():
        for image, text in zip(batch["image_ids"].tolist(), batch["text_ids"].tolist(), strict=True):
            assert texts[image] == text


@pytest.mark.parametrize(("words", "length"), [(1, 8), (6, 8), (7, 16), (14, 16), (15, 20), (60, 20)])
def test_captions_are_padded_to_a_multiple_of_eight_that_the_model_takes(
    words: int, length: int, processor: ProcessorMixin
):
    ids = processor.tokenizer("a").input_ids
    assert len(ids) == 3
    tokens = PairCollator(processor).tokenize(["a", " ".join("a" * words)])
    assert tokens["input_ids"].shape == tokens["attention_mask"].shape == (2, length)
    assert tokens["attention_mask"].sum(1).tolist() == [3, min(words + 2, 20)]
    assert tokens["input_ids"][0, 2:].eq(processor.tokenizer.pad_token_id).all()
    assert tokens["input_ids"][1, min(words + 1, 19)] == processor.tokenizer.eos_token_id


def test_equal_pictures_and_captions_are_known_by_their_ids(tmp_path: Path, processor: ProcessorMixin):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(png(1))
    columns = {"image": ["a.png", "b.png"], "caption": ["same", " same "], "class": [3, 5]}
    pairs = load_pairs(str(write_table(tmp_path / "table.csv", columns)), label_column="class")
    (batch,) = loader_of(pairs, processor, 2, training=False).epoch()
    assert batch["image_ids"].tolist() == [content_id(png(1))] * 2
    assert batch["text_ids"].tolist() == [content_id("same")] * 2
    assert batch["labels"].tolist() == [3, 5]


def test_content_ids_are_fixed_numbers_of_63_bits():
    assert content_id("ü") == content_id("ü".encode())
    ids = {content_id(str(index)) for index in range(1000)}
    assert len(ids) == 1000
    assert all(0 <= number < 2**63 for number in ids)
    assert content_id("a cat") == 3745569759787347665


def test_one_of_several_captions_is_drawn_anew_in_each_epoch(tmp_path: Path, processor: ProcessorMixin):
    texts = [[f"row {row} text {text}" for text in range(4)] for row in range(6)]
    source = str(write_table(tmp_path / "table.parquet", {"image": [png(i) for i in range(6)], "captions": texts}))
    loader = loader_of(load_pairs(source), processor, 6)

    def drawn(epoch: int) -> dict[int, int]:
        (batch,) = loader.epoch(epoch)
        return dict(zip(batch["image_ids"].tolist(), batch["text_ids"].tolist(), strict=True))

    epochs = [drawn(epoch) for epoch in range(8)]
    assert epochs[3] == drawn(3)
    for row in range(6):
        found = {epoch[content_id(png(row))] for epoch in epochs}
        assert found <= {content_id(text) for text in texts[row]}
        assert len(found) > 1
    (batch,) = loader_of(load_pairs(source, captions="all"), processor, 24).epoch()
    assert sorted(batch["text_ids"].tolist()) == sorted(content_id(text) for row in texts for text in row)


# --- order -----------------------------------------------------------------------------------------------------------


@STREAMING
def test_order_depends_on_seed_and_epoch_alone(shard: str, processor: ProcessorMixin, streaming: bool):
    pairs = load_pairs(shard, streaming=streaming)

    def order(seed: int, epoch: int) -> list[int]:
        batches = loader_of(pairs, processor, 11, seed=seed).epoch(epoch)
        return [number for batch in batches for number in batch["text_ids"].tolist()]

    orders = {(seed, epoch): order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(map(tuple, orders.values()))) == 4
    assert all(sorted(found) == sorted(map(content_id, captions(COUNT))) for found in orders.values())
    torch.manual_seed(99)
    assert order(1, 1) == orders[1, 1]


@STREAMING
def test_batches_do_not_depend_on_the_number_of_workers(
    shard_with_bad_rows: str, processor: ProcessorMixin, streaming: bool
):
    found = []
    for workers in (0, 2):
        loader = loader_of(load_pairs(shard_with_bad_rows, streaming=streaming), processor, num_workers=workers)
        found.append([batch for _, batch in islice(loader.batches(), 8)])  # into the second epoch
    assert_equal(*found)


@STREAMING
@pytest.mark.parametrize("training", [True, False])
def test_processes_together_have_what_one_process_has(
    shard_with_bad_rows: str, processor: ProcessorMixin, streaming: bool, training: bool
):
    """With augmentation, with rows that cannot be used, and with last batches that differ in size."""
    pairs = load_pairs(shard_with_bad_rows, streaming=streaming)
    (alone,) = ([*loader_of(pairs, processor, 6, training=training).epoch(1)],)
    locals_ = [
        list(loader_of(pairs, processor, 2, training=training, num_processes=3, process_index=index).epoch(1))
        for index in range(3)
    ]
    assert len(alone) == (3 if training else 4)
    assert_equal([joined(batches) for batches in zip(*locals_, strict=True)], alone)


@STREAMING
def test_run_that_goes_on_has_the_batches_that_it_would_have_had(
    shard_with_bad_rows: str, processor: ProcessorMixin, streaming: bool
):
    pairs = load_pairs(shard_with_bad_rows, streaming=streaming)
    uninterrupted = list(islice(loader_of(pairs, processor).batches(), 12))
    assert [position for position, _ in uninterrupted[:6]] == [(0, n) for n in range(1, 6)] + [(1, 1)]
    for place in (0, 2, 4, 6):  # 4 is the end of the first epoch
        position = uninterrupted[place][0]
        resumed = list(islice(loader_of(pairs, processor).batches(position), 11 - place))
        assert [found for found, _ in resumed] == [found for found, _ in uninterrupted[place + 1 :]]
        assert_equal([batch for _, batch in resumed], [batch for _, batch in uninterrupted[place + 1 :]])


@STREAMING
def test_nothing_is_prepared_of_what_is_skipped(
    shard: str, processor: ProcessorMixin, streaming: bool, monkeypatch: pytest.MonkeyPatch
):
    pairs = load_pairs(shard, streaming=streaming)
    prepared, read = [], []
    prepare, read_row = PairCollator.prepare, type(pairs).read
    monkeypatch.setattr(PairCollator, "prepare", lambda *given: prepared.append(given[1].row) or prepare(*given))
    monkeypatch.setattr(type(pairs), "read", lambda *given: read.append(given[1].row) or read_row(*given))
    next(loader_of(pairs, processor).batches(Position(0, 3)))
    expected = [draw.row for draw in islice(pairs.draws(0, first=12), 4)]
    assert prepared == read == expected


def test_position_beyond_a_stream_goes_on_with_the_next_epoch(shard: str, processor: ProcessorMixin):
    pairs = load_pairs(shard, streaming=True)
    position, batch = next(loader_of(pairs, processor).batches(Position(0, 5)))
    assert position == (1, 1)
    assert_equal([batch], [next(loader_of(pairs, processor).epoch(1))])


def test_epoch_that_is_left_early_can_be_followed_by_another(shard: str, processor: ProcessorMixin):
    for streaming in (False, True):
        loader = loader_of(load_pairs(shard, streaming=streaming), processor, num_workers=1)
        first = next(loader.epoch(0))
        assert_equal([first], [next(loader.epoch(0))])
        assert len(list(loader.epoch(1))) == 5


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_has_every_row_once_and_may_leave_a_process_nothing(shard: str, processor: ProcessorMixin):
    pairs = load_pairs(shard)
    batches = [
        list(
            loader_of(
                pairs, processor, 5, augmentation=None, training=False, num_processes=4, process_index=index
            ).epoch()
        )
        for index in range(4)
    ]  # fmt: skip
    assert [[len(batch["text_ids"]) for batch in local] for local in batches] == [[5, 2], [5, 0], [5, 0], [5, 0]]
    assert {name: tuple(value.shape) for name, value in batches[1][1].items()} == {
        "pixel_values": (0, 3, 48, 48),
        "input_ids": (0, 8),
        "attention_mask": (0, 8),
        "image_ids": (0,),
        "text_ids": (0,),
    }
    found = [number for local in zip(*batches, strict=True) for batch in local for number in batch["text_ids"].tolist()]
    assert found == list(map(content_id, captions(COUNT)))


def test_evaluation_leaves_bad_rows_out(shard_with_bad_rows: str, processor: ProcessorMixin):
    bad_rows = BadRows(0.5)
    loader = loader_of(load_pairs(shard_with_bad_rows), processor, 8, training=False, bad_rows=bad_rows)
    texts = [number for batch in loader.epoch() for number in batch["text_ids"].tolist()]
    assert texts == [content_id(text) for index, text in enumerate(captions(COUNT)) if index not in (3, 4, 9)]
    assert (bad_rows.bad, bad_rows.drawn) == (3, COUNT)


# --- rows that cannot be used ----------------------------------------------------------------------------------------


@STREAMING
@pytest.mark.parametrize("workers", [0, 1])
def test_training_goes_past_pictures_that_cannot_be_decoded(
    shard_with_bad_rows: str,
    processor: ProcessorMixin,
    streaming: bool,
    workers: int,
    caplog: pytest.LogCaptureFixture,
):
    """A truncated file, a text and an empty file are skipped; a picture with a damaged EXIF block is shown."""
    bad_rows = BadRows(0.2)
    pairs = load_pairs(shard_with_bad_rows, streaming=streaming)
    loader = loader_of(pairs, processor, 11, num_workers=workers, bad_rows=bad_rows)
    with caplog.at_level(logging.WARNING):
        batches = list(loader.epoch())
    assert [len(batch["text_ids"]) for batch in batches] == [11, 11]
    counts = Counter(number for batch in batches for number in batch["text_ids"].tolist())
    good = [text for index, text in enumerate(captions(COUNT)) if index not in (3, 4, 9)]
    assert set(counts) == set(map(content_id, good))
    assert (bad_rows.bad, bad_rows.drawn) == (3, 22)
    lines = sorted(record.getMessage() for record in caplog.records if record.name == "hf_clip.training.data")
    assert len(lines) == 3
    for place in (3, 4, 9):
        start = f"({place:05d}.jpg) in epoch 0: " if streaming else f"skipped: row {place} of "
        assert sum(start in line for line in lines) == 1, lines
    assert sum("cannot identify image file" in line for line in lines) == 2
    assert sum("truncated" in line for line in lines) == 1
    assert not any("0x" in line or "leave it out" in line for line in lines)


@STREAMING
def test_row_behind_the_batch_steps_in(tmp_path: Path, processor: ProcessorMixin, streaming: bool):
    pictures = [png(index) for index in range(12)]
    pictures[1] = pictures[2] = pictures[5] = b"bad"  # 5 is the first that would step in for 1
    source = str(write_table(tmp_path / "table.parquet", {"image": pictures, "caption": captions(12)}))
    pairs = load_pairs(source, streaming=streaming)
    in_order = pairs.draws
    pairs.draws = lambda epoch, **how: in_order(epoch, **(how | {"shuffle": False}))  # type: ignore[method-assign]
    batch = next(loader_of(pairs, processor, 4).epoch())
    assert batch["text_ids"].tolist() == [content_id(f"caption number {index}") for index in (0, 6, 6, 3)]


def test_batch_that_loses_all_rows_is_full_all_the_same(tmp_path: Path, processor: ProcessorMixin):
    pictures = [b"bad"] * 2 + [png(index) for index in range(2, 12)]
    source = str(write_table(tmp_path / "table.parquet", {"image": pictures, "caption": captions(12)}))
    pairs = load_pairs(source, streaming=True, buffer=1)
    bad_rows = BadRows(1.0)
    loaders = [
        loader_of(pairs, processor, 2, num_processes=2, process_index=index, bad_rows=bad_rows) for index in range(2)
    ]
    first, second = (next(loader.epoch()) for loader in loaders)
    assert first["text_ids"].tolist() == [content_id(f"caption number {index}") for index in (4, 5)]
    assert second["text_ids"].tolist() == [content_id(f"caption number {index}") for index in (2, 3)]
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
    with pytest.raises(
        ValueError, match=r"1 of 4 rows cannot be used, more than --max_bad_fraction 0.01 allows; the f"
    ):
        list(loader_of(pairs, processor, 2, bad_rows=BadRows()).epoch())
    assert "row 1 of" in caplog.text
    assert "its caption is empty" in caplog.text


def test_a_few_bad_rows_among_the_first_end_no_run_and_too_many_do():
    bad = [("row 7", "broken")]
    rows = BadRows(0.01)
    for _ in range(10):
        rows.add(10, bad)
    with pytest.raises(ValueError, match=r"11 of 110 rows cannot be used, .* the first is row 7: broken\. Repair"):
        rows.add(10, bad)
    rows = BadRows(0.01)
    rows.add(2000, bad * 20)
    rows.check()
    with pytest.raises(ValueError, match="21 of 2050 rows"):
        rows.add(50, bad)
    rows = BadRows(0.0)
    rows.add(5, [])
    rows.check()
    with pytest.raises(ValueError, match="1 of 10 rows"):
        rows.add(5, bad)
    with pytest.raises(ValueError, match="max_bad_fraction is 2, but must be from 0 to 1"):
        BadRows(2)


def test_count_of_bad_rows_outlives_an_interruption():
    rows, later = BadRows(0.5), BadRows(0.5)
    rows.add(10, [("row 1", "broken")])
    later.load_state_dict(rows.state_dict())
    assert (later.drawn, later.bad, later.first) == (10, 1, "row 1: broken")


# --- what is refused -------------------------------------------------------------------------------------------------


def test_batch_of_one_is_refused(shard: str, processor: ProcessorMixin):
    pairs = load_pairs(shard)
    with pytest.raises(ValueError, match="batch_size is 1, but a pair is learned against others: take at least 2"):
        loader_of(pairs, processor, 1)
    assert len(loader_of(pairs, processor, 1, training=False)) == COUNT


def test_batch_larger_than_the_data_is_refused(shard: str, processor: ProcessorMixin):
    with pytest.raises(ValueError, match="has 22 rows, fewer than one batch of 23. Pass --batch_size 22 or less"):
        loader_of(load_pairs(shard), processor, 23)
    with pytest.raises(ValueError, match=r"one batch of 24 \(8 in each of 3 processes\). Pass --batch_size 7 or less"):
        loader_of(load_pairs(shard), processor, 8, num_processes=3)
    with pytest.raises(ValueError, match="has fewer rows than one batch of 23; lower --batch_size"):
        next(loader_of(load_pairs(shard, streaming=True), processor, 23).batches())


def test_length_of_an_epoch(shard: str, processor: ProcessorMixin):
    assert len(loader_of(load_pairs(shard), processor, 4)) == 5
    assert len(loader_of(load_pairs(shard), processor, 4, training=False)) == 6
    with pytest.raises(TypeError, match="isn't known before it was read"):
        len(loader_of(load_pairs(shard, streaming=True), processor, 4))


def test_image_processor_that_keeps_sizes_is_refused(processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processor.image_processor, "do_center_crop", False)
    with pytest.raises(ValueError, match="do_center_crop=False, but pictures of one size are needed"):
        PairCollator(processor)


# --- validation ------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("streaming", "amount", "message"),
    [
        (False, 0, "--validation 0 would hold out 0 of 22 rows"),
        (False, 22, "would hold out 22 of 22 rows; take at least 1, and leave at least 1"),
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
    ahead = read_ahead(iter(range(10**9)), 2)
    next(ahead)
    ahead.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "hf_clip reader" and thread.is_alive()]
