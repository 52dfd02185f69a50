"""Fetch OpenAI's checkpoints from where they were published, and check that they are what was published.

A file is downloaded beside its place, goes on after an interruption where it stopped, and takes its place only
when its sha256 is the published one.
"""

import hashlib
import os
import re
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from filelock import FileLock
from huggingface_hub import constants
from tqdm import tqdm

from ..model.checked_files import one_line
from ..model.variants import VARIANTS, Variant
from .errors import MOST_SHOWN, CheckpointError

PUBLISHED_AT = "https://openaipublic.azureedge.net/clip/models"
"""The published address is this, the file's sha256, and its name."""

ADDRESS_VARIABLE = "HF_CLIP_ORIGINALS"
"""Environment variable with another address to use in place of it."""

CHUNK = 1 << 20
TIMEOUT = 30.0


def originals_folder() -> Path:
    """Return the folder of downloaded checkpoints, within the Hugging Face cache. Files can be put there by hand."""
    return Path(constants.HF_HOME) / "hf_clip" / "originals"


def byte_progress(title: str, total: int | None, done: int = 0) -> tqdm:
    """A progress bar that counts bytes and disappears when it is full."""
    return tqdm(desc=title, total=total, initial=done, unit="B", unit_scale=True, unit_divisor=1024, leave=False)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file, byte_progress(f"Checking {path.name}", path.stat().st_size) as bar:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


def published_sum(path: Path) -> str | None:
    """The sha256 of the file that OpenAI published under this name; None for any other name."""
    return next((variant.sha256 for variant in VARIANTS.values() if variant.checkpoint == path.name), None)


def cached_sum(path: Path) -> str | None:
    """The sha256 that a file in the Hub's cache must have; None for files elsewhere.

    The cache keeps large files under their sha256, `models--org--name/blobs/<sha256>`, and names of snapshots lead
    there. Small ones have a git hash, which is shorter; where links are impossible, they are copied and have neither.
    """
    target = path.resolve()
    is_cached = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return target.name if is_cached and re.fullmatch("[0-9a-f]{64}", target.name) else None


def verify_file(path: Path) -> bool:
    """Compare a file's sha256 with the one that it is known to have: by a published name, or by the Hub's cache.

    Returns:
        Whether anything is known of it, and so the file is what it should be.

    Raises:
        CheckpointError: It has another one; the message has both.
    """
    if not path.is_file():
        return False
    published, cached = published_sum(path), cached_sum(path)
    if published is None and cached is None:
        return False
    found = sha256_of(path)
    if cached is not None and found != cached:
        raise CheckpointError(
            f"{path} has sha256 {found}, but the Hub's file has {cached}. Remove {path.resolve()} and load it again, "
            f"which downloads it anew."
        )
    if published is not None and found != published:
        raise CheckpointError(
            f"{path} has sha256 {found}, but the published {path.name} has {published}. Download it again; if it is a "
            f"model of your own, rename it (the convert program also takes --no-verify)."
        )
    return True


def _download(url: str, unfinished: Path) -> None:
    """Append to `unfinished` what it lacks of the file at `url`."""
    start = unfinished.stat().st_size if unfinished.is_file() else 0
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416 and start:  # nothing lies beyond what is here already
            return
        raise
    with response:
        if response.status != 206:  # the server sends the whole file, whatever was asked for
            start = 0
        length = response.headers.get("Content-Length") or ""
        total = start + int(length) if re.fullmatch("[0-9]{1,15}", length) else None  # anything else tells nothing
        with (
            unfinished.open("ab" if start else "wb") as file,
            byte_progress(f"Downloading {unfinished.stem}", total, start) as bar,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
        if total is not None and unfinished.stat().st_size < total:
            raise ConnectionError(f"the connection ended after {unfinished.stat().st_size} of {total} bytes")


def fetch_original(variant: Variant, offline: bool = False, folder: str | Path | None = None) -> Path:
    """The published checkpoint of a variant: from its folder, else downloaded into it. Its sha256 is checked.

    Args:
        variant: The model.
        offline: Whether nothing may be downloaded. HF_HUB_OFFLINE=1 means the same.
        folder: The folder of checkpoints. By default it is within the Hugging Face cache.

    Returns:
        The file.

    Raises:
        FileNotFoundError: The file is missing, and nothing may be downloaded.
        ConnectionError: The download failed. The same call continues it.
        CheckpointError: What arrived is not the published file.
    """
    target = Path(os.path.expanduser(folder or originals_folder())) / variant.checkpoint
    address = os.environ.get(ADDRESS_VARIABLE, PUBLISHED_AT).rstrip("/")
    url = f"{address}/{variant.sha256}/{variant.checkpoint}"
    if target.is_file():
        verify_file(target)
        return target
    if offline or constants.HF_HUB_OFFLINE:
        raise FileNotFoundError(
            f"{variant.name} is not on this machine, and nothing is downloaded offline. Put {variant.checkpoint} into "
            f"{target.parent}, from {url}, or name a path."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_file():  # another process was quicker
            return target
        unfinished = target.with_name(f"{target.name}.part")
        try:
            _download(url, unfinished)
        except (HTTPError, URLError, HTTPException, OSError) as error:
            raise ConnectionError(
                f"{variant.checkpoint} could not be downloaded from {url} ({one_line(error, MOST_SHOWN)}). The same "
                f"command goes on where it stopped; or put the file into {target.parent}."
            ) from error
        if (found := sha256_of(unfinished)) != variant.sha256:
            unfinished.unlink()
            raise CheckpointError(
                f"What {url} sent has sha256 {found}, but the published file has {variant.sha256}. It was deleted; try "
                f"again, and if it happens twice, fetch the file another way."
            )
        unfinished.replace(target)
    return target


def find_original(name_or_path: str | Path, offline: bool = False) -> Path:
    """A checkpoint's path: the one given, or that of one of OpenAI's nine names, which is fetched when needed."""
    if str(name_or_path) in VARIANTS and not Path(name_or_path).exists():
        return fetch_original(VARIANTS[str(name_or_path)], offline)
    return Path(name_or_path)
