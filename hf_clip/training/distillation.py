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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..model.linear_map import linear
from . import tiles
from .gathering import Gathered, exchange_counts, gather, process_index, world_size
from .losses import ContrastiveResult
from .ring import Ring
from .tiles import wide_type


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


class _Lines:
    """What is known so far of each row, or of each column, of one model's logits.

    Attributes:
        peaks: (n,) the largest logit m.
        sums: (n,) Σ exp(logit - m).
        gaps: (n,) Σ exp(logit - m) · gap, where a gap of each logit is given.
    """

    def __init__(self, count: int, like: Tensor):
        self.peaks = like.new_full((count,), torch.finfo(like.dtype).min)  # finite: differences are no nan
        self.sums, self.gaps = (like.new_zeros(count, dtype=wide_type(like)) for _ in range(2))

    def add(self, part: slice, logits: Tensor, dim: int, gap: Tensor | None = None) -> None:
        """Take a tile (r, c) into account. dim: over which the lines go"""
        peaks = torch.maximum(self.peaks[part], logits.amax(dim))
        scale = (self.peaks[part].to(self.sums.dtype) - peaks).exp_()
        weights = (logits - peaks.unsqueeze(dim)).exp_()
        self.sums[part] = self.sums[part] * scale + weights.sum(dim)
        if gap is not None:
            self.gaps[part] = self.gaps[part] * scale + weights.mul_(gap).sum(dim)
        self.peaks[part] = peaks

    def put_together(self) -> None:
        """Add what all processes know of the same lines."""
        if world_size() == 1:
            return
        local_peaks, self.peaks = self.peaks, self.peaks.clone()
        dist.all_reduce(self.peaks, dist.ReduceOp.MAX)
        sums = torch.stack([self.sums, self.gaps]) * (local_peaks.to(self.sums.dtype) - self.peaks).exp_()
        dist.all_reduce(sums)
        self.sums, self.gaps = sums.unbind(0)

    def logarithms(self) -> Tensor:
        """(n,) log Σ exp, when all tiles are known."""
        return self.peaks + self.sums.log()

    def probabilities(self, part: slice, logits: Tensor, dim: int) -> Tensor:
        """The softmax of a tile along its lines: (r, c)."""
        factors = self.sums[part].reciprocal().to(logits.dtype).unsqueeze(dim)
        return (logits - self.peaks[part].unsqueeze(dim)).exp_().mul_(factors)


class _Pair:
    """The lines of the student and of the teacher, of rows or of columns."""

    def __init__(self, count: int, like: Tensor, dim: int):
        self.student, self.teacher, self.dim = _Lines(count, like), _Lines(count, like), dim

    def add(self, part: slice, z: Tensor, y: Tensor) -> None:
        self.student.add(part, z, self.dim)
        self.teacher.add(part, y, self.dim, y - z)

    def put_together(self) -> None:
        self.student.put_together()
        self.teacher.put_together()

    def divergences(self) -> Tensor:
        """(n,) KL of each line."""
        gaps = self.teacher.gaps / self.teacher.sums
        return gaps - self.teacher.logarithms() + self.student.logarithms()

    def gradient(self, part: slice, z: Tensor, y: Tensor) -> Tensor:
        """Of Σ KL by z: (r, c)."""
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


@dataclass
class _Tile:
    """Logits of some local images against some texts.   rows, columns: which, of the local and of all"""

    rows: slice
    columns: slice
    z: Tensor
    y: Tensor
    texts: Tensor
    scaled_images: Tensor


def _tiles_of(images: Tensor, scale: Tensor, teacher: _Teacher, first: int, both: Tensor) -> Iterator[_Tile]:
    """The tiles of all local images against a block of texts.

    Args:
        images: (B, D)
        scale: () the student's, in the wide type.
        teacher: What it gives.
        first: The place of the first of these texts among all.
        both: (n, D + Z)
    """
    device, width = images.device.type, images.shape[1]
    row_count = max(1, min(len(images), tiles.TILE_ROWS.get(device, tiles.TILE_ROWS["cpu"])))
    column_count = max(1, tiles.TILE_LOGITS.get(device, tiles.TILE_LOGITS["cpu"]) // row_count)
    for row in range(0, len(images), row_count):
        rows = slice(row, min(row + row_count, len(images)))
        scaled = (images[rows].to(scale.dtype) * scale).to(images.dtype)
        of_teacher = (teacher.images[rows].to(scale.dtype) * teacher.scale).to(images.dtype)
        for column in range(0, len(both), column_count):
            part = both[column : column + column_count]
            texts = part[:, :width]
            columns = slice(first + column, first + column + len(part))
            yield _Tile(rows, columns, linear(scaled, texts), linear(of_teacher, part[:, width:]), texts, scaled)


class _TiledDistillation(torch.autograd.Function):
    """R times the local share, and the share itself."""

    @staticmethod
    def forward(
        ctx: Any, local_images: Tensor, local_texts: Tensor, logit_scale: Tensor, teacher: _Teacher
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(local_images.device.type, enabled=False):
            scale = logit_scale.detach().to(wide_type(local_images)).exp().reshape(())
            rows, columns = _Pair(len(local_images), local_images, 1), _Pair(sum(teacher.counts), local_images, 0)
            for first, both in teacher.texts_of_both(local_texts).blocks():
                for tile in _tiles_of(local_images, scale, teacher, first, both):
                    rows.add(tile.rows, tile.z, tile.y)
                    columns.add(tile.columns, tile.z, tile.y)
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
        tiles.refuse_second_derivative("The distillation loss")
        local_images, local_texts, logit_scale = ctx.saved_tensors
        teacher, rows, columns = ctx.teacher, ctx.rows, ctx.columns
        needs_texts, width = ctx.needs_input_grad[1], local_images.shape[1]
        with torch.autocast(local_images.device.type, enabled=False):
            scale = logit_scale.detach().to(wide_type(local_images)).exp().reshape(())
            texts = teacher.texts_of_both(local_texts)
            image_gradient = torch.zeros_like(local_images)
            for first, both, text_gradient in texts.blocks_with_gradients(needs_texts):
                for tile in _tiles_of(local_images, scale, teacher, first, both):
                    of_logits = rows.gradient(tile.rows, tile.z, tile.y)
                    of_logits += columns.gradient(tile.columns, tile.z, tile.y)
                    image_gradient[tile.rows].addmm_(of_logits, tile.texts)
                    if text_gradient is not None:
                        there = slice(tile.columns.start - first, tile.columns.stop - first)
                        text_gradient[there, :width].addmm_(of_logits.T, tile.scaled_images)
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
