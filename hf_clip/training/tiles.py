"""Logits by tiles: of all the logits of images and texts, only a tile exists at a time.

A tile holds some images of this process (rows) against some texts of all processes (columns). Pair i's own logit stands
where the tile crosses the diagonal. Pairs that share an image or a caption are found by their ids, tile by tile.

Dimensions: B pairs of this process (`local_…`), N pairs of all processes (`global_…`), D embedding. A tile has
`r` rows and `c` columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..model.linear_map import linear
from .gathering import gather

TILE_ROWS = {"cpu": 1024, "cuda": 8192}
TILE_LOGITS = {"cpu": 1024 * 1024, "cuda": 8192 * 4096}
"""By kind of device. Of a CPU: large enough for matrix products at full speed, small enough to stay in its caches. Of a
GPU: enough work for all its units, in 128 MiB; that one was not measured."""


def wide_type(like: Tensor) -> torch.dtype:
    """What sums and single logits are kept in: float64, where the device has it."""
    return like.dtype if like.device.type == "mps" else torch.float64


class Masked(Protocol):
    """Says which logits of a tile are none of negatives, see `Duplicates.within`."""

    def within(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor] | None: ...


class Duplicates:
    """Which pairs share the image or the caption with others, and so are no negatives of each other.

    The relation is symmetric. It holds for an image against all texts and for a text against all images.
    """

    def __init__(self, local_ids: list[Tensor], counts: list[int]):
        """Find the pairs that have any duplicate. Every process calls this.

        Args:
            local_ids: (B,) int64 each, of images, of captions or of both.
            counts: The B of every process.
        """
        self.local_ids = torch.stack(local_ids, dim=1)  # (B, 1 or 2)
        self.global_ids = gather(self.local_ids, counts)  # (N, 1 or 2)
        is_repeated = torch.zeros(len(self.local_ids), dtype=torch.bool, device=self.local_ids.device)
        for local, everywhere in zip(self.local_ids.T, self.global_ids.T, strict=True):
            kinds, times = everywhere.unique(return_counts=True)
            is_repeated |= times[torch.searchsorted(kinds, local.contiguous())] > 1
        self.is_repeated = is_repeated
        self._rows: dict[int, Tensor] = {}  # a tile's first row → which of its rows have a duplicate

    def within(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor] | None:
        """The duplicates in a tile, each pair itself among them.

        Returns:
            Which rows of the tile have duplicates anywhere, (k,), and their duplicates, (k, c) bool. None where no
            row of the tile has any.
        """
        if rows.start not in self._rows:
            self._rows[rows.start] = self.is_repeated[rows].nonzero()[:, 0]
        places = self._rows[rows.start]
        if len(places) == 0:
            return None
        local, there = self.local_ids[rows][places], self.global_ids[columns]
        is_shared = local[:, None, 0] == there[None, :, 0]
        if local.shape[1] == 2:
            is_shared |= local[:, None, 1] == there[None, :, 1]
        return places, is_shared


@dataclass
class Tile:
    """Logits of some local images against some texts.

    Attributes:
        rows: which images, of this process's.
        columns: which texts, of all.
        logits: (r, c) to be overwritten by whoever works with it.
        spare: (r, c) memory for its work.
        scaled_images: (r, D) the images times the scale.
        texts: (c, D)
        own_rows: which images have their own text in the tile.
        duplicates: see `Duplicates.within`.
    """

    rows: slice
    columns: slice
    logits: Tensor
    spare: Tensor
    scaled_images: Tensor
    texts: Tensor
    own_rows: slice
    own_column: int
    duplicates: tuple[Tensor, Tensor] | None

    @property
    def own(self) -> Tensor:
        """The logits of `own_rows` with their own texts: a view."""
        row, length = self.own_rows.start - self.rows.start, self.own_rows.stop - self.own_rows.start
        column = self.own_column - self.columns.start
        return self.logits[row : row + length, column : column + length].diagonal()

    def fill_duplicates_(self, value: float) -> None:
        """Overwrite what stands at the duplicates, and at the own texts of rows that have any."""
        if self.duplicates is None:
            return
        places, is_shared = self.duplicates
        if len(places) == len(self.logits):
            self.logits.masked_fill_(is_shared, value)
        else:
            self.logits[places] = self.logits[places].masked_fill_(is_shared, value)

    def fill_all_but_negatives_(self, value: float) -> None:
        """Overwrite what stands at the own texts and at the duplicates."""
        self.fill_duplicates_(value)
        self.own.fill_(value)


def refuse_second_derivative(what: str) -> None:
    """To be called in a backward pass that has no derivative itself.

    Args:
        what: Is differentiated, as a sentence begins with it.

    Raises:
        NotImplementedError: It was called with `create_graph=True`.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"{what} was differentiated with create_graph=True, but it has no second derivative: leave create_graph "
            f"out, or compute the loss from whole logits."
        )


