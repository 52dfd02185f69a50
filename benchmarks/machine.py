"""On what was measured: the machine, and the versions of whatever took part."""

import os
import platform
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

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
)


def processor_name() -> str:
    """As Linux names it; elsewhere as Python does."""
    account = Path("/proc/cpuinfo")
    lines = account.read_text().splitlines() if account.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory_gigabytes() -> float | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):  # not on this system
        return None


def describe_machine() -> dict[str, Any]:
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
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


def describe(threads: int) -> dict[str, Any]:
    """What stands at the head of a report."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": installed_versions(),
        "threads": threads,
    }


def headline(facts: dict[str, Any]) -> str:
    machine = facts["machine"]
    parts = [facts["date"][:10], f"{machine['processor']}, {machine['cores']} cores", f"{facts['threads']} threads"]
    parts += [machine["gpu"]] if machine["gpu"] else []
    return ", ".join(parts) + "\n" + ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
