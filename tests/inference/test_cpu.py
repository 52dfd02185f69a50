"""What is read of a CPU: from Linux's files, also where these are missing or odd."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_clip.inference import cpu
from hf_clip.inference.cpu import Cpu, read_cpu

XEON = """\
processor\t: 0
model name\t: Intel(R) Xeon(R) Processor @ 2.70GHz
flags\t\t: fpu avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8

processor\t: 1
model name\t: another
flags\t\t: fpu
"""

ARM = "processor\t: 0\nFeatures\t: fp asimd bf16\n"


@pytest.fixture
def read_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine that is described by the files of a folder."""
    monkeypatch.setattr(cpu, "ACCOUNT", tmp_path / "cpuinfo")
    monkeypatch.setattr(cpu, "CACHES", tmp_path / "cache")
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 5})
    read_cpu.cache_clear()
    yield tmp_path
    read_cpu.cache_clear()


def write_cache(folder: Path, place: int, level: str, kind: str, size: str, cores: str) -> None:
    index = folder / "cache" / f"index{place}"
    index.mkdir(parents=True)
    for name, text in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", cores)):
        (index / name).write_text(text + "\n")


def test_xeon_with_amx(read_anew: Path):
    (read_anew / "cpuinfo").write_text(XEON)
    write_cache(read_anew, 0, "1", "Data", "48K", "0")
    write_cache(read_anew, 1, "1", "Instruction", "32K", "0")
    write_cache(read_anew, 2, "2", "Unified", "2048K", "0,2")
    write_cache(read_anew, 3, "3", "Unified", "266240K", "0-3,8")
    write_cache(read_anew, 4, "?", "Unified", "", "")
    found = read_cpu()
    assert found.instructions == ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    assert found.cache_bytes == {1: 48 << 10, 2: 2 << 20, 3: 260 << 20}
    assert found.sharers == {1: 1, 2: 2, 3: 5}
    assert found.describe() == (
        "Intel(R) Xeon(R) Processor @ 2.70GHz, 3 cores, avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_int8, "
        "L1 48 KiB, L2 2 MiB for 2 cores, L3 260 MiB for 5 cores"
    )


def test_arm_says_less(read_anew: Path):
    (read_anew / "cpuinfo").write_text(ARM)
    assert read_cpu().instructions == ("asimd", "bf16")
    assert read_cpu().cache_bytes == {}


def test_system_that_says_nothing(read_anew: Path):
    found = read_cpu()
    assert found.name
    assert found == Cpu(found.name, 3, (), {}, {})
    assert found.describe() == f"{found.name}, 3 cores"
