"""`hf-clip app`, run in a thread of the tests' own process, and ended by them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hf_clip.app import page_server
from hf_clip.commands import program
from hf_clip.taken_port import address_of

from ..waiting import LONGEST_WAIT


@contextmanager
def served(*words: str) -> Iterator[str]:
    """Run the command with these words until the `with` block ends; yields the page's address."""
    started, made, statuses = threading.Event(), [], []
    make_server = page_server.make_server

    def make(app: Any, then: Any) -> Any:
        def started_too() -> None:
            then()
            started.set()

        made.append(make_server(app, started_too))
        return made[0]

    def run() -> None:
        try:
            statuses.append(program.main(["app", *words, "--port", "0"]))
        finally:
            started.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_server, "make_server", make)
        thread = threading.Thread(target=run)
        thread.start()
        started.wait(LONGEST_WAIT)
        assert made, f"the command ended with {statuses}"
        try:
            yield f"{address_of(made[0].servers[0].sockets[0])}/"
        finally:
            made[0].should_exit = True
            thread.join(LONGEST_WAIT)
    assert statuses == [0]
