"""A CLIP as the folder that the server infinity loads.

infinity computes CLIPs with transformers' own CLIPModel on PyTorch; its engine for ONNX takes text models only. The
folder is therefore that of `hf-clip convert --format transformers`, for ViTs, with one more field: infinity cuts texts
to `max_length` of config.json, which is 20 where a file does not say, as transformers' default for generated text.
"""

from collections.abc import Callable
from pathlib import Path

from ..model.checked_files import read_object
from ..model.configuration_hf_clip import HfClipConfig
from .read import read
from .stock import why_not_stock
from .whole_file import write_json
from .whole_folder import check_destination, whole_folder
from .write import print_note, write_transformers


def export_infinity(
    source: str | Path, out: str | Path | None, *, note: Callable[[str], None] = print_note
) -> HfClipConfig:
    """Write a model into a folder for infinity; see the module.

    Args:
        source: Whatever `convert` reads.
        out: The folder to write to, new or empty.
        note: Called with a line that the user should read.

    Returns:
        The model's configuration.

    Raises:
        OSError: A file or folder is missing, in use or full, or `out` holds files.
        ValueError: infinity cannot compute the model. Nothing is written then.
    """
    if out is None:
        raise ValueError(
            f"An export for infinity is a folder of its own; name it: hf-clip export-onnx {source} OUT "
            f"--layout infinity"
        )
    if Path(out).is_dir() and any(Path(out).iterdir()):
        raise FileExistsError(f"{out} exists and is not empty; name a folder that is empty or new.")
    out = check_destination(out)
    model, processor = read(source, note=note)
    if reason := why_not_stock(model.config):
        raise ValueError(
            f"infinity cannot serve this model: {reason}, which infinity runs. `hf-clip serve {source}` serves it to "
            f"infinity's clients."
        )
    with whole_folder(out, overwrite=False, needed=model.nbytes) as folder:
        write_transformers(folder, model, processor, lambda written: model.forget_read_pages())
        config = folder / "config.json"
        write_json(config, read_object(config) | {"max_length": model.config.text_config.max_position_embeddings})
    return model.config


__all__ = ["export_infinity"]
