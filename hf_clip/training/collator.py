"""Drawn rows → a batch, in a worker process: pictures opened, augmented and scaled, captions padded to the longest.

A row that cannot be used is left out and reported, and its place is taken by another: training batches stay full, so
that every process of a distributed run has the same number of pairs, whatever it met. Which row steps in is a function
of the order of the data. In evaluation nothing steps in.

Dimensions: B local batch, L text length, S model's side, C = 3 channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import ProcessorMixin

from ..pictures_hf_clip import UNREADABLE
from .augment import Augmentation, AugmentedPixels
from .columns import UnusableRowError
from .content import content_id
from .pairs import Draw, Pairs, PairStream, Row
from .pictures import TIMEOUT, open_content, picture_content

PAD_TO = 8
"""Text lengths are multiples of this, which suits tensor cores and keeps the number of shapes small."""


@dataclass(frozen=True)
class Plan:
    """What one process does of a global batch.

    draws:  the rows of its local batch
    spares: rows from behind the global batch, of which one steps in for a row that cannot be used
    first:  the place of the local batch in the global one
    """

    draws: list[Draw]
    spares: list[Draw]
    first: int = 0


@dataclass
class Prepared:
    """A row as tensors, and what it shows and says as numbers.

    pixels: (C, S, S), which in training are still to be normalised
    """

    pixels: Tensor
    caption: str
    image_id: int
    label: int | None


@dataclass
class Batch:
    """tensors: the model's and the loss's inputs   drawn: rows that were asked for   skipped: (row, reason) of some"""

    tensors: dict[str, Tensor]
    drawn: int
    skipped: list[tuple[str, str]]

    def pin_memory(self) -> "Batch":
        """What DataLoader calls where pinned memory is asked for."""
        return Batch({name: tensor.pin_memory() for name, tensor in self.tensors.items()}, self.drawn, self.skipped)


class PairCollator:
    """Rows → pixel_values (B, C, S, S), input_ids and attention_mask (B, L), image_ids and text_ids (B,), labels (B,).

    processor:    the model's
    augmentation: None is for evaluation: pictures are prepared exactly as by the processor. Otherwise by its torch
                  backend, JPEGs decoded at a part of their size where that is still twice as large as needed
    seed:         of what is drawn for a row: its caption of several, its part, its colours
    timeout:      seconds to wait for a picture that is fetched
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        augmentation: Augmentation | None = None,
        *,
        seed: int = 0,
        timeout: float = TIMEOUT,
    ):
        self.tokenizer, self.image_processor = processor.tokenizer, processor.image_processor
        for setting in ("do_resize", "do_center_crop"):
            if not getattr(self.image_processor, setting):
                raise ValueError(f"The image processor has {setting}=False, but pictures of one size are needed.")
        self.seed, self.timeout = seed, timeout
        self.augmented = None if augmentation is None else AugmentedPixels(self.image_processor, augmentation)

    def prepare(self, draw: Draw, row: Row) -> Prepared:
        """Open and augment one row. Raises UnusableRowError."""
        if row.reason is not None:
            raise UnusableRowError(row.reason)
        rng = np.random.default_rng((self.seed, draw.round, draw.source, draw.row, draw.caption + 1))
        if draw.caption >= 0:
            caption = row.captions[draw.caption]
        else:
            spoken = [caption for caption in row.captions if caption]
            caption = spoken[int(rng.integers(len(spoken)))] if spoken else ""
        if not caption:
            raise UnusableRowError("its caption is empty")
        content = picture_content(row.image, row.places, self.timeout)
        picture = open_content(content, self.augmented.draft if self.augmented else None)
        try:
            if self.augmented:
                pixels = self.augmented.scaled(picture, rng)
            else:
                pixels = self.image_processor(picture, return_tensors="pt")["pixel_values"][0]
        except UNREADABLE as error:
            raise UnusableRowError(f"its picture cannot be processed ({error})") from error
        return Prepared(pixels, caption, content_id(content), row.label)

    def collate(self, rows: Sequence[Prepared]) -> dict[str, Tensor]:
        """Rows as one batch, of which there may be none in evaluation."""
        if not rows:
            crop = dict(self.image_processor.crop_size)
            shapes = {"input_ids": (0, PAD_TO), "attention_mask": (0, PAD_TO), "image_ids": (0,), "text_ids": (0,)}
            pixels = torch.zeros(0, 3, crop["height"], crop["width"])
            integers = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}
            return {"pixel_values": pixels} | integers
        pixels = torch.stack([row.pixels for row in rows])
        tensors = {"pixel_values": self.augmented.normalised(pixels) if self.augmented else pixels}
        tensors |= self.tokenize([row.caption for row in rows])
        tensors["image_ids"] = torch.tensor([row.image_id for row in rows])
        tensors["text_ids"] = torch.tensor([content_id(row.caption) for row in rows])
        if all(row.label is not None for row in rows):
            tensors["labels"] = torch.tensor([row.label for row in rows])
        return tensors

    def tokenize(self, captions: list[str]) -> dict[str, Tensor]:
        """Ids and mask (B, L), L the longest caption's length made a multiple of 8, if the model takes that many."""
        encoded = self.tokenizer(captions, truncation=True, padding=True, padding_side="right", return_tensors="pt")
        length = encoded["input_ids"].shape[1]
        more = max(0, min(-(-length // PAD_TO) * PAD_TO, self.tokenizer.model_max_length) - length)
        fills = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0}
        return {name: functional.pad(encoded[name], (0, more), value=fill) for name, fill in fills.items()}

    def __call__(self, plan: Plan, read: Callable[[Draw], Row]) -> Batch:
        """Carry out a plan. Raises ValueError where neither a row nor any of its spares can be used."""
        prepared: list[Prepared] = []
        skipped: list[tuple[str, str]] = []
        for place, draw in enumerate(plan.draws, start=plan.first):
            row = read(draw)
            try:
                prepared.append(self.prepare(draw, row))
            except UnusableRowError as error:
                skipped.append((row.name, str(error)))
                if plan.spares:
                    turn = place % len(plan.spares)
                    prepared.append(self._first_usable(plan.spares[turn:] + plan.spares[:turn], read, skipped[-1]))
        return Batch(self.collate(prepared), len(plan.draws), skipped)

    def _first_usable(self, spares: list[Draw], read: Callable[[Draw], Row], skipped: tuple[str, str]) -> Prepared:
        for draw in spares:
            try:
                return self.prepare(draw, read(draw))
            except UnusableRowError:  # counted where it is drawn itself
                continue
        raise ValueError(
            f"{skipped[0]} cannot be used ({skipped[1]}), nor can any of the {len(spares)} rows that would step in for "
            f"it; check the data."
        )


class Preparation(torch.utils.data.Dataset):
    """What a worker process of DataLoader runs: a plan → a batch."""

    def __init__(self, pairs: Pairs | PairStream, collator: PairCollator):
        self.pairs, self.collator = pairs, collator

    def __getitems__(self, plan: Any) -> Batch | ValueError:
        """An error is returned, for the main process to raise: a worker would wrap its text into tracebacks."""
        try:
            return self.collator(plan, self.pairs.read)
        except ValueError as error:
            return ValueError(str(error))
