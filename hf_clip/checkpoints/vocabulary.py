"""Where OpenAI's vocabulary file is found: this package doesn't carry it."""

from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import constants

PACKAGES = ("clip", "open_clip")
"""Import names of openai-clip and open_clip_torch, which ship the file."""

FILE_NAME = "bpe_simple_vocab_16e6.txt.gz"
HUB_REPOSITORY = "openai/clip-vit-base-patch32"
HUB_FILE_NAME = "merges.txt"


def installed_vocabulary() -> Path | None:
    """The file within an installed package, which isn't imported for that."""
    for package in PACKAGES:
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (path := Path(folder) / FILE_NAME).is_file():
                return path
    return None


def find_vocabulary(path: str | Path | None = None, offline: bool = False) -> Path:
    """The vocabulary file: the one given, else an installed package's, else the Hub's.

    Raises FileNotFoundError that says how to get it.
    """
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no vocabulary file {path}; check the path.")
        return Path(path)
    if installed := installed_vocabulary():
        return installed
    advice = (
        f'Install it with `pip install "hf-clip[convert]"`, which brings openai-clip; conversion also takes the path '
        f"of {FILE_NAME}, as --vocab."
    )
    if offline or constants.HF_HUB_OFFLINE:
        raise FileNotFoundError(
            f"OpenAI's vocabulary file is not installed, and the Hub is not asked offline. {advice}"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(HUB_REPOSITORY, HUB_FILE_NAME))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FileNotFoundError(
            f"OpenAI's vocabulary file is not installed or on the Hub ({reason}). {advice}"
        ) from error
