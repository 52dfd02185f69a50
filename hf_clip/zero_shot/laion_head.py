"""Read the weights of LAION's aesthetic predictors as heads of this package.

Two layouts were published, both for embeddings of length one, and both scores from about 1 to 10:

- LAION-Aesthetics V1: one linear layer, `weight` (1, D) and `bias` (1,), for ViT-B/32, ViT-B/16 and ViT-L/14.
- LAION-Aesthetics V2 ("improved aesthetic predictor"): five linear layers, `layers.0`, `.2`, `.4`, `.6` and `.7`, for
  ViT-L/14. Nothing but dropout stands between them, so that their product is one linear layer.

The files do not say which model they were trained on, and hold no feature by which it could be known. Only the width is
checked.

Dimensions: D embedding.
"""

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.archive import read_checkpoint
from .embedding_head import EmbeddingHead

NAME = "aesthetic"
"""What the score of these heads is called."""

LINEAR = (("weight", "bias"),)
IMPROVED = tuple((f"layers.{place}.weight", f"layers.{place}.bias") for place in (0, 2, 4, 6, 7))


def one_layer(layers: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Multiply linear layers that follow one another into one, in float64."""
    weight, bias = (tensor.double() for tensor in layers[0])
    for next_weight, next_bias in layers[1:]:
        weight, bias = next_weight.double() @ weight, next_weight.double() @ bias + next_bias.double()
    return weight.float(), bias.float()


def read_laion_head(path: str | Path) -> EmbeddingHead:
    """Read the file of a predictor, `.pth`, `.pt` or `.safetensors`. Nothing in it is run.

    Args:
        path: The file.

    Returns:
        A head with one score, "aesthetic". Its `reference` is empty: it fits every model of its width.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds other weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; name the weights of a LAION-Aesthetics predictor.")
    stored = read_checkpoint(path).tensors
    names = next(
        (pairs for pairs in (LINEAR, IMPROVED) if set(stored) == {name for pair in pairs for name in pair}), None
    )
    problem = "" if names else f"it has the tensors {', '.join(sorted(stored)[:4])}"
    if names:
        layers = [(stored[weight][:], stored[bias][:]) for weight, bias in names]
        sizes = [tuple(weight.shape) for weight, _ in layers]
        fits = all(
            weight.ndim == 2 and bias.shape == weight.shape[:1] and weight.isfinite().all() and bias.isfinite().all()
            for weight, bias in layers
        ) and all(first[0] == second[1] for first, second in pairwise(sizes))
        problem = "" if fits and sizes[-1][0] == 1 else f"its layers have the shapes {', '.join(map(str, sizes))}"
    if problem:
        raise ValueError(
            f"{path} is no LAION-Aesthetics predictor: {problem}. One linear layer ('weight', 'bias') or the five of "
            f"version 2 ('layers.0.weight', …) are read; a head of hf_clip's ends in .safetensors."
        )
    weight, bias = one_layer(layers)
    return EmbeddingHead("scores", [NAME], [(weight, bias)], torch.zeros(0), model="", facts={"file": path.name})


__all__ = ["NAME", "read_laion_head"]
