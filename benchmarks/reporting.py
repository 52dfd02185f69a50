"""Tables on the terminal, and as JSON with the raw seconds."""

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .measuring import OURS, Row, Table

TABLES_FOR_A_COLUMN = 3


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
                "ours": list(table.ours),
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
