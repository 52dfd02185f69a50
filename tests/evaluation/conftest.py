"""A small model that tells digits a little, and rows to measure it on."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, AutoProcessor

from .data_sets import stored_rows


@pytest.fixture(scope="session")
def small_clip(digits: Path) -> tuple[Any, Any]:
    """The model and its processor. Tests must not change them."""
    return AutoModel.from_pretrained(digits / "vit").eval(), AutoProcessor.from_pretrained(digits / "vit")


@pytest.fixture(scope="session")
def rows(digits: Path) -> list[dict[str, Any]]:
    """60 images with labels and captions. Tests must not change them."""
    return stored_rows(digits)
