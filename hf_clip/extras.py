"""Check for packages that only some tasks need, before a task begins, and say how to install them.

This file imports only the standard library, so a program can import it before anything else.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder

EXTRAS = {
    "train": ("accelerate", "datasets"),
    "lora": ("peft",),
    "eval": ("datasets",),
    "search": ("lancedb", "pyarrow"),
    "ray": ("ray",),
    "app": ("gradio",),
    "serve": ("fastapi", "uvicorn", "python_multipart", "prometheus_client"),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "demo": ("accelerate", "datasets", "matplotlib", "sklearn"),
}
"""For each extra of pyproject.toml the modules that its task needs."""


def is_there(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    # A folder of that name where the program runs is no package.
    spec = PathFinder.find_spec(module)
    return spec is not None and spec.loader is not None and spec.origin is not None


def missing_packages(task: str, extra: str, modules: Sequence[str] | None = None) -> str:
    """Say in one line which packages a task misses and how to install them. Empty if none is missing.

    Args:
        task: Name of the task, which begins the line.
        extra: A key of `EXTRAS`.
        modules: What of the extra the task needs. Default: all that `EXTRAS` names.
    """
    missing = [module for module in modules or EXTRAS[extra] if not is_there(module)]
    if not missing:
        return ""
    return f'{task} needs {", ".join(missing)}, which this Python does not have: pip install "hf-clip[{extra}]"'


def require(task: str, extra: str, modules: Sequence[str] | None = None) -> None:
    """Raise ImportError with the line of `missing_packages` if a package is missing."""
    if line := missing_packages(task, extra, modules):
        raise ImportError(line)
