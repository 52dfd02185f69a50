"""A model and its processor in memory, from wherever a model is."""

from pathlib import Path
from typing import Any

import torch

from ..model.hub_repository import CHECKPOINT_SUFFIXES
from ..model.modeling_hf_clip import HfClipModel
from ..model.processing_hf_clip import HfClipProcessor
from ..model.variants import VARIANTS, refuse_unknown_variant
from .folders import check_folder, check_reached, in_one_line
from .read import StoredModel, read


def build_model(stored: StoredModel, dtype: torch.dtype = torch.float32) -> HfClipModel:
    """Build a model of stored tensors, which are copied.

    Args:
        stored: What was read.
        dtype: The dtype of its floating-point tensors.

    Returns:
        The model on the CPU, in evaluation mode.
    """
    with torch.device("meta"):
        model = HfClipModel(stored.config)
    own = {
        name: tensor.to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in stored.tensors.items()
    }
    model.load_state_dict(own, assign=True)
    return model.eval()


def copy_to_memory(model: torch.nn.Module) -> None:
    """Take a model's tensors out of the file that they were read from.

    On a CPU they are mapped: if a program overwrites the file, such as a training that saves its model anew, they
    change, and if the file becomes shorter, the system ends the process that reads them.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def load_model(
    source: str | Path, *, dtype: str = "float32", offline: bool = False
) -> tuple[HfClipModel, HfClipProcessor]:
    """Load a model and its processor.

    Args:
        source: A folder or a repository on the Hub in the layout of hf_clip, stock CLIP or open_clip; a checkpoint file
            with OpenAI's tensor names; or one of OpenAI's nine names, whose file is downloaded.
        dtype: The name of the dtype to compute in.
        offline: Whether nothing may be downloaded.

    Returns:
        The model on the CPU, in evaluation mode, and its processor.

    Raises:
        OSError: There is no such source, or a download failed.
        ValueError: A file is damaged, or another model's; or the source is a name like those of OpenAI's models, and
            none of them.
    """
    name, path = str(source), Path(source)
    is_repository = path.is_dir() or (
        "/" in name and name not in VARIANTS and not path.is_file() and path.suffix not in CHECKPOINT_SUFFIXES
    )
    if is_repository and (path.is_dir() or not name.startswith((".", "/", "~"))):
        refuse_unknown_variant(name)
        hub: dict[str, Any] = {"local_files_only": True} if offline else {}
        if path.is_dir():
            check_folder(path)
        with in_one_line(source):
            if not path.is_dir() and not offline:
                check_reached(name)
            processor = HfClipProcessor.from_pretrained(source, **hub)
            return HfClipModel.from_pretrained(source, dtype=getattr(torch, dtype), **hub).eval(), processor
    stored, processor = read(source, offline=offline)
    return build_model(stored, getattr(torch, dtype)), processor


__all__ = ["build_model", "copy_to_memory", "load_model"]
