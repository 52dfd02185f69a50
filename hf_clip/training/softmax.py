"""The softmax loss from tiles of logits, and its gradient.

For each image the cross-entropy of a choice among all texts, for each text that of a choice among all images. Over the
negatives j of row i, with their largest logit m_i,

    s_i = Σⱼ exp(zᵢⱼ - m_i)         is summed up tile by tile; when a larger logit comes, s_i is scaled to it
    n_i = m_i + log s_i             is what the negatives have together; columns likewise
    -log p_ii = log(1 + exp(n_i - zᵢᵢ))

and the gradient of a negative's logit is exp(zᵢⱼ - m_i) · exp(m_i - log(exp n_i + exp zᵢᵢ)), its row's and its
column's. The own logit is kept apart, so that a loss near zero is no difference of large numbers.

Negative texts are further negatives of the rows alone. They have a sum of their own, as if they were another row of the
same image, and n_i is then the logarithm of both sums together.

With label smoothing ε a row's target gives ε / k_i to each of its k_i candidates: itself and its negatives among the
pairs.

Each process has its rows of the logits, so rows are complete. Columns are put together from all processes.

Dimensions: B pairs of this process, N pairs of all processes. A tile has `r` rows and `c` columns.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import softplus

from .gathering import gather, world_size
from .line_sums import LineSums
from .tiles import Tile

LARGEST_EXPONENT = 80.0
"""Above it log(1 + exp x) is x, in any precision. torch's own threshold of 20 is too low for float64."""


class _Lines(LineSums):
    """What is known so far of the negatives of each row, or of each column.

    Attributes:
        totals: (n,) Σ z over the negatives; for label smoothing.
    """

    def __init__(self, count: int, like: Tensor):
        super().__init__(count, like)
        self.totals = torch.zeros_like(self.sums)

    def add(self, part: slice, tile: Tile, dim: int) -> None:
        """Add the negatives of a tile, where all other logits are -inf."""
        self.take(part, tile.logits, tile.spare, dim)


class Softmax:
    """The sum of the cross-entropies of this process's images and texts."""

    def __init__(self, own: Tensor, offset: int, counts: list[int], like: Tensor, label_smoothing: float):
        """Nothing is known yet.

        Args:
            own: (B,) the local pairs' own logits, in the wide type.
            offset: the place of the first local pair among all.
            counts: The B of every process.
            like: a tensor of the tiles' type and device.
            label_smoothing: The part of the target that is spread over the candidates.
        """
        self.own, self.counts, self.label_smoothing = own, counts, label_smoothing
        self.local = slice(offset, offset + len(own))
        self.rows, self.columns = _Lines(len(own), like), _Lines(sum(counts), like)
        self.negative_rows = _Lines(len(own), like)
        self.own_in_tiles = like.new_zeros(len(own))
        self.candidates = torch.full_like(own, sum(counts))
        self.weight = 1 / (2 * sum(counts))

    def measure(self, tile: Tile) -> None:
        """Take the logits of a tile into account. They are overwritten."""
        self.own_in_tiles[tile.own_rows] = tile.own
        if self.label_smoothing:
            self._measure_totals(tile)
        tile.fill_all_but_negatives_(-torch.inf)
        self.rows.add(tile.rows, tile, dim=1)
        self.columns.add(tile.columns, tile, dim=0)

    def measure_negatives(self, tile: Tile) -> None:
        """Take the logits of a tile against negative texts into account. They are overwritten."""
        tile.fill_duplicates_(-torch.inf)
        self.negative_rows.add(tile.rows, tile, dim=1)

    def _measure_totals(self, tile: Tile) -> None:
        tile.fill_all_but_negatives_(0.0)
        self.rows.totals[tile.rows] += tile.logits.sum(1)
        self.columns.totals[tile.columns] += tile.logits.sum(0)
        if tile.duplicates is not None:
            places, is_shared = tile.duplicates
            self.candidates[tile.rows.start + places] -= is_shared.sum(1)
            own = places[
                (places >= tile.own_rows.start - tile.rows.start) & (places < tile.own_rows.stop - tile.rows.start)
            ]
            self.candidates[tile.rows.start + own] += 1  # a pair is no duplicate of itself

    def complete(self) -> None:
        """Put the columns together from all processes, when all tiles are measured."""
        columns, global_own = self.columns, self.own
        self.global_candidates = self.candidates
        if world_size() > 1:
            columns.align()
            global_own = gather(torch.stack([self.own, self.candidates], dim=1), self.counts)
            global_own, self.global_candidates = global_own.unbind(1)
            sums = torch.stack([columns.sums, columns.totals])
            dist.all_reduce(sums)
            columns.sums, columns.totals = sums.unbind(0)
        row_negatives = torch.logaddexp(self.rows.logarithms(), self.negative_rows.logarithms())
        column_negatives = columns.logarithms()
        # log p of the own one is -softplus of these.
        self.row_gaps = row_negatives - self.own
        self.column_gaps = column_negatives[self.local] - self.own
        like = self.own_in_tiles
        of_all = torch.logaddexp(row_negatives, self.own)
        self.row_factors = (self.rows.peaks - of_all).exp_().to(like.dtype)
        self.negative_row_factors = (self.negative_rows.peaks - of_all).exp_().to(like.dtype)
        self.column_factors = (columns.peaks - torch.logaddexp(column_negatives, global_own)).exp_().to(like.dtype)

    def local_share(self) -> Tensor:
        """This process's share of the loss: ()."""
        total = (
            softplus(self.row_gaps, threshold=LARGEST_EXPONENT) + softplus(self.column_gaps, threshold=LARGEST_EXPONENT)
        ).sum()
        if self.label_smoothing:
            means = (self.own + self.rows.totals) / self.candidates
            means = means + (self.own + self.columns.totals[self.local]) / self.candidates
            total = total + self.label_smoothing * (2 * self.own - means).sum()
        return total * self.weight

    def count_right(self) -> Tensor:
        """How many local images and texts have their own logit above those of all their negatives: ()."""
        best_in_column = self.columns.peaks[self.local]
        return (self.own_in_tiles > self.rows.peaks).sum() + (self.own_in_tiles > best_in_column).sum()

    def differentiate_(self, tile: Tile) -> Tensor:
        """Turn the logits of a tile into the gradient of the sum by them: (r, c), the tile's memory."""
        logits, spare = tile.logits, tile.spare
        rows, columns = tile.rows, tile.columns
        torch.sub(logits, self.rows.peaks[rows, None], out=spare).exp_()
        logits.sub_(self.columns.peaks[columns]).exp_().mul_(self.column_factors[columns])
        logits.addcmul_(spare, self.row_factors[rows, None])
        if self.label_smoothing:
            logits.sub_((self.label_smoothing / self.candidates[rows, None]).to(logits.dtype))
            logits.sub_((self.label_smoothing / self.global_candidates[columns]).to(logits.dtype))
        tile.fill_duplicates_(0.0)
        own = tile.own_rows
        gradients = -(torch.sigmoid(self.row_gaps[own]) + torch.sigmoid(self.column_gaps[own]))
        if self.label_smoothing:
            gradients = gradients + 2 * self.label_smoothing * (1 - 1 / self.candidates[own])
        tile.own.copy_(gradients)
        return logits

    def differentiate_negatives_(self, tile: Tile) -> Tensor:
        """Turn the logits of a tile against negative texts into the gradient of the sum by them, likewise."""
        rows = tile.rows
        tile.logits.sub_(self.negative_rows.peaks[rows, None]).exp_().mul_(self.negative_row_factors[rows, None])
        tile.fill_duplicates_(0.0)
        return tile.logits
