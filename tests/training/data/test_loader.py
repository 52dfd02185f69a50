"""Batches: what is in them, their order over workers, processes and interruptions, and rows that cannot be used."""

import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pandas
import psutil
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.multiprocessing import reductions
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from transformers import ProcessorMixin

from hf_clip.data.content import content_id
from hf_clip.training.data.bad_rows import BadRows
from hf_clip.training.data.collator import PairCollator
from hf_clip.training.data.load_pairs import load_pairs
from hf_clip.training.data.loader import Position, WorkerKilledError
from hf_clip.training.stopping import Signals, heeded

from ...waiting import until
from ..sources import COUNT, captions, jpeg, loader_of, png, text_id, text_ids, write_table

pytestmark = [
    pytest.mark.usefixtures("prepared_here"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # `datasets` leaves tables open
]

STREAMING = pytest.mark.parametrize("streaming", [False, True], ids=["table", "stream"])


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
    assert batch["text_ids"].tolist() == text_ids(processor, captions(COUNT))


def test_training_keeps_pairs_together_too(shard: str, processor: ProcessorMixin):
    texts = {content_id(jpeg(index)): text_id(processor, caption) for index, caption in enumerate(captions(COUNT))}
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


def test_lists_of_captions_may_be_empty_or_come_as_arrays(processor: ProcessorMixin):
    collator = PairCollator(processor)
    for nothing in ([], (), np.array([], dtype=str)):
        tokens = collator.tokenize(nothing)
        assert {name: tuple(t.shape) for name, t in tokens.items()} == {"input_ids": (0, 8), "attention_mask": (0, 8)}
        assert all(tensor.dtype == torch.int64 for tensor in tokens.values())
    texts = captions(5)
    expected = collator.tokenize(texts)
    for given in (
        tuple(texts),
        np.array(texts),
        pandas.Series(texts),
        Dataset.from_dict({"text": texts})["text"],
        iter(texts),
    ):
        found = collator.tokenize(given)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_captions_that_the_model_reads_alike_have_one_number(tmp_path: Path, processor: ProcessorMixin):
    """Masking and evaluation go by what the model sees: not by case, white space or what stands behind the cut."""
    long = " ".join(["word"] * 30)
    texts = ["a Cat", "A  cat", f"{long} one", f"{long} two", "a dog"]
    source = str(write_table(tmp_path / "table.parquet", {"image": [png(i) for i in range(5)], "caption": texts}))
    (batch,) = loader_of(load_pairs(source), processor, 5, training=False).epoch()
    cat, cats, one, two, dog = batch["text_ids"].tolist()
    assert cat == cats
    assert one == two
    assert len({cat, one, dog}) == 3


def test_equal_images_and_captions_are_known_by_their_ids(tmp_path: Path, processor: ProcessorMixin):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(png(1))
    columns = {"image": ["a.png", "b.png"], "caption": ["same", " same "], "class": [3, 5]}
    pairs = load_pairs(str(write_table(tmp_path / "table.csv", columns)), label_column="class")
    (batch,) = loader_of(pairs, processor, 2, training=False).epoch()
    assert batch["image_ids"].tolist() == [content_id(png(1))] * 2
    assert batch["text_ids"].tolist() == [text_id(processor, "same")] * 2
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
        assert found <= set(text_ids(processor, texts[row]))
        assert len(found) > 1
    (batch,) = loader_of(load_pairs(source, captions="all"), processor, 24).epoch()
    assert sorted(batch["text_ids"].tolist()) == sorted(text_ids(processor, [text for row in texts for text in row]))


# --- order -----------------------------------------------------------------------------------------------------------


@STREAMING
def test_order_depends_on_seed_and_epoch_alone(shard: str, processor: ProcessorMixin, streaming: bool):
    pairs = load_pairs(shard, streaming=streaming)

    def order(seed: int, epoch: int) -> list[int]:
        batches = loader_of(pairs, processor, 11, seed=seed).epoch(epoch)
        return [number for batch in batches for number in batch["text_ids"].tolist()]

    orders = {(seed, epoch): order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(map(tuple, orders.values()))) == 4
    assert all(sorted(found) == sorted(text_ids(processor, captions(COUNT))) for found in orders.values())
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


def test_worker_that_is_told_to_end_serves_its_process_on(shard: str, processor: ProcessorMixin):
    """A launcher and a batch system send SIGTERM to the workers too, and the present step still needs them."""
    with heeded(Signals()):
        batches = loader_of(load_pairs(shard), processor, num_workers=1).batches()
        others = set(psutil.Process().children())
        next(batches)
        worker_of(others).terminate()
        assert len(list(islice(batches, 12))) == 12


def workers_of(before: set[psutil.Process]) -> list[psutil.Process]:
    """Processes of this one that were not there before, and live."""
    found = []
    for child in set(psutil.Process().children()) - before:
        with suppress(psutil.NoSuchProcess):  # as of a zombie, too, which has no command
            if child.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(child.cmdline()):
                found.append(child)
    return found


def worker_of(before: set[psutil.Process]) -> psutil.Process:
    (worker,) = workers_of(before)
    return worker


@STREAMING
def test_killed_worker_is_started_anew_once_and_no_batch_is_lost(
    shard_with_bad_rows: str,
    processor: ProcessorMixin,
    streaming: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
):
    """Into the second epoch. The numbers that the run draws itself stay those that it would have drawn."""
    own_handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a loader of another test may have left torch's
    request.addfinalizer(lambda: signal.signal(signal.SIGCHLD, own_handler))
    # torch looks every five seconds whether its workers live.
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    pairs = load_pairs(shard_with_bad_rows, streaming=streaming)
    uninterrupted = [batch for _, batch in islice(loader_of(pairs, processor).batches(), 8)]
    torch.manual_seed(0)
    expected = torch.rand(())
    torch.manual_seed(0)
    before, bad_rows = set(psutil.Process().children()), BadRows(1.0)
    handler = signal.getsignal(signal.SIGCHLD)
    batches = loader_of(pairs, processor, num_workers=1, bad_rows=bad_rows).batches()
    found = [batch for _, batch in islice(batches, 3)]
    assert signal.getsignal(signal.SIGCHLD) is handler  # torch's own would raise anywhere
    worker_of(before).kill()
    found += [batch for _, batch in islice(batches, 5)]
    assert_equal(found, uninterrupted)
    assert bad_rows.drawn == 8 * 4
    assert torch.rand(()) == expected
    assert "is started anew, once" in "".join(record.getMessage() for record in caplog.records)
    worker_of(before).kill()
    message = "A worker that prepares rows of .* was killed, and again after it was started anew: .* Take fewer --data"
    with pytest.raises(WorkerKilledError, match=message):
        list(islice(batches, 8))


TAKEN: list[str] = []
TAKE = reductions.rebuild_storage_fd


def take_or_fail(*arguments: object) -> object:
    """What takes a tensor from a worker. Two of them are on their way when the worker is killed."""
    TAKEN.append(threading.current_thread().name)
    if len(TAKEN) in (12, 32):
        raise EOFError
    return TAKE(*arguments)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_worker_that_is_killed_while_its_batch_is_pinned_is_started_anew(
    shard: str, processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """As on a GPU. torch's thread then takes the batches, and what it cannot take from a dead worker ends it."""
    pairs = load_pairs(shard)
    uninterrupted = [batch for _, batch in islice(loader_of(pairs, processor).batches(), 5)]
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.1,))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(reductions, "rebuild_storage_fd", take_or_fail)
    TAKEN.clear()
    batches = loader_of(pairs, processor, num_workers=1, pin_memory=True).batches()
    assert_equal([batch for _, batch in islice(batches, 5)], uninterrupted)
    assert threading.current_thread().name not in TAKEN
    assert "A DataLoader worker exited unexpectedly; it is started anew, once" in caplog.text
    with pytest.raises(WorkerKilledError, match="was killed, and again after it was started anew"):
        list(islice(batches, 12))


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