class LogitTiles:
    """The tiles of this process's images against any texts."""

    def __init__(
        self,
        local_images: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        offset: int,
        duplicates: Masked | None,
    ):
        """Compute nothing yet.

        Args:
            local_images: (B, D)
            scale: () what a cosine is multiplied by, in the wide type.
            bias: () what is added.
            offset: the place of the first local pair among all.
            duplicates: of the local pairs, among these texts.
        """
        self.local_images, self.scale, self.bias = local_images, scale, bias
        self.offset, self.duplicates = offset, duplicates
        device = local_images.device.type
        self._rows = max(1, min(len(local_images), TILE_ROWS.get(device, TILE_ROWS["cpu"])))
        self._columns = max(1, TILE_LOGITS.get(device, TILE_LOGITS["cpu"]) // self._rows)
        self._spare = local_images.new_empty(0)

    def of(self, first: int, texts: Tensor) -> Iterator[Tile]:
        """One tile after another. Their spare memory is one.

        Args:
            first: the place of the first of these texts among all.
            texts: (n, D)
        """
        images = self.local_images
        size = min(self._rows, len(images)) * min(self._columns, len(texts))
        if len(self._spare) < size:
            self._spare = images.new_empty(size)
        for row in range(0, len(images), self._rows):
            rows = slice(row, min(row + self._rows, len(images)))
            # A scale in float32 would move all logits the same way, and its error would not average out.
            scaled = (images[rows].to(self.scale.dtype) * self.scale).to(images.dtype)
            for column in range(0, len(texts), self._columns):
                part = slice(column, min(column + self._columns, len(texts)))
                yield self._compute(rows, scaled, first + part.start, texts[part])

    def _compute(self, rows: slice, scaled_images: Tensor, first_column: int, texts: Tensor) -> Tile:
        logits = linear(scaled_images, texts)
        spare = self._spare[: logits.numel()].view(logits.shape)
        if self.bias is not None:
            logits += self.bias
        columns = slice(first_column, first_column + len(texts))
        begin = min(max(rows.start, columns.start - self.offset), rows.stop)
        own_rows = slice(begin, max(begin, min(rows.stop, columns.stop - self.offset)))
        own_column = min(begin + self.offset, columns.stop)
        duplicates = None if self.duplicates is None else self.duplicates.within(rows, columns)
        return Tile(rows, columns, logits, spare, scaled_images, texts, own_rows, own_column, duplicates)


def own_logits(local_images: Tensor, local_texts: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The logits of each local image with its own text, in the scale's type: (B,).

    They are the largest of a trained model, so that rounding them to float32 would be the largest error of its loss.
    """
    parts = [
        (images.to(scale.dtype) * texts.to(scale.dtype)).sum(1) * scale
        for images, texts in zip(local_images.split(TILE_ROWS["cpu"]), local_texts.split(TILE_ROWS["cpu"]), strict=True)
    ]
    return torch.cat(parts) if bias is None else torch.cat(parts) + bias
