"""Fixtures of the checkpoint reader's tests."""

from pathlib import Path

import pytest
import torch

from .hand_made import STATE


@pytest.fixture
def state_dict_file(tmp_path: Path) -> Path:
    torch.save(STATE, tmp_path / "state.pt")
    return tmp_path / "state.pt"
