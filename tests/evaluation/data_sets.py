"""Data sets to measure on, in each layout, made of the images that the digits fixture has."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Image, load_from_disk

from demo.digits import COMBINATIONS, DIGITS

TEMPLATES = ["a photo of a red {} on white paper", "the digit {} in blue ink on yellow paper"]


def stored_rows(digits: Path, count: int = 60) -> list[dict[str, Any]]:
    """Rows with the bytes of an image, the place of its digit, and its caption."""
    table = load_from_disk(str(digits / "pairs"))["held_out_images"].cast_column("image", Image(decode=False))
    return [
        {"bytes": row["image"]["bytes"], "label": COMBINATIONS[row["target"]].digit, "caption": row["caption"]}
        for row in table.select(range(count))
    ]


def write_class_folders(folder: Path, rows: list[dict[str, Any]]) -> Path:
    for place, row in enumerate(rows):
        path = folder / DIGITS[row["label"]] / f"{place:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["bytes"])
    return folder


def write_shards(
    folder: Path, rows: list[dict[str, Any]], kind: str = "classification", per_shard: int = 25, split: str = "test"
) -> Path:
    """The layout of clip-benchmark/wds_*."""
    shards = [rows[start : start + per_shard] for start in range(0, len(rows), per_shard)]
    (folder / split).mkdir(parents=True)
    (folder / split / "nshards.txt").write_text(str(len(shards)))
    (folder / "dataset_type.txt").write_text(kind)
    if kind != "retrieval":
        (folder / "classnames.txt").write_text("\n".join(DIGITS))
        text = "\n".join(template.replace("{}", "{c}") for template in TEMPLATES)
        (folder / "zeroshot_classification_templates.txt").write_text(text)
    for number, shard in enumerate(shards):
        with tarfile.open(folder / split / f"{number}.tar", "w") as tar:
            for place, row in enumerate(shard):
                name = f"s{number * per_shard + place:07d}"
                for ending, content in (("png", row["bytes"]), _label_entry(row, kind)):
                    member = tarfile.TarInfo(f"{name}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def _label_entry(row: dict[str, Any], kind: str) -> tuple[str, bytes]:
    if kind == "retrieval":
        captions = row.get("captions") or [row["caption"]]
        return "txt", "\n".join(captions).encode()
    if kind == "classification":
        return "cls", str(row["label"]).encode()
    buffer = io.BytesIO()
    labels = row.get("labels", [row["label"]])
    np.save(buffer, np.isin(np.arange(len(DIGITS)), labels).astype(np.int64))
    return "npy", buffer.getvalue()


def captioned(rows: list[dict[str, Any]]) -> Dataset:
    images = [{"bytes": row["bytes"], "path": None} for row in rows]
    return Dataset.from_dict({"image": images, "caption": [row["caption"] for row in rows]}).cast_column(
        "image", Image()
    )
