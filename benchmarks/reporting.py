"""Tables on the terminal, as JSON with the raw seconds, and as a picture with one bar for each ratio."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .measuring import OURS, Row, Table

COLUMNS_OF_PANELS = 3
WIDTH_OF_PANELS = 5.8  # inches
TABLES_FOR_A_COLUMN = 3
FASTER, SLOWER, PALE, GREY = "#1f5fa8", "#c2571a", "#b9d0ea", "#6b6b6b"


def column_title(name: str) -> str:
    """`hf_clip, optimized` heads a column as `optimized is`."""
    return f"{name.removeprefix(f'{OURS}, ')} is"


def _speed(row: Row) -> str:
    return f"{row.per_second:,.1f}" if row.per_second >= 1 else f"{row.per_second:.3f}"


def _columns(table: Table) -> list[tuple[str, Callable[[Row], str]]]:
    def ratio(name: str) -> Callable[[Row], str]:
        return lambda row: f"{table.ratios(row)[name]:.2f} times" if name in table.ratios(row) else ""

    def fraction(row: Row) -> str:
        return "" if row.fraction_of_ceiling is None else f"{row.fraction_of_ceiling:.2f}"

    def memory(row: Row) -> str:
        return "" if row.peak_memory is None else f"{row.peak_memory / 1e9:.2f} GB"

    return [
        ("precision", lambda row: row.precision),
        ("per second", _speed),
        *((column_title(name), ratio(name)) for name in table.ours),
        ("of ceiling", fraction),
        ("peak memory", memory),
    ]


def format_table(table: Table) -> str:
    """Columns without any value are left away."""
    lines = [f"{table.title}: {table.unit}"]
    if table.rows:
        width = max(len(row.name) for row in table.rows)
        filled = [(title, [value(row) for row in table.rows]) for title, value in _columns(table)]
        shown = [(title, cells, max(map(len, [title, *cells]))) for title, cells in filled if any(cells)]
        lines.append(" " * width + "".join(f"  {title:>{space}}" for title, _, space in shown))
        for place, row in enumerate(table.rows):
            cells = "".join(f"  {cells[place]:>{space}}" for _, cells, space in shown)
            lines.append(f"{row.name:{width}}{cells}".rstrip())
    return "\n".join(["", *lines, *table.notes, *table.left_out])


def as_json(facts: dict[str, Any], ceilings: dict[tuple[str, str], float], tables: dict[str, list[Table]]) -> dict:
    """`tables` by subcommand. Seconds are those of one call, `amount` what a call handles."""
    return facts | {
        "ceilings_gflops": [
            {"device": device, "precision": precision, "gflops": flops / 1e9}
            for (device, precision), flops in ceilings.items()
        ],
        "tables": [
            {
                "subcommand": subcommand,
                "title": table.title,
                "unit": table.unit,
                "device": table.device,
                "rows": [_row_as_json(table, row) for row in table.rows],
                "notes": table.notes,
                "left_out": table.left_out,
            }
            for subcommand, several in tables.items()
            for table in several
        ],
    }


def _row_as_json(table: Table, row: Row) -> dict[str, Any]:
    return {
        "implementation": row.name,
        "precision": row.precision or None,
        "per_second": row.per_second,
        "ours_is_times": table.ratios(row),
        "fraction_of_ceiling": row.fraction_of_ceiling,
        "peak_memory_bytes": row.peak_memory,
        "amount": row.amount,
        "seconds": row.seconds,
    }


def write_json(path: Path, report: dict) -> None:
    """Whole or not at all."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(unfinished, path)


def bars_of(table: Table) -> list[tuple[str, dict[str, float]]]:
    """(peer, how many times as fast ours are): the table's first row of ours, and the fastest if that is another."""
    bars = []
    for row in table.rows:
        ratios = table.ratios(row)
        if not row.name.startswith(OURS) and table.ours[0] in ratios:
            fastest = max(ratios, key=lambda name: ratios[name])
            bars.append((row.name, {name: ratios[name] for name in dict.fromkeys([table.ours[0], fastest])}))
    return bars


