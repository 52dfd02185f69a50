"""What ends a run from outside: a signal, a launcher that is gone, a process that stands still.

SIGINT, SIGTERM and SIGHUP end a run at once while it has nothing to lose. Within the steps a signal is remembered, and
`Run` saves a checkpoint when the present step is done. A second signal ends the run at once.

If only the launcher were killed, its processes would go on training and writing. So each process looks every second
whether the process that started it is still there. If it is gone, that is taken for a SIGTERM.

Processes wait for each other in every step. If one was stopped, or its machine is gone, the others would wait for ever.
So each process keeps counting in the store through which they found each other, and watches the count of the next one.
A thread does this, also while a step takes long. The first that sees one stand still says so in the store, and all end.

Where an exchange fails because another process is gone, the counts tell which: those of all others go on.

torch is imported within functions: Ctrl-C is told in words also while torch is still being imported.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))

INTERVAL = 1.0
LONGEST_STILL = 45.0
"""Seconds without a sign of life after which a process is taken for dead. A step that takes long gives signs, and so
does a file that takes long to be written or read: torch and safetensors let other threads run meanwhile."""

LONGEST_WITHOUT_STORE = 30.0
"""Seconds after which the process that keeps the store is taken for dead, where the store is gone."""

LOOKS = 5
"""So many times `INTERVAL` a count must stand still beside others that go on, when an exchange has failed."""

LONGEST_END = 300.0
"""Seconds that a process has for its checkpoint after its launcher is gone."""

LONGEST_WAIT = timedelta(minutes=30)
"""For another process in one exchange: the main process may write the result or publish it meanwhile."""

WORKERS_RESPITE = 30
"""Seconds that a worker which was told to end goes on: its process may need it for the present step."""

PROGRAMS = ("accelerate", "accelerate-launch", "torchrun", "deepspeed")
MODULES = ("accelerate.commands", "torch.distributed.run", "torch.distributed.launch", "deepspeed.launcher")
"""What starts processes and waits for them, as programs and as `python -m` knows them."""


AT_ONCE = (
    "at the second signal, in the midst of a step; --resume_from_checkpoint latest goes on from the last checkpoint, "
    "if any"
)


class Stopped(KeyboardInterrupt):
    """A signal ends the run; `saved` says in words what remains of it."""

    def __init__(self, signum: int, saved: str = ""):
        super().__init__(signum)
        self.signum, self.saved = signum, saved

    @property
    def status(self) -> int:
        """The exit status, as of a process that the signal ended."""
        return 128 + self.signum


class Signals:
    """What this process was told while it could not end at once; see `heeded`."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.are_deferred = False
        self._process = os.getpid()
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def handle(self, signum: int, frame: Any) -> None:
        if os.getpid() != self._process:
            self._handle_in_child(signum)
            return
        if signum == getattr(signal, "SIGHUP", None):
            self._leave_terminals()
        if self.are_deferred and self.received is None:
            self.received = signum
            return
        raise Stopped(signum, "" if self.received is None else AT_ONCE)

    def _leave_terminals(self) -> None:
        """Write to nothing from now on: a terminal that has hung up refuses every line, which would end the run."""
        for terminal in self._terminals:
            with suppress(OSError), open(os.devnull, "wb") as nothing:
                os.dup2(nothing.fileno(), terminal)

    def _handle_in_child(self, signum: int) -> None:
        """Ctrl-C and batch systems send signals to workers too. Their process ends them when it is done with them."""
        from torch.utils.data import get_worker_info

        if get_worker_info() is None or (signum != signal.SIGINT and self.received is not None):
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        elif signum != signal.SIGINT:
            self.received = signum
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(WORKERS_RESPITE)


@contextmanager
def heeded(signals: Signals) -> Iterator[None]:
    """Within this block SIGINT, SIGTERM and SIGHUP do what the module says.

    Signals that are ignored (nohup) stay ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
    # None is a handler that was not set from Python, and could not be set again.
    before = {signum: handler for signum, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    for signum in before:
        signal.signal(signum, signals.handle)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def heed_in_worker(worker: int) -> None:
    """Give SIGTERM back to the handler of `heeded`, as a DataLoader's `worker_init_fn`.

    torch puts a handler of its own in its place, by which a worker ends at once, and its process with an error then.

    Args:
        worker: The worker's number.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if callable(handler):
        signal.signal(signal.SIGTERM, handler)


def find_launcher() -> int | None:
    """The process id of the parent if it is a launcher, else None.

    A shell may end before its programs, a launcher may not.
    """
    import psutil  # accelerate brings it

    parent = os.getppid()
    try:
        words = psutil.Process(parent).cmdline()[:4]
    except psutil.Error:
        return None
    is_launcher = any(os.path.basename(word) in PROGRAMS or word.startswith(MODULES) for word in words)
    return parent if is_launcher else None


def end_without_launcher(launcher: int, is_over: threading.Event) -> None:
    """Wait until the launcher is gone, and end this process then.

    Args:
        launcher: Its process id.
        is_over: Set when the run is over.
    """
    while os.getppid() == launcher:
        if is_over.wait(INTERVAL):
            return
    os.kill(os.getpid(), signal.SIGTERM)
    if not is_over.wait(LONGEST_END):
        os._exit(128 + signal.SIGTERM)


ENDED = "ended"
GONE = "hf_clip_gone"


