"""The contrastive losses as they are written down: with all logits at once. What the tiled ones are compared with."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def plain_loss(
    images: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    *,
    logit_bias: Tensor | None = None,
    kind: str = "softmax",
    label_smoothing: float = 0.0,
    local_image_ids: Tensor | None = None,
    local_text_ids: Tensor | None = None,
    local_negative_text_embeds: Tensor | None = None,
    local_negative_text_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of one process's whole batch."""
    is_own = torch.eye(len(images), dtype=torch.bool)
    is_duplicate = torch.zeros_like(is_own)
    for ids in (local_image_ids, local_text_ids):
        if ids is not None:
            is_duplicate |= ids[:, None] == ids[None, :]
    is_duplicate &= ~is_own
    logits = logit_scale.exp() * images @ texts.T
    if logit_bias is not None:
        logits = logits + logit_bias
    negatives = logits.detach().masked_fill(is_own | is_duplicate, -torch.inf)
    own = logits.diagonal()
    accuracy = ((own > negatives.amax(0)).double().mean() + (own > negatives.amax(1)).double().mean()) / 2
    hard = (
        logits[:, :0]
        if local_negative_text_embeds is None
        else _hard_logits(images, logit_scale, logit_bias, local_negative_text_embeds)
    )
    is_caption = torch.zeros_like(hard, dtype=torch.bool)
    if local_text_ids is not None and local_negative_text_ids is not None:
        is_one_image = torch.eye(len(images), dtype=torch.bool)
        if local_image_ids is not None:
            is_one_image |= local_image_ids[:, None] == local_image_ids
        is_text = local_text_ids[:, None] == local_negative_text_ids
        is_caption = (is_one_image[:, :, None] & is_text).any(1)
    if kind == "sigmoid":
        terms = -logsigmoid(torch.where(is_own, logits, -logits)).masked_fill(is_duplicate, 0.0)
        more = -logsigmoid(-hard).masked_fill(is_caption, 0.0)
        return (terms.sum() + more.sum()) / len(images), accuracy
    is_candidate = (~is_duplicate).to(logits.dtype)
    target = (1 - label_smoothing) * is_own.to(logits.dtype) + label_smoothing * is_candidate / is_candidate.sum(
        1, keepdim=True
    )
    loss = torch.zeros((), dtype=logits.dtype)
    for lines, more in ((logits, hard.masked_fill(is_caption, -torch.inf)), (logits.T, logits[:, :0])):
        choices = torch.cat([lines.masked_fill(is_duplicate, -torch.inf), more], dim=1)
        log_probabilities = choices.log_softmax(1)[:, : len(images)]
        loss = loss - (target * log_probabilities.masked_fill(is_duplicate, 0.0)).sum() / (2 * len(images))
    return loss, accuracy


def _hard_logits(images: Tensor, logit_scale: Tensor, logit_bias: Tensor | None, negatives: Tensor) -> Tensor:
    logits = logit_scale.exp() * images @ negatives.T
    return logits if logit_bias is None else logits + logit_bias


def differentiate(loss: Any, images: Tensor, texts: Tensor, logit_scale: Tensor, **options: Any) -> dict[str, Tensor]:
    """Loss, accuracy and all gradients of `loss`, called with leaves of its own."""
    leaves = {"images": images, "texts": texts, "logit_scale": logit_scale}
    among_options = ("logit_bias", "local_negative_text_embeds")
    leaves |= {name: options[name] for name in among_options if name in options}
    leaves = {name: value.detach().clone().requires_grad_() for name, value in leaves.items()}
    more = options | {name: value for name, value in leaves.items() if name in among_options}
    value, accuracy = loss(leaves["images"], leaves["texts"], leaves["logit_scale"], **more)
    value.backward()
    return {"loss": value.detach(), "accuracy": accuracy} | {name: leaf.grad for name, leaf in leaves.items()}
