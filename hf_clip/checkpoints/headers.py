"""Names, shapes and dtypes of stored tensors, without reading any of their values.

A file's tensors are views of the mapped file, of which nothing but the header is read. A file on the Hub is asked for
its first bytes, and its tensors are on the device "meta", which has no memory.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import HfApi
from torch import Tensor

from .archive import SAFETENSORS_DTYPES, read_checkpoint
from .errors import CheckpointError
from .keys import without_descriptions, without_wrappers

CONTAINERS = {
    "torchscript": "TorchScript archive",
    "state dict": "state dict",
    "training checkpoint": "training checkpoint",
    "safetensors": "safetensors file",
}


@dataclass
class Headers:
    """What is stored.

    Attributes:
        container: How: one of `CONTAINERS`.
        tensors: By the names that they have there.
        nbytes: The size of all of them.
        has_averages: Whether a training checkpoint holds moving averages of the weights too.
    """

    container: str
    tensors: dict[str, Tensor]
    nbytes: int
    has_averages: bool = False


def read_headers(*paths: str | Path) -> Headers:
    """The tensors of a file, or of the shards of one model.

    Raises:
        FileNotFoundError: A file is missing.
        CheckpointError: A file is damaged, or no checkpoint.
    """
    checkpoints = [read_checkpoint(path, check_sums=False) for path in paths]
    tensors = {name: tensor for checkpoint in checkpoints for name, tensor in checkpoint.tensors.items()}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return Headers(checkpoints[0].container, tensors, nbytes, checkpoints[0].averages is not None)


def hub_headers(repo_id: str, names: list[str]) -> Headers | None:
    """The same of safetensors files on the Hub; None where they are of another kind, which a header doesn't describe.

    Raises:
        CheckpointError: A tensor has a dtype that no CLIP has.
    """
    if not names or any(not name.endswith(".safetensors") for name in names):
        return None
    tensors: dict[str, Tensor] = {}
    for name in names:
        for tensor, info in HfApi().parse_safetensors_file_metadata(repo_id, name).tensors.items():
            if info.dtype not in SAFETENSORS_DTYPES:
                raise CheckpointError(f"{repo_id} has {tensor[:80]!r} of dtype {info.dtype}, which no CLIP has.")
            tensors[tensor] = torch.empty(info.shape, dtype=SAFETENSORS_DTYPES[info.dtype], device="meta")
    return Headers("safetensors", tensors, sum(tensor.nbytes for tensor in tensors.values()))


NAMINGS = (
    ("LoRA", r"base_model\.model\..*\.lora_A\."),
    ("Stable Diffusion", r"(cond_stage_model|conditioner\.embedders\.\d+)\."),
    ("open_clip with a timm tower", r"visual\.trunk\."),
    ("transformers", r"(text_model|vision_model)\.(encoder|embeddings|layer1|conv1|attnpool)\."),
    ("OpenAI", r"visual\.(conv1\.weight|class_embedding)|ln_final\.weight"),
    ("timm", r"(cls_token|patch_embed\.proj\.weight|stages\.0\.)|(blocks|layers)\.0\.(attn\.qkv|norm1)\.|stem\.0\."),
)
"""Who names tensors so: patterns for the names' beginnings, the most special ones first."""


def naming_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Whose names the tensors bear, or None where these are nobody's that is known here."""
    names = set(tensors)
    names |= set(without_wrappers(tensors)) if not any(name.startswith("text_model.") for name in names) else set()
    for naming, pattern in NAMINGS:
        if any(re.match(pattern, name) for name in names):
            return naming
    return None


IMAGE_SIDE = ("visual.", "visual_projection.", "vision_model.")
COUNTERS = ("num_batches_tracked", "position_ids")


def count_parameters(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How many numbers the model learned: "all" of them, and those of the "image" tower with its projection."""
    learned = {
        name: tensor.numel()
        for name, tensor in without_descriptions(without_wrappers(tensors)).items()
        if not name.endswith((*COUNTERS, "running_mean", "running_var"))
    }
    return {
        "all": sum(learned.values()),
        "image": sum(count for name, count in learned.items() if name.startswith(IMAGE_SIDE)),
    }


def dtypes_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How many numbers are stored in each floating-point dtype, the most frequent first."""
    counts = Counter[str]()
    for tensor in tensors.values():
        if tensor.is_floating_point():
            counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return dict(counts.most_common())


__all__ = ["CONTAINERS", "Headers", "count_parameters", "dtypes_of", "hub_headers", "naming_of", "read_headers"]
