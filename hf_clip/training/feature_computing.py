"""Rows → their features: images by workers that open them, captions by this process.

Invariant: the features of rows that are computed together depend on these rows alone. Images are prepared as in
training; view v of an image is what training would make of it in epoch v. The exception is `--captions all` with an
augmentation: training would draw another view for each caption of a row, and here they share one.

Dimensions: B batch, W width of a feature.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..data.columns import UnusableRowError
from ..data.content import tokens_id
from .data.collator import EMPTY, PairCollator
from .data.feature_shards import Entries
from .data.image_batch import ImageBatch, PreparedImage
from .data.loader import Restarts, iterate, with_restart
from .data.pair_table import ANY, Draw
from .data.pairs import Pairs
from .data.rows_digest import digest_of_rows
from .stopping import heed_in_worker

AT_ONCE = 64
"""Images or captions that are encoded together. Another number would change what is stored by rounding."""

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Encoder:
    """What makes features.

    Attributes:
        module: what has the weights; it is moved to the device.
        encode: the model's inputs (B, …) on the device → features (B, W).
        width: W.
        made_of: what its features depend on, as JSON can hold it.
        precision: of the run, as accelerate names it.
        name: what has the weights, for messages.
    """

    module: nn.Module
    encode: Callable[..., Tensor]
    width: int
    made_of: dict[str, Any]
    precision: str = "no"
    name: str = "the model"

    def __call__(self, device: torch.device, **inputs: Any) -> np.ndarray:
        """(B, W), float32. Raises ValueError for features that are no numbers."""
        casts: AbstractContextManager = nullcontext()
        if self.precision in AUTOCAST:
            casts = torch.autocast(device.type, AUTOCAST[self.precision])
        with torch.no_grad(), casts:
            features = self.encode(**{name: tensor.to(device) for name, tensor in inputs.items()})
        found = features.float().cpu().numpy()
        if not np.isfinite(found).all():
            of_weights = "Check the weights of the model."
            of_half = "Its values may be too large for float16: launch with --mixed_precision bf16 or no."
            raise ValueError(
                f"{self.name} gives features that are no finite numbers (precision {self.precision}); training would "
                f"learn from them. {of_half if self.precision == 'fp16' else of_weights}"
            )
        return found


@dataclass(frozen=True)
class Wanted:
    """Features of one kind, of the rows of one `Pairs`.

    Attributes:
        kind: of the folder's name, such as "image".
        title: what the progress bar says.
        encoder: that makes them.
        pairs: whose rows they are of.
        collator: that prepares the rows as in training.
        of_texts: whether of captions, and not of images.
        views: of each image.
        prepared_by: what the preparation of images depends on beside the processor.
    """

    kind: str
    title: str
    encoder: Encoder
    pairs: Pairs
    collator: PairCollator
    of_texts: bool
    views: int = 1
    prepared_by: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """What the features are made of."""
        made_of = self.encoder.made_of | self.prepared_by | {"views": self.views, "precision": self.encoder.precision}
        return json.loads(json.dumps(made_of | {"data": digest_of_rows(self.pairs)}, default=str))

    def rows(self) -> np.ndarray:
        """Source and row of each, (2, rows)."""
        sources = [np.full(len(source.rows), place) for place, source in enumerate(self.pairs.sources)]
        rows = [source.rows for source in self.pairs.sources]
        return np.stack([np.concatenate(sources), np.concatenate(rows)]).astype(np.int64)


Parts = dict[int, np.ndarray]
"""The number of a shard → source and row of its rows, (2, rows)."""

Computed = Iterator[tuple[int, bool, int, Entries]]
"""Number of the shard, whether these are the last of it, how many rows they are of, and the entries."""


def compute(wanted: Wanted, parts: Parts, device: torch.device, num_workers: int) -> Computed:
    """Compute the features of several shards, one after the other.

    Args:
        wanted: Which.
        parts: The rows of each shard.
        device: Where the encoder is.
        num_workers: Processes that open images.
    """
    return (_texts if wanted.of_texts else _images)(wanted, parts, device, num_workers)


def compute_again(wanted: Wanted, rows: np.ndarray, device: torch.device) -> Entries:
    """Compute the features of some rows (2, rows), all together."""
    if wanted.of_texts:
        return _entries_of_texts(wanted, rows, device)
    return _encoded(wanted, rows, _OpenedRows(wanted).open(rows.T.tolist()), device)


# --- images ----------------------------------------------------------------------------------------------------------


@dataclass
class _Opened:
    """What a worker makes of some rows. `images` has those of rows without a reason, view by view."""

    images: ImageBatch
    ids: list[int]
    reasons: list[str | None]


class _OpenedRows(Dataset):
    """Source and row → their images."""

    def __init__(self, wanted: Wanted):
        self.pairs, self.collator, self.views = wanted.pairs, wanted.collator, wanted.views

    def __getitems__(self, rows: Any) -> _Opened | OSError | ValueError:
        """An error is returned, for the main process to raise: a worker would wrap its text into tracebacks."""
        try:
            return self.open(rows)
        except OSError as error:
            return OSError(str(error))
        except ValueError as error:
            return ValueError(str(error))

    def open(self, rows: Any) -> _Opened:
        """Source and row of each → their images."""
        images: list[PreparedImage] = []
        ids: list[int] = []
        reasons: list[str | None] = []
        for source, row in rows:
            draws = [Draw(source, row, ANY, view) for view in range(self.views)]
            stored = self.pairs.read(draws[0])
            try:
                if stored.reason is not None:
                    raise UnusableRowError(stored.reason)
                views, image_id = self.collator.prepare_images(
                    stored, [self.collator.choose(draw, stored)[1] for draw in draws]
                )
            except UnusableRowError as error:
                ids.append(0)
                reasons.append(str(error))
            else:
                images += views
                ids.append(image_id)
                reasons.append(None)
        return _Opened(self.collator.images.batch(images), ids, reasons)


def _as_it_is(opened: Any) -> Any:
    return opened


def _images(wanted: Wanted, parts: Parts, device: torch.device, num_workers: int) -> Computed:
    step = max(1, AT_ONCE // wanted.views)
    batches = [
        (number, first + step >= part.shape[1], part[:, first : first + step])
        for number, part in parts.items()
        for first in range(0, part.shape[1], step)
    ]
    opened = _opened(wanted, [batch.T.tolist() for _, _, batch in batches], num_workers)
    for (number, is_last, batch), item in zip(batches, opened, strict=True):
        yield number, is_last, batch.shape[1], _encoded(wanted, batch, item, device)


def _opened(wanted: Wanted, batches: list[list[list[int]]], num_workers: int) -> Iterator[_Opened]:
    """What the workers make of source and row of each batch. When one is killed, all start anew, once."""

    def start(done: int, is_anew: bool) -> Iterator[Any]:
        loader = DataLoader(
            _OpenedRows(wanted),
            batch_sampler=batches[done:],
            collate_fn=_as_it_is,
            num_workers=num_workers,
            worker_init_fn=heed_in_worker,
            generator=torch.Generator(),  # its start draws a number, which must not be one of the run's own
        )
        return iterate(loader)

    items = with_restart(start, num_workers, wanted.pairs.name, Restarts())
    for item in items:
        if isinstance(item, Exception):
            items.close()  # workers that a traceback holds end seconds later
            raise item
        yield item


def _encoded(wanted: Wanted, rows: np.ndarray, opened: _Opened, device: torch.device) -> Entries:
    """The entries of rows (2, rows) whose images are open."""
    count, views = rows.shape[1], wanted.views
    features = np.zeros((count, views, wanted.encoder.width), dtype=np.float32)
    is_usable = np.array([reason is None for reason in opened.reasons], dtype=bool)
    if len(opened.images):
        found = wanted.encoder(device, pixel_values=opened.images)
        features[is_usable] = found.reshape(-1, views, wanted.encoder.width)
    zeros = np.zeros(count, dtype=np.int64)
    ids = np.array(opened.ids, dtype=np.int64)
    sources, numbers = rows
    return Entries(
        sources, numbers, zeros, ids, zeros.astype(bool), opened.reasons, [features[:, v] for v in range(views)]
    )


# --- captions --------------------------------------------------------------------------------------------------------


def _texts(wanted: Wanted, parts: Parts, device: torch.device, num_workers: int) -> Computed:
    for number, part in parts.items():
        yield number, True, part.shape[1], _entries_of_texts(wanted, part, device)


def _entries_of_texts(wanted: Wanted, rows: np.ndarray, device: torch.device) -> Entries:
    """An entry for each caption of some rows (2, rows), and one for a row without. Equal ones are encoded once."""
    collator = wanted.collator
    captions = list(_captions(wanted.pairs, rows))  # (place among the rows, place in its row, text, reason)
    known = collator.encode_together(text for _, _, text, _ in captions if text)
    tokens: list[tuple[int, ...]] = []
    is_cut: list[bool] = []
    reasons: list[str | None] = []
    for _, _, text, reason in captions:
        found: Sequence[int] = ()
        cut = False
        if reason is None:
            try:
                found, cut = known[text] if text in known else collator.encode(text)
            except UnusableRowError as error:
                reason = str(error)
        tokens.append(tuple(found))
        is_cut.append(cut)
        reasons.append(reason)
    features, numbers = _encode_texts(wanted, tokens, device)
    ids = [tokens_id(ids) if ids else 0 for ids in tokens]
    places = np.array([place for place, *_ in captions], dtype=np.int64)
    return Entries(
        rows[0, places],
        rows[1, places],
        np.array([place for _, place, *_ in captions], dtype=np.int64),
        np.array(ids, dtype=np.int64),
        np.array(is_cut, dtype=bool),
        reasons,
        [features[numbers]],
    )


def _captions(pairs: Pairs, rows: np.ndarray) -> Iterator[tuple[int, int, str, str | None]]:
    """Of each caption: the place of its row among these, its own in its row, its text, and why it cannot be used."""
    tables = [source.table.select_columns(source.columns_of_texts) for source in pairs.sources]
    for place, (number, row) in enumerate(rows.T.tolist()):
        stored = pairs.sources[number].row(tables[number][row], "")
        if stored.reason is not None:
            yield place, 0, "", stored.reason
            continue
        for caption, text in enumerate(stored.captions):
            yield place, caption, text, None if text else EMPTY


def _encode_texts(wanted: Wanted, tokens: list[tuple[int, ...]], device: torch.device) -> tuple[np.ndarray, list[int]]:
    """Features of different texts (n, W), the first of which are zeros, and for each text the number of its own."""
    different = sorted({ids for ids in tokens if ids}, key=lambda ids: (len(ids), ids))
    features = [np.zeros((1, wanted.encoder.width), dtype=np.float32)]
    for first in range(0, len(different), AT_ONCE):
        features.append(wanted.encoder(device, **wanted.collator.padded(different[first : first + AT_ONCE])))
    numbers = {ids: number for number, ids in enumerate(different, start=1)}
    return np.concatenate(features), [numbers.get(ids, 0) for ids in tokens]


__all__ = ["Computed", "Encoder", "Parts", "Wanted", "compute", "compute_again"]
