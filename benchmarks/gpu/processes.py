"""The checks that need processes of their own: two on one GPU, FSDP2, float16, memory that runs out, resumed runs.

On a GPU all begin at once, since most of their time is the start of Python. What exceeds the time limit is ended.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .place import MARK
from .report import FAILED, Setup

LIMIT, LIMIT_OF_CPU = 150.0, 300.0
"""Seconds for all of them on a GPU, and in a dry run for each."""
GRACE = 20.0
"""Seconds that a process has, once the others of its scenario have ended."""


@dataclass
class Started:
    """One process of a scenario."""

    scenario: str
    rank: int
    process: subprocess.Popen
    log: Path


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def begin(setup: Setup, scenario: str, count: int, folder: Path) -> list[Started]:
    """Start the processes of a scenario. Their output goes into files."""
    port, started = free_port(), []
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.process", scenario, "--device", setup.device]
    command += ["--dry-run"] if setup.is_dry else []
    for rank in range(count):
        environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"OMP_NUM_THREADS": "1", "NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
        if scenario in ("two", "nccl", "fsdp2"):
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        log = folder / f"{scenario}-{rank}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=Path(__file__).resolve().parents[2],
            )
        started.append(Started(scenario, rank, process, log))
    return started


def wait(started: list[Started], seconds: float) -> list[Started]:
    """Wait for the processes of one scenario. Returns those that had to be ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        running = [each for each in started if each.process.poll() is None]
        if not running:
            return []
        if len(running) < len(started):
            until = min(until, time.monotonic() + GRACE)
        time.sleep(0.1)
    running = [each for each in started if each.process.poll() is None]
    for each in running:
        each.process.kill()
        each.process.wait()
    return running


def take_in(setup: Setup, started: list[Started], ended: list[Started]) -> None:
    """Put what a scenario printed into the report."""
    report = setup.report
    for each in started:
        lines = each.log.read_text(errors="replace").splitlines()
        for line in lines:
            if line.startswith(MARK):
                row = json.loads(line.removeprefix(MARK))
                what = row.pop("what")
                if "at_most" in row:
                    report.check(what, row["value"], row["at_most"], row["note"])
                elif "is_so" in row:
                    report.expect(what, row["is_so"], row["note"])
                else:
                    report.add(what, row["state"], note=row["note"])
        who = f"{each.scenario}, process {each.rank}"
        last = next((line.strip() for line in reversed(lines) if line.strip() and not line.startswith(MARK)), "")
        if each.scenario == "nccl" and each.rank > 0:
            continue  # what the first process has seen counts
        if each in ended:
            report.add(who, FAILED, note=f"ended after its time limit; {last[:120]}")
        elif each.process.returncode:
            report.add(who, FAILED, note=f"exit status {each.process.returncode}: {last[:160]}")


def scenarios(setup: Setup) -> dict[str, int]:
    """Each with its number of processes."""
    found = {"two": 2, "fsdp2": 1, "auto": 1, "fp16": 1, "resume": 1, "program": 1}
    if setup.on_gpu and torch.cuda.device_count() == 1:
        found["nccl"] = 2
    return found


def all_processes(setup: Setup) -> None:
    """Every scenario; see benchmarks/gpu/process.py. A GPU has room for all at once, a CPU has not."""
    with tempfile.TemporaryDirectory(prefix="hf_clip-gpu-") as name:
        folder, begun = Path(name), time.monotonic()
        together = {}
        if not setup.is_dry:
            together = {scenario: begin(setup, scenario, count, folder) for scenario, count in scenarios(setup).items()}
        for scenario, count in scenarios(setup).items():
            started = together.get(scenario) or begin(setup, scenario, count, folder)
            left = setup.choose(min(LIMIT, setup.report.left()) - (time.monotonic() - begun), LIMIT_OF_CPU)
            take_in(setup, started, wait(started, max(left, 1.0)))


PARTS = ((all_processes, 90.0),)
