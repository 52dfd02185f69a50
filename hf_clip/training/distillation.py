"""Distillation of affinities: a student learns how near a teacher finds each image of a batch to each text of it.

With the student's logits z = scale · images @ texts.T, and the teacher's y by its own embeddings and scale, over all N
pairs of all processes:

    1 / (2 N) · Σᵢ [KL(softmax of row i of y ‖ softmax of row i of z) + the same of column i]

as in TinyCLIP (Wu et al. 2023, arXiv 2309.12314, section 3.1), whose cross-entropy has the same gradient. KL is zero
where the student agrees. The gradient of zᵢⱼ is (softmax of z − softmax of y)ᵢⱼ of its row and of its column, over 2 N.

All is computed by tiles: no process holds more logits than a tile of each model. Of each row and column sums are kept:
the largest logit m, Σⱼ exp(z - m), and of the teacher Σⱼ exp(y - m) (y - z) too. Columns are put together from all
processes.

Invariant: loss and gradients are those of one process that has the whole batch. Every process calls this.

Dimensions: B pairs of this process (`local_…`), N pairs of all processes (`global_…`), R processes, D embedding of
the student, Z embedding of the teacher. A tile has `r` rows and `c` columns.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .gathering import Gathered, exchange_counts, gather, process_index, world_size
from .line_sums import LineSums
from .losses import ContrastiveResult
from .ring import Ring
from .tiles import LogitTiles, Tile, refuse_second_derivative, wide_type


@dataclass(frozen=True)
class Distillation:
    """What `distillation_loss` returns.

    Attributes:
        local_loss_to_backpropagate: () R times this process's share. Its value alone means nothing.
        global_loss: () the loss, to be reported; equal on all processes, without a graph.
    """

    local_loss_to_backpropagate: Tensor
    global_loss: Tensor


@dataclass(frozen=True)
class DistilledResult(ContrastiveResult):
    """The result of a contrastive loss to which a distillation was added.

    Attributes:
        global_distillation: () the distillation, before its weight. `global_loss` is the contrastive loss alone.
    """

    global_distillation: Tensor


def add_distillation(result: ContrastiveResult, distillation: Distillation, weight: float) -> DistilledResult:
    """Add a distillation to a contrastive loss.

    Args:
        result: Of the contrastive loss.
        distillation: Of the same batch.
        weight: Of the distillation in the sum.
    """
    total = result.local_loss_to_backpropagate + weight * distillation.local_loss_to_backpropagate
    return DistilledResult(total, result.global_loss, result.global_accuracy, distillation.global_loss)


class _Lines(LineSums):
    """What is known so far of each row, or of each column, of one model's logits.

    Attributes:
        gaps: (n,) Σ exp(logit - peak) · gap, where a gap of each logit is given.
    """

    def __init__(self, count: int, like: Tensor):
        super().__init__(count, like)
        self.gaps = torch.zeros_like(self.sums)

    def add(self, part: slice, tile: Tile, dim: int, gap: Tensor | None = None) -> None:
        """Take a tile into account. dim: over which the lines go"""
        weights, factors = self.take(part, tile.logits, tile.spare, dim)
        if gap is not None:
            self.gaps[part] *= factors
            self.gaps[part] += weights.mul_(gap).sum(dim)

    def put_together(self) -> None:
        """Add what all processes know of the same lines."""
        if world_size() == 1:
            return
        self.gaps *= self.align()
        sums = torch.stack([self.sums, self.gaps])
        dist.all_reduce(sums)
        self.sums, self.gaps = sums.unbind(0)

    def probabilities(self, part: slice, tile: Tile, dim: int) -> Tensor:
        """The softmax of a tile along its lines: (r, c), its spare memory."""
        factors = self.sums[part].reciprocal().to(tile.logits.dtype).unsqueeze(dim)
        weights = torch.sub(tile.logits, self.peaks[part].unsqueeze(dim), out=tile.spare).exp_()
        return weights.mul_(factors)


class _Pair:
    """The lines of the student and of the teacher, of rows or of columns."""

    def __init__(self, count: int, like: Tensor, dim: int):
        self.student, self.teacher, self.dim = _Lines(count, like), _Lines(count, like), dim

    def add(self, part: slice, z: Tile, y: Tile) -> None:
        self.student.add(part, z, self.dim)
        self.teacher.add(part, y, self.dim, y.logits - z.logits)

    def put_together(self) -> None:
        self.student.put_together()
        self.teacher.put_together()

    def divergences(self) -> Tensor:
        """(n,) KL of each line."""
        gaps = self.teacher.gaps / self.teacher.sums
        return gaps - self.teacher.logarithms() + self.student.logarithms()

    def gradient(self, part: slice, z: Tile, y: Tile) -> Tensor:
        """Of Σ KL by z: (r, c), the spare memory of z."""
        return self.student.probabilities(part, z, self.dim).sub_(self.teacher.probabilities(part, y, self.dim))


@dataclass(frozen=True)
class _Teacher:
    """What the loss is told besides tensors with gradients. images, texts: (B, Z)"""

    images: Tensor
    texts: Tensor
    scale: float
    counts: list[int]
    is_ring: bool

    def texts_of_both(self, local_texts: Tensor) -> Gathered | Ring:
        """The texts of all processes: the student's, and behind them the teacher's, (n, D + Z)."""
        both = torch.cat([local_texts, self.texts.to(local_texts.dtype)], dim=1)
        if self.is_ring and len(self.counts) > 1:
            return Ring(both, self.counts)
        return Gathered(gather(both, self.counts), self.counts)


def _tiles(images: Tensor, scale: Tensor, teacher: _Teacher) -> Callable[[int, Tensor], Iterator[tuple[Tile, Tile]]]:
    """The tiles of all local images against any block of texts: from (first, both) to those of student and teacher.

    `first` is the place of the first of these texts among all; `both` (n, D + Z) has them of the student and, behind,
    of the teacher.

    Args:
        images: (B, D)
        scale: () the student's, in the wide type.
        teacher: What it gives.
    """
    width = images.shape[1]
    of_student = LogitTiles(images, scale, None, 0, None)
    of_teacher = LogitTiles(teacher.images, torch.full_like(scale, teacher.scale), None, 0, None)

    def against(first: int, both: Tensor) -> Iterator[tuple[Tile, Tile]]:
        return zip(of_student.of(first, both[:, :width]), of_teacher.of(first, both[:, width:]), strict=True)

    return against


class _TiledDistillation(torch.autograd.Function):
    """R times the local share, and the share itself."""

    @staticmethod
    def forward(
        ctx: Any, local_images: Tensor, local_texts: Tensor, logit_scale: Tensor, teacher: _Teacher
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(local_images.device.type, enabled=False):
            scale = logit_scale.detach().to(wide_type(local_images)).exp().reshape(())
            rows, columns = _Pair(len(local_images), local_images, 1), _Pair(sum(teacher.counts), local_images, 0)
            against = _tiles(local_images, scale, teacher)
            for first, both in teacher.texts_of_both(local_texts).blocks():
                for z, y in against(first, both):
                    rows.add(z.rows, z, y)
                    columns.add(z.columns, z, y)
            columns.put_together()
            offset = sum(teacher.counts[: process_index()])
            own = columns.divergences()[offset : offset + len(local_images)]
            share = (rows.divergences().sum() + own.sum()) / (2 * sum(teacher.counts))
        ctx.save_for_backward(local_images, local_texts, logit_scale)
        ctx.teacher, ctx.rows, ctx.columns = teacher, rows, columns
        ctx.mark_non_differentiable(share)
        return (world_size() * share).to(local_images.dtype), share

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("The distillation loss")
        local_images, local_texts, logit_scale = ctx.saved_tensors
        teacher, rows, columns = ctx.teacher, ctx.rows, ctx.columns
        needs_texts, width = ctx.needs_input_grad[1], local_images.shape[1]
        with torch.autocast(local_images.device.type, enabled=False):
            scale = logit_scale.detach().to(wide_type(local_images)).exp().reshape(())
            texts = teacher.texts_of_both(local_texts)
            image_gradient, against = torch.zeros_like(local_images), _tiles(local_images, scale, teacher)
            for first, both, text_gradient in texts.blocks_with_gradients(needs_texts):
                for z, y in against(first, both):
                    of_logits = rows.gradient(z.rows, z, y).clone()  # both give the same spare memory
                    of_logits += columns.gradient(z.columns, z, y)
                    image_gradient[z.rows].addmm_(of_logits, z.texts)
                    if text_gradient is not None:
                        there = slice(z.columns.start - first, z.columns.stop - first)
                        text_gradient[there, :width].addmm_(of_logits.T, z.scaled_images)
            factor = gradient.to(scale.dtype) * world_size() / (2 * sum(teacher.counts))
            image_gradient *= factor * scale
            # z is linear in an image times the scale: Σ z · ∂L/∂z is Σ image · ∂L/∂image.
            scale_gradient = (local_images.to(scale.dtype) * image_gradient).sum()
            of_texts = texts.local_gradient()[:, :width].mul(factor).to(local_texts.dtype) if needs_texts else None
        return image_gradient, of_texts, scale_gradient.to(logit_scale.dtype).reshape(logit_scale.shape), None


def distillation_loss(
    local_image_embeds: Tensor,
    local_text_embeds: Tensor,
    logit_scale: Tensor,
    *,
    local_teacher_images: Tensor,
    local_teacher_texts: Tensor,
    teacher_scale: float,
    ring: bool = False,
) -> Distillation:
    """Compute how far a student's affinities of the global batch are from a teacher's.

    Every process must call this. Row i of all embeddings is one pair.

    Args:
        local_image_embeds: (B, D) of the student, already normalised.
        local_text_embeds: (B, D) of the student, already normalised.
        logit_scale: () the logarithm of the student's scale, as the model has it.
        local_teacher_images: (B, Z) of the teacher, already normalised.
        local_teacher_texts: (B, Z) of the teacher, already normalised.
        teacher_scale: What the teacher's cosines are multiplied by; its inverse is the teacher's temperature.
        ring: Whether texts are passed around the processes, so that none holds them all. The loss is the same.

    Returns:
        The loss to backpropagate and the global loss to report. It can be differentiated once.

    Raises:
        ValueError: The embeddings are not of the same pairs.
    """
    given = (local_image_embeds, local_text_embeds, local_teacher_images, local_teacher_texts)
    table = exchange_counts([len(embeds) for embeds in given], local_image_embeds.device)
    for process, counts in enumerate(table):
        if len(set(counts)) > 1:
            raise ValueError(
                f"Process {process} has {', '.join(map(str, counts))} images, texts, teacher's images and teacher's "
                f"texts: row i of all must be one pair. Pass the embeddings of whole pairs."
            )
    dtype = torch.promote_types(local_image_embeds.dtype, torch.float32)
    teacher = _Teacher(
        local_teacher_images.detach().to(local_image_embeds.device, dtype),
        local_teacher_texts.detach().to(local_image_embeds.device, dtype),
        teacher_scale,
        [counts[0] for counts in table],
        ring,
    )
    local_loss, share = _TiledDistillation.apply(
        local_image_embeds.to(dtype), local_text_embeds.to(dtype), logit_scale, teacher
    )
    if world_size() > 1:
        dist.all_reduce(share)
    return Distillation(local_loss, share.to(dtype))


__all__ = ["Distillation", "DistilledResult", "add_distillation", "distillation_loss"]
