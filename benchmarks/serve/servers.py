"""The servers that are measured, each as a process of its own on a free port of this machine.

All processes that compute have the same cores and as many threads. The clients have the other cores, if there are any.
"""

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import IO

from ..load import COMMAND
from ..measuring import LeftOutError
from .sent_items import MODEL_NAME

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0

INFINITY = "from infinity_emb.cli import cli; cli()"


def last_words(log: IO[bytes]) -> str:
    """The last line that a process has logged, without a frame that some programs draw around it."""
    log.seek(0)
    lines = [line.strip(" │╰╯─╭╮") for line in log.read().decode(errors="replace").splitlines()]
    return next((line[:200] for line in reversed(lines) if line), "it said nothing")


def cores_for(threads: int) -> tuple[list[int], list[int]]:
    """The cores of what computes, as many as threads, and those of the clients: the others, or the same."""
    cores = sorted(os.sched_getaffinity(0))
    return cores[:threads], cores[threads:] or cores


@contextmanager
def pinned_process(
    command: list[str], threads: int, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], IO[bytes]]]:
    """A process on the cores of what computes, which ends with the block."""
    cores, _ = cores_for(threads)
    with tempfile.TemporaryFile() as log:
        started = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"} | environment,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            yield started, log
        finally:
            started.terminate()
            try:
                started.wait(20)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()
            for pipe in (started.stdin, started.stdout):
                assert pipe is not None
                pipe.close()


@contextmanager
def hf_clip_server(model: Path, threads: int) -> Iterator[tuple[str, int]]:
    """`hf-clip serve` with its usual options. Yields host and port."""
    with hf_clip_process(model, threads) as (_, host, port):
        yield host, port


@contextmanager
def hf_clip_process(model: Path, threads: int) -> Iterator[tuple[int, str, int]]:
    """As `hf_clip_server`. Yields the number of the process, host and port."""
    words = ["serve", str(model), "--port", "0", "--name", MODEL_NAME]
    with pinned_process([sys.executable, "-W", "ignore", "-c", COMMAND, *words], threads, PYTHONPATH=str(ROOT)) as (
        started,
        log,
    ):
        assert started.stdout is not None
        found = re.match(r"http://([\d.]+):(\d+) ", started.stdout.readline())
        if found is None:
            started.wait(20)
            raise LeftOutError(last_words(log))
        host, port = found[1], int(found[2])
        _wait_until_there(host, port, started, log)
        yield started.pid, host, port


@contextmanager
def infinity_server(model: Path, python: str, threads: int) -> Iterator[tuple[str, int]]:
    """infinity with a model in transformers' layout. Yields host and port once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host, port = free.getsockname()
    words = ["v2", "--model-id", str(model), "--served-model-name", MODEL_NAME, "--host", host, "--port", str(port)]
    words += ["--device", "cpu", "--dtype", "float32", "--engine", "torch", "--log-level", "error"]
    quiet = {"PYTHONPATH": "", "DO_NOT_TRACK": "1", "PYTHONUNBUFFERED": "1"}
    with pinned_process([python, "-W", "ignore", "-c", INFINITY, *words], threads, **quiet) as (started, log):
        _wait_until_there(host, port, started, log)
        yield host, port


def _wait_until_there(host: str, port: int, started: subprocess.Popen[str], log: IO[bytes]) -> None:
    """Return once a server answers. Raises LeftOutError if it ends, or takes too long."""
    end = time.monotonic() + START_SECONDS
    while not _is_there(host, port):
        if started.poll() is not None:
            raise LeftOutError(last_words(log))
        if time.monotonic() > end:
            raise LeftOutError(f"it did not answer within {START_SECONDS:g} s")
        time.sleep(0.2)


def _is_there(host: str, port: int) -> bool:
    connection = HTTPConnection(host, port, timeout=2.0)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()
