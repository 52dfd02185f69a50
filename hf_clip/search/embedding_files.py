"""Embeddings in files: shards that appear whole, and a record of what they were made of.

    OUT/_hf_clip_embeddings.json   model, processor, source, and for each shard its files with their checksums
    OUT/_problems/00000.jsonl      images of the shard that could not be opened, and why; only if there are any
    OUT/…                          the shards, see `embedding_layouts`

The record is written anew after each shard. What it does not name does not count: a killed run goes on after the last
shard in it. Programs that read a folder of parquet leave out names that begin with `_`.

Dimensions: I images of a shard, D embedding.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import require
from .embedding_layouts import Shard, read_shard, write_shard
from .embedding_place import RECORD, EmbeddingFilesError, FilePlace
from .image_rows import Position
from .index_table import shown_path
from .row_encoding import EmbeddedRow

FORMAT = 1
"""Number of the record's layout."""


@dataclass(frozen=True)
class EmbeddingDescription:
    """What embeddings in files were made of, and how.

    Attributes:
        layout: "parquet", "safetensors" or "clip-retrieval".
        dtype: "float16" or "float32".
        width: D.
        weights: Hash of the image tower's weights and configuration.
        processor: The image processor's settings.
        model: The model as it was named.
        text_weights: Hash of the text tower's weights if captions were encoded, else None.
        source: The folder or data set.
        data: Fingerprint of the data, or None where it is not known.
        settings: How the data are read: columns, and whether large JPEGs are decoded in full.
    """

    layout: str
    dtype: str
    width: int
    weights: str
    processor: dict[str, Any]
    model: str
    text_weights: str | None
    source: str
    data: str | None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Record:
    description: EmbeddingDescription
    shards: list[dict[str, Any]] = field(default_factory=list)
    is_complete: bool = False

    def dumped(self) -> bytes:
        values = {"what": "embeddings of hf_clip", "format": FORMAT, **asdict(self.description)}
        values |= {"is_complete": self.is_complete, "shards": self.shards}
        return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()


def _read_record(place: FilePlace) -> _Record:
    path = place.path(RECORD)
    try:
        values = json.loads(place.read(RECORD))
        if values["format"] != FORMAT:
            raise EmbeddingFilesError(
                f"{path} has layout {values['format']}, and this version reads layout {FORMAT}: embed into another "
                f"folder.",
                path,
            )
        description = EmbeddingDescription(**{one.name: values[one.name] for one in fields(EmbeddingDescription)})
        for shard in values["shards"]:
            _check_shard(shard)
        return _Record(description, values["shards"], values["is_complete"])
    except EmbeddingFilesError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EmbeddingFilesError(f"{path} is damaged: remove {place.name}, and embed anew.", path) from error


def _check_shard(shard: Any) -> None:
    """Raise one of several errors if what a record says of a shard is not of its form."""
    position = Position(*shard["position"])
    numbers = [*position, shard["rows"], shard["problems"], *(state["bytes"] for state in shard["files"].values())]
    if not all(isinstance(number, int) for number in numbers):
        raise TypeError
    if not all(isinstance(state["checksum"], str) for state in shard["files"].values()):
        raise TypeError


