"""Images and captions in every form that a data set comes in, small enough to be made anew for each test."""

import csv
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from PIL import Image
from transformers import ProcessorMixin

from hf_clip.data.content import tokens_id
from hf_clip.training.data.augment import Augmentation
from hf_clip.training.data.collator import PairCollator
from hf_clip.training.data.loader import PairLoader, build_loader
from hf_clip.training.data.pairs import Pairs, PairStream

SMALL = 6
"""Rows of the sources of every kind."""

COUNT = 22
"""Rows of what batches are made of."""

STRONG = Augmentation(crop=0.5, flip=0.5, jitter=0.3)


def captions(count: int = SMALL) -> list[str]:
    return [f"caption number {index}" for index in range(count)]


def png(index: int, size: tuple[int, int] = (60, 48)) -> bytes:
    """An image that shows its number: all of it has one grey level."""
    buffer = BytesIO()
    Image.new("RGB", size, (index * 10,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(seed: int = 0, size: tuple[int, int] = (60, 48), orientation: int | None = None) -> bytes:
    """Smooth colours."""
    buffer, exif = BytesIO(), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    levels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def broken() -> dict[str, bytes]:
    """Images that cannot be decoded, by what is wrong with them."""
    return {"truncated": jpeg(1, (200, 160))[:2000], "text": b"this is no image", "nothing": b""}


def corrupt_exif() -> bytes:
    """An image whose EXIF block is damaged, and which can be shown all the same."""
    data = bytearray(jpeg(2, orientation=6))
    place = data.index(b"Exif\0\0") + 6
    data[place : place + 20] = b"\xff" * 20
    return bytes(data)


def write_pictures(folder: Path, count: int = SMALL) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"image{index}.png" for index in range(count)]
    for index, name in enumerate(names):
        (folder / name).write_bytes(png(index))
    return names


def write_table(path: Path, columns: dict[str, Sequence[Any]]) -> Path:
    """A CSV, TSV, JSON lines or parquet file, by its ending."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(columns), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix in (".json", ".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pydict({name: list(values) for name, values in columns.items()}), path)
    return path


def write_tar(path: Path, images: Sequence[bytes], texts: Sequence[str], start: int = 0) -> Path:
    with tarfile.open(path, "w") as archive:
        for index, (image, text) in enumerate(zip(images, texts, strict=True), start=start):
            about = json.dumps({"id": index, "long": f"a long {text}"}).encode()
            for name, content in (("jpg", image), ("txt", text.encode()), ("json", about)):
                member = tarfile.TarInfo(f"{index:05d}.{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def _folder(ending: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        names = write_pictures(folder / "images")
        write_table(folder / "images" / f"metadata{ending}", {"file_name": names, "caption": captions()})
        return str(folder / "images")

    return write


def _paths(ending: str) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        names = [f"images/{name}" for name in write_pictures(folder / "images")]
        return str(write_table(folder / f"table{ending}", {"image_path": names, "text": captions()}))

    return write


def _bytes(folder: Path) -> str:
    images = [png(index) for index in range(SMALL)]
    return str(write_table(folder / "table.parquet", {"image": images, "caption": captions(), "id": range(SMALL)}))


def _stored(folder: Path) -> str:
    images = [{"bytes": png(index), "path": f"{index}.png"} for index in range(SMALL)]
    return str(write_table(folder / "table.parquet", {"image": images, "caption": captions()}))


def _tar(folder: Path) -> str:
    return str(write_tar(folder / "shard.tar", [png(index) for index in range(SMALL)], captions()))


def _tars(folder: Path) -> str:
    images, half = [png(index) for index in range(SMALL)], SMALL // 2
    write_tar(folder / "shard-0.tar", images[:half], captions()[:half])
    write_tar(folder / "shard-1.tar", images[half:], captions()[half:], start=half)
    return str(folder / "shard-*.tar")


def _saved(folder: Path) -> str:
    table = Dataset.from_dict({"image": [png(index) for index in range(SMALL)], "caption": captions()})
    table.save_to_disk(folder / "saved")
    return str(folder / "saved")


WRITERS: dict[str, Callable[[Path], str]] = {
    **{f"folder with metadata{ending}": _folder(ending) for ending in (".csv", ".jsonl", ".parquet")},
    **{f"paths in {ending}": _paths(ending) for ending in (".csv", ".tsv", ".json", ".jsonl", ".parquet")},
    "bytes in .parquet": _bytes,
    "stored images in .parquet": _stored,
    "webdataset": _tar,
    "several webdatasets": _tars,
    "save_to_disk": _saved,
}
"""Every kind of source → a function that writes it below a folder and returns what to name it by."""


def loader_of(pairs: Pairs | PairStream, processor: ProcessorMixin, batch_size: int = 4, **settings: Any) -> PairLoader:
    collator = PairCollator(processor, settings.pop("augmentation", STRONG), seed=settings.get("seed", 0))
    return build_loader(pairs, collator, batch_size, **settings)


def text_id(processor: ProcessorMixin, caption: str) -> int:
    """The number by which a batch knows a caption."""
    return tokens_id(processor.tokenizer(caption, truncation=True).input_ids)


def text_ids(processor: ProcessorMixin, texts: Sequence[str]) -> list[int]:
    return [text_id(processor, text) for text in texts]
