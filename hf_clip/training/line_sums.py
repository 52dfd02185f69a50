"""Sums of exponentials over the rows or the columns of logits, of which one tile after another becomes known."""

import torch
import torch.distributed as dist
from torch import Tensor

from .gathering import world_size
from .tiles import wide_type


class LineSums:
    """What is known so far of each row, or of each column.

    Attributes:
        peaks: (n,) the largest logit.
        sums: (n,) Σ exp(logit - peak), in the wide type.
    """

    def __init__(self, count: int, like: Tensor):
        """Nothing is known yet.

        Args:
            count: n, how many lines there are.
            like: A tensor of the tiles' type and device.
        """
        self.peaks = like.new_full((count,), torch.finfo(like.dtype).min)  # finite: differences are no nan
        self.sums = like.new_zeros(count, dtype=wide_type(like))

    def take(self, part: slice, logits: Tensor, spare: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """Add the exponentials of a tile.

        Args:
            part: Which lines the tile has.
            logits: (r, c)
            spare: (r, c) memory, which is overwritten.
            dim: Over which the lines go.

        Returns:
            The exponentials, relative to the new peaks: (r, c), the spare memory. And by what earlier sums of these
            lines have to be multiplied, since there may be larger peaks.
        """
        peaks = torch.maximum(self.peaks[part], logits.amax(dim))
        weights = torch.sub(logits, peaks.unsqueeze(dim), out=spare).exp_()
        factors = (self.peaks[part].to(self.sums.dtype) - peaks).exp_()
        self.sums[part] *= factors
        self.sums[part] += weights.sum(dim)
        self.peaks[part] = peaks
        return weights, factors

    def align(self) -> Tensor:
        """Bring what several processes know of the same lines to common peaks; their sums can be added then.

        Returns:
            By what other sums of this process have to be multiplied: (n,).
        """
        local_peaks = self.peaks
        if world_size() > 1:
            self.peaks = local_peaks.clone()
            dist.all_reduce(self.peaks, dist.ReduceOp.MAX)
        factors = (local_peaks.to(self.sums.dtype) - self.peaks).exp_()
        self.sums *= factors
        return factors

    def logarithms(self) -> Tensor:
        """(n,) log Σ exp, over what is known."""
        return self.peaks + self.sums.log()
