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

Negative texts are wrong captions of any number, which belong to no pair (NegCLIP, Yuksekgonul et al. 2023). They are
further columns: each image is contrasted with those of all processes, and they themselves with nothing. In the softmax
the choice of a row is among them too. In the sigmoid loss each image and negative text is one more negative. They come
all at once or around the ring, as the texts do.

Invariant: loss and every parameter's gradient are those of one process that has the whole batch, however unevenly the
pairs are spread over the processes; a process may even have none. All is computed in float32 at least, under autocast
and for half-precision embeddings too. Sums are kept in float64.

Every process must call this, equally often, in the same order, and backpropagate or not alike. A parameter that the
wrapper leaves out (FSDP shards no scalars, so not the logit scale) has its gradient to be averaged by the caller.

Dimensions: B pairs of this process (`local_…`), N pairs of all processes (`global_…`), J negative texts, R processes,
D embedding.
"""

import math
from collections.abc import Callable
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
from .own_captions import OwnCaptions
from .ring import Ring
from .sigmoid import Sigmoid
from .softmax import Softmax
from .tiles import Duplicates, LogitTiles, Tile, own_logits, refuse_second_derivative, wide_type

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
        global_accuracy: () the part of the images and texts whose own logit is above those of all other pairs that are
            their negatives. Negative texts do not count, so that it compares with that of a run without them.
    """

    local_loss_to_backpropagate: Tensor
    global_loss: Tensor
    global_accuracy: Tensor


NOT_GIVEN = -1


@dataclass(frozen=True)
class _Ids:
    """Numbers that name contents, of this process.   images, texts: (B,)   negatives: (J,)"""

    images: Tensor | None
    texts: Tensor | None
    negatives: Tensor | None

    def named(self) -> dict[str, Tensor | None]:
        names = ("local_image_ids", "local_text_ids", "local_negative_text_ids")
        return dict(zip(names, (self.images, self.texts, self.negatives), strict=True))


def _agree_on_counts(
    local_image_embeds: Tensor, local_text_embeds: Tensor, local_negatives: Tensor, ids: _Ids
) -> tuple[list[int], list[int]]:
    """The numbers of pairs and of negative texts of every process, checked.

    All processes see all counts before any of them refuses. So all refuse, and none is left waiting.
    """
    given = (local_image_embeds, local_text_embeds, local_negatives, *ids.named().values())
    local_counts = [NOT_GIVEN if tensor is None else tensor.shape[0] for tensor in given]
    table = exchange_counts(local_counts, local_image_embeds.device)
    for process, (images, texts, negatives, *of_pairs, negative_ids) in enumerate(table):
        if images != texts:
            raise ValueError(
                f"Process {process} has {images} image embeddings, but {texts} text embeddings: row i of both must be "
                f"one pair. Pass the embeddings of whole pairs."
            )
        for name, count, first in zip(("local_image_ids", "local_text_ids"), of_pairs, table[0][3:5], strict=True):
            if (count == NOT_GIVEN) != (first == NOT_GIVEN):
                raise ValueError(
                    f"{name} were given on some processes and not on others (0 and {process} differ). Pass them on "
                    f"all processes or on none."
                )
            if count not in (NOT_GIVEN, images):
                raise ValueError(f"Process {process} has {images} pairs, but {count} {name}: pass one for each pair.")
        if negative_ids not in (NOT_GIVEN, negatives):
            raise ValueError(
                f"Process {process} has {negatives} negative texts, but {negative_ids} local_negative_text_ids: pass "
                f"one for each of them."
            )
        if negatives and (negative_ids == NOT_GIVEN) != (of_pairs[1] == NOT_GIVEN):
            raise ValueError(
                "Of local_text_ids and local_negative_text_ids one was given without the other, but an image's own "
                "caption is found among the negative texts by both: pass both, or neither."
            )
    counts = [row[0] for row in table]
    if sum(counts) < 2:
        raise ValueError(
            f"The global batch has {sum(counts)} pair(s), but a contrastive loss compares each pair with others: at "
            f"least 2 are needed. Raise the batch size, or leave out such a last batch."
        )
    return counts, [row[2] for row in table]


@dataclass(frozen=True)
class _Batch:
    """What the loss is told besides tensors with gradients; see `global_contrastive_loss`."""

    kind: str
    label_smoothing: float
    counts: list[int]
    duplicates: Duplicates | None
    is_ring: bool
    negative_counts: list[int]
    own_captions: OwnCaptions | None

    @property
    def offset(self) -> int:
        """The place of the first local pair among all."""
        return sum(self.counts[: process_index()])

    def texts(self, local_texts: Tensor, gathered: Tensor | None = None) -> Gathered | Ring:
        """The texts of all processes; `gathered` is (N, D), where they were gathered before."""
        return self._all(local_texts, self.counts, gathered)

    def negatives(self, local_negatives: Tensor, gathered: Tensor | None = None) -> Gathered | Ring | None:
        """The negative texts of all processes, likewise (J, D). None where no process has any."""
        return self._all(local_negatives, self.negative_counts, gathered) if any(self.negative_counts) else None

    def _all(self, local_texts: Tensor, counts: list[int], gathered: Tensor | None) -> Gathered | Ring:
        if self.is_ring and len(counts) > 1:
            return Ring(local_texts, counts)
        return Gathered(gather(local_texts, counts) if gathered is None else gathered, counts)


