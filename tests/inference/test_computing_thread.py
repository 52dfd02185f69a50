"""One thread computes: whatever asks it, in turns, and with its own number of torch's threads."""

import threading
from functools import partial

import pytest
import torch

from hf_clip.inference.computing_thread import ComputingThread, without_a_team

from ..waiting import LONGEST_WAIT


def test_everything_is_computed_in_one_thread_and_in_turn():
    computing = ComputingThread()
    done: list[int] = []

    def work(number: int) -> int:
        done.append(number)
        return threading.get_ident()

    threads = {
        found.result(LONGEST_WAIT) for found in [computing.submit(partial(work, number)) for number in range(20)]
    }
    assert threads == {computing.run(threading.get_ident)}
    assert threads != {threading.get_ident()}
    assert done == list(range(20))


def test_work_that_asks_for_more_work_does_not_wait_for_itself():
    computing = ComputingThread()
    assert computing.submit(lambda: computing.run(lambda: 3)).result(LONGEST_WAIT) == 3


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_error_is_raised_where_it_was_asked_for(error: type[BaseException]):
    computing = ComputingThread()

    def fail() -> None:
        raise error("no")

    with pytest.raises(error, match="^no$"):
        computing.run(fail)
    assert computing.submit(lambda: 3).result(LONGEST_WAIT) == 3


def test_number_of_threads_is_that_of_the_maker():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        computing = ComputingThread()
        with without_a_team():
            assert torch.get_num_threads() == 1
            assert computing.run(torch.get_num_threads) == 3
    finally:
        torch.set_num_threads(before)


def test_what_was_cancelled_is_not_computed():
    computing = ComputingThread()
    may_go_on, done = threading.Event(), []
    first = computing.submit(may_go_on.wait)
    second = computing.submit(lambda: done.append(2))
    assert second.cancel()
    may_go_on.set()
    assert first.result(LONGEST_WAIT)
    assert computing.submit(lambda: 3).result(LONGEST_WAIT) == 3
    assert done == []


def test_thread_ends_with_its_last_holder():
    computing = ComputingThread()
    thread = computing.run(threading.current_thread)
    del computing
    thread.join(LONGEST_WAIT)
    assert not thread.is_alive()
