"""open_clip's own model class, loaded as a file: the package needs torchvision, the class one name of it."""

import importlib
import importlib.util
import sys
import types
from typing import Any

import pytest
from torch import nn

PACKAGE = "open_clip_files"


def load_open_clip_model() -> Any:
    """The module `open_clip.model`; a test is skipped where open_clip isn't installed."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("open_clip is not installed: pip install --no-deps open_clip_torch")
    if f"{PACKAGE}.model" not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = list(spec.submodule_search_locations or [])
        sys.modules[PACKAGE] = package
        stubs = {name: types.ModuleType(name) for name in ("torchvision", "torchvision.ops", "torchvision.ops.misc")}
        stubs["torchvision.ops.misc"].FrozenBatchNorm2d = nn.Identity  # for locked towers alone
        absent = {name: module for name, module in stubs.items() if name not in sys.modules}
        sys.modules.update(absent)
        try:
            importlib.import_module(f"{PACKAGE}.model")
        finally:
            for name in absent:
                del sys.modules[name]
    return sys.modules[f"{PACKAGE}.model"]
