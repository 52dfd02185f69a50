"""Contrastive losses over the global batch, in memory that grows with the batch and not with its square.

Pair i is image i with text i; everything else in the global batch is a negative of both. With logits
z = scale · images @ texts.T (+ bias), over all N pairs of all R processes:

    softmax (section 2.3, figure 3)     1 / (2 N) · Σᵢ [cross-entropy of row i + cross-entropy of column i]
    sigmoid (Zhai et al. 2023, alg. 1)  1 / N     · Σᵢⱼ −log σ(±zᵢⱼ), plus on the diagonal, minus elsewhere

1. The texts of all processes come to each, all at once or, passed around a ring, block by block.
2. Each process computes its rows of the logits, (B, N), by tiles, and keeps sums of each row and each column only.
3. The columns' sums of all processes are put together. What belongs to the local images and texts is this process's
   share; the shares add up to the loss.
4. Backward, each tile is computed again, turned into the gradient of its logits, and multiplied with the texts and the
   images. The gradients of other processes' texts go to them.

Data-parallel wrappers (DDP, FSDP, DeepSpeed) average gradients over the processes, so what a process
backpropagates is R times its share: the average is then the sum.

Invariant: loss and every parameter's gradient are those of one process that has the whole batch, however unevenly the
pairs are spread over the processes; a process may even have none. All is computed in float32 at least, under autocast
and for half-precision embeddings too. Sums are kept in float64.

Every process must call this, equally often, in the same order, and backpropagate or not alike. A parameter that the
wrapper leaves out (FSDP shards no scalars, so not the logit scale) has its gradient to be averaged by the caller.

Dimensions: B pairs of this process (`local_…`), N pairs of all processes (`global_…`), R processes, D embedding.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .gathering import (
    Gathered,
    exchange_counts,
    gather,
    process_index,
    world_size,
)
from .ring import Ring
from .sigmoid import Sigmoid
from .softmax import Softmax
from .tiles import Duplicates, LogitTiles, own_logits, wide_type

INITIAL_SIGMOID_LOGIT_SCALE = math.log(10)
"""The logarithm of the scale with which training by the sigmoid loss begins (Zhai et al. 2023, section 3.2)."""
INITIAL_SIGMOID_LOGIT_BIAS = -10.0
"""Its bias: nearly all pairs are negatives, and without it the first steps would only learn that."""


@dataclass(frozen=True)
class ContrastiveResult:
    """What `global_contrastive_loss` returns. The global values are equal on all processes and have no graph.

    Attributes:
        local_loss_to_backpropagate: () R times this process's share. Its value alone means nothing.
        global_loss: () the loss, to be reported.
        global_accuracy: () the part of the images and texts whose own logit is above those of all their negatives.
    """

    local_loss_to_backpropagate: Tensor
    global_loss: Tensor
    global_accuracy: Tensor


NOT_GIVEN = -1


def _agree_on_counts(
    local_image_embeds: Tensor, local_text_embeds: Tensor, local_image_ids: Tensor | None, local_text_ids: Tensor | None
) -> list[int]:
    """The number of pairs of every process, checked.

    All processes see all counts before any of them refuses. So all refuse, and none is left waiting.
    """
    given = (local_image_embeds, local_text_embeds, local_image_ids, local_text_ids)
    local_counts = [NOT_GIVEN if tensor is None else tensor.shape[0] for tensor in given]
    table = exchange_counts(local_counts, local_image_embeds.device)
    for process, (images, texts, *ids) in enumerate(table):
        if images != texts:
            raise ValueError(
                f"Process {process} has {images} image embeddings, but {texts} text embeddings: row i of both must be "
                f"one pair. Pass the embeddings of whole pairs."
            )
        for name, count, first in zip(("local_image_ids", "local_text_ids"), ids, table[0][2:], strict=True):
            if (count == NOT_GIVEN) != (first == NOT_GIVEN):
                raise ValueError(
                    f"{name} were given on some processes and not on others (0 and {process} differ). Pass them on "
                    f"all processes or on none."
                )
            if count not in (NOT_GIVEN, images):
                raise ValueError(f"Process {process} has {images} pairs, but {count} {name}: pass one for each pair.")
    counts = [row[0] for row in table]
    if sum(counts) < 2:
        raise ValueError(
            f"The global batch has {sum(counts)} pair(s), but a contrastive loss compares each pair with others: at "
            f"least 2 are needed. Raise the batch size, or leave out such a last batch."
        )
    return counts


@dataclass(frozen=True)
class _Batch:
    """What the loss is told besides tensors with gradients; see `global_contrastive_loss`."""

    kind: str
    label_smoothing: float
    counts: list[int]
    duplicates: Duplicates | None
    is_ring: bool

    @property
    def offset(self) -> int:
        """The place of the first local pair among all."""
        return sum(self.counts[: process_index()])

    def texts(self, local_texts: Tensor, gathered: Tensor | None = None) -> Gathered | Ring:
        """The texts of all processes; `gathered` is (N, D), where they were gathered before."""
        if self.is_ring and len(self.counts) > 1:
            return Ring(local_texts, self.counts)
        return Gathered(gather(local_texts, self.counts) if gathered is None else gathered, self.counts)


class _TiledLoss(torch.autograd.Function):
    """R times the local share, and the sums of all processes' shares and right answers, of which each adds its own."""

    @staticmethod
    def forward(
        ctx: Any,
        local_images: Tensor,
        local_texts: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        batch: _Batch,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(local_images.device.type, enabled=False):
            texts = batch.texts(local_texts)
            tiles = _tiles(local_images, logit_scale, logit_bias, batch)
            own = own_logits(local_images, local_texts, tiles.scale, tiles.bias)
            loss: Softmax | Sigmoid
            if batch.kind == "softmax":
                loss = Softmax(own, batch.offset, batch.counts, local_images, batch.label_smoothing)
            else:
                loss = Sigmoid(own, batch.offset, batch.counts, local_images)
            for first, block in texts.blocks():
                for tile in tiles.of(first, block):
                    loss.measure(tile)
            loss.complete()
            share = loss.local_share()
            sums = torch.stack([share, loss.count_right().to(share.dtype)])
        gathered = texts.texts if isinstance(texts, Gathered) else None
        ctx.save_for_backward(local_images, local_texts, logit_scale, logit_bias, gathered)
        ctx.batch, ctx.loss = batch, loss
        ctx.mark_non_differentiable(sums)
        return (world_size() * share).to(local_images.dtype), sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "The contrastive loss was differentiated with create_graph=True, but it has no second derivative: "
                "leave create_graph out, or compute the loss from whole logits."
            )
        local_images, local_texts, logit_scale, logit_bias, gathered = ctx.saved_tensors
        batch, loss = ctx.batch, ctx.loss
        needs_image_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]  # the scale's is made from it
        with torch.autocast(local_images.device.type, enabled=False):
            tiles = _tiles(local_images, logit_scale, logit_bias, batch)
            texts = batch.texts(local_texts, gathered)
            image_gradient = torch.zeros_like(local_images)
            bias_gradient = torch.zeros_like(tiles.scale)
            for first, block, text_gradient in texts.blocks_with_gradients(ctx.needs_input_grad[1]):
                for tile in tiles.of(first, block):
                    logit_gradient = loss.differentiate_(tile)  # (r, c)
                    if needs_image_gradient:
                        image_gradient[tile.rows].addmm_(logit_gradient, tile.texts)
                    if text_gradient is not None:
                        there = slice(tile.columns.start - first, tile.columns.stop - first)
                        text_gradient[there].addmm_(logit_gradient.T, tile.scaled_images)
                    if logit_bias is not None:
                        bias_gradient += logit_gradient.sum(1).sum(dtype=bias_gradient.dtype)
            factor = gradient.to(tiles.scale.dtype) * (world_size() * loss.weight)
            image_gradient *= factor * tiles.scale
            text_gradient = texts.local_gradient().mul_(factor) if ctx.needs_input_grad[1] else None
            # z is linear in an image times the scale: Σ z · ∂L/∂z is Σ image · ∂L/∂image.
            scale_gradient = sum(
                (images.to(factor.dtype) * gradients).sum()
                for images, gradients in zip(local_images.split(1024), image_gradient.split(1024), strict=True)
            )
        return (
            image_gradient,
            text_gradient,
            _like(scale_gradient, logit_scale),
            None if logit_bias is None else _like(bias_gradient * factor, logit_bias),
            None,
        )


