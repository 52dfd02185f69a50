"""What `--metric_for_best_model` names: one figure of an evaluation, or the mean of several."""

import re
from collections.abc import Mapping

from .options import GUARD_METRICS, METRICS

EXAMPLE = "mean(recall@1, guard_acc1)"


def parse_metric(text: str) -> tuple[str, ...]:
    """Read which figures a metric is the mean of.

    Args:
        text: A name, or `mean(NAME, NAME, ...)`.

    Returns:
        The names. A single figure is its own mean.

    Raises:
        ValueError: It cannot be read, or a run has no such figure.
    """
    mean = re.fullmatch(r"\s*mean\s*\((.*)\)\s*", text)
    names = tuple(name.strip() for name in (mean[1].split(",") if mean else [text]))
    if not set(names) <= {*METRICS, *GUARD_METRICS}:
        raise ValueError(
            f"metric_for_best_model is {text!r}, but must be one of {', '.join((*METRICS, *GUARD_METRICS))}, or a mean "
            f"of them such as {EXAMPLE}."
        )
    return names


def metric_of(names: tuple[str, ...]) -> str:
    """Write the metric that `parse_metric` reads as these names."""
    return names[0] if len(names) == 1 else f"mean({', '.join(names)})"


def value_of(metric: str, figures: Mapping[str, float]) -> float:
    """Compute a metric.

    Args:
        metric: See `parse_metric`.
        figures: Of one evaluation, by name.

    Raises:
        ValueError: The data cannot be measured by it.
    """
    names = parse_metric(metric)
    if missing := [name for name in names if name not in figures]:
        raise ValueError(
            f"--metric_for_best_model {metric} cannot be measured: these data have no {missing[0]}, but "
            f"{', '.join(name for name in figures if name in (*METRICS, *GUARD_METRICS))}."
        )
    return sum(figures[name] for name in names) / len(names)
