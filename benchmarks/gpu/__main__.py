"""Check on one GPU what a CPU cannot show, and measure it: in less than 8 minutes, without the internet.

    python -m benchmarks.gpu --json gpu.json --picture gpu.png
    python -m benchmarks.gpu parity losses
    python -m benchmarks.gpu --dry-run          every path with tiny models on a CPU

It prints a table of what is right, WRONG, failed or measured, and ends with 1 where anything is wrong. Sections do not
depend on each other. What there is no time for is skipped, and said.
"""

import argparse
import faulthandler
import gc
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from ..__main__ import positive_seconds
from ..loss import ON_A_GPU
from ..machine import describe, headline
from ..measuring import first_line
from ..peers import OPEN_CLIP, OPENAI, STOCK
from ..ratio_chart import draw, import_pyplot
from ..reporting import as_json, write_json
from . import images, losses, optimized, parity, processes, speed, training
from .report import FAILED, SKIPPED, WRONG, Report, Setup, format_row

Part = tuple[Callable[[Setup], None], float]
"""And the seconds that it needs at least."""

SECTIONS: dict[str, tuple[str, Sequence[Part], float]] = {
    "parity": ("all nine models beside OpenAI's code in every precision; gradients", parity.PARTS, 80.0),
    "optimized": (
        "optimize_for_inference: the same results, and nothing that waits for the GPU",
        optimized.PARTS,
        40.0,
    ),
    "losses": ("the loss: exact, in linear memory, 8k to 128k pairs", losses.PARTS, 45.0),
    "training": ("a step; micro-batches; memory that runs out", training.PARTS, 45.0),
    "processes": ("two processes, FSDP2, float16, resumed runs, each by itself", processes.PARTS, 80.0),
    "survival": ("a worker that is killed while batches are pinned", images.SURVIVAL, 15.0),
    "images": ("grey levels beside Pillow's; from JPEGs to features", images.PARTS, 35.0),
    "speed": ("images and texts per second beside the peers; compiled", speed.PARTS, 95.0),
}
"""In the order in which they run: what is right first, then how fast. The last number is a section's share of the time,
to which comes what the sections before it have left."""
PEERS = (OPENAI, STOCK, OPEN_CLIP, *ON_A_GPU)
LAST = 45.0
"""Seconds that are kept for imports, and for a part that takes longer than it should."""
HANGS = 60.0
"""Seconds after the last minute, after which a program that still runs is ended. It says where it was."""


def build_parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:11}{what}" for name, (what, *_) in SECTIONS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        epilog=f"sections:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="one or several of those below (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="tiny models on a CPU: every path, no figures")
    parser.add_argument("--minutes", type=positive_seconds, default=8.0, help="after which nothing begins (default 8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the ratios there, as .png, .svg or .pdf")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError for what cannot be done, before anything is measured."""
    for name in options.sections:
        if name not in SECTIONS:
            raise ValueError(f"there is no section {name!r}; there are {', '.join(SECTIONS)}")
    if not options.dry_run and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU here; pass --dry-run to try every path on a CPU")
    for path in (options.json, options.picture):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"{path} cannot be written: name a file in a folder that exists")
    if options.picture is not None:
        import_pyplot()


def run_part(setup: Setup, part: Callable[[Setup], None]) -> bool:
    """Run one part, whatever becomes of it. Returns whether the GPU can go on."""
    begun = time.perf_counter()
    try:
        part(setup)
    except Exception as error:
        traceback.print_exc()
        setup.report.add(part.__name__, FAILED, note=first_line(error))
    print(f"{'':15}({part.__name__} took {time.perf_counter() - begun:.1f} s)", flush=True)
    if not setup.on_gpu:
        return True
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:  # such as an illegal address, after which nothing more can be computed in this process
        setup.report.add(f"the GPU after {part.__name__}", FAILED, note=f"{first_line(error)}; the rest is left out")
        return False
    return True


def facts_of(setup: Setup) -> dict[str, Any]:
    facts = describe(torch.get_num_threads())
    if setup.on_gpu:
        properties = torch.cuda.get_device_properties(0)
        facts["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": properties.total_memory / 1e9,
            "count": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "driver_free_gb": torch.cuda.mem_get_info()[0] / 1e9,
        }
    return facts


@contextmanager
def ended_if_it_hangs(seconds: float) -> Iterator[None]:
    """End the program with status 1 if this block takes longer, and print where it was."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def run_sections(setup: Setup, chosen: dict[str, tuple[str, Sequence[Part], float]], write: Callable[[], None]) -> None:
    """Run sections one after the other, each until its time and what was left before is over."""
    report, can_go_on, until = setup.report, True, 0.0
    shares = sum(share for _, _, share in chosen.values())
    for name, (what, parts, share) in chosen.items():
        until += report.seconds * share / shares
        report.section, report.until = name, until
        print(f"\n{name}: {what}\n", flush=True)
        for part, seconds in parts:
            if not can_go_on:
                report.add(part.__name__, SKIPPED, note="the GPU cannot go on")
            elif report.has_time(part.__name__, setup.choose(seconds, 0.0)):
                can_go_on = run_part(setup, part)
            write()


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        check_options(options)
    except (ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # float32 is to be float32
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    report = Report(60 * options.minutes - (0.0 if options.dry_run else LAST))
    setup = Setup(report, "cpu" if options.dry_run else "cuda", options.dry_run)
    facts = facts_of(setup)
    print(headline(facts))

    def write() -> None:
        if options.json:
            found = as_json(facts, {}, {"gpu": report.tables}) | {"rows": report.as_json(), "dry_run": setup.is_dry}
            write_json(options.json, found)

    chosen = {name: section for name, section in SECTIONS.items() if name in (options.sections or SECTIONS)}
    with ended_if_it_hangs(60 * options.minutes + HANGS):
        run_sections(setup, chosen, write)
    conclude(report)
    if options.picture:
        draw_peers(options.picture, facts, report)
    return int(report.is_wrong())


def draw_peers(path: Path, facts: dict[str, Any], report: Report) -> None:
    """Draw the tables in which there is a peer, below the GPU's name."""
    name = facts["machine"]["gpu"] or facts["machine"]["processor"]
    tables = [table for table in report.tables if any(table.row(peer) for peer in PEERS)]
    draw(path, facts | {"machine": facts["machine"] | {"processor": name}}, tables)


def conclude(report: Report) -> None:
    """Print once more all that is not as it should be."""
    states = [row.state for row in report.rows]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    print(f"\n{counted or 'nothing was done'}")
    for row in report.rows:
        if row.state in (WRONG, FAILED, SKIPPED):
            print(format_row(row))


if __name__ == "__main__":
    sys.exit(main())
