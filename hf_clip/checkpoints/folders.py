"""Check that the files of a model exist and can be read, before anything is built from them.

For a missing or damaged file transformers raises errors of many kinds, some of several lines, some without the file's
name. Here the error is one line that names the file and says what to do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)

from ..model.checked_files import TOKENIZER_CHECKS, in_one_kind, one_line, read_object
from ..model.hub_repository import read_config_object
from .open_clip import CONFIG_FILE

WHOLE_MODELS = ("hf_clip", "clip")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
IMAGE_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
DESCRIPTIONS = ("config.json", *IMAGE_PROCESSOR_FILES, CONFIG_FILE)
"""The files by which a folder's readers tell what it holds: those of two layouts beside each other mislead them."""


def check_kind(source: str | Path, values: dict[str, Any]) -> None:
    """Raises ValueError where a config.json describes no whole CLIP."""
    if (kind := values.get("model_type")) not in WHOLE_MODELS:
        found = "a config.json without a model_type" if kind is None else f"a {kind!r:.80} model by its config.json"
        raise ValueError(f"{source} holds {found}; a whole CLIP is needed, {' or '.join(WHOLE_MODELS)}.")


def check_holds_model(source: str | Path) -> None:
    """Refuse a path that leads nowhere, and a folder that is no model's. The name of a repository is not looked at.

    Raises:
        FileNotFoundError: There is no such folder, or it has no configuration.
    """
    folder = Path(source)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", CONFIG_FILE)):
            raise FileNotFoundError(
                f"{source} is a folder without a model: it has neither config.json nor {CONFIG_FILE}. Name a "
                f"checkpoint file such as ViT-B-32.pt, or the folder of a model."
            )
    elif not folder.exists() and str(source).startswith((".", "/", "~")):
        raise FileNotFoundError(f"There is no folder {source}; check the path.")


def check_folder(folder: str | Path) -> dict[str, dict[str, Any]]:
    """Refuse a folder that is no model's, or whose configuration, tokenizer or image processor is missing or damaged.

    Returns:
        What its configuration and its image processor's files hold, by their names.

    Raises:
        FileNotFoundError: It is no model's folder, or a part is missing.
        ValueError: A file is damaged, or is another model's.
    """
    folder = Path(folder)
    check_holds_model(folder)
    names = [name for name in (*DESCRIPTIONS, *TOKENIZER_CHECKS) if (folder / name).is_file()]
    readers = dict.fromkeys(DESCRIPTIONS, read_object) | {"config.json": read_config_object}
    found = {name: readers[name](folder / name) for name in names if name in DESCRIPTIONS}
    for name in set(names) - found.keys():
        TOKENIZER_CHECKS[name](folder / name)
    if found.get("config.json", {}).get("model_type") is None and CONFIG_FILE in names:
        return found  # open_clip's own layout, which needs neither tokenizer nor image processor
    check_kind(folder, found["config.json"])
    for what, files in (("tokenizer", TOKENIZER_FILES), ("image processor", IMAGE_PROCESSOR_FILES)):
        if not set(files) & set(names):
            raise FileNotFoundError(
                f"{folder} has no {what} ({' or '.join(files)}); save the model's processor there: "
                f"processor.save_pretrained({str(folder)!r})."
            )
    return found


def check_reached(repository: str) -> None:
    """Raise OSError if the Hub cannot be reached for a repository that was not loaded before.

    The Hub's client asks for a file again and again for half a minute, and transformers asks for ten files. Whatever
    else is wrong is told when they are loaded.
    """
    try:
        stored = (try_to_load_from_cache(repository, name) for name in ("config.json", CONFIG_FILE))
        if constants.HF_HUB_OFFLINE or any(isinstance(path, str) for path in stored):
            return
        hf_hub_download(repository, "config.json")
    except LocalEntryNotFoundError as error:
        raise OSError(f"{constants.ENDPOINT} cannot be reached.") from error
    except (OSError, HFValidationError, HTTPError):
        return


def _refused_by_the_hub(source: str | Path, error: BaseException) -> OSError | None:
    """Return the error that explains the Hub's answer. None if the answer is that there is no such repository."""
    causes: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in causes:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__
    statuses = [getattr(getattr(error, "response", None), "status_code", None) for error in causes]
    status = next((status for status in statuses if status is not None), None)
    gated = any(isinstance(error, GatedRepoError) for error in causes)
    hub = constants.ENDPOINT
    if gated:
        return PermissionError(
            f"{source} is gated: accept its conditions on {hub}/{source}, and log in with `hf auth login` or HF_TOKEN."
        )
    if status == 401:
        return PermissionError(
            f"{source} is no public model of the Hub (401): check the name; a private one needs a token that may read "
            f"it, by `hf auth login` or HF_TOKEN."
        )
    if status == 403:
        return PermissionError(f"The Hub ({hub}) forbids to read {source} with this token or from this address (403).")
    if status == 429:
        return ConnectionError(
            f"The Hub ({hub}) was asked too often and refuses {source} for now (429): try again in some minutes, and "
            f"log in, which allows for more."
        )
    if status is not None and status >= 500:
        return ConnectionError(f"The Hub ({hub}) failed to send {source} ({status}); try again later.")
    return None


@contextmanager
def in_one_line(source: str | Path) -> Iterator[None]:
    """Turn every error of transformers and the Hub about a folder or repository into one line that says what to do.

    Args:
        source: The folder, or the repository's name.

    Raises:
        OSError: The folder or repository is missing, or cannot be reached.
        ValueError: A file is damaged, whatever error its reader raised for that.
    """
    name = one_line(source, 200)
    try:
        with in_one_kind(name):
            yield
    except StrictDataclassError as error:
        raise ValueError(f"The configuration of {name} is refused: {one_line(error)}") from error
    except (OSError, HFValidationError) as error:
        # Errors of ours, and of the file system, are of narrower kinds.
        if (refused := _refused_by_the_hub(name, error)) is not None:
            raise refused from error
        if Path(source).exists() or type(error) not in (OSError, HFValidationError):
            raise
        raise FileNotFoundError(
            f"There is no folder {name!r}, and no model of that name could be loaded from the Hub ({one_line(error)}) "
            f"Check the path or the name; without a network only models are found that were downloaded before."
        ) from error
    except HTTPError as error:
        raise ConnectionError(f"{name} could not be loaded from the Hub ({one_line(error)}); try again.") from error


__all__ = ["DESCRIPTIONS", "IMAGE_PROCESSOR_FILES", "check_folder", "check_kind", "check_reached", "in_one_line"]
