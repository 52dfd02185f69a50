"""Write a safetensors file tensor by tensor.

`safetensors.torch.save_file` wants all tensors at once. Here each one is made contiguous, written and
forgotten before the next is read, so that converting a checkpoint needs memory for its largest tensor only.

Format: an 8-byte little-endian length, a JSON header with dtype, shape and byte range of every tensor, the bytes.
"""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..model.checked_files import one_line
from .archive import SAFETENSORS_DTYPES
from .errors import MOST_SHOWN, CheckpointError

DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    after_each: Callable[[int], None],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `tensors` to `path`; they may be views and may lie in a mapped file.

    after_each: called with the number of bytes of every tensor once it is written
    metadata:   further texts for the header
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    # Larger elements first, then by name, as the library lays files out: every tensor is aligned to its dtype.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        dtype, shape = DTYPE_NAMES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in order:
            data = tensors[name].contiguous().reshape(-1)
            file.write(data.view(torch.uint8).numpy().data if data.numel() else b"")
            after_each(data.nbytes)


def read_all(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors of a safetensors file, and the texts in its header. Raises ValueError if it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no readable safetensors file ({error}).") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file. Raises CheckpointError for a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        reason = one_line(error, MOST_SHOWN)
        raise CheckpointError(f"{path} is truncated or damaged ({reason}); save or download it again.") from None
