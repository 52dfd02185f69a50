"""Pictures of results: calibration, confusion, the most confident mistakes, averages of models. They need matplotlib.

Dimensions: K classes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.images import NOWHERE, ImagePlaces
from .class_metrics import Reliability
from .embedder import open_stored
from .interpolation import InterpolationResult
from .zero_shot import Mistake

MOST_NAMED = 40
"""Number of classes up to which the axes of a confusion matrix name them all."""

MOST_SHOWN = 60
"""Number of classes up to which a confusion matrix shows all; of more the most confused ones."""

MOST_COUNTED = 20
"""Number of classes up to which the cells hold their numbers."""

COLUMNS = 6
BLUE, GREY = "#2f6fb0", "#777777"
CURVES = (BLUE, "#d1642a", "#3c8d5a", "#8a5fb5", "#b8902a", "#c0487f", "#4aa3a3", "#6b6b6b")


def _figure(width: float, height: float, **settings: Any) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Pictures need matplotlib: pip install "hf-clip[eval]"') from error
    figure = Figure(figsize=(width, height), layout="constrained", **settings)
    FigureCanvasAgg(figure)  # draws without a screen, whatever pyplot is set to
    return figure


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, facecolor="white")


def _short(name: str, most: int = 22) -> str:
    # A dollar sign would begin a formula.
    name = name.replace("$", r"\$")
    return name if len(name) <= most else f"{name[: most - 1]}…"


def plot_reliability(found: Reliability, error: float, title: str, path: Path) -> None:
    """Draw the accuracy at each level of confidence, and how many images there are at it.

    Args:
        found: See `reliability`.
        error: The expected calibration error.
        title: What stands above.
        path: The PNG to write.
    """
    figure = _figure(5.2, 5.6)
    axes, below = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    edges, width = found.edges[:-1].tolist(), float(found.edges[1] - found.edges[0])
    filled = [place for place, count in enumerate(found.counts.tolist()) if count]
    starts = [edges[place] for place in filled]
    axes.bar(
        starts, [float(found.accuracy[place]) for place in filled], width, align="edge", color=BLUE, edgecolor="white",
        label="accuracy",
    )  # fmt: skip
    axes.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1, label="well calibrated")
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="fraction of images that is right", title=title)
    axes.legend(loc="upper left", frameon=False, title=f"calibration error {error:.1%}", alignment="left")
    below.bar(
        starts, [int(found.counts[place]) for place in filled], width, align="edge", color=GREY, edgecolor="white"
    )
    below.set(xlabel="confidence", ylabel="images")
    for each in (axes, below):
        each.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_confusion(confusion: Tensor, names: list[str], title: str, path: Path) -> None:
    """Draw a confusion matrix, each row in parts of its class. Of many classes the most confused ones are shown.

    Args:
        confusion: (K, K), row: the class of an image, column: what it is taken for.
        names: The K classes.
        title: What stands above.
        path: The PNG to write.
    """
    counts = confusion.sum(1)
    chosen = [place for place, count in enumerate(counts.tolist()) if count or int(confusion[:, place].sum())]
    if len(chosen) > MOST_SHOWN:
        wrong = confusion.clone().fill_diagonal_(0)
        most = (wrong.sum(0) + wrong.sum(1)).argsort(descending=True)[:MOST_SHOWN].tolist()
        title = f"{title}\nthe {MOST_SHOWN} most confused of {len(names)} classes"
        chosen = sorted(most)
    parts = (confusion.double() / counts.clamp(min=1)[:, None])[chosen][:, chosen]
    side = max(4.5, 0.36 * min(len(chosen), MOST_NAMED) + 2.2)
    figure = _figure(side + 0.8, side)
    axes = figure.subplots()
    shown = axes.imshow(parts.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes, label="part of the class's images", shrink=0.8, fraction=0.05, pad=0.02)
    if len(chosen) <= MOST_SHOWN:
        size = 9 if len(chosen) <= MOST_COUNTED else 6
        labels = [_short(names[place]) for place in chosen]
        axes.set_xticks(range(len(chosen)), labels, rotation=90 if len(chosen) > 4 else 0, fontsize=size)
        axes.set_yticks(range(len(chosen)), labels, fontsize=size)
    if len(chosen) <= MOST_COUNTED:
        for row, place in enumerate(chosen):
            for column, other in enumerate(chosen):
                if number := int(confusion[place, other]):
                    colour = "white" if float(parts[row, column]) > 0.5 else "black"
                    axes.text(column, row, str(number), ha="center", va="center", fontsize=8, color=colour)
    axes.set(xlabel="taken for", ylabel="class", title=title)
    _save(figure, path)


def plot_mistakes(mistakes: list[Mistake], title: str, path: Path, places: ImagePlaces = NOWHERE) -> None:
    """Draw a sheet of images that are taken for another class, the most confident mistake first.

    Args:
        mistakes: What `evaluate_zero_shot(..., mistakes=24)` kept.
        title: What stands above.
        path: The PNG to write.
        places: Where paths may lead, see `LabelledImages.places`.

    Raises:
        ValueError: There are no mistakes.
    """
    if not mistakes:
        raise ValueError("There are no mistakes to draw.")
    columns = min(COLUMNS, len(mistakes))
    rows = -(-len(mistakes) // columns)
    figure = _figure(max(2.0 * columns, 4.5), 2.5 * rows + 0.5)
    figure.suptitle(title)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for one in axes:
        one.axis("off")
    for one, mistake in zip(axes, mistakes, strict=False):
        image = open_stored(mistake.image, places).convert("RGB")
        image.thumbnail((256, 256))
        one.imshow(image)
        one.set_title(
            f"{_short(mistake.label)}\n→ {_short(mistake.predicted)} {mistake.confidence:.0%}",
            fontsize=9,
            color="black",
        )
    _save(figure, path)


def plot_widths(values: Mapping[int, float], metric: str, title: str, path: Path) -> None:
    """Draw a metric over the widths of truncated features.

    Args:
        values: Width → the metric, from 0 to 1.
        metric: Its name.
        title: What stands above.
        path: The PNG to write.
    """
    figure = _figure(5.2, 3.6)
    axes = figure.subplots()
    widths = sorted(values)
    points = [100 * values[width] for width in widths]
    axes.plot(widths, points, color=BLUE, marker="o")
    for width, point in zip(widths, points, strict=True):
        axes.annotate(f"{point:.1f}", (width, point), (0, 7), textcoords="offset points", ha="center", fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_xticks(widths, list(map(str, widths)))
    axes.minorticks_off()
    axes.margins(y=0.15)
    axes.set(xlabel="numbers of a feature that are compared", ylabel=f"{metric}, %", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def plot_interpolation(found: InterpolationResult, title: str, path: Path) -> None:
    """Draw the figures of each data set between the pretrained and the fine-tuned model, and their mean.

    Args:
        found: See `evaluate_interpolation`.
        title: What stands above.
        path: The PNG to write.
    """
    figure = _figure(6.4, 4.2)
    axes = figure.subplots()
    for place, (name, curve) in enumerate(found.curves.items()):
        label = f"{_short(Path(name).name, 28)} ({found.metrics[name]})"
        values = [100 * value for value in curve]
        axes.plot(found.alphas, values, marker="o", markersize=4, color=CURVES[place % len(CURVES)], label=label)
    if len(found.curves) > 1:
        axes.plot(found.alphas, [100 * value for value in found.mean], "--", color="black", label="mean")
    axes.axvline(found.best, color=GREY, linewidth=1, linestyle=":")
    axes.set(xlabel="α: from the pretrained model (0) to the fine-tuned one (1)", ylabel="%", title=title)
    axes.legend(frameon=False, fontsize=9, title=f"best α: {found.best:g}", alignment="left")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