def _tiles(local_images: Tensor, logit_scale: Tensor, logit_bias: Tensor | None, batch: _Batch) -> LogitTiles:
    wide = wide_type(local_images)
    scale = logit_scale.detach().to(wide).exp().reshape(())
    bias = None if logit_bias is None else logit_bias.detach().to(wide).reshape(())
    return LogitTiles(local_images, scale, bias, batch.offset, batch.duplicates)


def _like(gradient: Any, parameter: Tensor) -> Tensor:
    return gradient.to(parameter.dtype).reshape(parameter.shape)


def _check_arguments(
    local_image_embeds: Tensor,
    local_text_embeds: Tensor,
    logit_bias: Tensor | None,
    kind: str,
    label_smoothing: float,
    ids: tuple[Tensor | None, Tensor | None],
) -> None:
    if kind not in ("softmax", "sigmoid"):
        raise ValueError(f"The loss's kind is {kind!r}, but must be 'softmax' or 'sigmoid'.")
    image_shape, text_shape = tuple(local_image_embeds.shape), tuple(local_text_embeds.shape)
    if len(image_shape) != 2 or len(text_shape) != 2 or image_shape[1] != text_shape[1]:
        raise ValueError(
            f"The embeddings have shapes {image_shape} and {text_shape}, but (pairs, width) with one width are needed: "
            f"pass image_embeds and text_embeds of one model."
        )
    for name, given in zip(("local_image_ids", "local_text_ids"), ids, strict=True):
        if given is not None and (given.ndim != 1 or given.dtype != torch.int64):
            raise ValueError(
                f"{name} are {given.dtype} of shape {tuple(given.shape)}, but int64 of shape (pairs,) is needed: "
                f"torch.tensor([content_id(...) for each pair])."
            )
    if kind == "sigmoid" and logit_bias is None:
        raise ValueError(
            "The sigmoid loss needs a logit_bias, and the model has none: load it with contrastive_loss='sigmoid'."
        )
    if kind == "softmax" and logit_bias is not None:
        raise ValueError(
            "A logit_bias was given, but it cancels out of the softmax loss and would never learn: load the model "
            "with contrastive_loss='softmax', or use the sigmoid loss."
        )
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}, but must be at least 0 and below 1.")
    if kind == "sigmoid" and label_smoothing != 0:
        raise ValueError(
            f"label_smoothing is {label_smoothing}, but the sigmoid loss has none: set it to 0, or use the softmax."
        )


