"""Options of a run in a YAML or JSON file: a value, or a list of values, for each name."""

import json
import os
from pathlib import Path
from typing import Any

from .option_names import hint

LAUNCH = "launch"
"""What a run's training_config.json says of its launcher; where that file is given as options it is passed over."""

OPTION_FILES = (".json", ".yaml", ".yml")
"""How the names of such files end."""


def read_options(path: Path, known: list[str]) -> dict[str, Any]:
    """Read the options of a file.

    Args:
        path: A .yaml, .yml or .json file.
        known: The options that there are.

    Returns:
        Values by name, with `_` for `-`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, or has an option that there isn't.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no configuration file {path}; check the path.")
    import yaml  # type: ignore[import-untyped]  # transformers brings it

    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" and text.strip() else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}. Write it anew.") from None
    if values is None:
        raise ValueError(f"{path} is empty; write options by name into it, such as num_train_epochs: 3.")
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, but options by name are needed.")
    values = {str(name).replace("-", "_"): value for name, value in values.items() if name != LAUNCH}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{path} has an option {name!r} that there isn't.{hint(name, known)}")
        inner = value if isinstance(value, list) else [value]
        if any(isinstance(part, (dict, list)) for part in inner):
            raise ValueError(f"{path}: {name} is {value!r}, but a single value, or a list of such, is needed.")
    return values


def words_of(values: dict[str, Any]) -> list[str]:
    """Options as the words of a command line, so that both are checked alike."""
    words = []
    for name, value in values.items():
        if isinstance(value, list) and value:
            words += [f"--{name}", *map(str, value)]
        elif value is not None and value != []:
            words.append(f"--{name}={value}")
    return words


def plain(value: Any) -> Any:
    """Paths as text; NumPy's, torch's and pandas' numbers and arrays, and tuples, as Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
