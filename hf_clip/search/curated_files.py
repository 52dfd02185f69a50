"""What curation writes: one parquet file or webdataset tars, a summary and a picture of the scores."""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .scored_rows import ScoredRows

ROWS_AT_ONCE = 1000
BYTES_AT_ONCE = 64 << 20
"""A parquet file's group of rows is written when it holds that many."""

TAR_ROWS = 10_000
LISTED = 1000
"""Most unreadable images that a summary names."""

QUANTILES = (1, 5, 25, 50, 75, 95, 99)
BINS = 60
BLUE, GREY = "#2f6fb0", "#c9c9c9"

Chosen = Iterable[tuple[dict[str, Any], tuple[bytes, str] | None]]
"""Rows that are kept; and if images are written too, each image's bytes, and the ending of its file, such as "jpg"."""


def _schema(rows: ScoredRows, images: bool) -> Any:
    """The columns of the parquet file. Where it holds images, `datasets` is told so."""
    import pyarrow as pa  # type: ignore[import-untyped]

    kinds = {"INTEGER": ("int64", pa.int64()), "TEXT": ("string", pa.string()), "REAL": ("float32", pa.float32())}
    fields: list[tuple[str, Any]] = []
    features: dict[str, Any] = {}
    for name, kind in rows.columns.items():
        hub, arrow = kinds[kind] if name != "duplicate" else ("bool", pa.bool_())
        fields.append((name, pa.list_(arrow) if name == "tags" else arrow))
        value = {"dtype": hub, "_type": "Value"}
        features[name] = {"feature": value, "_type": "List"} if name == "tags" else value
    if images:
        fields.append(("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
        features["image"] = {"_type": "Image"}
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


def write_parquet(path: Path, rows: ScoredRows, chosen: Chosen, images: bool) -> None:
    """Write rows that are kept into one file, in groups.

    Args:
        path: The file.
        rows: They say which columns there are.
        chosen: The rows.
        images: Whether they come with images.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    schema = _schema(rows, images)
    waiting: list[dict[str, Any]] = []
    size = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for row, content in chosen:
            if content is not None:
                size += len(content[0])
                row = row | {"image": {"bytes": content[0], "path": f"{row['id']:09}.{content[1]}"}}
            waiting.append(row)
            if len(waiting) == ROWS_AT_ONCE or size > BYTES_AT_ONCE:
                writer.write_table(pa.Table.from_pylist(waiting, schema=schema))
                waiting, size = [], 0
        writer.write_table(pa.Table.from_pylist(waiting, schema=schema))


def write_tars(folder: Path, chosen: Chosen, tar_rows: int) -> int:
    """Write rows that are kept as webdataset shards: the image, `.txt` with its caption, `.json` with the columns.

    Args:
        folder: The folder.
        chosen: The rows with their images.
        tar_rows: Rows of a tar.

    Returns:
        The number of tars.
    """
    tar: tarfile.TarFile | None = None
    count = 0
    try:
        for count, (row, content) in enumerate(chosen, 1):
            if (count - 1) % tar_rows == 0:
                if tar is not None:
                    tar.close()
                tar = tarfile.open(folder / f"{(count - 1) // tar_rows:05}.tar", "w")  # noqa: SIM115
            assert tar is not None
            assert content is not None
            _add_sample(tar, row, *content)
    finally:
        if tar is not None:
            tar.close()
    return -(-count // tar_rows)


def _add_sample(tar: tarfile.TarFile, row: dict[str, Any], image: bytes, ending: str) -> None:
    parts = {ending: image, "json": json.dumps(row, ensure_ascii=False).encode()}
    if row["caption"] is not None:
        parts["txt"] = row["caption"].encode()
    for name, content in parts.items():
        member = tarfile.TarInfo(f"{row['id']:09}.{name}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def summary_of(rows: ScoredRows, settings: dict[str, Any]) -> dict[str, Any]:
    """Say in numbers what was scored and what is kept. JSON can hold it.

    Args:
        rows: All rows.
        settings: What else the summary says.
    """
    found: dict[str, Any] = {**settings, "images": len(rows), "kept": rows.kept, "unreadable": rows.unreadable}
    if rows.with_duplicates:
        found["duplicates"] = rows.duplicates
    found["scores"] = {
        name: {"all": _distribution(rows.values(name)), "kept": _distribution(rows.values(name, kept=True))}
        for name in rows.scores
    }
    problems: Iterator[tuple[str, str]] = rows.problems()
    found["problems"] = [
        {"path": path, "problem": problem} for (path, problem), _ in zip(problems, range(LISTED), strict=False)
    ]
    return found


def _distribution(values: np.ndarray) -> dict[str, Any]:
    if not len(values):
        return {"count": 0}
    quantiles = np.percentile(values, QUANTILES).round(6).tolist()
    found = {"count": len(values), "mean": round(float(values.mean()), 6), "min": round(float(values.min()), 6)}
    return (
        found
        | {f"{part}%": value for part, value in zip(QUANTILES, quantiles, strict=True)}
        | {"max": round(float(values.max()), 6)}
    )


def draw_scores(path: Path, rows: ScoredRows, title: str) -> None:
    """Draw a histogram of each score: all images in grey, those that are kept in blue.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 0.6 + 2.5 * len(rows.scores)), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a screen
    figure.suptitle(title.replace("$", r"\$"), fontsize=11)
    for axes, name in zip(figure.subplots(len(rows.scores), 1, squeeze=False).flat, rows.scores, strict=True):
        values, kept = rows.values(name), rows.values(name, kept=True)
        edges = np.histogram_bin_edges(values, BINS) if len(values) else np.linspace(0, 1, BINS + 1)
        axes.hist(values, edges, color=GREY, label=f"all, {len(values):,}")
        axes.hist(kept, edges, color=BLUE, label=f"kept, {len(kept):,}")
        axes.set(xlabel=name, ylabel="images")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=120, facecolor="white")


__all__ = ["TAR_ROWS", "draw_scores", "summary_of", "write_parquet", "write_tars"]
