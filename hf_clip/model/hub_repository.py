"""What a model is loaded from and pushed to: a folder, or a repository on the Hub, in our layout or another library's.

This file imports no torch.
"""

import os
from collections.abc import Callable
from typing import Any

from .checked_files import check_names, find_file, read_object
from .variants import VARIANTS, refuse_unknown_variant

CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

FOREIGN_LAYOUTS: list[Callable[..., Any]] = []
"""Readers of other libraries' repositories. The package adds them when it is imported; remote code has none.

A reader takes a folder or repository and the Hub's arguments. It returns None if the layout is not its own, else an
object with `config`, `tensors()`, `image_processor_values()` and `tokenizer()`.
"""

BEFORE_UPLOAD: list[Callable[[str, str], None]] = []
"""Functions that prepare a folder for a push to the Hub, called with the folder and the repository's name.

The package adds its own when it is imported.
"""


class HubUpload:
    """Base of all classes with `push_to_hub`: adds the code that loads the model without this package to each push."""

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        for prepare in BEFORE_UPLOAD:
            prepare(working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)  # type: ignore[misc]


def read_config_object(path: Any) -> dict[str, Any]:
    """Read a config.json. Raises ValueError for a damaged file, and for one that names files outside its folder."""
    values = read_object(path)
    check_names(path, values, ("configuration_files", "transformers_weights"))
    return values


def refuse_checkpoint_file(source: Any) -> None:
    """Raise ValueError for the path or name of a checkpoint file: `from_pretrained` takes a folder or a repository.

    It is raised for a name like those of OpenAI's files that is none of them, too.
    """
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""
    if name in VARIANTS and not os.path.isdir(name):
        raise ValueError(
            f"{name} is the name of one of OpenAI's checkpoint files. Convert it once, by `hf-clip convert {name} "
            f"{VARIANTS[name].slug}/`, and pass that folder."
        )
    refuse_unknown_variant(name)
    is_repository = os.path.isdir(name) or (name.count("/") == 1 and not name.startswith((".", "/", "~")))
    if not name.endswith(CHECKPOINT_SUFFIXES) or (is_repository and not os.path.isfile(name)):
        return
    folder = os.path.dirname(name) or "."
    if os.path.isfile(name) and os.path.isfile(os.path.join(folder, "config.json")):
        raise ValueError(
            f"{name} is a file, but from_pretrained takes the folder that describes it too: pass {folder}."
        )
    raise ValueError(
        f"{name} is a checkpoint file, but from_pretrained takes a folder or a repository. Convert it once, by "
        f"`hf-clip convert {name} FOLDER`, and pass that folder."
    )


def find_foreign(source: Any, arguments: dict[str, Any]) -> Any:
    """Find the reader for a repository in another library's layout.

    Args:
        source: A folder, or the name of a repository.
        arguments: Arguments of `from_pretrained`. Those of the Hub are used.

    Returns:
        An object as described at `FOREIGN_LAYOUTS`. None for a repository whose config.json has a `model_type`, which
        transformers reads itself.

    Raises:
        ValueError: `source` is a checkpoint file, or a name like those of OpenAI's models.
    """
    refuse_checkpoint_file(source)
    if source is None or os.path.isfile(source):
        return None
    hub = {name: arguments[name] for name in HUB_ARGUMENTS if arguments.get(name) is not None}
    try:
        path = find_file(source, "config.json", hub)
    except OSError:
        return None  # transformers looks for the file next, and reports this error itself
    if path is not None and "model_type" in read_config_object(path):
        return None
    return next((found for layout in FOREIGN_LAYOUTS if (found := layout(source, hub)) is not None), None)
