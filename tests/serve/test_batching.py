"""Which texts and images are computed together, in which order, and what happens to those nobody waits for."""

import random
import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hf_clip.inference.computing_thread import ComputingThread
from hf_clip.serve.batching import (
    IMAGES,
    MOST_PADDING,
    TEXTS,
    Batcher,
    DroppedError,
    Job,
    QueueFullError,
    Waiting,
    texts_of_one_length,
)

from ..waiting import LONGEST_WAIT, until


class Model:
    """Encodes a text as its length, and waits in its first batch until it is told to go on."""

    def __init__(self, **options: Any):
        self.batches: list[tuple[str, list[int]]] = []
        self.is_at_work, self.may_go_on = threading.Event(), threading.Event()
        self.batcher = Batcher(
            lambda rows: self.encode(TEXTS, rows), lambda rows: self.encode(IMAGES, rows), 1, **options
        )

    def encode(self, kind: str, rows: list[Any]) -> np.ndarray:
        self.batches.append((kind, [len(row) for row in rows]))
        self.is_at_work.set()
        assert self.may_go_on.wait(LONGEST_WAIT)
        if any(len(row) == 13 for row in rows):
            raise RuntimeError("13")
        return np.array([[len(row)] for row in rows], dtype=np.float32)

    def ask(self, kind: str, lengths: list[int]) -> "tuple[Job, Future[Any]]":
        job = self.batcher.open(kind, len(lengths))
        self.batcher.put(job, 0, [[0] * length for length in lengths])
        return job, job.done


@pytest.fixture
def hold():
    made: list[Model] = []

    def make(**options: Any) -> Model:
        made.append(Model(**options))
        return made[-1]

    yield make
    for model in made:
        model.may_go_on.set()
        model.batcher.close()


def test_lone_request_does_not_wait_for_others(hold):
    model = hold()
    model.may_go_on.set()
    assert model.ask(TEXTS, [3])[1].result(LONGEST_WAIT).tolist() == [[3]]
    assert model.batches == [(TEXTS, [3])]


def test_what_arrives_while_a_batch_is_computed_is_the_next_batch(hold):
    model = hold()
    asked = [model.ask(TEXTS, [1])]
    assert model.is_at_work.wait(LONGEST_WAIT)
    asked += [model.ask(TEXTS, [2]), model.ask(TEXTS, [4, 3]), model.ask(IMAGES, [9, 8]), model.ask(IMAGES, [7])]
    model.may_go_on.set()
    assert [done.result(LONGEST_WAIT)[:, 0].tolist() for _, done in asked] == [[1], [2], [4, 3], [9, 8], [7]]
    assert model.batches == [
        (TEXTS, [1]),
        (IMAGES, [9, 7, 8]),
        (TEXTS, [2, 3, 4]),
    ]  # second ones of a request come last


def test_batches_have_a_size(hold):
    model = hold(text_batch=2, image_batch=2)
    model.may_go_on.set()
    for kind in (TEXTS, IMAGES):
        assert model.ask(kind, [5, 4, 3, 2, 1])[1].result(LONGEST_WAIT)[:, 0].tolist() == [5, 4, 3, 2, 1]
    assert max(len(rows) for _, rows in model.batches) == 2


def test_long_texts_are_not_padded_to_and_none_waits_for_ever(hold):
    job = Job(TEXTS, 0, 1)
    waiting = [Waiting(job, place, [0] * length, place) for place, length in enumerate([40, 5, 77, 6, 50, 13])]
    assert [len(item.value) for item in texts_of_one_length(waiting, 64)] == [40, 50]
    assert [len(item.value) for item in texts_of_one_length(waiting[1:], 64)] == [5, 6, 13]
    assert [len(item.value) for item in texts_of_one_length(waiting[2:], 64)] == [77]
    assert [len(item.value) for item in texts_of_one_length(waiting[1:], 2)] == [5, 6]


def test_padding_of_a_batch_is_bounded_and_no_text_that_fits_is_left():
    chance, job = random.Random(0), Job(TEXTS, 0, 1)
    for _ in range(300):
        lengths = [chance.randint(3, chance.choice([8, 30, 77])) for _ in range(chance.randint(1, 40))]
        waiting = [Waiting(job, place, [0] * length, place) for place, length in enumerate(lengths)]
        most = chance.choice([1, 8, 64])
        taken = texts_of_one_length(waiting, most)
        found = [len(item.value) for item in taken]
        assert waiting[0] in taken
        assert found == sorted(found)
        assert len(found) <= most
        padding = sum(found[-1] - length for length in found)
        assert padding <= MOST_PADDING
        left = [len(item.value) for item in waiting if item not in taken]
        added = [len(found) * max(0, length - found[-1]) + max(0, found[-1] - length) for length in left]
        assert len(found) == most or not added or padding + min(added) > MOST_PADDING


def test_texts_are_taken_as_they_arrive_where_no_padding_is_computed(hold):
    model = hold(most_padding=None, text_batch=3)
    asked = [model.ask(TEXTS, [1])]
    assert model.is_at_work.wait(LONGEST_WAIT)
    asked += [model.ask(TEXTS, [length]) for length in (70, 3, 40, 2)]
    model.may_go_on.set()
    assert [done.result(LONGEST_WAIT)[:, 0].tolist() for _, done in asked] == [[1], [70], [3], [40], [2]]
    assert model.batches == [(TEXTS, [1]), (TEXTS, [70, 3, 40]), (TEXTS, [2])]


