"""WiSE-FT: the weights of two models, averaged (Wortsman et al. 2022).

Both are state dicts of plain models, so merge adapters first. Floating-point tensors are averaged in float32,
BatchNorm's running statistics too, and get their own type again. Integers, which count BatchNorm's batches, are copied.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

MOST = 1001
"""Values of α in a range, since each is a model to measure. Steps of a thousandth are the finest."""


def show_alpha(alpha: float) -> str:
    """Write α as shortly as it can be read again: two that differ are written differently."""
    short = f"{alpha:g}"
    return short if float(short) == alpha else repr(float(alpha))


def parse_alphas(spec: str | float) -> list[float]:
    """Read the values of α that WiSE-FT is to try.

    Args:
        spec: `0.5`, or a list `"0.3,0.5"`, or a range with both its ends `"0:1:0.1"` (from, to, step).

    Raises:
        ValueError: It is none of these, a range has more than `MOST` values, or a value is not between 0 and 1.
    """
    text = str(spec)
    pieces = text.split(":")
    try:
        numbers = [float(item) for item in (pieces if len(pieces) > 1 else text.split(","))]
    except ValueError:
        numbers = []
    if not numbers or len(pieces) not in (1, 3):
        raise ValueError(f"{text!r} is no α to average with: write '0.5', '0.3,0.5' or a range '0:1:0.1'.")
    if len(pieces) == 3:
        first, last, step = numbers
        steps = (last - first) / step if step > 0 and all(map(math.isfinite, numbers)) else -1
        if steps > MOST - 0.5:
            raise ValueError(
                f"The range {text!r} has more than {MOST} values of α, and each is a model to measure: take a larger "
                f"step."
            )
        count = round(steps)
        if count < 0 or abs(first + count * step - last) > 1e-6:
            raise ValueError(
                f"The range {text!r} does not lead from its first number to its second in steps of its third."
            )
        numbers = [round(first + index * step, 10) for index in range(count + 1)]
    if outside := [alpha for alpha in numbers if not 0 <= alpha <= 1]:
        raise ValueError(f"α is {show_alpha(outside[0])}, but must be between 0 (pretrained) and 1 (fine-tuned).")
    return [alpha + 0.0 for alpha in numbers]  # -0 becomes 0


def check_same_tensors(pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor]) -> None:
    """Raise ValueError if two state dicts differ in more than their numbers."""
    if differing := sorted(pretrained.keys() ^ finetuned.keys()):
        owner = "pretrained" if differing[0] in pretrained else "fine-tuned"
        raise ValueError(
            f"The weights cannot be averaged: only the {owner} model has {differing[0]}. Merge adapters, and "
            f"give both models the same loss."
        )
    for name, tensor in pretrained.items():
        if tensor.shape != finetuned[name].shape:
            raise ValueError(
                f"The weights cannot be averaged: {name} is {tuple(tensor.shape)} before fine-tuning and "
                f"{tuple(finetuned[name].shape)} after. Give the pretrained model the same image size, text length and "
                f"vocabulary first."
            )


@torch.no_grad()
def interpolate_weights(
    pretrained: Mapping[str, Tensor], finetuned: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """Average two models: θ = (1 − α) · pretrained + α · fine-tuned (Wortsman et al. 2022, equation 1).

    α = 0 and α = 1 give either model bit for bit. In between, integers are those of the fine-tuned model, and running
    statistics fit neither model. BatchNorm that was frozen has the same statistics in both, and so in the result.

    Args:
        pretrained: State dict from before training.
        finetuned: State dict from after it.
        alpha: From 0 to 1.

    Returns:
        New tensors by name.

    Raises:
        ValueError: The models differ in more than their numbers.
    """
    check_same_tensors(pretrained, finetuned)
    mixed = {}
    for name, start in pretrained.items():
        end = finetuned[name].to(start.device)
        if alpha in (0, 1):
            mixed[name] = (start if alpha == 0 else end).clone()
        elif start.is_floating_point():
            mixed[name] = torch.lerp(wide(start), wide(end), alpha).to(start.dtype)
        else:
            mixed[name] = end.clone()
    return mixed


def wide(tensor: Tensor) -> Tensor:
    """A tensor in the precision that averages are computed in: float32, or float64 if it is that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
