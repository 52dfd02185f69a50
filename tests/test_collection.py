"""Every process that collects the suite finds the same tests: two workers that disagree run none at all."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STARTED = time.monotonic()
APART = 3.0
"""Seconds between the two collections, for whatever has the time of day in it."""

COLLECT = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "", "-o", "addopts=", "-p", "no:cacheprovider"]


def by_file(names: list[str]) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for name in names:
        files.setdefault(name.partition("::")[0], []).append(name)
    return files


@pytest.mark.slow  # the workers of `make test` compare what they collect by themselves
def test_another_process_collects_the_same_tests(request: pytest.FixtureRequest):
    """This process has collected some time ago; another does it now, and its sets have another order."""
    time.sleep(max(0.0, STARTED + APART - time.monotonic()))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONHASHSEED"] = "1" if hash("a") % 2 else "2"
    done = subprocess.run(COLLECT, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    theirs = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(theirs) > 2000
    ours = by_file([item.nodeid for item in request.session.items])  # without those that were deselected
    for file, names in by_file(theirs).items():
        mine = set(ours.get(file, ()))
        assert ours.pop(file, []) == [name for name in names if name in mine]
    assert not ours