def test_what_nobody_waits_for_is_not_computed(hold):
    model = hold()
    model.ask(TEXTS, [1])
    assert model.is_at_work.wait(LONGEST_WAIT)
    dropped, done = model.ask(TEXTS, [2, 2])
    kept = model.ask(TEXTS, [3])[1]
    model.batcher.drop(dropped)
    assert model.batcher.waiting(TEXTS) == 2
    model.may_go_on.set()
    assert kept.result(LONGEST_WAIT).tolist() == [[3]]
    assert (TEXTS, [3]) in model.batches
    with pytest.raises(DroppedError):
        done.result(0)
    until(lambda: model.batcher.waiting(TEXTS) == 0)  # counted down just after the result is there


def test_full_queue_refuses_and_says_when_to_ask_again(hold):
    model = hold(most_texts=3, most_images=1)
    model.ask(TEXTS, [1, 1])
    with pytest.raises(QueueFullError, match="Too many texts are waiting; ask again in 1 s"):
        model.ask(TEXTS, [1, 1])
    last = model.ask(TEXTS, [1])[1]
    model.may_go_on.set()
    last.result(LONGEST_WAIT)
    model.ask(TEXTS, [1, 1])[1].result(LONGEST_WAIT)


def test_large_requests_leave_room_for_small_ones(hold):
    model = hold(most_texts=400, most_images=40)
    model.ask(TEXTS, [1] * 300)
    with pytest.raises(QueueFullError):
        model.ask(TEXTS, [1] * 65)
    model.ask(TEXTS, [1] * 64)
    model.ask(IMAGES, [1] * 30)
    with pytest.raises(QueueFullError):
        model.ask(IMAGES, [1] * 17)
    model.ask(IMAGES, [1] * 10)


def test_large_request_may_fill_the_queue_if_nothing_waits(hold):
    """Otherwise its client would ask again for ever."""
    model = hold(most_texts=400)
    with pytest.raises(QueueFullError):
        model.ask(TEXTS, [1] * 401)
    model.ask(TEXTS, [1] * 400)


@pytest.fixture
def queues():
    """A batcher whose batches are taken by the test."""
    nobody = SimpleNamespace(submit=lambda work: None)
    made = Batcher(len, len, 1, text_batch=4, image_batch=4, computing=nobody)  # type: ignore[arg-type]

    def ask(kind: str, count: int, length: int = 5) -> Job:
        job = made.open(kind, count)
        made.put(job, 0, [[0] * length] * count)
        return job

    return made, ask


@pytest.mark.parametrize("length", [5, 77])
@pytest.mark.parametrize("kind", [TEXTS, IMAGES])
def test_small_request_passes_large_ones(queues, kind: str, length: int):
    batcher, ask = queues
    large = [ask(kind, 50) for _ in range(3)]
    for _ in range(5):
        assert {item.job for item in batcher._take()[1]} <= set(large)
    small = ask(kind, 1, length)
    soon = [item.job for _ in range(2) for item in batcher._take()[1]]
    assert small in soon


def test_large_request_does_not_wait_for_ever(queues):
    batcher, ask = queues
    large, left, batches = ask(TEXTS, 30), 30, 0
    while left:
        for _ in range(4):  # as many as a batch holds
            ask(TEXTS, 1, 77 if batches % 2 else 5)
        left -= sum(item.job is large for item in batcher._take()[1])
        batches += 1
        assert batches < 8 * 30
    assert batches > 30 / 4


def test_texts_and_images_take_turns(queues):
    batcher, ask = queues
    ask(TEXTS, 12)
    ask(IMAGES, 8)
    assert [batcher._take()[0] for _ in range(5)] == [TEXTS, IMAGES, TEXTS, IMAGES, TEXTS]


def test_other_work_of_the_thread_waits_for_two_batches_at_most(hold):
    """Such as the search of an index, whatever waits to be encoded."""
    computing = ComputingThread()
    model = hold(text_batch=1, computing=computing)
    model.ask(TEXTS, [1] * 10)
    assert model.is_at_work.wait(LONGEST_WAIT)
    batches = computing.submit(lambda: len(model.batches))
    model.may_go_on.set()
    assert batches.result(LONGEST_WAIT) <= 2


def test_error_is_that_of_its_batch_alone(hold):
    model = hold()
    model.may_go_on.set()
    with pytest.raises(RuntimeError, match="13"):
        model.ask(TEXTS, [13])[1].result(LONGEST_WAIT)
    assert model.ask(TEXTS, [2])[1].result(LONGEST_WAIT).tolist() == [[2]]


def test_closing_computes_what_waits(hold):
    model = hold()
    model.ask(TEXTS, [1])
    assert model.is_at_work.wait(LONGEST_WAIT)
    last = model.ask(TEXTS, [2])[1]
    closing = threading.Thread(target=model.batcher.close)
    closing.start()
    model.may_go_on.set()
    closing.join(LONGEST_WAIT)
    assert last.result(0).tolist() == [[2]]
