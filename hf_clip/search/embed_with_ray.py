"""Embed on many machines through Ray Data: tasks read a source's units, and actors that hold a model encode the rows.

    units → read (tasks) → rows with the images' bytes or paths → encode (actors) → embeddings → this process

Ray Data moves the rows, holds back whoever is too fast, and keeps their order. What comes back is numbered and written
here, as without Ray; embeddings are small. All machines have to see the model, and images that are named by path.

Dimensions: D embedding.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..model.checked_files import one_line
from .image_rows import DataSetRows, FolderRows, ImageRow, ImageRows, Position, row_path
from .index_model import describe, load
from .index_table import IndexDescription
from .indexed_image import register_formats
from .row_encoding import EmbeddedRow, embed_captions, embed_rows

if TYPE_CHECKING:
    import pyarrow  # type: ignore[import-untyped]

    from .embed_source import RayOptions

ROWS_AT_ONCE = 64
BYTES_AT_ONCE = 32 << 20
"""Rows that a reading task hands on together, and bytes of images after which it does so earlier."""

READING_CPUS, ENCODING_SHARE = 0.2, 0.8
"""Of a core, and of all cores: so that there is always a place for a task that reads."""

CORES_OF_A_WORKER = 4

FAILED = -1
"""In place of a unit: the row tells why the run cannot go on."""

NO_ROW = ImageRow("", 0, 0, None, None, None)


def _rows_schema() -> "pyarrow.Schema":
    import pyarrow as pa

    # Paths are bytes, since a file's name may be no UTF-8.
    names = {"unit": pa.int64(), "path": pa.binary(), "caption": pa.string(), "metadata": pa.string()}
    return pa.schema({**names, "place": pa.binary(), "content": pa.large_binary()})


def _content_and_place(stored: Any) -> tuple[bytes | None, str | None]:
    """The bytes of what a row stores, or its path."""
    if isinstance(stored, (bytes, bytearray)):
        return bytes(stored), None
    if isinstance(stored, dict):
        return (None, stored.get("path")) if stored.get("bytes") is None else (stored["bytes"], None)
    return None, stored


def _as_values(row: ImageRow) -> dict[str, Any]:
    content, place = _content_and_place(row.stored)
    values = {"unit": row.unit, "path": os.fsencode(row.path), "caption": row.caption, "metadata": row.metadata}
    return values | {"place": None if place is None else os.fsencode(place), "content": content}


def _as_table(rows: list[ImageRow]) -> "pyarrow.Table":
    import pyarrow as pa

    return pa.Table.from_pylist([_as_values(row) for row in rows], schema=_rows_schema())


def _failure(error: Exception) -> "pyarrow.Table":
    """A row that tells what stops the run, which Ray would bury in the lines of its own errors."""
    import pyarrow as pa

    return pa.Table.from_pylist([{"unit": FAILED, "caption": one_line(error)}], schema=_rows_schema())


def _read_unit(units: dict[str, Any], rows: DataSetRows, position: Position) -> Iterator["pyarrow.Table"]:
    """The rows of a data set's unit from a position on, some at a time. Runs in a task."""
    (unit,) = units["unit"].tolist()
    waiting: list[ImageRow] = []
    size = 0
    try:
        for row in islice(rows.rows_of(unit), position.offset if unit == position.unit else 0, None):
            waiting.append(row)
            size += len(_content_and_place(row.stored)[0] or b"")
            if len(waiting) >= ROWS_AT_ONCE or size >= BYTES_AT_ONCE:
                yield _as_table(waiting)
                waiting, size = [], 0
        yield _as_table(waiting)
    except (ValueError, OSError, ImportError) as error:
        yield _failure(error)


class _Encoder:
    """Loads a model once, and encodes tables of rows. Lives in an actor."""

    def __init__(
        self, content: Any, is_data_set: bool, identity: IndexDescription, texts: bool, encoding: dict[str, Any]
    ):
        self.content, self.is_data_set, self.texts, self.encoding = content, is_data_set, texts, encoding
        self.width = identity.width
        self.failure: pyarrow.Table | None = None
        register_formats()
        try:
            self.model, self.processor = load(identity.model)
            if replace(describe(self.model, self.processor, ""), model=identity.model) != identity:
                raise ValueError(
                    f"{identity.model} on the machine {os.uname().nodename} is another model than where the run was "
                    f"started: copy the same to all machines."
                )
        except (ValueError, OSError, ImportError) as error:
            self.failure = _failure(error)
            return
        if self.model.device.type == "cpu":
            torch.set_num_threads(encoding["threads"])

    def __call__(self, table: "pyarrow.Table") -> "pyarrow.Table":
        import pyarrow as pa

        failed = table.filter(pa.array(np.asarray(table["unit"]) == FAILED))
        failed = failed if self.failure is None else self.failure
        rows = [] if len(failed) else [self._as_row(values) for values in table.to_pylist()]
        table = failed if len(failed) else table
        found = embed_rows(rows, self.content, self.model, self.processor, **self.encoding) if rows else iter(())
        done = list(embed_captions(found, self.model, self.processor) if self.texts and rows else found)
        columns = {name: table[name] for name in ("unit", "path", "caption", "metadata")}
        return _with_embeddings(columns, done or [EmbeddedRow(NO_ROW, None)] * len(table), self.width)

    def _as_row(self, values: dict[str, Any]) -> ImageRow:
        place = None if values["place"] is None else os.fsdecode(values["place"])
        stored = {"bytes": values["content"], "path": place} if self.is_data_set else place
        return replace(NO_ROW, caption=values["caption"], stored=stored)