class _TiledLoss(torch.autograd.Function):
    """R times the local share, and the sums of all processes' shares and right answers, of which each adds its own."""

    @staticmethod
    def forward(
        ctx: Any,
        local_images: Tensor,
        local_texts: Tensor,
        local_negatives: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor | None,
        batch: _Batch,
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(local_images.device.type, enabled=False):
            texts, negatives = batch.texts(local_texts), batch.negatives(local_negatives)
            tiles, against_negatives = _tiles(local_images, logit_scale, logit_bias, batch)
            own = own_logits(local_images, local_texts, tiles.scale, tiles.bias)
            loss: Softmax | Sigmoid
            if batch.kind == "softmax":
                loss = Softmax(own, batch.offset, batch.counts, local_images, batch.label_smoothing)
            else:
                loss = Sigmoid(own, batch.offset, batch.counts, local_images)
            for first, block in texts.blocks():
                for tile in tiles.of(first, block):
                    loss.measure(tile)
            for first, block in () if negatives is None else negatives.blocks():
                for tile in against_negatives.of(first, block):
                    loss.measure_negatives(tile)
            loss.complete()
            share = loss.local_share()
            sums = torch.stack([share, loss.count_right().to(share.dtype)])
        gathered = [all_of.texts if isinstance(all_of, Gathered) else None for all_of in (texts, negatives)]
        ctx.save_for_backward(local_images, local_texts, local_negatives, logit_scale, logit_bias, *gathered)
        ctx.batch, ctx.loss = batch, loss
        ctx.mark_non_differentiable(sums)
        return (world_size() * share).to(local_images.dtype), sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("The contrastive loss")
        local_images, local_texts, local_negatives, logit_scale, logit_bias, *gathered = ctx.saved_tensors
        batch, loss = ctx.batch, ctx.loss
        needs_image_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[3]  # the scale's is made from it
        with torch.autocast(local_images.device.type, enabled=False):
            tiles, against_negatives = _tiles(local_images, logit_scale, logit_bias, batch)
            image_gradient = torch.zeros_like(local_images) if needs_image_gradient else None
            bias_gradient = None if logit_bias is None else torch.zeros_like(tiles.scale)
            texts, negatives = batch.texts(local_texts, gathered[0]), batch.negatives(local_negatives, gathered[1])
            needed = ctx.needs_input_grad[1:3]
            _add_gradients_(texts, tiles, loss.differentiate_, needed[0], image_gradient, bias_gradient)
            if negatives is not None:
                differentiate = loss.differentiate_negatives_
                _add_gradients_(negatives, against_negatives, differentiate, needed[1], image_gradient, bias_gradient)
            factor = gradient.to(tiles.scale.dtype) * (world_size() * loss.weight)
            text_gradients = [
                all_of.local_gradient().mul_(factor) if is_needed and all_of is not None else None
                for all_of, is_needed in zip((texts, negatives), needed, strict=True)
            ]
            scale_gradient = None
            if image_gradient is not None:
                image_gradient *= factor * tiles.scale
                # z is linear in an image times the scale: Σ z · ∂L/∂z is Σ image · ∂L/∂image.
                scale_gradient = sum(
                    (images.to(factor.dtype) * gradients).sum()
                    for images, gradients in zip(local_images.split(1024), image_gradient.split(1024), strict=True)
                )
                scale_gradient = _like(scale_gradient, logit_scale)
        return (
            image_gradient,
            *text_gradients,
            scale_gradient,
            None if bias_gradient is None else _like(bias_gradient * factor, logit_bias),
            None,
        )


def _add_gradients_(
    texts: Gathered | Ring,
    tiles: LogitTiles,
    differentiate_: Callable[[Tile], Tensor],
    needs_text_gradient: bool,
    image_gradient: Tensor | None,
    bias_gradient: Tensor | None,
) -> None:
    """Compute the tiles of some texts again, and add what they give to each gradient. The texts keep their own."""
    for first, block, text_gradient in texts.blocks_with_gradients(needs_text_gradient):
        for tile in tiles.of(first, block):
            logit_gradient = differentiate_(tile)  # (r, c)
            if image_gradient is not None:
                image_gradient[tile.rows].addmm_(logit_gradient, tile.texts)
            if text_gradient is not None:
                there = slice(tile.columns.start - first, tile.columns.stop - first)
                text_gradient[there].addmm_(logit_gradient.T, tile.scaled_images)
            if bias_gradient is not None:
                bias_gradient += logit_gradient.sum(1).sum(dtype=bias_gradient.dtype)


def _tiles(
    local_images: Tensor, logit_scale: Tensor, logit_bias: Tensor | None, batch: _Batch
) -> tuple[LogitTiles, LogitTiles]:
    """The tiles of the images against texts of pairs, and against negative texts."""
    wide = wide_type(local_images)
    scale = logit_scale.detach().to(wide).exp().reshape(())
    bias = None if logit_bias is None else logit_bias.detach().to(wide).reshape(())
    behind_all = sum(batch.negative_counts)  # no image's own text stands among the negatives
    return (
        LogitTiles(local_images, scale, bias, batch.offset, batch.duplicates),
        LogitTiles(local_images, scale, bias, behind_all, batch.own_captions),
    )


def _like(gradient: Any, parameter: Tensor) -> Tensor:
    return gradient.to(parameter.dtype).reshape(parameter.shape)


def _check_arguments(
    local_image_embeds: Tensor,
    local_text_embeds: Tensor,
    local_negatives: Tensor,
    logit_bias: Tensor | None,
    kind: str,
    label_smoothing: float,
    ids: _Ids,
) -> None:
    if kind not in ("softmax", "sigmoid"):
        raise ValueError(f"The loss's kind is {kind!r}, but must be 'softmax' or 'sigmoid'.")
    image_shape, text_shape = tuple(local_image_embeds.shape), tuple(local_text_embeds.shape)
    if len(image_shape) != 2 or len(text_shape) != 2 or image_shape[1] != text_shape[1]:
        raise ValueError(
            f"The embeddings have shapes {image_shape} and {text_shape}, but (pairs, width) with one width are needed: "
            f"pass image_embeds and text_embeds of one model."
        )
    if local_negatives.ndim != 2 or local_negatives.shape[1] != text_shape[1]:
        raise ValueError(
            f"local_negative_text_embeds have shape {tuple(local_negatives.shape)}, but (negative texts, "
            f"{text_shape[1]}) is needed: pass text_embeds of the same model."
        )
    for name, given in ids.named().items():
        if given is not None and (given.ndim != 1 or given.dtype != torch.int64):
            each = "negative text" if given is ids.negatives else "pair"
            raise ValueError(
                f"{name} are {given.dtype} of shape {tuple(given.shape)}, but int64 of shape ({each}s,) is needed: "
                f"torch.tensor([content_id(...) for each {each}])."
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
    local_negative_text_embeds: Tensor | None = None,
    local_negative_text_ids: Tensor | None = None,
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
            Negative texts get nothing of it, since they are known to be wrong.
        local_image_ids: (B,) int64, `content_id` of the images. Pairs with equal ids are no negatives of each other.
        local_text_ids: (B,) int64, `content_id` of the captions, likewise.
        local_negative_text_embeds: (J, D) of wrong captions, already normalised. Every image of all processes is
            contrasted with those of all processes. J is any number, and may be 0 on some processes.
        local_negative_text_ids: (J,) int64, `content_id` of these. An image is not contrasted with what is the caption
            of its own pair, or of a pair with an equal image. Given if and only if `local_text_ids` are.
        ring: Whether the texts are passed around the processes, so that none holds them all. The loss is the same.

    Returns:
        The loss to backpropagate, the global loss to report, and the global accuracy. It can be differentiated once.

    Raises:
        ValueError: On all processes. The global batch has fewer than two pairs, the counts of embeddings or ids
            differ, or the arguments contradict each other.
    """
    ids = _Ids(local_image_ids, local_text_ids, local_negative_text_ids)
    # No negative texts are none of the texts, so that they have a gradient where those of other processes have one.
    negatives = local_text_embeds[:0] if local_negative_text_embeds is None else local_negative_text_embeds
    _check_arguments(local_image_embeds, local_text_embeds, negatives, logit_bias, kind, label_smoothing, ids)
    counts, negative_counts = _agree_on_counts(local_image_embeds, local_text_embeds, negatives, ids)
    device = local_image_embeds.device
    given = [of_pairs.to(device) for of_pairs in (ids.images, ids.texts) if of_pairs is not None]
    duplicates, own_captions = Duplicates(given, counts) if given else None, None
    if duplicates is not None and ids.texts is not None and any(negative_counts):
        local_negative_ids = ids.texts[:0] if ids.negatives is None else ids.negatives
        own_captions = OwnCaptions(duplicates, local_negative_ids.to(device), negative_counts)
    batch = _Batch(kind, label_smoothing, counts, duplicates, ring, negative_counts, own_captions)
    dtype = torch.promote_types(local_image_embeds.dtype, torch.float32)
    embeds = (embeds.to(dtype) for embeds in (local_image_embeds, local_text_embeds, negatives))
    local_loss, sums = _TiledLoss.apply(*embeds, logit_scale, logit_bias, batch)
    if world_size() > 1:
        dist.all_reduce(sums)
    return ContrastiveResult(
        local_loss_to_backpropagate=local_loss,
        global_loss=sums[0].to(dtype),
        global_accuracy=(sums[1] / (2 * sum(counts))).to(dtype),
    )