def _checksum(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class EmbeddingWriter:
    """Writes shards one after the other, and goes on where an earlier run ended.

    Args:
        place: Folder or address.
        description: What is embedded.
        shard_rows: Images of a shard.

    Attributes:
        position: Where the source is to be read from.
        rows: Number of images with embeddings, those of earlier runs too.
        problems: Number of images that could not be opened, those of earlier runs too.

    Raises:
        EmbeddingFilesError: The place holds other things, or embeddings of another model, source or layout.
    """

    def __init__(self, place: FilePlace, description: EmbeddingDescription, shard_rows: int):
        self.place, self.shard_rows = place, shard_rows
        names = place.names()
        if RECORD in names:
            self._record = _read_record(place)
            _check_same(place, self._record.description, description)
            gone = [name for shard in self._record.shards for name in shard["files"] if name not in names]
            if gone:
                raise EmbeddingFilesError(
                    f"{place.name} lacks {gone[0]}, which was written: copy it there again, or name another folder.",
                    place.path(gone[0]),
                )
        elif names:
            raise EmbeddingFilesError(
                f"{place.name} holds other files, such as {names[0]}: name an empty or a new folder.", place.name
            )
        else:
            self._record = _Record(description)
        self._is_recorded = RECORD in names
        shards = self._record.shards
        self.position = Position(*shards[-1]["position"]) if shards else Position()
        self.rows = sum(shard["rows"] for shard in shards)
        self.problems = sum(shard["problems"] for shard in shards)
        self._waiting: list[EmbeddedRow] = []

    @property
    def is_complete(self) -> bool:
        """Whether the source was gone through to its end."""
        return self._record.is_complete

    @property
    def shards(self) -> int:
        """Number of shards that are written."""
        return len(self._record.shards)

    def add(self, found: EmbeddedRow) -> None:
        """Add the next row of the source. A full shard is written."""
        self._waiting.append(found)
        if len(self._waiting) >= self.shard_rows:
            self.write()

    def write(self, is_complete: bool = False) -> None:
        """Write what waits as a shard. `is_complete`: whether the source has no more rows."""
        if self._waiting or is_complete:
            if not self._is_recorded:  # before the first shard, whose files a killed run would leave without it
                self.place.write(RECORD, self._record.dumped())
                self._is_recorded = True
            record = _Record(self._record.description, list(self._record.shards), is_complete)
            if self._waiting:
                record.shards.append(self._write_shard())
            self.place.write(RECORD, record.dumped())
            self._record = record
        if self._waiting:
            last = record.shards[-1]
            self._waiting, self.position = [], Position(*last["position"])
            self.rows, self.problems = self.rows + last["rows"], self.problems + last["problems"]

    def _write_shard(self) -> dict[str, Any]:
        """Write the files of a shard. Returns what the record says of it."""
        description, number = self._record.description, len(self._record.shards)
        found = [one for one in self._waiting if one.embedding is not None]
        files = {}
        if found:
            shard = _as_shard(found, description.text_weights is not None, description.width)
            for name, content in write_shard(description.layout, number, shard, description.dtype).items():
                self.place.write(name, content)
                files[name] = {"bytes": len(content), "checksum": _checksum(content)}
        problems = [(one.row.path, one.problem) for one in self._waiting if one.embedding is None]
        if problems:
            lines = [json.dumps([shown_path(path), problem], ensure_ascii=False) for path, problem in problems]
            self.place.write(f"_problems/{number:05}.jsonl", "".join(f"{line}\n" for line in lines).encode())
        position = self.position.after([one.row for one in self._waiting])
        return {"rows": len(found), "problems": len(problems), "position": list(position), "files": files}

    def read_problems(self) -> Iterator[tuple[str, str]]:
        """The images that could not be opened, and why."""
        for number, shard in enumerate(self._record.shards):
            if shard["problems"]:
                # Names of files hold other ends of lines, such as U+2028, which JSON does not escape.
                for line in self.place.read(f"_problems/{number:05}.jsonl").splitlines():
                    path, problem = json.loads(line)
                    yield path, problem


def _as_shard(found: list[EmbeddedRow], has_texts: bool, width: int) -> Shard:
    texts = None
    if has_texts:
        texts = np.stack([np.zeros(width) if one.text_embedding is None else one.text_embedding for one in found])
    return Shard(
        ids=np.array([one.row.number for one in found], dtype=np.int64),
        paths=[shown_path(one.row.path) for one in found],
        captions=[one.row.caption for one in found],
        metadata=[one.row.metadata for one in found],
        embeddings=np.stack([one.embedding for one in found if one.embedding is not None]),
        text_embeddings=texts,
    )


def _check_same(place: FilePlace, made: EmbeddingDescription, given: EmbeddingDescription) -> None:
    """Raise EmbeddingFilesError if a run cannot go on with what an earlier one wrote."""
    if (made.weights, made.width, made.text_weights or given.text_weights) != (
        given.weights,
        given.width,
        given.text_weights or made.text_weights,
    ):
        raise EmbeddingFilesError(
            f"{place.name} holds embeddings of another model ({made.model or 'in memory'}) than "
            f"{given.model or 'the one that was given'}: name that model, or another folder.",
            place.name,
        )
    if made.source != given.source:
        raise EmbeddingFilesError(
            f"{place.name} holds embeddings of {made.source}, and not of {given.source}: name another folder.",
            place.name,
        )
    if None not in (made.data, given.data) and made.data != given.data:
        raise EmbeddingFilesError(
            f"{made.source} changed since its embeddings in {place.name} were begun: name another folder, or remove "
            f"that one.",
            place.name,
        )
    others: dict[str, tuple[Any, Any]] = {"format": (made.layout, given.layout), "dtype": (made.dtype, given.dtype)}
    others["texts"] = (made.text_weights is not None, given.text_weights is not None)
    names = {*made.settings, *given.settings, *made.processor, *given.processor}
    both = (made.settings | made.processor, given.settings | given.processor)
    others |= {name: (both[0].get(name), both[1].get(name)) for name in sorted(names)}
    if different := [f"{name}: {before}, not {now}" for name, (before, now) in others.items() if before != now]:
        raise EmbeddingFilesError(
            f"{place.name} was begun with other settings ({'; '.join(different)}): use the same, or name another "
            f"folder.",
            place.name,
        )


class StoredEmbeddings:
    """Embeddings in files, read shard by shard: `for shard in StoredEmbeddings(folder)`.

    The layouts of `hf-clip embed` are read, and that of clip-retrieval whoever wrote it, and a folder of parquet files
    with the columns `path` and `embedding`.

    Args:
        place: Folder or address.

    Attributes:
        place: Where they are.
        rows: Number of images, or None where no record says it.
        fingerprint: A text that changes with the files, or "" where no record says it.
        layout: "parquet", "safetensors" or "clip-retrieval".
        description: What they were made of; None if other programs wrote them.

    Raises:
        EmbeddingFilesError: There are none, or their files do not belong together.
        ImportError: pyarrow is not installed.
    """

    def __init__(self, place: str | Path):
        require("Embeddings in files", "search", ["pyarrow"])
        self.place = FilePlace(place)
        names = self.place.names()
        self.description: EmbeddingDescription | None = None
        self._states: dict[str, dict[str, Any]] = {}
        self.rows: int | None = None
        self.fingerprint = ""
        if RECORD in names:
            record = _read_record(self.place)
            self.description, self.layout = record.description, record.description.layout
            self._states = {name: state for shard in record.shards for name, state in shard["files"].items()}
            self._shards = [list(shard["files"]) for shard in record.shards if shard["files"]]
            self.rows = sum(shard["rows"] for shard in record.shards)
            self.fingerprint = _checksum(json.dumps([self._shards, self._states]).encode())
        else:
            self.layout, self._shards = _find_shards(self.place, names)
        if not self._shards:
            raise EmbeddingFilesError(f"{self.place.name} holds no embeddings yet: embed first.", self.place.name)

    def __len__(self) -> int:
        """Number of shards."""
        return len(self._shards)

    def __iter__(self) -> Iterator[Shard]:
        return map(self.read, range(len(self)))

    def read(self, number: int) -> Shard:
        """Read one shard.

        Args:
            number: Its place among the shards, from 0.

        Returns:
            The shard.

        Raises:
            EmbeddingFilesError: A file is missing or damaged, or is another than was written.
        """
        names = self._shards[number]
        contents = {name: self._checked(name) for name in names if name in self._states}
        shard = read_shard(self.place, self.layout, names, contents)
        width = shard.embeddings.shape[1]
        if self.description is not None and width != self.description.width:
            raise EmbeddingFilesError(
                f"{self.place.path(names[0])} holds embeddings of {width} numbers, and not {self.description.width}.",
                self.place.path(names[0]),
            )
        return shard

    def _checked(self, name: str) -> bytes:
        """The content of a file, which is what the record says."""
        content, state = self.place.read(name), self._states[name]
        if len(content) != state["bytes"] or _checksum(content) != state["checksum"]:
            raise EmbeddingFilesError(
                f"{self.place.path(name)} is damaged: it has {len(content):,} bytes, and {state['bytes']:,} were "
                f"written. Copy it again, or remove {self.place.name} and embed anew.",
                self.place.path(name),
            )
        return content


def _find_shards(place: FilePlace, names: list[str]) -> tuple[str, list[list[str]]]:
    """The layout of files that other programs wrote, and the files of each shard."""
    images = [name for name in names if name.startswith("img_emb/") and name.endswith(".npy")]
    if images:
        texts = [name for name in names if name.startswith("text_emb/") and name.endswith(".npy")]
        tables = [name for name in names if name.startswith("metadata/") and name.endswith(".parquet")]
        if len(tables) != len(images) or len(texts) not in (0, len(images)):
            raise EmbeddingFilesError(
                f"{place.name} has {len(images)} files in img_emb, {len(texts)} in text_emb and {len(tables)} in "
                f"metadata: they do not belong together. Copy all of them again.",
                place.name,
            )
        columns = [images, texts, tables] if texts else [images, tables]
        return "clip-retrieval", [list(parts) for parts in zip(*columns, strict=True)]
    if tables := [name for name in names if name.endswith(".parquet") and "/_" not in f"/{name}"]:
        return "parquet", [[name] for name in tables]
    raise EmbeddingFilesError(
        f"{place.name} holds no embeddings: neither what `hf-clip embed` writes, nor img_emb/*.npy with "
        f"metadata/*.parquet, nor parquet files with the columns path and embedding.",
        place.name,
    )


__all__ = ["EmbeddingDescription", "EmbeddingWriter", "StoredEmbeddings"]
