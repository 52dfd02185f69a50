"""Threads that watch one another, one after the other and by a clock of the test's own."""

import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from hf_clip.training import stopping

from ..waiting import LONGEST_WAIT


class Watching:
    """What one thread takes for the event that its run is over: it waits there until it is its turn."""

    def __init__(self, watch: Callable[["Watching"], None]):
        self.is_over = False
        self._waits, self._may_go_on = threading.Semaphore(0), threading.Semaphore(0)

        def run() -> None:
            try:
                watch(self)
            finally:
                self._waits.release()

        self.thread = threading.Thread(target=run)
        self.thread.start()
        assert self._waits.acquire(timeout=LONGEST_WAIT)

    def wait(self, seconds: float) -> bool:
        self._waits.release()
        assert self._may_go_on.acquire(timeout=LONGEST_WAIT)
        return self.is_over

    def take_turn(self) -> None:
        """Let it look once more, or end."""
        if self.thread.is_alive():
            self._may_go_on.release()
            assert self._waits.acquire(timeout=LONGEST_WAIT)


class Turns:
    """A clock for `stopping`, and the threads that go by it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        self.watching: list[Watching] = []
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=lambda seconds: None)
        monkeypatch.setattr(stopping, "time", clock)

    def start(self, life: stopping.SignsOfLife, end: Callable[[str, bool], None]) -> Watching:
        """Watch in a thread, which has looked once when this returns."""
        self.watching.append(Watching(lambda over: life.watch(end, over)))  # type: ignore[arg-type]
        return self.watching[-1]

    def take(self, number: int, seconds: float = 10.0) -> None:
        """So often, let so many seconds pass and each thread look once."""
        for _ in range(number):
            self.now += seconds
            for each in self.watching:
                each.take_turn()

    def end(self) -> None:
        """Let all end."""
        for each in self.watching:
            each.is_over = True
            each.take_turn()
            each.thread.join()
