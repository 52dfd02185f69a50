"""An original checkpoint's file → a configuration, and tensors under our names."""

from pathlib import Path

from torch import Tensor

from ..configuration_hf_clip import HfClipConfig
from .archive import Checkpoint, CheckpointError, read_checkpoint
from .download import verify_published
from .keys import config_from_shapes, convert_names


def read_original(path: Path, verify: bool = True) -> tuple[Checkpoint, HfClipConfig, dict[str, Tensor]]:
    """The checkpoint, its configuration, and its tensors under our names: views of the mapped file.

    verify: a file that bears one of the nine published names must have that file's sha256

    Raises FileNotFoundError, or CheckpointError for a file that is none of CLIP's.
    """
    if verify:
        verify_published(path)
    checkpoint = read_checkpoint(path)
    try:
        config = config_from_shapes(checkpoint.tensors)
        return checkpoint, config, convert_names(checkpoint.tensors, config)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None
