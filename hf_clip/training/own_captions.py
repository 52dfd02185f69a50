"""Which of the wrong captions of a batch are right for which of its images after all.

A text that is given as wrong for one image may be the caption of another one in the batch. An image must not be pushed
away from its own caption: neither from that of its own pair, nor from that of another pair with an equal image.

Dimensions: B pairs of this process (`local_…`), N pairs of all processes (`global_…`), J negative texts.
"""

import torch
from torch import Tensor

from .gathering import gather
from .tiles import Duplicates


class OwnCaptions:
    """The captions of each local image that stand among the negatives, known by their ids."""

    def __init__(self, pairs: Duplicates, local_negative_ids: Tensor, counts: list[int]):
        """Find the images that have any. Every process calls this.

        Args:
            pairs: Whose last ids are those of the captions.
            local_negative_ids: (J of this process,) int64, of the negatives.
            counts: The J of every process.
        """
        self.global_negative_ids = gather(local_negative_ids, counts)  # (J,)
        if pairs.local_ids.shape[1] == 1:  # equal images are not known, so each has the caption of its own pair
            captions = pairs.local_ids[:, 0]
            first = torch.arange(len(captions), device=captions.device)
            last = first + 1
        else:
            images, captions = pairs.global_ids.unique(dim=0).T.contiguous()  # sorted by images
            local_images = pairs.local_ids[:, 0].contiguous()
            first = torch.searchsorted(images, local_images)
            last = torch.searchsorted(images, local_images, right=True)
        # Of all captions those that are among the negatives.
        is_there = torch.isin(captions, self.global_negative_ids)
        before = torch.cat([is_there.new_zeros(1, dtype=torch.int64), is_there.cumsum(0)])
        self._captions = captions[is_there]
        self._first, self._last = before[first], before[last]  # of each local image's captions, (B,)
        self._rows: dict[int, tuple[Tensor, int]] = {}  # a tile's first row → its rows with any, and how many at most

    def within(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor] | None:
        """The own captions in a tile of images against negatives.

        Returns:
            Which rows of the tile have own captions anywhere among the negatives, (k,), and where these are, (k, c)
            bool. None where no row of the tile has any.
        """
        first, counts = self._first[rows], self._last[rows] - self._first[rows]
        if rows.start not in self._rows:
            places = counts.nonzero()[:, 0]
            self._rows[rows.start] = places, int(counts.max()) if len(places) else 0
        places, most = self._rows[rows.start]
        if not most:
            return None
        there = self.global_negative_ids[columns]
        is_own = torch.zeros(len(places), len(there), dtype=torch.bool, device=there.device)
        for number in range(most):
            some = (counts[places] > number).nonzero()[:, 0]
            is_own[some] |= self._captions[first[places[some]] + number, None] == there
        return places, is_own
