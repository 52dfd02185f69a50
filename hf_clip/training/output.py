"""The folder of a run: one run at a time, and nothing of runs that were killed."""

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .checkpoint import FOLDER, remove_unfinished
from .config import LAUNCH, TrainingConfig
from .results import CONFIG_FILE, METRICS_FILE


class FolderInUseError(OSError):
    """Another run writes to this folder; `holder` says which, where it is known."""

    def __init__(self, message: str, holder: str):
        super().__init__(message)
        self.holder = holder


def _beside(out: Path, ending: str) -> Path:
    """Beside the folder, which may not be there yet; within one whose parent takes no files."""
    place = out.parent if os.access(out.parent, os.W_OK) or not out.is_dir() else out
    return place / f".{out.name}.{ending}"


@contextmanager
def held(output_dir: str | Path) -> Iterator[None]:
    """Within this block no other run can hold the folder. The operating system lets go of it when the process ends.

    Raises FolderInUseError that names who holds it.
    """
    out = Path(output_dir).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    holder = _beside(out, "holder")  # a file of its own: some versions of filelock empty the lock's
    lock = FileLock(_beside(out, "lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        who = holder.read_text().strip() if holder.is_file() else "another process"
        raise FolderInUseError(
            f"{output_dir} is in use by another run ({who}). Wait for it or end it, or name another folder.", who
        ) from None
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        remove_leftovers(out)
        yield
    finally:
        holder.unlink(missing_ok=True)
        if holder.parent == out:  # a folder with files in it is refused; beside it the file stays, as locks do
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def remove_leftovers(out: Path) -> None:
    """Remove what runs that were killed left half-written. Only who holds the folder may call this."""
    for place in (out, out.parent):
        for folder in place.glob(f".{escape(out.name)}-unfinished-*"):
            shutil.rmtree(folder, ignore_errors=True)
    remove_unfinished(out)


def prepare_output(config: TrainingConfig, launched: dict[str, Any]) -> None:
    """Make the folder, with the records of this run alone. The main process calls this when the first batch is there.

    launched: what the launcher decided, see `launch_settings`
    """
    output = Path(config.output_dir)
    if config.resume is None:
        output.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(output / FOLDER, ignore_errors=True)
        (output / METRICS_FILE).write_text("")
    content = config.to_dict() | {LAUNCH: launched}
    (output / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")