def test_workers_that_are_not_kept_end_with_the_epoch(shard: str, processor: ProcessorMixin):
    before = set(psutil.Process().children())
    loader = loader_of(load_pairs(shard), processor, num_workers=1, keep_workers=False, training=False)
    first = []
    for batch in loader.epoch():
        assert worker_of(before).is_running()
        first.append(batch)
    until(lambda: not workers_of(before), "the worker's end")
    assert_equal(first, list(loader.epoch()))


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
    assert found == text_ids(processor, captions(COUNT))


def test_evaluation_leaves_bad_rows_out(shard_with_bad_rows: str, processor: ProcessorMixin):
    bad_rows = BadRows(0.5)
    loader = loader_of(load_pairs(shard_with_bad_rows), processor, 8, training=False, bad_rows=bad_rows)
    texts = [number for batch in loader.epoch() for number in batch["text_ids"].tolist()]
    assert texts == [text_id(processor, text) for index, text in enumerate(captions(COUNT)) if index not in (3, 4, 9)]
    assert (bad_rows.bad, bad_rows.drawn) == (3, COUNT)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_batch_of_one_is_refused(shard: str, processor: ProcessorMixin):
    pairs = load_pairs(shard)
    with pytest.raises(ValueError, match="batch_size is 1, but a pair is learned against others: take at least 2"):
        loader_of(pairs, processor, 1)
    assert len(loader_of(pairs, processor, 1, training=False)) == COUNT


def test_batch_larger_than_the_data_is_refused(shard: str, processor: ProcessorMixin):
    with pytest.raises(
        ValueError, match="has 22 rows, fewer than one batch of 23. Pass --per_device_train_batch_size 22 or less"
    ):
        loader_of(load_pairs(shard), processor, 23)
    with pytest.raises(
        ValueError, match=r"one batch of 24 \(8 in each of 3 processes\). Pass --per_device_train_batch_size 7 or less"
    ):
        loader_of(load_pairs(shard), processor, 8, num_processes=3)
    with pytest.raises(ValueError, match="has fewer rows than one batch of 23; lower --per_device_train_batch_size"):
        next(loader_of(load_pairs(shard, streaming=True), processor, 23).batches())


def test_length_of_an_epoch(shard: str, processor: ProcessorMixin):
    assert len(loader_of(load_pairs(shard), processor, 4)) == 5
    assert len(loader_of(load_pairs(shard), processor, 4, training=False)) == 6
    with pytest.raises(TypeError, match="isn't known before it was read"):
        len(loader_of(load_pairs(shard, streaming=True), processor, 4))


def test_image_processor_that_keeps_sizes_is_refused(processor: ProcessorMixin, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processor.image_processor, "do_center_crop", False)
    with pytest.raises(ValueError, match="do_center_crop=False, but images of one size are needed"):
        PairCollator(processor)
