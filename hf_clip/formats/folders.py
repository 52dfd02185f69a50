"""Whether the files of a model are there and can be read, asked before anything is built of them.

What transformers says of a missing or damaged file is a traceback, several lines, or names no file. Here it is one
line that does, and says what to do.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError, StrictDataclassError

from .open_clip import CONFIG_FILE

WHOLE_MODELS = ("hf_clip", "clip")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
IMAGE_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
DESCRIPTIONS = ("config.json", *IMAGE_PROCESSOR_FILES, CONFIG_FILE)
"""The files by which a folder's readers tell what it holds: those of two layouts beside each other mislead them."""
OBJECTS = ("config.json", "tokenizer_config.json", *TOKENIZER_FILES, *IMAGE_PROCESSOR_FILES)


def read_object(path: str | Path) -> dict[str, Any]:
    """The fields that a JSON file holds. Raises FileNotFoundError or ValueError."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; check the path.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); save or download it again.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no object of fields; save or download it again.")
    return values


def check_folder(folder: str | Path) -> None:
    """Refuse a folder that is no model's, or whose configuration, tokenizer or image processor is missing or damaged.

    Raises FileNotFoundError or ValueError.
    """
    folder = Path(folder)
    names = [name for name in (*OBJECTS, CONFIG_FILE) if (folder / name).is_file()]
    if "config.json" not in names and CONFIG_FILE not in names:
        raise FileNotFoundError(
            f"{folder} is a folder without a model: it has neither config.json nor {CONFIG_FILE}. Name a checkpoint "
            f"file such as ViT-B-32.pt, or the folder of a model."
        )
    found = {name: read_object(folder / name) for name in names}
    kind = found.get("config.json", {}).get("model_type")
    if kind is None and CONFIG_FILE in names:
        return  # open_clip's own layout, which needs neither tokenizer nor image processor
    if kind not in WHOLE_MODELS:
        found_kind = "a config.json without a model_type" if kind is None else f"a {kind!r} model by its config.json"
        raise ValueError(f"{folder} holds {found_kind}; a whole CLIP is needed, {' or '.join(WHOLE_MODELS)}.")
    for what, files in (("tokenizer", TOKENIZER_FILES), ("image processor", IMAGE_PROCESSOR_FILES)):
        if not set(files) & set(names):
            raise FileNotFoundError(
                f"{folder} has no {what} ({' or '.join(files)}); save the model's processor there: "
                f"processor.save_pretrained({str(folder)!r})."
            )


@contextmanager
def in_one_line(source: str | Path) -> Iterator[None]:
    """What transformers and the Hub say of a model's folder or repository as one line, which says what to do."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(f"The configuration of {source} is refused: {' '.join(str(error).split())}") from error
    except (OSError, HFValidationError) as error:
        # Errors of ours, and of the file system, are of narrower kinds.
        if Path(source).exists() or type(error) not in (OSError, HFValidationError):
            raise
        raise FileNotFoundError(
            f"There is no folder {str(source)!r}, and no model of that name could be loaded from the Hub "
            f"({' '.join(str(error).split())}) Check the path or the name; without a network only models are "
            f"found that were downloaded before."
        ) from error


__all__ = ["DESCRIPTIONS", "IMAGE_PROCESSOR_FILES", "check_folder", "in_one_line", "read_object"]
