"""A process group of this process alone, for what distributed training wraps models in."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
