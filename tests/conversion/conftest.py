"""Reduced models with few layers, and their graphs: exporting takes time for every layer, whatever its width."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from conversion.reference import build_reference, write_archive
from hf_clip import convert
from hf_clip.checkpoints import onnx_export
from hf_clip.checkpoints.onnx_export import export_onnx
from hf_clip.checkpoints.onnx_graphs import Graph, TextTower, write_graph

from ..small import DIMENSIONS, IMAGE_SIZES

LAYERS = {
    "vit": {"transformer_layers": 1, "vision_layers": 1},
    "resnet": {"transformer_layers": 1, "vision_layers": (1, 1, 1, 1)},
}


@pytest.fixture(scope="session")
def shallow_repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both reduced models, but with fewer layers, and with the same text tower. Tests must not write there."""
    folder = tmp_path_factory.mktemp("models")
    models = {tower: build_reference(DIMENSIONS[tower] | layers, seed=1) for tower, layers in LAYERS.items()}
    state = models["vit"].state_dict()
    models["resnet"].load_state_dict({n: t for n, t in state.items() if not n.startswith("visual.")}, strict=False)
    for tower, model in models.items():
        write_archive(model, folder / f"{tower}.pt", IMAGE_SIZES[tower])
        convert(folder / f"{tower}.pt", folder / tower)
    return {tower: folder / tower for tower in LAYERS}


@contextmanager
def known_graph(kind: type[Graph], path: Path) -> Iterator[None]:
    """Within this block exports copy graphs of this kind from a path, once there is a file. They check it as any other.

    Both models have the same text tower, and to export its graph takes seconds.
    """

    def write(graph: Graph, target: Path) -> None:
        if type(graph) is kind and path.exists():
            shutil.copyfile(path, target)
        else:
            write_graph(graph, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "write_graph", write)
        yield


@pytest.fixture(scope="session")
def exports(shallow_repositories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both reduced models in all precisions, exported once for all workers. Tests must not write there."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "exports"
    text_graph = folder / "vit" / "onnx" / "text_model.onnx"
    with FileLock(f"{folder}.lock"), known_graph(TextTower, text_graph):
        for tower, repository in shallow_repositories.items():
            if not (done := folder / f"{tower}.done").exists():
                export_onnx(repository, folder / tower, precisions=["fp32", "fp16", "int8"])
                done.touch()
    return {tower: folder / tower for tower in shallow_repositories}
