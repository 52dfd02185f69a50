"""Write the page of a machine from the JSON of its runs; what stands outside of the figures is kept.

    python -m benchmarks --json epyc.json --picture benchmarks/epyc.png
    python -m benchmarks.pages epyc.json --into docs/benchmarks/epyc-2-cores.md --picture benchmarks/epyc.png

Of several files, which must be of one machine, a table of a later one replaces that of an earlier one.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .measuring import Row, Table
from .reporting import format_summary, format_table

BEGIN = "<!-- figures: written by `python -m benchmarks.pages` -->"
END = "<!-- end of figures -->"

HOW_TO_READ = (
    "A cell says how many times as fast as that peer hf_clip is as it is loaded. The figure in brackets is for its "
    'fastest way: `optimize_for_inference()`, labels that are known, or `backend="torch"`. A blank cell was not '
    "measured, or the peer cannot do it. A peer whose outputs are not those of the float32 reference is left out."
)


def read_report(path: Path) -> dict[str, Any]:
    """A run's JSON.

    Raises:
        ValueError: The file is missing, or is none of `python -m benchmarks --json`.
    """
    try:
        report = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    needed = {"machine", "versions", "threads", "date", "tables", "ceilings_gflops"}
    lacking = needed - (report.keys() if isinstance(report, dict) else set())
    if lacking or "described" not in report["machine"]:
        raise ValueError(
            f"{path} has no {', '.join(sorted(lacking)) or 'description of the machine'}: give it a file that "
            f"python -m benchmarks --json wrote"
        )
    return report


def tables_of(report: dict[str, Any]) -> list[Table]:
    """The tables of a run's JSON, as they were measured."""
    return [
        Table(
            table["title"],
            table["unit"],
            [_row_of(row) for row in table["rows"]],
            ours=tuple(table["ours"]),
            left_out=table["left_out"],
            notes=table["notes"],
            device=table["device"],
        )
        for table in report["tables"]
    ]


def _row_of(row: dict[str, Any]) -> Row:
    part = row["fraction_of_ceiling"]  # its products and the ceiling by themselves are not stored
    return Row(
        row["implementation"],
        row["precision"] or "",
        row["amount"],
        row["seconds"],
        flops=None if part is None else part * statistics.median(row["seconds"]),
        ceiling=None if part is None else 1.0,
        peak_memory=row["peak_memory_bytes"],
    )


def _describe_run(report: dict[str, Any]) -> str:
    """A paragraph on one run: when, of which version, where, and how fast the machine was."""
    machine = report["machine"]
    where = ", ".join(part for part in (machine["described"], machine["gpu"]) if part)
    ceilings = ", ".join(
        f"{ceiling['gflops']:,.0f} GFLOP/s in {ceiling['precision']}" + (" on the GPU" * (ceiling["device"] != "cpu"))
        for ceiling in report["ceilings_gflops"]
    )
    fastest = f" The fastest matrix products, which are the ceilings, reached {ceilings}." if ceilings else ""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return (
        f"Measured on {report['date'][:10]}{_of_commit(report)}: {where}, {report['threads']} threads.{fastest} "
        f"{versions}. Random weights."
    )


def _of_commit(report: dict[str, Any]) -> str:
    return f" at commit `{report['commit']}`" if report.get("commit") else ""


def write_figures(reports: Sequence[dict[str, Any]], picture: str | None = None) -> str:
    """The part of a page that is made from its figures.

    Args:
        reports: Of one machine, the oldest first.
        picture: Path of the chart as the page names it. None: there is none.

    Raises:
        ValueError: The reports are of several machines.
    """
    machines = list(dict.fromkeys(report["machine"]["described"] for report in reports))
    if len(machines) > 1:
        raise ValueError(f"the files are of {len(machines)} machines: {'; '.join(machines)}. Write a page for each")
    tables = {table.title: table for report in reports for table in tables_of(report)}
    subcommands = {table["title"]: table["subcommand"] for report in reports for table in report["tables"]}
    parts = [*map(_describe_run, reports), "## All ratios", HOW_TO_READ, format_summary(list(tables.values()))]
    if picture:
        parts.append(f"![How many times as fast as each peer]({picture})")
    parts.append("## Every measurement")
    for subcommand in dict.fromkeys(subcommands.values()):
        of_it = [format_table(table) for title, table in tables.items() if subcommands[title] == subcommand]
        parts += [f"### `{subcommand}`", "```text\n" + "\n".join(of_it).strip() + "\n```"]
    return "\n\n".join([BEGIN, *parts, END])


def put_into(page: Path, figures: str) -> None:
    """Replace the figures of a page, or write a new page around them. Whole or not at all.

    Raises:
        ValueError: The page has no place for them, so its own words would be lost.
    """
    text = page.read_text() if page.exists() else f"# A machine\n\n{BEGIN}{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no lines {BEGIN} and {END}, between which the figures go: add them")
    unfinished = page.with_name(f".{page.name}.unfinished")
    unfinished.write_text(before + figures + after)
    os.replace(unfinished, page)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="of python -m benchmarks --json")
    parser.add_argument("--into", type=Path, required=True, metavar="PAGE.md", help="the page, which may exist")
    parser.add_argument("--picture", type=Path, help="a chart of the same run, by python -m benchmarks --picture")
    options = parser.parse_args(arguments)
    try:
        if not options.into.parent.is_dir():
            raise ValueError(f"{options.into} cannot be written: there is no folder {options.into.parent}")
        if options.picture and not options.picture.is_file():
            raise ValueError(f"there is no picture {options.picture}")
        picture = options.picture and os.path.relpath(options.picture, options.into.parent).replace(os.sep, "/")
        put_into(options.into, write_figures([read_report(path) for path in options.files], picture))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(options.into)
    return 0


if __name__ == "__main__":
    sys.exit(main())
