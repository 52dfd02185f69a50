"""The texts of all processes, passed around a ring, so that no process holds all of them.

Process r begins with its own block. In each of R steps it works with the block that it holds, which goes on to process
r - 1 meanwhile, while the next one comes from process r + 1. A gradient travels with its block: each process adds its
part and passes it on. After R steps it is at home, complete.

Blocks are padded to the longest, so all messages have one size, and a process may have no texts at all.

Dimensions: B pairs of this process, R processes, D embedding.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from .gathering import padded, process_index


class _Arrival:
    """A tensor on its way from the next process, while another one goes to the process before."""

    def __init__(self, sent: Tensor):
        count = dist.get_world_size()
        self._sent, self._arriving = sent, torch.empty_like(sent)  # gloo reads what is sent until it has arrived
        before, after = (process_index() - 1) % count, (process_index() + 1) % count
        operations = [dist.P2POp(dist.isend, sent, before), dist.P2POp(dist.irecv, self._arriving, after)]
        self._works = dist.batch_isend_irecv(operations)

    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._arriving


class Ring:
    """The texts of all processes, one process's block after another."""

    def __init__(self, local_texts: Tensor, counts: list[int]):
        """Begin with this process's block. Nothing is sent yet.

        Args:
            local_texts: (B, D)
            counts: The B of every process.
        """
        self.local_texts, self.counts = local_texts, counts

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """The place of a block's first text among all texts, and the block, (B of its process, D)."""
        processes, held = len(self.counts), padded(self.local_texts, max(self.counts))
        for step in range(processes):
            owner = (process_index() + step) % processes
            arrival = _Arrival(held) if step < processes - 1 else None
            yield sum(self.counts[:owner]), held[: self.counts[owner]]
            if arrival is not None:
                held = arrival.wait()

    def blocks_with_gradients(self, is_needed: bool) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """`blocks`, each with zeros of its shape, to which the caller adds the gradient of its own loss.

        Args:
            is_needed: Whether there is a gradient at all. Otherwise None stands for it.
        """
        if not is_needed:
            yield from ((first, texts, None) for first, texts in self.blocks())
            return
        arrival = None
        for first, texts in self.blocks():
            gradient = texts.new_zeros(max(self.counts), texts.shape[1])
            yield first, texts, gradient[: len(texts)]
            if arrival is not None:  # what the processes before have added
                gradient += arrival.wait()
            arrival = _Arrival(gradient)
        assert arrival is not None
        self._gradient = arrival.wait()[: len(self.local_texts)]

    def local_gradient(self) -> Tensor:
        """(B, D) the gradients that all processes added to this process's texts, when all blocks are done."""
        return self._gradient
