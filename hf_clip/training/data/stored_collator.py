"""Drawn rows → a batch in which stored features take the place of images, of captions, or of both.

A row that could not be used when its features were computed is left out and reported as it would be without them, and
the same row steps in for it. Which caption is drawn is the same too.

Dimensions: B local batch, W width of a stored feature, Z embedding of a teacher.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.columns import UnusableRowError
from .collator import Batch, Choice, PairCollator, Plan, Prepared, Tokens
from .image_batch import PreparedImage
from .pair_table import Draw, Row
from .pairs import Pairs
from .stored_features import StoredFeatures, choose_place, labels_of

NOTHING = PreparedImage(torch.zeros(0))
UNUSED = np.random.default_rng(0)
"""Random numbers for an image that is not opened. To make some for each row would take longer than all else."""

TEACHER_IMAGES, TEACHER_TEXTS = "teacher_image_embeds", "teacher_text_embeds"
"""What a batch calls a teacher's embeddings, (B, Z) each."""

FIRST = Draw(0, 0, 0, 0)


@dataclass(frozen=True)
class Stores:
    """What is stored of the rows of one `Pairs`.

    Attributes:
        images: features that the model gets in place of pixel values.
        texts: features that it gets in place of captions.
        teacher_images, teacher_texts: a teacher's embeddings of images and captions, both or none.
    """

    images: StoredFeatures | None = None
    texts: StoredFeatures | None = None
    teacher_images: StoredFeatures | None = None
    teacher_texts: StoredFeatures | None = None

    @property
    def is_any(self) -> bool:
        """Whether something is stored."""
        return any(store is not None for store in (self.images, self.texts, self.teacher_images))

    @property
    def is_all(self) -> bool:
        """Whether nothing is read of a row any more."""
        return self.images is not None and self.texts is not None


@dataclass
class StoredPair(Prepared):
    """A row of which something is stored.

    Attributes:
        draw: of the row.
        image_entry, text_entry: the numbers of its features, where there are some.
        of_teacher: likewise the two of the teacher.
    """

    draw: Draw = FIRST
    image_entry: int = 0
    text_entry: int = 0
    of_teacher: tuple[int, int] = (0, 0)


class StoredCollator(PairCollator):
    """A `PairCollator` of whose tensors some are stored features.

    In place of pixel values stand the features of images (B, W), and in place of input_ids those of captions (B, W).
    Their attention_mask is then (B, 1), all ones.

    stores: what is stored
    given:  as for `PairCollator`
    """

    def __init__(self, stores: Stores, *given: Any, **named: Any):
        super().__init__(*given, **named)
        self.stores = stores

    def __call__(self, plan: Plan, read: Callable[[Draw], Row]) -> Batch:
        batch = self._at_once(plan) if self.stores.is_all and plan.spares else None
        return super().__call__(plan, read) if batch is None else batch

    def _at_once(self, plan: Plan) -> Batch | None:
        """A batch to train on whose rows are all stored, usable, and have one caption; else None.

        Row by row it would take a third of a step's time.
        """
        images, texts = self.stores.images, self.stores.texts
        assert images is not None
        assert texts is not None
        sources, rows, captions, rounds = np.array([draw[:4] for draw in plan.draws], dtype=np.int64).T
        of_images, of_texts = images.entries(sources, rows), texts.entries(sources, rows)
        if of_images is None or of_texts is None or self.stores.teacher_images is not None or captions.max() > 0:
            return None
        tensors = {
            "pixel_values": images.gather(of_images.tolist(), rounds.tolist()),
            "input_ids": texts.gather(of_texts.tolist(), [0] * len(rows)),
            "attention_mask": torch.ones(len(rows), 1, dtype=torch.int64),
            "text_ids": torch.from_numpy(texts.ids[of_texts]),
            "image_ids": torch.from_numpy(images.ids[of_images]),
        }
        return Batch(tensors, len(rows), [], int(texts.is_cut[of_texts].sum()))

    def choose(self, draw: Draw, row: Row) -> Choice:
        if self.stores.texts is None:
            return super().choose(draw, row)
        place = choose_place(self.stores.texts, draw, self.seed_of(draw))
        return place, UNUSED if self.stores.images is not None else super().choose(draw, row)[1]

    def encode_drawn(self, rows: Sequence[Row], choices: Sequence[Choice]) -> Tokens:
        return MappingProxyType({}) if self.stores.texts is not None else super().encode_drawn(rows, choices)

    def prepare(
        self, draw: Draw, row: Row, known: Tokens = MappingProxyType({}), choice: Choice | None = None
    ) -> Prepared:
        if row.reason is not None:
            raise UnusableRowError(row.reason)
        images, texts = self.stores.images, self.stores.texts
        place, rng = self.choose(draw, row) if choice is None else choice
        pair = StoredPair(NOTHING, [], False, 0, row.label, draw=draw)
        if texts is None:
            pair.input_ids, pair.is_cut = self.tokens(row, place, known)
            pair.negative_input_ids, is_any_cut = self.negative_tokens(row, known)
            pair.is_cut |= is_any_cut
        else:
            pair.text_entry = texts.entry(draw, place)
            pair.is_cut = bool(texts.is_cut[pair.text_entry])
        if images is None:
            (pair.image,), pair.image_id = self.prepare_images(row, [rng])
        else:
            pair.image_entry = images.entry(draw)
            pair.image_id = int(images.ids[pair.image_entry])
        if (teacher := self.stores.teacher_images) is not None and self.stores.teacher_texts is not None:
            pair.of_teacher = teacher.entry(draw), self.stores.teacher_texts.entry(draw, place)
        return pair

    def collate(self, rows: Sequence[Any]) -> dict[str, Any]:
        tensors = super().collate(rows)
        of_teacher = {TEACHER_IMAGES: self.stores.teacher_images, TEACHER_TEXTS: self.stores.teacher_texts}
        for number, (name, store) in enumerate(of_teacher.items()):
            if store is not None:
                tensors[name] = store.gather([row.of_teacher[number] for row in rows], [0] * len(rows))
        return tensors

    def collate_images(self, rows: Sequence[Any]) -> Any:
        if self.stores.images is None:
            return super().collate_images(rows)
        return self.stores.images.gather([row.image_entry for row in rows], [row.draw.round for row in rows])

    def collate_texts(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        texts = self.stores.texts
        if texts is None:
            return super().collate_texts(rows)
        entries = [row.text_entry for row in rows]
        return {
            "input_ids": texts.gather(entries, [0] * len(entries)),
            "attention_mask": torch.ones(len(entries), 1, dtype=torch.int64),
            "text_ids": torch.from_numpy(texts.ids[np.asarray(entries, dtype=np.int64)]),
        }


class StoredPairs(Pairs):
    """The same draws as those of other pairs. What is stored of their rows is not read.

    Args:
        pairs: The others.
        stores: What is stored of them.
    """

    def __init__(self, pairs: Pairs, stores: Stores):
        vars(self).update(vars(pairs))
        self._labels = [labels_of(source) for source in pairs.sources] if stores.is_all else None
        if stores.images is not None:
            self.sources = [
                replace(source, table=source.table.select_columns(source.columns_of_texts)) for source in pairs.sources
            ]

    def read(self, draw: Draw) -> Row:
        if self._labels is None:
            return super().read(draw)
        labels = self._labels[draw.source]
        label = None if labels is None else int(labels[draw.row])
        return Row(f"row {draw.row} of {self.sources[draw.source].name}", None, [], label)


__all__ = ["TEACHER_IMAGES", "TEACHER_TEXTS", "StoredCollator", "StoredPair", "StoredPairs", "Stores"]
