"""Packages that only some tasks need, named with the way to install them before anything is done.

This file imports nothing that is not there, so that a program can ask it first.
"""

import sys
from importlib.machinery import PathFinder

EXTRAS = {
    "train": ("accelerate", "datasets"),
    "demo": ("accelerate", "datasets", "matplotlib", "sklearn"),
}
"""Extra of pyproject.toml → the modules that it brings and its task cannot do without."""


def _is_there(module: str) -> bool:
    if module in sys.modules:
        return sys.modules[module] is not None
    # A folder of that name where the program runs is no package.
    spec = PathFinder.find_spec(module)
    return spec is not None and spec.loader is not None and spec.origin is not None


def missing_packages(task: str, extra: str) -> str:
    """What is to be installed for a task, in one line, or an empty text.

    Args:
        task: how the task is called in the line, as the beginning of a sentence.
        extra: a key of `EXTRAS`.
    """
    missing = [module for module in EXTRAS[extra] if not _is_there(module)]
    if not missing:
        return ""
    return f'{task} needs {", ".join(missing)}, which this Python does not have: pip install "hf-clip[{extra}]"'


def require(task: str, extra: str) -> None:
    """Raises ImportError with the line of `missing_packages` where something is missing."""
    if line := missing_packages(task, extra):
        raise ImportError(line)
