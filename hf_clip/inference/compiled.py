"""`optimize_for_inference(compile=True)`: towers as graphs of torch's own compiler.

Each tower's `forward` is compiled at its first call. A second batch size or text length compiles it once more, for all
sizes. torch keeps what it has compiled in a folder, from which later processes take it.
"""

import os
import shutil
import sys
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from ..model.optimized import OptimizedModelError
from ..model.text_ends import find_ends, find_starts
from ..model.text_tower import check_input_ids
from .batches import towers_of, wants_all_layers
from .layers import refuse_gradients

CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""The environment variable by which torch is told where to keep what it has compiled."""


def check_compiler(device: str) -> None:
    """Raise OptimizedModelError if torch cannot compile for this kind of device here."""
    if device == "cuda":
        if find_spec("triton") is None:
            raise OptimizedModelError(
                "compile=True needs Triton on a GPU, which is not installed here: pip install triton, or leave "
                "compile=True out."
            )
        return
    wanted = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(wanted) is None:
        raise OptimizedModelError(
            f"compile=True needs a C++ compiler, and there is no {wanted} here: install it (Debian: apt install g++), "
            f"name another one in the environment variable CXX, or leave compile=True out."
        )


def is_compiled(model: Any) -> bool:
    """Whether towers of a model were compiled."""
    return any("compiled" in vars(module) for module in model.modules())


def compile_towers_(model: Any) -> list[str]:
    """Let the towers of a model be compiled at their first call. Returns a description."""
    towers = towers_of(model)
    for tower in towers:
        _compile_tower_(tower)
    names = " and ".join("texts" if tower.main_input_name == "input_ids" else "images" for tower in towers)
    folder = os.environ.get(CACHE) or "torch's folder of temporary files"
    return [f"the towers of {names} are compiled at their first call; later processes find the result in {folder}"]


def _compile_tower_(tower: Any) -> None:
    whole = tower.forward
    # All towers share code of transformers. Without this, the few graphs that torch allows per code would soon be
    # taken, and what comes later would not be compiled.
    has_choice = "isolate_recompiles" in signature(torch.compile).parameters
    alone: dict[str, Any] = {"isolate_recompiles": True} if has_choice else {}
    tower.compiled = torch.compile(whole, **alone)

    def forward(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        for tensor in tensors:
            refuse_gradients(tensor)
        is_empty = any(tensor.numel() == 0 for tensor in tensors)  # which a graph of any number of rows is not made for
        with torch.no_grad():
            if is_empty or wants_all_layers(tower, kwargs):
                return whole(*args, **kwargs)
            if tower.main_input_name == "input_ids":
                _check_texts(tower, *args, **kwargs)
            return tower.compiled(*args, **kwargs)

    tower.forward = forward


def _check_texts(
    tower: Any, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, *_: Any, **__: Any
) -> None:
    """Raise what the text tower raises for texts without an end. A graph would give NaN for them."""
    ids = check_input_ids(input_ids, attention_mask)
    find_ends(ids, find_starts(attention_mask), tower.config)