def format_summary(tables: Sequence[Table]) -> str:
    """All ratios in one table, in Markdown: a row for each table, and a column for each peer that is in several.

    A peer's cell says how many times as fast ours is as it is loaded and, in brackets, in its fastest way, whose speed
    and fraction of the ceiling stand in front.
    """
    present = [(table, dict(bars_of(table))) for table in tables if table.row(table.ours[0])]
    counts = Counter(name for _, bars in present for name in bars)
    peers = [name for name, count in counts.items() if count >= TABLES_FOR_A_COLUMN]
    header = ["measured", "per second, fastest", "of ceiling", *peers, "others"]
    lines = []
    for table, bars in present:
        fastest = max((row for name in table.ours if (row := table.row(name))), key=lambda row: row.per_second)
        fraction = "" if fastest.fraction_of_ceiling is None else f"{fastest.fraction_of_ceiling:.2f}"
        others = "; ".join(f"{name} {_both(ratios)}" for name, ratios in bars.items() if name not in peers)
        cells = [_both(bars[name]) if name in bars else "" for name in peers]
        lines.append([table.title, f"{_speed(fastest)} {table.unit}", fraction, *cells, others])
    kept = [place for place, title in enumerate(header) if any(line[place] for line in lines)]
    widths = {place: max(len(line[place]) for line in [header, *lines]) for place in kept}

    def row_of(line: list[str]) -> str:
        return "| " + " | ".join(f"{line[place]:{widths[place]}}" for place in kept) + " |"

    rule = "|" + "|".join("-" * (widths[place] + 2) for place in kept) + "|"
    return "\n".join([row_of(header), rule, *map(row_of, lines)])


def _both(ratios: dict[str, float]) -> str:
    first, *others = (f"{ratio:.2f}" for ratio in ratios.values())
    return first + "".join(f" ({ratio})" for ratio in others)


def import_pyplot() -> Any:
    """Raises ModuleNotFoundError with the line that installs matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ModuleNotFoundError("The picture is drawn with matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw(path: Path, facts: dict[str, Any], tables: Sequence[Table]) -> None:
    """A panel for each table that has peers, a bar for each peer, from which one reads how much faster ours is."""
    plt = import_pyplot()
    panels = [(table, bars) for table in tables if (bars := bars_of(table))]
    if not panels:
        return
    across = min(COLUMNS_OF_PANELS, len(panels))
    rows = [panels[start : start + across] for start in range(0, len(panels), across)]
    heights = [max(len(bars) for _, bars in row) + 2.2 for row in rows]
    size = (WIDTH_OF_PANELS * across, max(0.27 * sum(heights) + 0.9, 2.4))
    figure, axes = plt.subplots(
        len(rows), across, figsize=size, squeeze=False, layout="constrained", height_ratios=heights
    )
    for place in range(len(rows) * across):
        panel = axes[place // across][place % across]
        if place >= len(panels):
            panel.set_axis_off()
        else:
            _draw_panel(panel, *panels[place], room=heights[place // across])
    machine = f"{facts['machine']['processor']}, {facts['threads']} threads, {facts['date'][:10]}"
    figure.suptitle(f"{OURS} is so many times as fast as …   ({machine})", fontsize=12, fontweight="bold")
    unfinished = path.with_name(f".{path.name}.unfinished")
    # Tight, since titles may be wider than the last column.
    figure.savefig(unfinished, dpi=110, format=path.suffix.lstrip(".") or "png", bbox_inches="tight")
    plt.close(figure)
    os.replace(unfinished, path)


def _draw_panel(panel: Any, table: Table, bars: list[tuple[str, dict[str, float]]], room: float) -> None:
    """The first row of ours in full colour; where another way is faster, its bar is pale and its label says which."""
    farthest, longest = max(1.0, *(ratio for _, ratios in bars for ratio in ratios.values())), 0
    for place, (_, ratios) in enumerate(bars):
        (_, first), *others = ratios.items()
        label, end = f"{first:.2f} ×", first
        for name, ratio in others:
            panel.barh(-place, ratio, height=0.66, color=PALE)
            label, end = f"{label}, {name.removeprefix(f'{OURS}, ')} {ratio:.2f} ×", ratio
        longest = max(longest, len(label))
        panel.barh(-place, first, height=0.66, color=FASTER if first >= 1 else SLOWER)
        place_of_label = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        panel.annotate(label, (end, -place), fontsize=8.5, color=GREY, **place_of_label)
    panel.axvline(1, color=GREY, linewidth=0.9, linestyle=(0, (4, 3)))
    panel.set_yticks([-place for place in range(len(bars))], [name for name, _ in bars], fontsize=9)
    panel.set_xlim(0, farthest * (1 + 0.04 * longest))  # the labels stand behind the bars
    panel.set_ylim(0.6 - (room - 1.6), 0.6)  # bars of one thickness, however many a panel has
    panel.set_title(table.title, loc="left", fontsize=9.5)
    panel.tick_params(axis="both", length=0, labelcolor=GREY)
    panel.set_xticks([])
    panel.spines[["top", "right", "bottom", "left"]].set_visible(False)
