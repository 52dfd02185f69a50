"""Convert a model from any layout to any other: `convert(source, out, layout)` reads it and writes it."""

from collections.abc import Callable
from pathlib import Path

from ..model.configuration_hf_clip import HfClipConfig
from .read import read
from .whole_folder import check_destination
from .write import check_layout, print_note, write


def convert(
    source: str | Path,
    out: str | Path,
    layout: str = "hf_clip",
    *,
    config: str | Path | None = None,
    activation: str | None = None,
    weights: str | None = None,
    vocabulary: str | Path | None = None,
    overwrite: bool = False,
    verify: bool = True,
    offline: bool = False,
    remote_code: bool = False,
    note: Callable[[str], None] = print_note,
) -> HfClipConfig:
    """Turn a CLIP into a folder that transformers loads, or into another library's layout.

    Tensors keep their dtypes and their bits. No code of a checkpoint is run. The folder appears only when it is
    complete.

    Args:
        source: A checkpoint file with OpenAI's tensor names (OpenAI's own, a state dict, a training checkpoint of
            open_clip's), one of OpenAI's nine names, which is downloaded, or a folder or repository of hf_clip, stock
            CLIP or open_clip.
        out: The folder to write.
        layout: "hf_clip", "transformers", "open_clip", "openai", "diffusers" or "comfyui".
        config: For a checkpoint file that doesn't say: open_clip's configuration file, or a config.json.
        activation: For a training checkpoint without `config`: "quick_gelu" or "gelu".
        weights: "model" or "ema", for a training checkpoint that has both.
        vocabulary: OpenAI's vocabulary file, if it is neither installed nor on the Hub.
        overwrite: Whether `out` may hold files. Those of the same names are replaced, the others stay.
        verify: Whether a file that bears one of the nine published names must have that file's sha256, and one in the
            Hub's cache that which the Hub has.
        offline: Whether nothing may be downloaded.
        remote_code: Whether to put the code beside the model that loads it where this package isn't installed.
        note: Called with a line that the user should read; by default it goes to stderr.

    Returns:
        The model's configuration.

    Raises:
        OSError: A file or folder is missing, in use or full, or a download failed.
        ValueError: A file is damaged or another model's (CheckpointError is one), or the layout cannot express the
            model. Nothing is written to `out` then.

    Example::

        hf_clip.convert("ViT-L-14-336px.pt", "clip-vit-l14-336")
        hf_clip.convert("ViT-L/14@336px", "clip-vit-l14-336")  # downloads it
        hf_clip.convert("clip-vit-l14-336", "stock", layout="transformers")
    """
    check_layout(layout, remote_code)
    out = check_destination(out, overwrite)
    model, processor = read(
        source,
        config=config,
        activation=activation,
        weights=weights,
        vocabulary=vocabulary,
        verify=verify,
        offline=offline,
        note=note,
    )
    write(model, processor, out, layout, overwrite=overwrite, remote_code=remote_code, note=note)
    return model.config


__all__ = ["convert"]
