"""How many worker processes a run has where nobody says so."""

import os
from types import SimpleNamespace

import pytest
import torch

from hf_clip.training.run_loaders import find_num_workers


@pytest.mark.parametrize(
    ("device", "cores", "processes", "local", "expected"),
    [
        ("cuda", 8, 1, None, 7),
        ("cuda", 64, 8, None, 7),
        ("cuda", 64, 16, "8", 7),  # two machines
        ("cuda", 128, 1, None, 16),
        ("cuda", 2, 4, None, 1),
        ("cpu", 64, 1, None, 1),
    ],
)
def test_workers_take_the_cores_that_a_gpu_leaves(
    device: str, cores: int, processes: int, local: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    accelerator = SimpleNamespace(device=torch.device(device), num_processes=processes)
    assert find_num_workers(accelerator) == expected
