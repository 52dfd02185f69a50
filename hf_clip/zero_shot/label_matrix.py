"""Labels become the matrix of a zero-shot classifier: their names are put into templates, encoded and averaged.

1. Each name of a label is put into each template. The text tower encodes the prompts, and each feature is normalised.
2. The features of a label are averaged and normalised again (Radford et al. 2021, section 3.1.4). This gives one column
   of the matrix.

Dimensions: D embedding, K labels, U background labels, M = K + U columns.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..model.repair_text import TextError
from .features import (
    check_texts,
    check_width,
    encode_text_batches,
    no_features,
    progress_bar,
    tokenizer_of,
    truncated,
)
from .matrix import SCORES, ClassifierMatrix, fingerprint_of
from .prompts import DEFAULT_TEMPLATE, Template, make_prompts, read_labels, read_templates
from .text_batches import TextTooLongError, check_batch_size


def default_scores(model: Any) -> str:
    """Return the scores that fit the model's training loss: "softmax" or "sigmoid"."""
    return getattr(model.config, "contrastive_loss", "softmax")


def check_parts(model: Any, processor: Any) -> None:
    """Raise ValueError for a model without a text tower, or a processor without a tokenizer."""
    if isinstance(model, (str, Path)):
        raise ValueError(f"model is {str(model)!r}; load it first, with AutoModel.from_pretrained.")
    if not hasattr(model, "text_model") or not hasattr(model, "logit_scale"):
        raise ValueError(
            f"Labels are encoded by the text tower, which {type(model).__name__} doesn't have; pass an HfClipModel, or "
            f"take a saved classifier with ZeroShotClassifier.load."
        )
    if not hasattr(tokenizer_of(processor), "decode"):
        raise ValueError(
            f"processor is of type {type(processor).__name__}, but the model's HfClipProcessor is needed: "
            f"AutoProcessor.from_pretrained."
        )


def sum_prompts(
    model: Any,
    processor: Any,
    columns: list[list[str]],
    templates: list[Template],
    *,
    batch_size: int,
    progress: bool,
    settings: dict[str, Any],
    truncate_dim: int | None = None,
) -> Tensor:
    """Sum the normalised features of each column's prompts.

    Prompts are made when they are encoded, and each batch is added to its sums at once. Memory grows with the number
    of columns, not with the number of prompts.

    Args:
        model: HfClipModel.
        processor: HfClipProcessor.
        columns: For each of the M columns the names of its label.
        templates: Functions from a name to a prompt.
        batch_size: Number of prompts encoded at once.
        progress: Whether to show a progress bar.
        settings: Arguments for the tokenizer.
        truncate_dim: How many of each feature's first numbers are taken, before it is normalised. None: all.

    Returns:
        The sums (M, D) or (M, truncate_dim), float32.

    Raises:
        TextError: A prompt cannot be tokenized; `index` is the place of its label.
        TextTooLongError: A prompt is too long; `index` is the place of its label.
    """
    check_batch_size(batch_size)

    def prompts() -> Iterator[str]:
        return (prompt for column in columns for prompt in make_prompts(column, templates))

    counts = torch.tensor([len(column) * len(templates) for column in columns])
    owner = torch.arange(len(columns)).repeat_interleave(counts)
    sums = no_features(model, len(columns))[:, :truncate_dim]
    try:
        check_texts(model, processor, prompts(), len(owner), settings)
        with progress_bar("Encoding texts", "text", len(owner), progress) as update:
            batches = encode_text_batches(model, processor, prompts(), batch_size=batch_size, settings=settings)
            for places, features in batches:
                features = truncated(features, truncate_dim)
                sums.index_add_(0, owner[places].to(sums.device), features.to(sums.device))
                update(len(places))
    except (TextError, TextTooLongError) as error:
        if error.index is not None:
            error.index, error.is_prompt = int(owner[error.index]), True
        raise
    return sums


def build_matrix(
    model: Any,
    processor: Any,
    labels: Any,
    templates: Any = DEFAULT_TEMPLATE,
    *,
    background: Any = (),
    scores: str | None = None,
    batch_size: int = 64,
    progress: bool = False,
    tokenizer_settings: dict[str, Any] | None = None,
    truncate_dim: int | None = None,
) -> ClassifierMatrix:
    """Make the matrix of a zero-shot classifier: encode each name of each label in each template.

    The arguments are those of `ZeroShotClassifier`. Besides, `tokenizer_settings` holds arguments for the tokenizer,
    e.g. `{"truncation": True}`. The matrix is on the model's device.
    """
    check_parts(model, processor)
    check_width(model, truncate_dim)
    scores = scores or default_scores(model)
    if scores not in SCORES:
        raise ValueError(f"scores is {scores!r}, but must be one of {', '.join(map(repr, SCORES))}.")
    functions, texts = read_templates(templates)
    names = read_labels(labels)
    if isinstance(background, str):
        raise ValueError(f"background is a single text, {background!r}; pass a list of background labels.")
    if isinstance(background, Iterable):
        background = background if isinstance(background, Mapping) else list(background)
    others = read_labels(background) if background else {}
    if both := names.keys() & others.keys():
        raise ValueError(f"{min(both)!r} is both a label and a background label; leave one out.")
    columns = [*names.values(), *others.values()]
    sums = sum_prompts(
        model,
        processor,
        columns,
        functions,
        batch_size=batch_size,
        progress=progress,
        settings=tokenizer_settings or {},
        truncate_dim=truncate_dim,
    )
    bias = getattr(model, "logit_bias", None)
    return ClassifierMatrix(
        weights=normalize(sums, dim=-1).T.contiguous(),
        labels=list(names),
        scores=scores,
        logit_scale=float(model.logit_scale.detach().float().exp()),
        logit_bias=0.0 if bias is None else float(bias.detach()),
        templates=texts,
        fingerprint=fingerprint_of(model),
        truncate_dim=truncate_dim,
    )
