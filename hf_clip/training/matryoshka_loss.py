"""The contrastive loss at several widths, so that the first numbers of a feature are a feature too.

    Σ_d w_d · loss(u_d, v_d)        u_d = x[:d] / |x[:d]|, likewise v_d of the texts (Kusupati et al. 2022, section 3)

Every width has the same temperature, and the same bias with the sigmoid loss. A feature of length one and the feature
before it was normalised give the same u_d, so embeddings of length one are what is truncated.

Invariant: each term is `global_contrastive_loss`, so the sum is as exact, with several processes, in a ring and by
micro-batches too. Its memory is that of one loss for each width, and grows with the pairs as that does.

Dimensions: B pairs of this process, D embedding.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..model.matryoshka import check_dims
from .losses import ContrastiveResult, global_contrastive_loss

EXAMPLE = "512,256,128,64"
OF_PAIRS = "_embeds"
"""End of the names of arguments that are embeddings, and truncated like those of the pairs."""


def parse_widths(dims: Sequence[str], weights: Sequence[str] = ()) -> dict[int, float]:
    """Read `--matryoshka_dims` and `--matryoshka_weights`.

    Args:
        dims: The widths as texts.
        weights: As many weights as texts. Empty: each is 1.

    Returns:
        The weight of each width, the largest width first.

    Raises:
        ValueError: A text is no width or no weight, a width stands twice, or there are not as many weights.
    """
    for text in dims:
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(
                f"--matryoshka_dims has {text[:40]!r}, but widths are needed, such as {EXAMPLE}: how many of a "
                f"feature's first numbers are a feature too."
            )
    widths = [int(text) for text in dims]
    if len(set(widths)) < len(widths):
        raise ValueError(f"--matryoshka_dims is {','.join(dims)}, in which a width stands twice: name each once.")
    if weights and len(weights) != len(dims):
        raise ValueError(
            f"--matryoshka_weights has {len(weights)} numbers, but --matryoshka_dims has {len(dims)}: name a weight "
            f"for each width, in the same order."
        )
    numbers = [_weight(text) for text in weights] or [1.0] * len(widths)
    return dict(sorted(zip(widths, numbers, strict=True), reverse=True))


def _weight(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"--matryoshka_weights has {text[:40]!r}, but positive numbers are needed, such as 1,0.5.")
    return value


def check_widths(widths: dict[int, float], full: int) -> None:
    """Refuse widths that a model cannot be trained at.

    Args:
        widths: See `parse_widths`.
        full: D of the model.

    Raises:
        ValueError: A width is above D, or D itself is missing.
    """
    shown = ",".join(map(str, widths))
    if max(widths) > full:
        raise ValueError(
            f"--matryoshka_dims is {shown}, but this model's features have {full} numbers: name {full} and smaller "
            f"widths."
        )
    if full not in widths:
        raise ValueError(
            f"--matryoshka_dims is {shown}, which leaves out the full width: the numbers behind the first "
            f"{max(widths)} would not be trained. Name {full} too."
        )


def matryoshka_contrastive_loss(
    local_image_embeds: Tensor,
    local_text_embeds: Tensor,
    logit_scale: Tensor,
    *,
    dims: Sequence[int] = (),
    weights: Sequence[float] = (),
    **options: Any,
) -> ContrastiveResult:
    """Compute the contrastive loss of the global batch at several widths, and add them up. Every process must call it.

    Args:
        local_image_embeds: (B, D) of this process, normalised or not.
        local_text_embeds: (B, D) of this process, likewise.
        logit_scale: () the logarithm of the scale, as the model has it.
        dims: The widths. Empty: `global_contrastive_loss` of the embeddings as they are.
        weights: The weight of each width. Empty: each is 1.
        **options: As for `global_contrastive_loss`.

    Returns:
        The weighted sums of the losses, and the accuracy of the largest width.

    Raises:
        ValueError: A width is out of range, there are not as many weights as widths, or `global_contrastive_loss`
            refuses the rest.

    Example::

        result = matryoshka_contrastive_loss(
            outputs.image_embeds, outputs.text_embeds, model.logit_scale, dims=[512, 256, 128, 64]
        )
        result.local_loss_to_backpropagate.backward()
    """
    if not dims:
        return global_contrastive_loss(local_image_embeds, local_text_embeds, logit_scale, **options)
    full = local_image_embeds.shape[-1]
    if weights and len(weights) != len(dims):
        raise ValueError(f"There are {len(weights)} weights for {len(dims)} widths: pass one for each.")
    weight_of = dict(zip(dims, weights or [1.0] * len(dims), strict=True))
    results = {}
    for width in check_dims(dims, full):
        more: dict[str, Any] = {n: _truncated(v, width) if n.endswith(OF_PAIRS) else v for n, v in options.items()}
        images, texts = _truncated(local_image_embeds, width), _truncated(local_text_embeds, width)
        results[width] = global_contrastive_loss(images, texts, logit_scale, **more)

    def total(name: str) -> Tensor:
        return torch.stack([weight_of[width] * getattr(result, name) for width, result in results.items()]).sum()

    return ContrastiveResult(
        local_loss_to_backpropagate=total("local_loss_to_backpropagate"),
        global_loss=total("global_loss"),
        global_accuracy=next(iter(results.values())).global_accuracy,
    )


def _truncated(embeds: Tensor, width: int) -> Tensor:
    """(B, D) → (B, width), of length one, in float32 at least. What is not a matrix is left to be refused."""
    if not isinstance(embeds, Tensor) or embeds.ndim < 2:
        return embeds
    return normalize(embeds[..., :width].to(torch.promote_types(embeds.dtype, torch.float32)), dim=-1)


__all__ = ["check_widths", "matryoshka_contrastive_loss", "parse_widths"]
