"""Ports that nobody else takes between their choice and their use."""

import itertools
import os
import random
import socket

_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
_numbers = list(range(20_000 + _worker, 30_000, 64))  # each of up to 64 workers has its own
random.Random(os.getpid()).shuffle(_numbers)
_turns = itertools.cycle(_numbers)


def free_port() -> int:
    """A port that processes can take later: the system gives these numbers to nobody who asks for any port."""
    for port in itertools.islice(_turns, len(_numbers)):
        with socket.socket() as trial:
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("all of them are taken")
