"""One writer of an index at a time: by a lock of the file system for a folder, by a row of a table for an address.

Two writers would both add the files that are new to both of them. On object storage there are no locks, but LanceDB
carries out `update … where holder = ''` for one of several processes only, since its commits are written only if nobody
else wrote one of that number. The row names the process that writes, and when it was last known to be alive: a thread
renews that while it writes. A row that was not renewed for `STALE_AFTER` seconds is taken over, at once if its process
ran on this machine and is gone.

Two processes may create the table at once, and LanceDB then puts the later one in the place of the earlier one, with
whatever that says. So nobody takes a table that nobody ever took before `SETTLE_SECONDS` have passed.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .index_errors import SearchIndexError, is_overtaken, known_problem

WRITER = "writer"
"""The table, which only an index on object storage has."""

RENEW_AFTER, STALE_AFTER = 60.0, 900.0
"""In seconds. Clocks of two machines may differ by minutes."""

SETTLE_SECONDS = 3.0
"""How long another process may take to create the table, once it has found none."""

NEVER = 0.0
"""When a row was renewed that nobody ever took."""


@contextmanager
def only_writer(place: str, what: str = "index", database: Any = None) -> Iterator[Callable[[], None]]:
    """Keep other processes from writing to the same index, or what else it is, while the block runs.

    Args:
        place: Folder or address.
        what: What it is, for the error.
        database: LanceDB's connection to an index at an address. None: nobody is kept from writing to an address.

    Yields:
        A function to be called before each write. It raises SearchIndexError if another process took over, which
        happens to one that was suspended for long.

    Raises:
        SearchIndexError: Another process writes to it.
    """
    if "://" not in place:
        with _locked_folder(place, what):
            yield lambda: None
        return
    if database is None:
        yield lambda: None
        return
    claim = _Claim(place, database)
    claim.take()
    try:
        yield claim.check
    finally:
        claim.release()


@contextmanager
def _locked_folder(place: str, what: str) -> Iterator[None]:
    from filelock import FileLock, Timeout

    folder = os.path.abspath(place).rstrip(os.sep)
    try:
        Path(folder).parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock", timeout=0)
        lock.acquire()
    except Timeout:
        raise SearchIndexError(
            f"Another process is writing to the {what} {place}: wait until it is done, or stop it.", place
        ) from None
    except OSError as error:
        raise SearchIndexError(
            f"The {what} {place} cannot be written: its lock {folder}.lock cannot be opened ({error.strerror}). It can "
            f"be read.",
            place,
        ) from error
    try:
        yield
    finally:
        lock.release()


class _Claim:
    """A row that says who writes.

    The column `holder` is JSON: host, process and a number that no other claim has; empty if nobody writes.
    """

    def __init__(self, place: str, database: Any):
        self.place, self.database = place, database
        self.holder = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "id": uuid.uuid4().hex})
        self._lost = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)

    def take(self) -> None:
        """Raises SearchIndexError if another process has it."""
        try:
            self._take()
        except SearchIndexError:
            raise
        except Exception as error:
            problem = known_problem(self.place, error)
            if problem is None or is_overtaken(error):  # of two that make or change the table, one fails
                raise self._in_use("", time.time()) from error
            raise SearchIndexError(problem, self.place) from error
        self._thread.start()

    def _take(self) -> None:
        start = [{"holder": "", "renewed": NEVER}]
        self.table = self.database.create_table(WRITER, data=start, exist_ok=True)
        other, renewed = self._read()
        if renewed == NEVER:
            time.sleep(SETTLE_SECONDS)
            self.table = self.database.open_table(WRITER)
            other, renewed = self._read()
        if other and not _is_gone(other) and time.time() - renewed < STALE_AFTER:
            raise self._in_use(other, renewed)
        if not self._replace(other, self.holder):
            raise self._in_use("", time.time())

    def _read(self) -> tuple[str, float]:
        """Who holds it, and when that was renewed."""
        row = self.table.search().to_arrow().to_pylist()[0]
        return row["holder"], row["renewed"]

    def _replace(self, old: str, new: str) -> bool:
        """Whether the row held `old`; it holds `new` then."""
        values = {"holder": new, "renewed": time.time()}
        return bool(self.table.update(where=f"holder = '{old}'", values=values).rows_updated)

    def _keep(self) -> None:
        while not self._done.wait(RENEW_AFTER):
            try:
                self._lost = not self._replace(self.holder, self.holder)
            except Exception:  # the network; whoever writes next meets it too
                continue
            if self._lost:
                return

    def check(self) -> None:
        """Raises SearchIndexError if another process took over."""
        if self._lost:
            raise SearchIndexError(
                f"Another process took over the index {self.place} while this one was suspended: what was written "
                f"before stays. Run the same command again.",
                self.place,
            )

    def release(self) -> None:
        """Let others write. If that fails, they can in `STALE_AFTER` seconds."""
        self._done.set()
        self._thread.join()
        try:
            self._replace(self.holder, "")
        except Exception:  # what went wrong in the block is worth more than this
            return

    def _in_use(self, holder: str, renewed: float) -> SearchIndexError:
        values = json.loads(holder) if holder else {}
        who = f" (process {values['process']} on {values['host']})" if values else ""
        left = max(1, round((STALE_AFTER - time.time() + renewed) / 60))
        return SearchIndexError(
            f"Another process{who} is writing to the index {self.place}: wait until it is done, or stop it. If it was "
            f"killed, its claim ends in {left} minutes.",
            self.place,
        )


def _is_gone(holder: str) -> bool:
    """Whether a claim is of a process of this machine that is no more."""
    values = json.loads(holder)
    if values["host"] != socket.gethostname():
        return False
    try:
        os.kill(values["process"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


__all__ = ["only_writer"]
