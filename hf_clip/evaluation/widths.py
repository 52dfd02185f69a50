"""Figures by width: features are truncated to their first numbers, and measured as whole ones are.

A figure of a width has the width behind its name: `recall@1_dim64`. One of whole features has its name alone.

Dimensions: D embedding.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..model.matryoshka import check_truncate_dim

SUFFIX = "_dim"


def name_at(name: str, width: int | None) -> str:
    """Return what a figure is called that was measured at a width. None: at the full width."""
    return name if width is None else f"{name}{SUFFIX}{width}"


def named_at(figures: Mapping[str, float], width: int | None) -> dict[str, float]:
    """Return figures by the names that `name_at` gives them."""
    return {name_at(name, width): value for name, value in figures.items()}


def embedding_dim(model: Any) -> int | None:
    """Return D of a model of the CLIP family. None if its configuration does not tell it."""
    config = model.config
    of_texts = getattr(config, "text_config", None)
    return getattr(config, "projection_dim", None) or getattr(of_texts, "projection_size", None)


def read_widths(truncate_dim: int | Sequence[int] | None, model: Any) -> list[int]:
    """Check at which widths a model is to be measured.

    Args:
        truncate_dim: A width, or several.
        model: A model of the CLIP family.

    Returns:
        The widths in their order, each once. Empty for None.

    Raises:
        ValueError: A width is not a whole number from 1 to D, or no width is given.
    """
    if truncate_dim is None:
        return []
    widths = list(truncate_dim) if isinstance(truncate_dim, Sequence) else [truncate_dim]
    full = embedding_dim(model)
    if full is None:
        raise ValueError(
            f"The features of a {type(model).__name__} have a width that its configuration does not tell: leave "
            f"truncate_dim out."
        )
    if not widths:
        raise ValueError("truncate_dim is empty: name one or several widths, or leave it out.")
    for width in widths:
        check_truncate_dim(width, full, [width])
    return list(dict.fromkeys(map(int, widths)))


def widths_in_words(widths: Sequence[int], model: Any) -> str:
    """Return the end of a protocol: at which widths a model was measured, and which of them it was trained at."""
    if not widths:
        return ""
    full, trained = embedding_dim(model), getattr(model.config, "matryoshka_dims", None) or []
    untrained = [width for width in widths if width != full and width not in trained]
    words = f"; first {', '.join(map(str, widths))} of {full} numbers"
    if not untrained:
        return words
    return f"{words}, not trained at {'these' if untrained == list(widths) else ', '.join(map(str, untrained))}"


def by_names(widths: Mapping[int, Mapping[str, float]], full: int | None) -> dict[str, float]:
    """Return the figures of several widths under one name each."""
    found: dict[str, float] = {}
    for width, figures in widths.items():
        found |= named_at(figures, None if width == full else width)
    return found


def names_at(name: str, widths: Iterable[int], full: int | None) -> list[str]:
    """Return what a figure is called at each width."""
    return [name_at(name, None if width == full else width) for width in widths]


def split_name(name: str) -> tuple[str, int | None]:
    """Return a figure's name without its width, and the width: `recall@1_dim64` → (`recall@1`, 64)."""
    found = re.fullmatch(rf"(.+){SUFFIX}([1-9]\d*)", name)
    return (found[1], int(found[2])) if found else (name, None)
