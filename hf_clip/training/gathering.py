"""What processes tell each other: how many rows each has, and the rows themselves.

`Gathered` gives every process the texts of all. Its counterpart that never does is `ring.Ring`.

Dimensions: B pairs of this process (`local_…`), N pairs of all processes (`global_…`), R processes, D embedding.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad


def world_size() -> int:
    """The number of processes, 1 where torch.distributed was not set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def exchange_counts(local_counts: list[int], device: torch.device) -> list[list[int]]:
    """Every process's list of numbers, in the order of the processes. Waits for the device.

    Args:
        local_counts: of this process; every process passes as many numbers.
        device: where the processes exchange them.
    """
    if world_size() == 1:
        return [local_counts]
    local = torch.tensor(local_counts, device=device)
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local)
    return torch.stack(parts).tolist()


def padded(local: Tensor, rows: int) -> Tensor:
    """(B, …) → (rows, …), with zeros behind the rows that there are."""
    return pad(local, (0, 0) * (local.ndim - 1) + (0, rows - len(local))).contiguous()


def gather(local: Tensor, counts: list[int]) -> Tensor:
    """Gather the rows of all processes, in the order of the processes, without a gradient.

    Args:
        local: (B, …) the rows of this process.
        counts: The B of every process, as `exchange_counts` returns them.

    Returns:
        (N, …). On one process this is `local` itself.
    """
    if world_size() == 1:
        return local
    sent = padded(local, max(counts))
    parts = [torch.empty_like(sent) for _ in counts]
    dist.all_gather(parts, sent)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class Gathered:
    """The texts of all processes, all of them on each process.

    Attributes:
        texts: (N, D)
    """

    def __init__(self, texts: Tensor, counts: list[int]):
        """Take texts that were gathered.

        Args:
            texts: (N, D) as `gather` returns them.
            counts: The B of every process.
        """
        self.texts, self.counts = texts, counts

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The place of the first text among all, and the texts, (N, D): all at once."""
        yield 0, self.texts

    def blocks_with_gradients(self, is_needed: bool) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """`blocks`, each with zeros of its shape, to which the caller adds the gradient of its own loss.

        Args:
            is_needed: Whether there is a gradient at all. Otherwise None stands for it.
        """
        if not is_needed:
            yield 0, self.texts, None
            return
        self._gradient = torch.zeros_like(self.texts)
        yield 0, self.texts, self._gradient
        if len(self.counts) > 1:
            dist.all_reduce(self._gradient)  # gloo has no reduce-scatter before torch 2.8
            self._gradient = self._gradient.split(self.counts)[process_index()].clone()

    def local_gradient(self) -> Tensor:
        """(B, D) the gradients that all processes added to this process's texts, when all blocks are done."""
        return self._gradient
