"""Contrastive losses over the global batch, each process computing its own share of them.

Pair i is image i with text i; everything else in the global batch is a negative of both. With logits
z = scale · images @ texts.T (+ bias), over all N pairs of all R processes:

    softmax (section 2.3, figure 3)     1 / (2 N) · Σᵢ [cross-entropy of row i + cross-entropy of column i]
    sigmoid (Zhai et al. 2023, alg. 1)  1 / N     · Σᵢⱼ −log σ(±zᵢⱼ), plus on the diagonal, minus elsewhere

1. Gather all processes' embeddings, with a gradient: one collective forward, one backward.
2. Compute the rows of the local images and, for the softmax, the columns of the local texts: (B, N), never (N, N).
3. Their sum is this process's share; the shares add up to the loss.

Data-parallel wrappers (DDP, FSDP, DeepSpeed) average gradients over the processes, so what a process
backpropagates is R times its share: the average is then the sum.

Invariant: loss and every parameter's gradient are those of one process that has the whole batch, however unevenly the
pairs are spread over the processes; a process may even have none. All is computed in float32 at least, under autocast
and for half-precision embeddings too.

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
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid, pad

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


def world_size() -> int:
    """The number of processes, 1 where torch.distributed was not set up."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def _gather(local: Tensor, counts: list[int]) -> Tensor:
    """(B, …) → (N, …) in the order of the processes, whose B are `counts`."""
    longest = max(counts)
    padded = pad(local, (0, 0) * (local.ndim - 1) + (0, longest - len(local))).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _GatherWithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        return _gather(local, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, global_gradient: Tensor) -> tuple[Tensor, None]:
        summed = global_gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)  # gloo has no reduce-scatter before torch 2.8
        return summed.split(ctx.counts)[process_index()], None


def gather_with_gradients(local: Tensor, counts: list[int]) -> Tensor:
    """Gather the rows of all processes, in the order of the processes.

    Backwards, a row receives the sum of its gradients from the losses of all processes.

    Args:
        local: (B, …) the rows of this process.
        counts: The B of every process, as `exchange_counts` returns them.

    Returns:
        (N, …). On one process this is `local` itself.
    """
    return _GatherWithGradients.apply(local, counts) if world_size() > 1 else local


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


def _is_own(own: Tensor, columns: int) -> Tensor:
    """(B,) → (B, N) bool, true at each row's own pair."""
    return own[:, None] == torch.arange(columns, device=own.device)


def _find_duplicates(
    own: Tensor, counts: list[int], local_image_ids: Tensor | None, local_text_ids: Tensor | None
) -> Tensor | None:
    """(B, N) bool: which pairs share the image or the caption with the local pairs, and so are no negatives of them.

    The relation is symmetric. It holds for a local image against all texts and for a local text against all images.
    Returns None if there are no ids.
    """
    given = [ids.to(own) for ids in (local_image_ids, local_text_ids) if ids is not None]
    if not given:
        return None
    local_ids = torch.stack(given, dim=1)  # (B, 1 or 2)
    global_ids = _gather(local_ids, counts) if world_size() > 1 else local_ids  # (N, 1 or 2)
    is_duplicate = ~_is_own(own, len(global_ids))
    is_shared = [local_ids[:, None, column] == global_ids[None, :, column] for column in range(len(given))]
    return is_duplicate & (is_shared[0] | is_shared[-1])


