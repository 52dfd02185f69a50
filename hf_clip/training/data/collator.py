"""Drawn rows → a batch, in a worker process: images opened, augmented and scaled, captions tokenized one by one and
padded to the longest.

A row that cannot be used is left out and reported, and its place is taken by another: training batches stay full, so
that every process of a distributed run has the same number of pairs, whatever it met. Which row steps in is a function
of the order of the data. In evaluation nothing steps in.

Dimensions: B local batch, L text length, C channels, y × x pixels that the model gets.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import ProcessorMixin

from ...data.columns import UnusableRowError
from ...data.content import content_id, tokens_id
from ...data.images import TIMEOUT, image_content, open_content
from ...model.open_image import UNREADABLE
from .augment import Augmentation
from .image_batch import PreparedImage
from .image_preparation import ImagePreparation
from .pair_table import Draw, Row
from .pairs import Pairs, PairStream

Tokens = Mapping[str, tuple[list[int], bool]]
"""Captions → their tokens, and whether they were cut."""

Choice = tuple[int, np.random.Generator]
"""The place of the caption that was drawn among those of its row, -1 where all are empty, and the random numbers for
the row's image."""

PAD_TO = 8
"""Text lengths are multiples of this, which suits tensor cores and keeps the number of shapes small."""

LONGEST_REASON = 200

