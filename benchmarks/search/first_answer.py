"""One text query as a whole process, from the command line to the printed results, beside rclip: in turn.

    python -m venv rclip-venv && rclip-venv/bin/pip install rclip
    python -m benchmarks.search.first_answer --rclip rclip-venv/bin/python --work folder-benchmark

Both have indexed one folder with the same random weights, as in `benchmarks.search.folder`, whose work folder serves
here too. What they print of the best images is compared before anything is said of speed. Seconds are those of the
processor, of all threads, since others may compute at the same time. Files are in the page cache.
"""

import argparse
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ..__main__ import at_least_one
from ..load import COMMAND
from ..machine import describe, headline
from ..measuring import OURS, LeftOutError, Row, Table
from ..reporting import format_table
from .folder import INDEX_BY_RCLIP, RCLIP_MODEL, run_process, write_models, write_photographs

TEXT, TOP = "a red car on a street, seen from afar", 5
MOST_DIFFERENCE = 0.005
"""Of the scores that two print of one image. rclip prints three decimals, and embeds images a little otherwise."""

SCORED = re.compile(r"""^(-?\d\.\d+)\s+(?:\d+\s+)?"?(/.*?\.jpg)""", re.MULTILINE)


def answer(command: list[str], threads: int, where: Path, **environment: str) -> tuple[float, dict[str, float]]:
    """Seconds of the processor that a process takes, and the scores that it prints, by the images' paths."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        command,
        cwd=where,
        env=os.environ | environment | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise LeftOutError((done.stderr.strip().splitlines() or ["it printed nothing"])[-1][:300])
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return seconds, {path: float(score) for score, path in SCORED.findall(done.stdout)}


def measure(work: Path, rclip: str | None, threads: int, count: int, rounds: int) -> Table:
    """Index the folder with both, and search it in turn."""
    photographs, model, data = work / f"photographs-{count}", work / "model", work / "rclip"
    if not photographs.exists():
        write_photographs(photographs, count)
    if not (data / RCLIP_MODEL / "textual.onnx").exists():
        shutil.rmtree(data, ignore_errors=True)
        write_models(model, data)
    index, database = work / "searched-index", data / "db.sqlite3"
    root = str(Path(__file__).resolve().parents[2])
    shutil.rmtree(index, ignore_errors=True)
    database.unlink(missing_ok=True)
    ours = [sys.executable, "-W", "ignore", "-c", COMMAND]
    run_process(
        [*ours, "index", str(photographs), "--model", str(model), "--into", str(index)], threads, work, PYTHONPATH=root
    )
    words = [*ours, "search", TEXT, "--index", str(index), "--top", str(TOP), "--cutoff", "off", "--all-copies"]
    runs: dict[str, Callable[[], tuple[float, dict[str, float]]]] = {
        OURS: lambda: answer(words, threads, work, PYTHONPATH=root),
        f"{OURS}, with a filter": lambda: answer([*words, "--filter", "width > 0"], threads, work, PYTHONPATH=root),
    }
    table = Table(f"one text query over {count:,} images, a whole process", "queries")
    if rclip is None:
        table.left_out.append("rclip is left out: name the Python that has it with --rclip")
    else:
        given = {"RCLIP_DATADIR": str(data), "PYTHONPATH": ""}
        run_process([rclip, "-c", INDEX_BY_RCLIP], threads, photographs, **given)
        query = [rclip, "-m", "rclip.main", TEXT, "--no-indexing", "--top", str(count)]
        runs["rclip"] = lambda: answer(query, threads, photographs, **given)
    expected = runs[OURS]()[1]  # leaves the copy behind
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            spent, scores = run()
            seconds[name].append(spent)
            worst = max(abs(scores.get(path, 9) - score) for path, score in expected.items())
            if len(expected) != TOP or worst > MOST_DIFFERENCE:
                raise LeftOutError(f"{name} gives other scores: {worst:.3f} apart")
    for name, all_spent in seconds.items():
        table.rows.append(Row(name, "float32", 1, all_spent))
        table.notes.append(f"{name}: {statistics.median(all_spent):.2f} s of the processor")
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search.first_answer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rclip", metavar="PYTHON", help="the Python that has rclip (default: only hf_clip)")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="for the model and the photographs")
    parser.add_argument("--images", type=at_least_one, default=2000, help="photographs (default 2000)")
    parser.add_argument("--rounds", type=at_least_one, default=5, help="of each (default 5)")
    parser.add_argument("--threads", type=at_least_one, default=torch.get_num_threads(), help="of everyone")
    options = parser.parse_args(arguments)
    print(headline(describe(options.threads)))
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    rclip = options.rclip and os.path.abspath(options.rclip)
    try:
        table = measure(work, rclip, options.threads, options.images, options.rounds)
    except (LeftOutError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(format_table(table), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