def global_contrastive_loss(
    local_image_embeds: Tensor,
    local_text_embeds: Tensor,
    logit_scale: Tensor,
    *,
    logit_bias: Tensor | None = None,
    kind: Literal["softmax", "sigmoid"] = "softmax",
    label_smoothing: float = 0.0,
    local_image_ids: Tensor | None = None,
    local_text_ids: Tensor | None = None,
    ring: bool = False,
) -> ContrastiveResult:
    """Compute the contrastive loss of the global batch. On one process it equals `HfClipModel(return_loss=True)`.

    Every process must call this. Row i of the image embeddings and row i of the text embeddings are one pair.

    Args:
        local_image_embeds: (B, D) of this process, already normalised.
        local_text_embeds: (B, D) of this process, already normalised.
        logit_scale: () the logarithm of the scale, as the model has it.
        logit_bias: () for the sigmoid loss, which needs one.
        kind: "softmax" or "sigmoid".
        label_smoothing: The part of a row's target that is spread evenly over its positive and negatives; softmax only.
        local_image_ids: (B,) int64, `content_id` of the images. Pairs with equal ids are no negatives of each other.
        local_text_ids: (B,) int64, `content_id` of the captions, likewise.
        ring: Whether the texts are passed around the processes, so that none holds them all. The loss is the same.

    Returns:
        The loss to backpropagate, the global loss to report, and the global accuracy. It can be differentiated once.

    Raises:
        ValueError: On all processes. The global batch has fewer than two pairs, the counts of embeddings or ids
            differ, or the arguments contradict each other.
    """
    ids = (local_image_ids, local_text_ids)
    _check_arguments(local_image_embeds, local_text_embeds, logit_bias, kind, label_smoothing, ids)
    counts = _agree_on_counts(local_image_embeds, local_text_embeds, local_image_ids, local_text_ids)
    given = [of_pairs.to(local_image_embeds.device) for of_pairs in ids if of_pairs is not None]
    batch = _Batch(kind, label_smoothing, counts, Duplicates(given, counts) if given else None, ring)
    dtype = torch.promote_types(local_image_embeds.dtype, torch.float32)
    local_loss, sums = _TiledLoss.apply(
        local_image_embeds.to(dtype), local_text_embeds.to(dtype), logit_scale, logit_bias, batch
    )
    if world_size() > 1:
        dist.all_reduce(sums)
    return ContrastiveResult(
        local_loss_to_backpropagate=local_loss,
        global_loss=sums[0].to(dtype),
        global_accuracy=(sums[1] / (2 * sum(counts))).to(dtype),
    )