def softmax_terms(
    local_logits: Tensor, own: Tensor, is_duplicate: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """The cross-entropy of each row. Duplicates are left out of the softmax and of the smoothing.

    Args:
        local_logits: (B, N) of the local images or texts against all others.
        own: (B,) the column of each row's own pair.
        is_duplicate: (B, N) bool, which pairs are no negatives.
        label_smoothing: The part of the target that is spread over the row.

    Returns:
        (B,)
    """
    if is_duplicate is not None:
        local_logits = local_logits.masked_fill(is_duplicate, -torch.inf)
    log_probabilities = local_logits.log_softmax(dim=-1)
    terms = -log_probabilities.gather(1, own[:, None])[:, 0]
    if label_smoothing == 0:
        return terms
    if is_duplicate is None:
        uniform = -log_probabilities.mean(-1)
    else:
        uniform = -log_probabilities.masked_fill(is_duplicate, 0.0).sum(-1) / (~is_duplicate).sum(-1)
    return (1 - label_smoothing) * terms + label_smoothing * uniform


def sigmoid_terms(local_logits: Tensor, own: Tensor, is_duplicate: Tensor | None = None) -> Tensor:
    """The sum of −log σ(±z) over each row, without duplicates.

    Args:
        local_logits: (B, N) of the local images against all texts.
        own: (B,) the column of each row's own pair.
        is_duplicate: (B, N) bool, which pairs are no negatives.

    Returns:
        (B,)
    """
    terms = -logsigmoid(torch.where(_is_own(own, local_logits.shape[1]), local_logits, -local_logits))
    if is_duplicate is not None:
        terms = terms.masked_fill(is_duplicate, 0.0)
    return terms.sum(-1)


@torch.no_grad()
def _count_right(local_logits: Tensor, own: Tensor, is_duplicate: Tensor | None) -> Tensor:
    """How many of the local images and texts have their own logit above those of all their negatives: ().

    local_logits are the rows of the local images, (B, N). For the texts, each process takes the maxima of its part of
    the columns, and the maxima of all processes complete a column; so the other half of the logits is not needed. An
    equal logit counts as wrong: a collapsed model is never right.
    """
    own_logits = local_logits.gather(1, own[:, None])[:, 0]  # (B,)
    negatives = local_logits.scatter(1, own[:, None], -torch.inf)
    if is_duplicate is not None:
        negatives.masked_fill_(is_duplicate, -torch.inf)
    lowest = negatives.new_full((1, negatives.shape[1]), -torch.inf)
    best_in_column = torch.cat([negatives, lowest]).amax(0)  # (N,), where B is 0 too
    if world_size() > 1:
        dist.all_reduce(best_in_column, dist.ReduceOp.MAX)
    return (own_logits > negatives.amax(1)).sum() + (own_logits > best_in_column[own]).sum()


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

    Returns:
        The loss to backpropagate, the global loss to report, and the global accuracy.

    Raises:
        ValueError: On all processes. The global batch has fewer than two pairs, the counts of embeddings or ids
            differ, or the arguments contradict each other.
    """
    ids = (local_image_ids, local_text_ids)
    _check_arguments(local_image_embeds, local_text_embeds, logit_bias, kind, label_smoothing, ids)
    counts = _agree_on_counts(local_image_embeds, local_text_embeds, local_image_ids, local_text_ids)
    dtype = torch.promote_types(local_image_embeds.dtype, torch.float32)
    with torch.autocast(local_image_embeds.device.type, enabled=False):
        local_images, local_texts = local_image_embeds.to(dtype), local_text_embeds.to(dtype)  # (B, D)
        scale = logit_scale.to(dtype).exp()
        offset = sum(counts[: process_index()])
        own = torch.arange(offset, offset + len(local_images), device=local_images.device)
        is_duplicate = _find_duplicates(own, counts, local_image_ids, local_text_ids)

        if kind == "softmax":
            # Both in one tensor, for one collective; its width is 2 D.
            both = gather_with_gradients(torch.cat([local_images, local_texts], dim=1), counts)
            global_images, global_texts = both.chunk(2, dim=1)  # (N, D)
            rows = (scale * local_images) @ global_texts.T  # (B, N)
            # (B, N), a text's each; one process has them already.
            columns = (scale * local_texts) @ global_images.T if world_size() > 1 else rows.T
            terms = softmax_terms(rows, own, is_duplicate, label_smoothing)
            terms = (terms + softmax_terms(columns, own, is_duplicate, label_smoothing)) / 2
        else:
            assert logit_bias is not None
            global_texts = gather_with_gradients(local_texts, counts)
            rows = (scale * local_images) @ global_texts.T + logit_bias.to(dtype)
            terms = sigmoid_terms(rows, own, is_duplicate)
        local_share = terms.sum() / sum(counts)
        sums = torch.stack([local_share.detach(), _count_right(rows, own, is_duplicate).to(dtype)])
    if world_size() > 1:
        dist.all_reduce(sums)
    return ContrastiveResult(
        local_loss_to_backpropagate=world_size() * local_share,
        global_loss=sums[0],
        global_accuracy=sums[1] / (2 * sum(counts)),
    )
