"""Read a checkpoint file with OpenAI's tensor names: its configuration, and its tensors under our names.

Such files are OpenAI's archives, state dicts and safetensors files with the same tensor names, and training
checkpoints of open_clip's. The caller names the activation of a training checkpoint, which no tensor shows. If it holds
moving averages as well, the caller chooses between the two sets of weights.
"""

from pathlib import Path

from torch import Tensor

from ..model.checked_files import check_no_pointer
from ..model.configuration_hf_clip import HfClipConfig
from .archive import Checkpoint, CheckpointError, read_checkpoint
from .download import verify_file
from .keys import OPENAI_ACTIVATION, config_from_shapes, convert_names, without_wrappers

WEIGHTS = ("model", "ema")
"""What a training checkpoint may hold: the weights themselves, and their moving averages."""


def _choose_weights(checkpoint: Checkpoint, which: str | None) -> dict[str, Tensor]:
    if which not in (None, *WEIGHTS):
        raise ValueError(f"weights is {which!r}, but must be one of {', '.join(WEIGHTS)}.")
    if checkpoint.averages is None:
        if which == "ema":
            raise CheckpointError("holds no moving averages of the weights; leave out --weights ema.")
        return checkpoint.tensors
    if which is None:
        raise CheckpointError(
            "holds the weights and their moving averages, which are two models: choose with --weights model or "
            "--weights ema."
        )
    return checkpoint.averages if which == "ema" else checkpoint.tensors


def open_checkpoint(path: Path, verify: bool, *, check_sums: bool = True) -> Checkpoint:
    """Open a checkpoint file and check its content: its sha256 if that is known, else the checksums of an archive.

    Args:
        path: The file.
        verify: Whether its sha256 is compared where one is known: by a published name, or by the Hub's cache.
        check_sums: Whether an archive's own checksums are compared, unless its sha256 was.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is a Git-LFS pointer.
        CheckpointError: It is damaged, or another file than its name says.
    """
    if path.is_file():
        check_no_pointer(path)  # before its sha256 is, which would be called wrong
    is_verified = verify and verify_file(path)
    return read_checkpoint(path, check_sums=check_sums and not is_verified)


def read_original(
    path: Path,
    verify: bool = True,
    *,
    check_sums: bool = True,
    config: HfClipConfig | None = None,
    activation: str | None = None,
    weights: str | None = None,
) -> tuple[Checkpoint, HfClipConfig, dict[str, Tensor]]:
    """Read a checkpoint file: the checkpoint, its configuration, and its tensors under our names.

    The tensors are views of the mapped file.

    Args:
        path: The file.
        verify: Whether a file that bears one of the nine published names must have that file's sha256, and one in the
            Hub's cache that which the Hub has.
        check_sums: Whether an archive's own checksums are compared, unless its sha256 was.
        config: The model's configuration, where the file alone doesn't tell it all.
        activation: "quick_gelu" or "gelu", for a training checkpoint that comes without a configuration.
        weights: "model" or "ema", for a training checkpoint that has both.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file is none of CLIP's, or it is a training checkpoint whose activation nobody tells: no
            tensor shows it, and the wrong one spoils every feature by a little.
    """
    checkpoint = open_checkpoint(path, verify, check_sums=check_sums)
    try:
        stored = _choose_weights(checkpoint, weights)
        tensors = without_wrappers(stored)
        is_training = checkpoint.container == "training checkpoint" or tensors.keys() != stored.keys()
        if is_training and config is None and activation is None:
            raise CheckpointError(
                "was written by a training program and doesn't say which activation its transformers have: OpenAI's "
                "models and those named -quickgelu have quick_gelu, open_clip's others gelu. Pass --config with the "
                "model's open_clip_config.json, or --activation."
            )
        if checkpoint.container == "torchscript" and activation not in (None, OPENAI_ACTIVATION):
            raise CheckpointError(
                f"is an archive of OpenAI's, whose transformers have {OPENAI_ACTIVATION}; leave out --activation."
            )
        if config is None:
            config = config_from_shapes(tensors, activation or OPENAI_ACTIVATION)
        return checkpoint, config, convert_names(tensors, config)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None
