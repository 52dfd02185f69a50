"""All ratios in one chart: a row for each table, a mark for each peer, an axis of how many times as fast ours is."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .measuring import OURS, Table
from .reporting import TABLES_FOR_A_COLUMN, bars_of

Ratios = Sequence[tuple[str, dict[str, tuple[float, float]]]]
"""(measured, {peer: (ratio of ours as it is loaded, ratio of its fastest way)})"""

MARKS = (
    *(("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#56b4e9", "v"), ("#e69f00", ">")),
    *(("#7b3294", "p"), ("#1b1b1b", "<")),
)
"""Colours that most people can tell apart (Okabe and Ito), each with a shape of its own."""

GREY, RULE = "#6b6b6b", "#d9d9d9"
OTHERS = "others, named beside their mark"
ROW_HEIGHT = 0.36  # inches
LANE = 0.11  # rows: peers that are equally fast lie beside each other
TICKS = (0.25, 0.5, 1, 2, 5, 10, 20, 50)


def import_pyplot() -> Any:
    """Raises ModuleNotFoundError with the line that installs matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ModuleNotFoundError("The picture is drawn with matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def ratios_of(tables: Sequence[Table]) -> Ratios:
    """The tables that have peers, each with the ratios of ours as it is loaded and in its fastest way."""
    found = [
        (table.title, {name: (next(iter(both.values())), [*both.values()][-1]) for name, both in bars_of(table)})
        for table in tables
    ]
    return [(title, peers) for title, peers in found if peers]


def draw(path: Path, facts: dict[str, Any], tables: Sequence[Table]) -> None:
    """Draw the ratios of all tables; nothing where no table has a peer."""
    if ratios := ratios_of(tables):
        machine = f"{facts['machine']['processor']}, {facts['threads']} threads, {facts['date'][:10]}"
        draw_ratios(path, ratios, machine)


def draw_ratios(path: Path, ratios: Ratios, machine: str) -> None:
    """A row for each measurement; hollow marks for ours as it is loaded, full ones for its fastest way.

    Peers that are measured in fewer than `TABLES_FOR_A_COLUMN` rows share one mark, and have their names beside it.
    """
    plt = import_pyplot()
    counts = Counter(name for _, peers in ratios for name in peers)
    often = [name for name, count in counts.items() if count >= TABLES_FOR_A_COLUMN][: len(MARKS)]
    marks = dict(zip(often, MARKS, strict=False))
    figure, axes = plt.subplots(figsize=(11, 1.6 + ROW_HEIGHT * len(ratios)), layout="constrained")
    for row, (_, peers) in enumerate(ratios):
        axes.axhline(-row, color=RULE, linewidth=0.6, zorder=0)
        for lane, (name, (first, fastest)) in enumerate(sorted(peers.items(), key=lambda item: item[0] not in marks)):
            height = -row + LANE * ((len(peers) - 1) / 2 - lane)
            _draw_peer(axes, height, first, fastest, *marks.get(name, (GREY, ".")))
            if name not in marks:
                label = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 7.5}
                axes.annotate(name, (max(first, fastest), height), color=GREY, **label)
    axes.axvline(1, color="black", linewidth=0.9)
    axes.set_yticks([-row for row in range(len(ratios))], [title for title, _ in ratios], fontsize=8.5)
    axes.set_ylim(-len(ratios) + 0.4, 0.6)
    values = [value for _, peers in ratios for both in peers.values() for value in both]
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, min(values) / 1.15), max(2.0, max(values) * 1.6))
    axes.set_xticks([tick for tick in TICKS if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} ×")
    axes.minorticks_off()
    axes.set_xlabel(f"{OURS} is so many times as fast: left of 1 it is slower, right of 1 faster", fontsize=9)
    axes.tick_params(length=0, labeltop=True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(f"How fast {OURS} is beside each of its peers   ({machine})", fontsize=11, loc="left")
    has_others = len(marks) < len(counts)
    figure.legend(
        handles=_legend(plt, marks, has_others), loc="outside lower center", ncols=4, frameon=False, fontsize=9
    )
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a picture, whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    figure.savefig(unfinished, dpi=110, format=path.suffix.lstrip(".") or "png")
    import_pyplot().close(figure)
    os.replace(unfinished, path)


def _draw_peer(axes: Any, height: float, first: float, fastest: float, colour: str, shape: str) -> None:
    if fastest != first:
        axes.plot([first, fastest], [height, height], color=colour, linewidth=1, alpha=0.45, zorder=1)
        axes.plot(fastest, height, shape, color=colour, markersize=5.5, zorder=3)
    axes.plot(first, height, shape, color=colour, markersize=5.5, markerfacecolor="white", zorder=2)


def _legend(plt: Any, marks: dict[str, tuple[str, str]], has_others: bool) -> list[Any]:
    def handle(label: str, colour: str, shape: str, **more: Any) -> Any:
        return plt.Line2D([], [], linestyle="none", marker=shape, color=colour, label=label, markersize=6.5, **more)

    found = [handle(f"than {name}", *mark) for name, mark in marks.items()]
    if has_others:
        found.append(handle(f"than {OTHERS}", GREY, "."))
    return [
        *found,
        handle(f"hollow: {OURS} as it is loaded", "black", "o", markerfacecolor="white"),
        handle("full: in its fastest way", "black", "o"),
    ]
