"""Matryoshka embeddings: the first numbers of a feature are a smaller feature (Kusupati et al. 2022).

A model that was trained at several widths names them in the field `matryoshka_dims` of its configuration. Any model's
features can be truncated, but those of other widths may say little.

Dimensions: D embedding.
"""

import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any


def check_dims(dims: Sequence[int], full: int) -> list[int]:
    """Check the widths that a model is trained at.

    Args:
        dims: The widths, in any order.
        full: D of the model.

    Returns:
        The widths, the largest first.

    Raises:
        ValueError: There are none, one stands there twice, or one is not from 1 to D.
    """
    if not dims:
        raise ValueError("matryoshka_dims is empty, but at least one width is needed; leave it out for the full width.")
    for width in dims:
        if isinstance(width, bool) or not isinstance(width, Integral) or not 1 <= width <= full:
            raise ValueError(
                f"matryoshka_dims has {width!r:.40}, but a feature has {full} numbers: widths from 1 to {full} are "
                f"needed."
            )
    if len(set(dims)) < len(dims):
        raise ValueError(f"matryoshka_dims is {list(dims)!r:.80}, in which a width stands twice: name each once.")
    return sorted(map(int, dims), reverse=True)


def check_truncate_dim(truncate_dim: Any, full: int, trained: Sequence[int] | None = None) -> None:
    """Check a width to which features are truncated. A width that the model was not trained at is warned of.

    Args:
        truncate_dim: The width.
        full: D of the model.
        trained: The widths that it was trained at. None: the full width.

    Raises:
        ValueError: The width is not a whole number from 1 to D.
    """
    is_whole = isinstance(truncate_dim, Integral) and not isinstance(truncate_dim, bool)
    if not is_whole or not 1 <= truncate_dim <= full:
        raise ValueError(
            f"truncate_dim is {truncate_dim!r:.40}, but this model's features have {full} numbers: a whole number from "
            f"1 to {full} is needed, or None for all."
        )
    if truncate_dim == full or truncate_dim in (trained or ()) or _is_compiling():
        return
    known = f"the widths {', '.join(map(str, trained))}" if trained else f"the full width of {full} alone"
    warnings.warn(
        f"truncate_dim is {truncate_dim}, but this model was trained at {known}: the first {truncate_dim} numbers of "
        f"its features may say little. Take a width that it was trained at, or train it with --matryoshka_dims.",
        stacklevel=2,
    )


def _is_compiling() -> bool:
    import torch  # the configuration, which imports this file, does without

    return torch.compiler.is_compiling()


def truncate(features: Any, truncate_dim: int | None, config: Any) -> Any:
    """Take the first numbers of features.

    Args:
        features: (…, D) of a model.
        truncate_dim: How many numbers. None: all.
        config: The model's HfClipConfig.

    Returns:
        (…, truncate_dim), a view. They are not normalised again.

    Raises:
        ValueError: `truncate_dim` is not a whole number from 1 to D.
    """
    if truncate_dim is None:
        return features
    check_truncate_dim(truncate_dim, config.projection_dim, config.matryoshka_dims)
    return features[..., :truncate_dim]
