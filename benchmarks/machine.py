"""On what was measured: the machine, and the versions of whatever took part."""

import os
import platform
import subprocess
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hf_clip.inference.cpu import read_cpu

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "pillow",
    "numpy",
    "openai-clip",
    "open_clip_torch",
    "onnxruntime",
    "openvino",
    "instant-clip-tokenizer",
    "hf-processors-rs",
)


def memory_gigabytes() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):  # not on this system
        return None


def describe_machine() -> dict[str, Any]:
    cpu = read_cpu()
    caches = cpu.cache_bytes
    return {
        "processor": cpu.name,
        "cores": cpu.cores,
        "instructions": list(cpu.instructions),
        "caches": {f"L{level}": {"bytes": size, "cores": cpu.sharers[level]} for level, size in caches.items()},
        "described": cpu.describe(),
        "memory_gb": memory_gigabytes(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def installed_versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def present_commit() -> str | None:
    """The checkout's commit, with a + where files differ from it. None outside of a checkout."""
    folder = Path(__file__).resolve().parents[1]
    try:
        asked = [["git", "rev-parse", "--short", "HEAD"], ["git", "status", "--porcelain", "--untracked-files=no"]]
        commit, changed = (
            subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for words in asked
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changed)


def describe(threads: int) -> dict[str, Any]:
    """What stands at the head of a report."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": present_commit(),
        "machine": describe_machine(),
        "versions": installed_versions(),
        "threads": threads,
    }


def headline(facts: dict[str, Any]) -> str:
    machine = facts["machine"]
    parts = [facts["date"][:10], machine["described"], f"{facts['threads']} threads"]
    parts += [machine["gpu"]] if machine["gpu"] else []
    return ", ".join(parts) + "\n" + ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