def _with_embeddings(columns: dict[str, Any], done: list[EmbeddedRow], width: int) -> "pyarrow.Table":
    import pyarrow as pa

    def as_lists(vectors: list[np.ndarray | None]) -> "pyarrow.Array":
        flat = np.zeros((len(vectors), width), np.float32)
        for place, vector in enumerate(vectors):
            flat[place] = 0 if vector is None else vector
        missing = pa.array([vector is None for vector in vectors], pa.bool_())
        return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), width, mask=missing)

    columns["problem"] = pa.array([one.problem for one in done], pa.string())
    columns["embedding"] = as_lists([one.embedding for one in done])
    columns["text_embedding"] = as_lists([one.text_embedding for one in done])
    return pa.table(columns)


def _as_embedded(table: "pyarrow.Table") -> Iterator[EmbeddedRow]:
    """The rows that an actor encoded, not numbered yet. Raises ValueError with what a worker could not do."""
    for values in table.to_pylist():
        if values["unit"] == FAILED:
            raise ValueError(values["caption"])
        row = replace(NO_ROW, unit=values["unit"], caption=values["caption"], metadata=values["metadata"])
        vectors = [values[name] and np.array(values[name], np.float32) for name in ("embedding", "text_embedding")]
        yield EmbeddedRow(
            replace(row, path=os.fsdecode(values["path"])), vectors[0], values["problem"], None, vectors[1]
        )


def embedded_by_ray(
    rows: ImageRows,
    position: Position,
    identity: IndexDescription,
    texts: bool,
    encoding: dict[str, Any],
    options: "RayOptions",
) -> Iterator[EmbeddedRow]:
    """The rows of a source from a position on, with their embeddings, in their order.

    Args:
        rows: The source.
        position: Where to begin.
        identity: The model, by a name that all machines can load.
        texts: Whether captions are encoded too.
        encoding: `batch_size`, `exact` and `threads`, as `embed_rows` takes them.
        options: Where and how Ray runs.

    Raises:
        ValueError: The model has no name, or a worker could not go on.
        OSError: Ray could not be started, or ended with an error.
    """
    if not identity.model:
        raise ValueError(
            "The model is in memory, but Ray's workers have to load it: pass where it is, a folder that all machines "
            "see or a repository on the Hub."
        )
    with _running(options) as data:
        pool, resources, threads = _share_out(data, options.workers)
        encoding = encoding | {"threads": encoding["threads"] or threads}
        encoded = _read_by_ray(data, rows, position).map_batches(
            _Encoder,
            fn_constructor_args=(rows.content, isinstance(rows, DataSetRows), identity, texts, encoding),
            batch_size=max(ROWS_AT_ONCE, 4 * encoding["batch_size"]),
            batch_format="pyarrow",
            compute=pool,
            **resources,
        )
        number = position.number
        for table in encoded.iter_batches(batch_size=None, batch_format="pyarrow"):
            for one in _as_embedded(table):
                path = row_path(rows.name, number) if rows.is_numbered else one.row.path
                yield replace(one, row=replace(one.row, path=path, number=number))
                number += 1


def _read_by_ray(data: Any, rows: ImageRows, position: Position) -> Any:
    """The rows from a position on, as a data set of Ray."""
    import pyarrow as pa

    if isinstance(rows, FolderRows):  # their paths are known here
        ahead = ((unit, position.offset if unit == position.unit else 0) for unit in range(position.unit, rows.units))
        tables = [_as_table(list(islice(rows.rows_of(unit), skipped, None))) for unit, skipped in ahead]
        return data.from_arrow(tables)
    # Not `range`, whose tasks would take a core each that the actors have.
    units = data.from_arrow([pa.table({"unit": [unit]}) for unit in range(position.unit, rows.units)])
    read = partial(_read_unit, rows=rows, position=position)
    return units.map_batches(read, batch_size=1, batch_format="numpy", num_cpus=READING_CPUS)


def _share_out(data: Any, workers: int | None) -> tuple[Any, dict[str, Any], int]:
    """The pool of actors, what each of them takes of a machine, and its number of threads."""
    import ray

    found = ray.cluster_resources()
    gpus, cores = int(found.get("GPU", 0)), found.get("CPU", 1.0)
    workers = workers or gpus or max(1, int(cores) // CORES_OF_A_WORKER)
    cpus = 1.0 if gpus else ENCODING_SHARE * cores / workers
    cpus = float(int(cpus)) if cpus > 1 else cpus  # Ray takes fractions below one only
    resources = {"num_cpus": cpus} | ({"num_gpus": min(1.0, gpus / workers)} if gpus else {})
    return data.ActorPoolStrategy(size=workers), resources, max(1, round(cpus))


@contextmanager
def _running(options: "RayOptions") -> Iterator[Any]:
    """Ray Data on a cluster, or on this machine; started and stopped here unless the program did so."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray
    from ray import data

    is_ours = not ray.is_initialized()
    try:
        if is_ours:
            here = {} if options.address or os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
            ray.init(address=options.address, logging_level=logging.ERROR, log_to_driver=False, **here)
    except Exception as error:  # whatever a cluster that is not there raises
        raise OSError(
            f"Ray cannot be started{' at ' + options.address if options.address else ''} ({one_line(error)})."
        ) from error
    context, logger = data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, context.execution_options.preserve_order, logger.level
    context.enable_progress_bars, context.execution_options.preserve_order = False, True
    logger.setLevel(logging.CRITICAL)
    try:
        yield data
    except ray.exceptions.RayError as error:
        raise OSError(f"Ray ended with an error ({one_line(error)}); its logs say more.") from error
    finally:
        context.enable_progress_bars, context.execution_options.preserve_order = before[:2]
        logger.setLevel(before[2])
        if is_ours:
            ray.shutdown()


__all__ = ["embedded_by_ray"]
