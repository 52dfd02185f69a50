"""Reduced models with few layers, and their graphs: exporting takes time for every layer, whatever its width."""

import os
from pathlib import Path

import pytest
from filelock import FileLock

from conversion.reference import build_reference, write_archive
from hf_clip import convert
from hf_clip.checkpoints.onnx_export import export_onnx

from ..small import DIMENSIONS, IMAGE_SIZES

LAYERS = {
    "vit": {"transformer_layers": 1, "vision_layers": 1},
    "resnet": {"transformer_layers": 1, "vision_layers": (1, 1, 1, 1)},
}


@pytest.fixture(scope="session")
def shallow_repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both reduced models, as everywhere, but with fewer layers. Tests must not write there."""
    folder = tmp_path_factory.mktemp("models")
    for tower, layers in LAYERS.items():
        write_archive(build_reference(DIMENSIONS[tower] | layers, seed=1), folder / f"{tower}.pt", IMAGE_SIZES[tower])
        convert(folder / f"{tower}.pt", folder / tower)
    return {tower: folder / tower for tower in LAYERS}


@pytest.fixture(scope="session")
def exports(shallow_repositories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both reduced models in all precisions, exported once for all workers. Tests must not write there."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exports"
    with FileLock(f"{folder}.lock"):
        for tower, repository in shallow_repositories.items():
            if not (done := folder / f"{tower}.done").exists():
                export_onnx(repository, folder / tower, precisions=["fp32", "fp16", "int8"])
                done.touch()
    return {tower: folder / tower for tower in shallow_repositories}
