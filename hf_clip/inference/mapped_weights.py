"""Let go of the pages of a checkpoint file whose weights a model no longer uses.

transformers maps a safetensors file instead of reading it, if no dtype has to change. All tensors then lie in one
mapping, which lives as long as any of them. When layers are packed, their old weights stay resident as pages of the
file, although nothing reads them any more.

Invariant: no tensor changes its values. Only unchanged pages of a file are let go of; whoever still reads them gets
them from the file again.
"""

import ctypes
import mmap
import sys
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from torch import Tensor

Range = tuple[int, int]
"""First address, and the address behind the last."""

DROP = getattr(mmap, "MADV_DONTNEED", None)

CHANGED = ("Anonymous:", "Swap:")
"""Fields of /proc/self/smaps with the changed pages of a mapping: those in memory, and those that were swapped out."""


def addresses_of(model: Any) -> list[Range]:
    """Return where the parameters and buffers of a model lie in memory."""
    tensors: Iterable[Tensor] = [*model.parameters(), *model.buffers()]
    on_cpu = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.is_contiguous()]
    return [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in on_cpu]


def _unchanged_files() -> list[Range]:
    """List the private mappings of files in which no page was written to."""
    found: list[Range] = []
    place: Range = (0, 0)
    with open("/proc/self/smaps", errors="replace") as lines:  # a path may have bytes of another encoding
        for line in lines:
            fields = line.split()
            if not fields[0].endswith(":"):  # addresses, permissions, offset, device, inode, path
                start, end = (int(address, 16) for address in fields[0].split("-"))
                place = (start, end)
                if len(fields) > 5 and fields[4] != "0" and fields[1].endswith("p"):
                    found.append(place)
            elif fields[0] in CHANGED and fields[1] != "0" and found and found[-1] == place:
                found.pop()
    return found


def let_go_of(before: list[Range], kept: list[Range]) -> int:
    """Drop the resident pages of weights that a model had and no longer has.

    Args:
        before: Where its weights were, from `addresses_of`.
        kept: Where they are now.

    Returns:
        The bytes of the file that are no longer resident. 0 if the weights were not mapped, or not on Linux.
    """
    if not sys.platform.startswith("linux") or DROP is None:
        return 0
    unused = sorted(set(before) - set(kept))
    if not unused:
        return 0
    # Neighbours are one range: a page may hold the end of one weight and the beginning of the next.
    ranges: list[list[int]] = [list(unused[0])]
    for (_, last), (first, end) in pairwise(unused):
        if first <= last + 64:  # safetensors aligns tensors
            ranges[-1][1] = end
        else:
            ranges.append([first, end])
    try:
        files, advise = _unchanged_files(), ctypes.CDLL(None).madvise
    except (OSError, AttributeError):  # no /proc, or no libc of that kind
        return 0
    dropped = 0
    for first, end in ranges:
        start, stop = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        is_mapped = any(low <= start and stop <= high for low, high in files)
        if start < stop and is_mapped and advise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), DROP) == 0:
            dropped += stop - start
    return dropped


__all__ = ["addresses_of", "let_go_of"]