EMPTY = "its caption is empty"
"""Why an empty caption is not used."""


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

    image:     grey levels, which are still to be normalised
    input_ids: the caption's tokens, not padded
    is_cut:    whether the caption or a negative one was longer than the model takes
    negative_input_ids: tokens of wrong captions, likewise
    """

    image: PreparedImage
    input_ids: list[int]
    is_cut: bool
    image_id: int
    label: int | None
    negative_input_ids: list[list[int]] = field(default_factory=list)


@dataclass
class Batch:
    """What a worker made of a plan.

    Attributes:
        tensors: The model's and the loss's inputs, with an `ImageBatch` as pixel_values.
        drawn: Rows that were asked for.
        skipped: (row, reason) of some.
        cut: Rows with captions that were longer than the model takes.
    """

    tensors: dict[str, Any]
    drawn: int
    skipped: list[tuple[str, str]]
    cut: int = 0

    @property
    def negatives(self) -> int:
        """How many wrong captions it has."""
        return len(self.tensors.get("negative_text_ids", ()))

    def pin_memory(self) -> "Batch":
        """What DataLoader calls where pinned memory is asked for."""
        return replace(self, tensors={name: tensor.pin_memory() for name, tensor in self.tensors.items()})


def check_image_processor(image_processor: Any) -> None:
    """Raises ValueError for an image processor whose images would have several sizes."""
    for setting in ("do_resize", "do_center_crop"):
        if not getattr(image_processor, setting):
            raise ValueError(f"The image processor has {setting}=False, but images of one size are needed.")


def texts_of(rows: Iterable[Row]) -> list[str]:
    """All captions of some rows, right and wrong ones."""
    return [text for row in rows for text in (*row.captions, *row.negatives) if text]


class PairCollator:
    """Rows → pixel_values, input_ids and attention_mask (B, L), image_ids and text_ids (B,), labels (B,).

    Of J wrong captions the tokens stand behind those of the pairs, so that one call embeds all texts: input_ids and
    attention_mask are then (B + J, L), and negative_text_ids are (J,).

    pixel_values are an `ImageBatch`, of which `to` makes a tensor (B, C, y, x).

    processor:    the model's
    augmentation: None is for evaluation: images are prepared exactly as by the processor. Otherwise by its torch
                  backend, JPEGs decoded at a part of their size where that is still twice as large as needed
    seed:         of what is drawn for a row: its caption of several, its part, its colours
    timeout:      seconds to wait for an image that is fetched
    on_device:    whether images are scaled where the batch goes to, and not here
    keep_own:     whether a row's wrong captions stay in the batch where they equal one of its own
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        augmentation: Augmentation | None = None,
        *,
        seed: int = 0,
        timeout: float = TIMEOUT,
        on_device: bool = False,
        keep_own: bool = False,
    ):
        self.keep_own = keep_own
        self.tokenizer, self.image_processor = processor.tokenizer, processor.image_processor
        check_image_processor(self.image_processor)
        self.seed, self.timeout = seed, timeout
        self.images = ImagePreparation(self.image_processor, augmentation, on_device=on_device)

    def seed_of(self, draw: Draw) -> tuple[int, ...]:
        """Of what is drawn for a row: its caption, and what happens to its image."""
        return self.seed, draw.round, draw.source, draw.row, draw.caption + 1

    def choose(self, draw: Draw, row: Row) -> Choice:
        """The caption that is drawn, and the random numbers for the image."""
        rng = np.random.default_rng(self.seed_of(draw))
        if draw.caption >= 0:  # a row that cannot be used has no captions
            return draw.caption if draw.caption < len(row.captions) else -1, rng
        spoken = [place for place, caption in enumerate(row.captions) if caption]
        return spoken[int(rng.integers(len(spoken)))] if spoken else -1, rng

    def prepare(
        self, draw: Draw, row: Row, known: Tokens = MappingProxyType({}), choice: Choice | None = None
    ) -> Prepared:
        """Open and augment one row. Raises UnusableRowError.

        known:  captions that are tokenized already
        choice: what `choose` has drawn already
        """
        if row.reason is not None:
            raise UnusableRowError(row.reason)
        place, rng = self.choose(draw, row) if choice is None else choice
        input_ids, is_cut = self.tokens(row, place, known)
        negatives, is_any_cut = self.negative_tokens(row, known)
        (image,), image_id = self.prepare_images(row, [rng])
        return Prepared(image, input_ids, is_cut or is_any_cut, image_id, row.label, negatives)

    def tokens(self, row: Row, place: int, known: Tokens = MappingProxyType({})) -> tuple[list[int], bool]:
        """The tokens of the caption at a place, -1 for none, and whether it was cut. Raises UnusableRowError."""
        caption = row.captions[place] if place >= 0 else ""
        if not caption:
            raise UnusableRowError(EMPTY)
        return known[caption] if caption in known else self.encode(caption)

    def negative_tokens(self, row: Row, known: Tokens) -> tuple[list[list[int]], bool]:
        """The tokens of the wrong captions that are used, and whether any was cut. Raises UnusableRowError."""
        own = set() if self.keep_own else self.own_negatives(row, known)
        found = [known[text] if text in known else self.encode(text) for text in row.negatives if text not in own]
        return [ids for ids, _ in found], any(is_cut for _, is_cut in found)

    def own_negatives(self, row: Row, known: Tokens) -> set[str]:
        """The wrong captions that the model reads as it does one of the row's own, whichever of these is drawn.

        Nothing else would tell them: of a row the loss knows the caption that was drawn.
        """
        own = {self._read(text, known) for text in row.captions if text and row.negatives}
        return {text for text in row.negatives if self._read(text, known) in own - {None}}

    def _read(self, text: str, known: Tokens) -> tuple[int, ...] | None:
        """A text's tokens; None where there are none."""
        try:
            return tuple((known[text] if text in known else self.encode(text))[0])
        except UnusableRowError:
            return None

    def prepare_images(self, row: Row, rngs: Sequence[np.random.Generator]) -> tuple[list[PreparedImage], int]:
        """Open a row's image, and augment it by each of the random numbers. Raises UnusableRowError.

        Returns:
            The images, and the number of what the row shows.
        """
        content = image_content(row.image, row.places, self.timeout)
        image = open_content(content, self.images.draft)
        try:
            return [self.images(image, rng) for rng in rngs], content_id(content)
        except UNREADABLE as error:
            raise UnusableRowError(f"its image cannot be processed ({error})") from error

    def collate(self, rows: Sequence[Prepared]) -> dict[str, Any]:
        """Rows as one batch, of which there may be none in evaluation."""
        tensors: dict[str, Any] = {"pixel_values": self.collate_images(rows)} | self.collate_texts(rows)
        tensors["image_ids"] = torch.tensor([row.image_id for row in rows], dtype=torch.int64)
        if rows and all(row.label is not None for row in rows):
            tensors["labels"] = torch.tensor([row.label for row in rows])
        return tensors

    def collate_images(self, rows: Sequence[Prepared]) -> Any:
        """What the model gets of images."""
        return self.images.batch([row.image for row in rows])

    def collate_texts(self, rows: Sequence[Prepared]) -> dict[str, Tensor]:
        """What the model gets of captions, and their text_ids; of wrong ones likewise."""
        negatives = [ids for row in rows for ids in row.negative_input_ids]
        tensors = self.padded([row.input_ids for row in rows] + negatives)
        # Of the tokens: captions that the model cannot tell apart are one.
        tensors["text_ids"] = torch.tensor([tokens_id(row.input_ids) for row in rows], dtype=torch.int64)
        if negatives:
            tensors["negative_text_ids"] = torch.tensor([tokens_id(ids) for ids in negatives], dtype=torch.int64)
        return tensors

    def encode(self, caption: str) -> tuple[list[int], bool]:
        """A caption's tokens, and whether it was cut at the model's length. Raises UnusableRowError."""
        longest = self.tokenizer.model_max_length
        try:
            ids = self.tokenizer(caption, truncation=True, padding=False)["input_ids"]
            if len(ids) < longest:
                return ids, False
            one_more = self.tokenizer(caption, truncation=True, max_length=longest + 1, padding=False)["input_ids"]
        except Exception as error:  # whatever a tokenizer makes of what stands in a file
            reason = f"{type(error).__name__}: {error}"[:LONGEST_REASON]
            raise UnusableRowError(f"its caption cannot be tokenized ({reason})") from error
        return ids, len(one_more) > longest

    def encode_together(self, captions: Iterable[str]) -> Tokens:
        """What `encode` makes of captions, much faster. Nothing where any of them cannot be tokenized."""
        longest, texts = self.tokenizer.model_max_length, list(dict.fromkeys(captions))
        if not texts:
            return {}
        try:
            # One token more than the model takes shows which captions are cut.
            ids = self.tokenizer(texts, truncation=True, max_length=longest + 1, padding=False)["input_ids"]
        except Exception:  # `encode` says what is wrong, and of which caption
            return {}
        found = dict(zip(texts, ids, strict=True))
        return {text: self.encode(text) if len(row) > longest else (row, False) for text, row in found.items()}

    def encode_drawn(self, rows: Sequence[Row], choices: Sequence[Choice]) -> Tokens:
        """What `encode` makes of the captions that were drawn, and of all texts of rows with wrong ones."""
        places = zip(rows, choices, strict=True)
        drawn = [caption for row, (place, _) in places if place >= 0 and (caption := row.captions[place])]
        return self.encode_together(drawn + texts_of(row for row in rows if row.negatives))

    def tokenize(self, captions: Iterable[str]) -> dict[str, Tensor]:
        """Ids and mask (B, L), L the longest caption's length made a multiple of 8, if the model takes that many."""
        return self.padded([self.encode(caption)[0] for caption in captions])

    def padded(self, ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Tokens as ids and mask (B, L); see `tokenize`."""
        length = max(map(len, ids), default=1)
        length = max(length, min(-(-length // PAD_TO) * PAD_TO, self.tokenizer.model_max_length))
        input_ids = torch.full((len(ids), length), self.tokenizer.pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for place, row in enumerate(ids):
            input_ids[place, : len(row)] = torch.tensor(row)
            attention_mask[place, : len(row)] = 1
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def __call__(self, plan: Plan, read: Callable[[Draw], Row]) -> Batch:
        """Carry out a plan. Raises ValueError where neither a row nor any of its spares can be used."""
        prepared: list[Prepared] = []
        skipped: list[tuple[str, str]] = []
        rows = [read(draw) for draw in plan.draws]
        choices = [self.choose(draw, row) for draw, row in zip(plan.draws, rows, strict=True)]
        known = self.encode_drawn(rows, choices)
        drawn = zip(plan.draws, rows, choices, strict=True)
        for place, (draw, row, choice) in enumerate(drawn, start=plan.first):
            try:
                prepared.append(self.prepare(draw, row, known, choice))
            except UnusableRowError as error:
                skipped.append((row.name, str(error)))
                if plan.spares:
                    turn = place % len(plan.spares)
                    prepared.append(self._first_usable(plan.spares[turn:] + plan.spares[:turn], read, skipped[-1]))
        return Batch(self.collate(prepared), len(plan.draws), skipped, sum(row.is_cut for row in prepared))

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
