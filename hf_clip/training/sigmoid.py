"""The sigmoid loss from tiles of logits, and its gradient.

Each logit z is a question of its own: log(1 + exp z) for a negative, log(1 + exp -z) for a pair's own. The gradients
are σ(z) and -σ(-z). Duplicates are not asked for. Negative texts are more of the first kind.

Dimensions: B pairs of this process, N pairs of all processes. A tile has `r` rows and `c` columns.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import softplus

from .gathering import world_size
from .softmax import LARGEST_EXPONENT
from .tiles import Tile


class Sigmoid:
    """The sum over this process's rows of logits."""

    def __init__(self, own: Tensor, offset: int, counts: list[int], like: Tensor):
        """Nothing is known yet.

        Args:
            own: (B,) the local pairs' own logits, in the wide type.
            offset: the place of the first local pair among all.
            counts: The B of every process.
            like: a tensor of the tiles' type and device.
        """
        self.own, self.local = own, slice(offset, offset + len(own))
        lowest = torch.finfo(like.dtype).min
        self.row_peaks, self.column_peaks = like.new_full((len(own),), lowest), like.new_full((sum(counts),), lowest)
        self.own_in_tiles = like.new_zeros(len(own))
        self.total = softplus(-own, threshold=LARGEST_EXPONENT).sum()
        self.weight = 1 / sum(counts)

    def measure(self, tile: Tile) -> None:
        """Take the logits of a tile into account. They are overwritten."""
        self.own_in_tiles[tile.own_rows] = tile.own
        tile.fill_all_but_negatives_(-torch.inf)
        for peaks, part, dim in ((self.row_peaks, tile.rows, 1), (self.column_peaks, tile.columns, 0)):
            peaks[part] = torch.maximum(peaks[part], tile.logits.amax(dim))
        self.total += softplus(tile.logits, threshold=LARGEST_EXPONENT).sum(1).sum(dtype=self.total.dtype)

    def measure_negatives(self, tile: Tile) -> None:
        """Take the logits of a tile against negative texts into account. They are overwritten."""
        tile.fill_duplicates_(-torch.inf)
        self.total += softplus(tile.logits, threshold=LARGEST_EXPONENT).sum(1).sum(dtype=self.total.dtype)

    def complete(self) -> None:
        """Put the columns' largest logits together from all processes, when all tiles are measured."""
        if world_size() > 1:
            dist.all_reduce(self.column_peaks, dist.ReduceOp.MAX)

    def local_share(self) -> Tensor:
        """This process's share of the loss: ()."""
        return self.total * self.weight

    def count_right(self) -> Tensor:
        """How many local images and texts have their own logit above those of all their negatives: ()."""
        best_in_column = self.column_peaks[self.local]
        return (self.own_in_tiles > self.row_peaks).sum() + (self.own_in_tiles > best_in_column).sum()

    def differentiate_(self, tile: Tile) -> Tensor:
        """Turn the logits of a tile into the gradient of the sum by them: (r, c), the tile's memory."""
        tile.logits.sigmoid_()
        tile.fill_duplicates_(0.0)
        tile.own.copy_(-torch.sigmoid(-self.own[tile.own_rows]))
        return tile.logits

    def differentiate_negatives_(self, tile: Tile) -> Tensor:
        """Turn the logits of a tile against negative texts into the gradient of the sum by them, likewise."""
        tile.logits.sigmoid_()
        tile.fill_duplicates_(0.0)
        return tile.logits
