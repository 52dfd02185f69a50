"""What `--metric_for_best_model` names: one figure of an evaluation, or the mean of several.

A figure is called SET_METRIC_dimWIDTH. The set is missing for the first validation set, and the width for whole
features: `recall@1`, `flickr_recall@1`, `recall@1_dim64`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..evaluation.widths import name_at
from .options import GUARD_METRICS, METRICS

EXAMPLE = "mean(recall@1, guard_acc1)"

# The longest first: `image_to_text_recall@1` is no `recall@1` of a set that is called image_to_text.
_ANY = "|".join(sorted(map(re.escape, METRICS), key=len, reverse=True))
_FIGURE = re.compile(rf"(?:(?P<set>.+?)_)??(?P<metric>{_ANY})(?:_dim(?P<width>[1-9]\d*))?")


@dataclass(frozen=True)
class Figure:
    """A figure of validation data, by the parts of its name.

    Attributes:
        metric: One of METRICS.
        width: How many of a feature's first numbers were compared; None for all.
        set: The validation set's name; empty for the first.
    """

    metric: str
    width: int | None = None
    set: str = ""

    @property
    def name(self) -> str:
        """What it is called."""
        return name_at(f"{self.set}_{self.metric}" if self.set else self.metric, self.width)


def read_figure(name: str) -> Figure | None:
    """Read the name of a figure of validation data. None for any other name, such as one of the guard set's."""
    found = _FIGURE.fullmatch(name)
    if found is None or name in GUARD_METRICS:
        return None
    width = found["width"]
    return Figure(found["metric"], None if width is None else int(width), found["set"] or "")


def parse_metric(text: str) -> tuple[str, ...]:
    """Read which figures a metric is the mean of.

    Args:
        text: A name, or `mean(NAME, NAME, ...)`.

    Returns:
        The names. A single figure is its own mean.

    Raises:
        ValueError: It cannot be read, or no run has such a figure.
    """
    mean = re.fullmatch(r"\s*mean\s*\((.*)\)\s*", text)
    names = tuple(name.strip() for name in (mean[1].split(",") if mean else [text]))
    if not all(map(is_metric, names)):
        raise ValueError(
            f"metric_for_best_model is {text!r}, but must be one of {', '.join((*METRICS, *GUARD_METRICS))}, or a mean "
            f"of them such as {EXAMPLE}."
        )
    return names


def settled_metric(text: str, sets: Sequence[str]) -> str:
    """Write a metric with the names that its figures have in a run.

    Args:
        text: As it was given. It may name the first validation set too, `mean(coco_recall@1, flickr_recall@1)`.
        sets: The names of the validation sets.

    Returns:
        The same without the first set's name.

    Raises:
        ValueError: It cannot be read, or it names a set that there isn't.
    """
    names = []
    for name in parse_metric(text):
        figure = read_figure(name)
        if figure is not None and figure.set:
            if figure.set not in sets:
                there = f"there are {', '.join(sets)}" if sets else "there is no --validation"
                raise ValueError(
                    f"--metric_for_best_model {name} is measured on a validation set {figure.set!r}, which is not "
                    f"given: {there}."
                )
            first = Figure(figure.metric, figure.width)
            name = first.name if figure.set == sets[0] else name
        names.append(name)
    return metric_of(tuple(names))


def is_metric(name: str) -> bool:
    """Whether a run may have such a figure: one of METRICS, of any set at any width, or one of GUARD_METRICS."""
    return name in GUARD_METRICS or read_figure(name) is not None


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
            f"{', '.join(name for name in figures if is_metric(name))}."
        )
    return sum(figures[name] for name in names) / len(names)
