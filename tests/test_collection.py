"""Every process that collects the suite finds the same tests: two workers that disagree run none at all."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
APART = 3.0
"""Seconds between the starts, for whatever has the time of day in it."""


def start_collecting(hash_seed: int) -> subprocess.Popen[str]:
    """Collect all tests, the slow ones too, in a process of its own whose sets have an order of their own."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-m",
        "",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONHASHSEED"] = str(hash_seed)
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def test_two_processes_collect_the_same_tests():
    processes = [start_collecting(1)]
    time.sleep(APART)
    processes.append(start_collecting(2))
    first, second = (process.communicate()[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0], first[-2000:] + second[-2000:]
    names = [line for line in first.splitlines() if "::" in line]
    assert len(names) > 2000
    assert names == [line for line in second.splitlines() if "::" in line]
