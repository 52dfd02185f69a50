"""Pairs of pictures and captions, from `datasets` to tensors.

Pictures are taken undecoded and opened here, so that orientation is applied and an error names its row.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import BatchFeature, ProcessorMixin

from ..pictures_hf_clip import open_picture
from .config import TrainingConfig


def load_pairs(config: TrainingConfig) -> Any:
    """The training split with its picture and caption columns, pictures undecoded.

    Raises FileNotFoundError for data that isn't there and ValueError for a missing split or column.
    """
    import datasets

    is_saved = (Path(config.dataset) / "dataset_dict.json").is_file() or (Path(config.dataset) / "state.json").is_file()
    try:
        loaded = datasets.load_from_disk(config.dataset) if is_saved else datasets.load_dataset(config.dataset)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"There is no data set {config.dataset!r}: name a folder written by Dataset.save_to_disk, a folder of data "
            f"files, or a repository on the Hub ({str(error).splitlines()[0]})."
        ) from error
    if isinstance(loaded, dict):
        if config.split not in loaded:
            raise ValueError(f"{config.dataset} has no split {config.split!r}; its splits are {', '.join(loaded)}.")
        loaded = loaded[config.split]
    for flag, column in [("image_column", config.image_column), ("caption_column", config.caption_column)]:
        if column not in loaded.column_names:
            raise ValueError(
                f"{config.dataset} has no column {column!r}; its columns are {', '.join(loaded.column_names)}. "
                f"Name the right one with --{flag}."
            )
    if len(loaded) < config.batch_size:
        raise ValueError(
            f"{config.dataset} has {len(loaded)} rows, fewer than one batch of {config.batch_size}. Pass --batch_size "
            f"{len(loaded)} or less."
        )
    pairs = loaded.select_columns([config.image_column, config.caption_column])
    captions = pairs.features[config.caption_column]
    if getattr(captions, "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"The column {config.caption_column!r} holds {captions}, but one text for each row is needed.")
    if missing := pairs.data.column(config.caption_column).null_count:
        row = next(row for row, caption in enumerate(pairs[config.caption_column]) if caption is None)
        raise ValueError(
            f"{missing} rows of {config.dataset} have no {config.caption_column}, the first of them row {row}; give "
            f"them texts, or remove them."
        )
    pictures = pairs.features[config.image_column]
    try:
        return pairs.cast_column(config.image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"The column {config.image_column!r} holds {pictures}, but pictures are needed.") from error


def open_stored(stored: dict[str, Any] | None, name: str) -> Image.Image:
    """Open a picture as `datasets` stores it (bytes or a path), turned as its EXIF orientation says."""
    if stored is None:
        raise ValueError(f"{name} is missing; remove that row.")
    return open_picture(stored, name)


class PairCollator:
    """Rows of the data set → a batch: pixel_values (B, 3, H, W), input_ids and attention_mask (B, L)."""

    def __init__(self, processor: ProcessorMixin, config: TrainingConfig):
        self.processor = processor
        self.image_column, self.caption_column = config.image_column, config.caption_column

    def __call__(self, rows: list[dict[str, Any]]) -> BatchFeature | ValueError:
        """An error is returned, for `repeat` to raise: a worker process would wrap its text into tracebacks."""
        try:
            return self.collate(rows)
        except ValueError as error:
            return error

    def collate(self, rows: list[dict[str, Any]]) -> BatchFeature:
        captions = [row[self.caption_column] for row in rows]
        pictures = [
            open_stored(row[self.image_column], f"The picture of the pair captioned {caption!r}")
            for row, caption in zip(rows, captions, strict=True)
        ]
        return self.processor(text=captions, images=pictures, truncation=True, return_tensors="pt")


def build_loader(pairs: Any, processor: ProcessorMixin, config: TrainingConfig) -> DataLoader:
    """Shuffled full batches; the order depends on the seed alone."""
    return DataLoader(
        pairs,
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=True,
        collate_fn=PairCollator(processor, config),
        num_workers=config.num_workers,
        persistent_workers=config.num_workers > 0,
        generator=torch.Generator().manual_seed(config.seed),
    )


def repeat(loader: DataLoader, steps: int) -> Iterator[BatchFeature]:
    """As many batches as there are steps, going through the data as often as that takes."""
    done = 0
    while done < steps:
        for batch in loader:
            if done == steps:
                return
            if isinstance(batch, ValueError):
                raise batch
            done += 1
            yield batch