class ProcessGoneError(OSError):
    """Another process of the run has ended without a word.

    Attributes:
        name: which one, in words.
    """

    def __init__(self, name: str):
        self.name = name
        super().__init__(
            f"{name} is gone: it was killed, or its machine is. The others cannot go on without it. Find out why, and "
            f"go on with --resume_from_checkpoint latest."
        )

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (self.name,)


class SignsOfLife:
    """Gives signs of life of one process, and watches for those of the next.

    Args:
        store: A connection of its own to the processes' store, which serves one call of a connection at a time.
        rank: Of this process.
        count: Of the processes.
    """

    def __init__(self, store: Any, rank: int, count: int):
        self.store, self.rank, self.next, self.count = store, rank, (rank + 1) % count, count
        self.own = 0
        self.seen, self.since = "", time.monotonic()
        self.looked = self.since

    def give(self) -> None:
        self.own += 1
        self.store.set(f"hf_clip_alive_{self.rank}", f"process id {os.getpid()} on {socket.gethostname()}, {self.own}")

    def find_still(self) -> str | None:
        """The name of the next process if it has stood still for too long.

        While this process stood still itself, nothing is known of the next.
        """
        now, looked = time.monotonic(), self.looked
        self.looked = now
        key = f"hf_clip_alive_{self.next}"
        if not self.store.check([key]):
            return None  # it has not begun, and whoever waits for it then has a time limit
        seen = self.store.get(key).decode()
        # All processes may have been stopped and go on: by Ctrl-Z, a batch system, or a machine that slept.
        if seen != self.seen or now - looked > LONGEST_STILL / 2:
            self.seen, self.since = seen, now
        if seen == ENDED or now - self.since < LONGEST_STILL:
            return None
        return self._in_words(self.next, self.seen)

    def _in_words(self, rank: int, sign: str) -> str:
        who = sign.rpartition(",")[0]
        return f"process {rank} of {self.count}{who and f' ({who})'}"

    def watch(self, end: Callable[[str, bool], None], is_over: threading.Event) -> None:
        """Give signs and watch until the run is over.

        Args:
            end: Called with the name of a process that stands still, and whether this process saw it first.
            is_over: Set when the run is over.
        """
        try:
            while (still := self.find_still()) is None and not self.store.check([GONE]):
                self.give()
                if is_over.wait(INTERVAL):
                    self.store.set(f"hf_clip_alive_{self.rank}", ENDED)
                    return
            is_first = self.store.add(GONE, 1) == 1
        except RuntimeError:  # the store is gone, and soon the run, unless this process waits for the one that kept it
            if not is_over.wait(LONGEST_WITHOUT_STORE):
                end(self._in_words(0, ""), self.rank == 1)
            return
        end(still or "", is_first)

    def find_gone(self) -> str | None:
        """The name of a process whose count stands still while an exchange has failed, once `watch` is done."""
        try:
            others = [rank for rank in range(self.count) if rank != self.rank]
            seen = {rank: self._sign(rank) for rank in others}
            for _ in range(LOOKS):
                time.sleep(INTERVAL)
                others = [rank for rank in others if seen[rank] not in (ENDED, "") and self._sign(rank) == seen[rank]]
        except RuntimeError:  # the store is gone
            return self._in_words(0, "")
        return self._in_words(others[0], seen[others[0]]) if others else None

    def _sign(self, rank: int) -> str:
        key = f"hf_clip_alive_{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else ""


def _end_because_of(still: str, is_first: bool) -> None:
    if is_first:
        sys.stderr.write(
            f"\nerror: {still} has given no sign of life for {LONGEST_STILL:.0f} s, and the others wait for it. It was "
            f"stopped, or its machine is gone. End it, and go on with --resume_from_checkpoint latest.\n"
        )
        sys.stderr.flush()
    else:
        time.sleep(3 * INTERVAL)  # a launcher ends all when one has ended, which would cut the line off
    os._exit(1)


@contextmanager
def others_watched() -> Iterator[None]:
    """Within this block threads watch the launcher and the next process of the run.

    Raises:
        ProcessGoneError: an exchange failed because another process is gone.
    """
    is_over = threading.Event()
    threads, life = [], _connect()
    if (launcher := find_launcher()) is not None:
        threads.append(threading.Thread(target=end_without_launcher, args=(launcher, is_over), daemon=True))
    if life is not None:
        threads.append(threading.Thread(target=life.watch, args=(_end_because_of, is_over), daemon=True))
    for thread in threads:
        thread.start()
    try:
        try:
            yield
        finally:
            is_over.set()
            for thread in threads:
                thread.join(timeout=10 * INTERVAL)
    except RuntimeError as error:  # as failed exchanges are
        gone = None if life is None else life.find_gone()
        if gone is None:
            raise
        raise ProcessGoneError(gone) from error


def _connect() -> SignsOfLife | None:
    """What watches a run of several processes, with a connection to their store.

    None if they found each other in another way.
    """
    import torch.distributed as dist

    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1 or not address or not port:
        return None
    try:
        store = dist.TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=30))
    except RuntimeError:
        return None
    return SignsOfLife(store, dist.get_rank(), dist.get_world_size())


def wait_for_launchers_end(seconds: float = 1.5) -> None:
    """Wait for the launcher to end after Ctrl-C, so that our line is the last.

    `accelerate launch` of one process gets the signal too, and ends with a traceback.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or (launcher := find_launcher()) is None:
        return
    until = time.monotonic() + seconds
    while os.getppid() == launcher and time.monotonic() < until:
        time.sleep(0.05)
