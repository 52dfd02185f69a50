"""Where embeddings lie as files: a folder, or an address such as s3://bucket/folder that fsspec opens."""

import json
import os
from pathlib import Path
from typing import Any

from ..checkpoints.whole_file import whole_file
from ..model.checked_files import one_line
from .index_table import file_in_the_way, is_address

RECORD = "_hf_clip_embeddings.json"
"""File that says what embeddings were made of, see `embedding_files`."""

FOREIGN = "img_emb"
"""Folder in which clip-retrieval puts embeddings of images."""


class EmbeddingFilesError(ValueError):
    """Files of embeddings are missing, damaged, or of another model than is needed.

    Attributes:
        place: The folder, address or file that is meant.
    """

    def __init__(self, message: str, place: str = ""):
        super().__init__(message, place)
        self.place = place

    def __str__(self) -> str:
        return str(self.args[0])


class FilePlace:
    """A folder or an address, whose files are read and written whole.

    Args:
        place: The folder or address. It need not be there.

    Raises:
        EmbeddingFilesError: It is a file; or the package is missing that opens such addresses.
    """

    def __init__(self, place: str | Path):
        self.name = os.path.expanduser(str(place)).rstrip("/") or "/"
        self.is_address = is_address(self.name)
        if self.is_address:
            import fsspec  # type: ignore[import-untyped]

            try:
                self._files, self._root = fsspec.core.url_to_fs(self.name)
            except (ImportError, ValueError) as error:
                raise EmbeddingFilesError(f"{place} cannot be opened ({one_line(error)}).", self.name) from error
        elif (file := file_in_the_way(Path(self.name))) is not None:
            raise EmbeddingFilesError(f"{file} is a file, but a folder is needed: name another.", self.name)

    def path(self, name: str) -> str:
        """The path or address of a file."""
        return f"{self.name}/{name}"

    def names(self) -> list[str]:
        """All files in it and in its folders, in the order of their names. Hidden ones are left out."""
        if self.is_address:
            found = self._call("listed", lambda: self._files.find(self._root) if self._files.exists(self._root) else [])
            names = [str(path)[len(self._root.rstrip("/")) + 1 :] for path in found]
        else:
            root = Path(self.name)
            names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
        return sorted(name for name in names if not any(part.startswith(".") for part in name.split("/")))

    def read(self, name: str) -> bytes:
        """A file's content.

        Raises:
            EmbeddingFilesError: It is not there, or cannot be read.
        """
        return self._call("read", lambda: self._read(name), name)

    def _read(self, name: str) -> bytes:
        return self._files.cat_file(f"{self._root}/{name}") if self.is_address else Path(self.path(name)).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all.

        Raises:
            EmbeddingFilesError: An address cannot be written to.
            OSError: A disk is full, or a folder may not be written to.
        """
        if not self.is_address:
            with whole_file(self.path(name)) as unfinished:
                unfinished.write_bytes(content)
            return
        target = f"{self._root}/{name}"

        def put() -> None:
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._files.pipe_file(target, content)  # object storage shows an object when it is whole

        self._call("written", put, name)

    def _call(self, what: str, act: Any, name: str = "") -> Any:
        try:
            return act()
        except Exception as error:  # what a file system of fsspec raises is its own
            shown = self.path(name) if name else self.name
            if isinstance(error, FileNotFoundError):
                raise EmbeddingFilesError(
                    f"There is no file {shown}; copy it there again, or embed anew.", shown
                ) from None
            reason = getattr(error, "strerror", None) or one_line(error)
            raise EmbeddingFilesError(f"{shown} cannot be {what} ({reason}).", shown) from error


def holds_embeddings(place: str) -> bool:
    """Whether a folder or an address holds embeddings, and not images: by few names, however much it holds."""
    if not is_address(place):
        folder = os.path.expanduser(place)
        return os.path.isfile(os.path.join(folder, RECORD)) or os.path.isdir(os.path.join(folder, FOREIGN))
    if place.partition("://")[0] in ("http", "https") or place.endswith((".tar", ".parquet", ".csv", ".jsonl")):
        return False
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(place)
        return any(files.exists(f"{root.rstrip('/')}/{name}") for name in (RECORD, FOREIGN))
    except Exception:  # whoever opens it gets the error
        return False


def model_of_embeddings(place: str) -> str | None:
    """Where the model is of which embeddings were made. None if nothing says it."""
    files = FilePlace(place)
    try:
        return json.loads(files.read(RECORD)).get("model") or None
    except ValueError:  # no record, or a damaged one, which whoever reads the embeddings refuses
        return None


__all__ = ["RECORD", "EmbeddingFilesError", "FilePlace", "holds_embeddings", "model_of_embeddings"]
