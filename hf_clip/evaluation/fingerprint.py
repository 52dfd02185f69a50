"""A text that changes when a data set changes, by which features that were kept are found again."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path


def _digest(parts: Iterator[str]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(f"{part}\0".encode())
    return state.hexdigest()


def fingerprint_of_files(folder: Path, split: str, without: Sequence[str] = ()) -> str:
    """Return a text that changes when a file is added to a folder, removed, or written anew.

    `without` names files and folders directly in it that do not count.
    """
    files = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if path == folder or path.relative_to(folder).parts[0] not in without]
    states = ((path, path.stat()) for path in files)
    return _digest(
        f"{split} {path.relative_to(folder.parent)} {state.st_size} {state.st_mtime_ns}" for path, state in states
    )


def fingerprint_of(source: str, split: str) -> str | None:
    """Return a text that changes with a source: its files' sizes and times, or its commit on the Hub.

    None if it isn't known.
    """
    place = Path(os.path.expanduser(source))
    if place.exists():
        return fingerprint_of_files(place, split)
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(source.partition(":")[0]).sha
    except Exception:  # no network, a pattern of files, an address
        return None
    return _digest(iter([source, str(commit), split]))
