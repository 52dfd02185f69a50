"""What this machine's CPU is: its name, the instructions that matter here, cores and caches, as Linux reports them."""

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "avx_vnni", "asimd", "bf16")
"""Flags of `/proc/cpuinfo` that decide how fast matrix products are, and in which types."""

ACCOUNT = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class Cpu:
    """A machine's CPU. A virtual machine may report another cache than it has.

    Attributes:
        name: As the system names it.
        cores: How many this process may use.
        instructions: Those of `INSTRUCTIONS` that it has.
        cache_bytes: By level, such as {1: 32768, 2: 1048576, 3: 33554432}: the data cache in bytes. Empty where the
            system does not say.
        sharers: By level, how many cores share it.
    """

    name: str
    cores: int
    instructions: tuple[str, ...]
    cache_bytes: dict[int, int]
    sharers: dict[int, int]

    def describe(self) -> str:
        """One line: name, cores, instructions, caches."""
        parts = [f"{self.name}, {self.cores} core{'s' * (self.cores != 1)}", " ".join(self.instructions)]
        for level, size in self.cache_bytes.items():
            shared = f" for {self.sharers[level]} cores" if self.sharers.get(level, 1) > 1 else ""
            parts.append(f"L{level} {_in_units(size)}{shared}")
        return ", ".join(part for part in parts if part)


def _in_units(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 2**20 else f"{size >> 10} KiB"


def count_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def read_cpu() -> Cpu:
    """Read the facts of this machine's CPU, once."""
    text = ACCOUNT.read_text(errors="replace") if ACCOUNT.is_file() else ""
    fields = dict(line.partition(":")[::2] for line in text.partition("\n\n")[0].splitlines())
    found = {name.strip(): value.strip() for name, value in fields.items()}
    flags = (found.get("flags") or found.get("Features") or "").split()
    sizes, sharers = _read_caches(CACHES)
    return Cpu(
        name=found.get("model name") or platform.processor() or platform.machine(),
        cores=count_cores(),
        instructions=tuple(name for name in INSTRUCTIONS if name in flags),
        cache_bytes=sizes,
        sharers=sharers,
    )


def _read_caches(folder: Path) -> tuple[dict[int, int], dict[int, int]]:
    """Bytes of the data caches, and how many cores share each, by level."""
    sizes: dict[int, int] = {}
    sharers: dict[int, int] = {}
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size, cores = (
                (index / name).read_text().strip() for name in ("level", "type", "size", "shared_cpu_list")
            )
            if kind != "Instruction":
                sizes[int(level)] = _parse_size(size)
                sharers[int(level)] = _count_listed(cores)
        except (OSError, ValueError):  # a system that hides it
            continue
    return sizes, sharers


def _parse_size(text: str) -> int:
    """`1024K` in bytes."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text)


def _count_listed(text: str) -> int:
    """How many numbers a list such as `0-3,8` has."""
    spans = [part.partition("-") for part in text.split(",") if part]
    return sum(int(last or first) - int(first) + 1 for first, _, last in spans)
