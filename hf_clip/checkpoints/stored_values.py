"""What the pickle of a checkpoint may hold: inert records of tensors, storages, dictionaries and script modules.

A `StoredTensor` only describes a tensor; its size, strides and offset lie within its storage, or it is refused when it
is described. Functions that a pickle calls are those of this module, whatever names the file knows them by.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..model.checked_files import one_line
from .errors import MOST_SHOWN, CheckpointError, NoCheckpointsPickleError

STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
MOST_DIMENSIONS = 8
LARGEST_COUNT = 1 << 62


@dataclass(frozen=True)
class StorageType:
    dtype: torch.dtype


@dataclass(frozen=True)
class Storage:
    """A run of `numel` elements that lies elsewhere in the file, under `key`."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that could be made of a storage: its elements all lie there, none of them twice as often as stored."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, flat: Tensor) -> Tensor:
        """The tensor as a view of its storage's elements, which are given as a tensor (numel,)."""
        if math.prod(self.size) == 0:
            return flat[:0].view(self.size)
        return flat.as_strided(self.size, self.stride, self.offset)


@dataclass
class Table:
    """A dictionary as its pairs, in the file's order. is_ordered: made as an OrderedDict, which may have attributes"""

    pairs: list[tuple[Any, Any]] = field(default_factory=list)
    is_ordered: bool = False

    def named(self) -> dict[str, Any]:
        """The values whose keys are texts. Raises CheckpointError when a key comes twice."""
        found: dict[str, Any] = {}
        for key, value in self.pairs:
            if type(key) is str:
                if key in found:
                    raise CheckpointError(f"is refused: it has two values for {one_line(key, MOST_SHOWN)}.")
                found[key] = value
        return found


@dataclass(frozen=True)
class ScriptClass:
    """Any class of a script module: its name says nothing that is needed."""


@dataclass
class Record:
    """A pickled script module: its attributes and nothing else."""

    attributes: Table | None = None


@dataclass(frozen=True)
class Call:
    """A function that pickles may call: `make` checks the arguments' types and returns the result."""

    make: Callable[[tuple[Any, ...]], Any]


def _are_counts(values: Any) -> bool:
    return (
        type(values) is tuple
        and len(values) <= MOST_DIMENSIONS
        and all(type(value) is int and abs(value) < LARGEST_COUNT for value in values)
    )


def _tensor(args: tuple[Any, ...]) -> StoredTensor:
    """(storage, offset, size, stride[, requires_grad, backward_hooks[, metadata]])"""
    if not 4 <= len(args) <= 7:
        raise NoCheckpointsPickleError(f"a tensor with {len(args)} arguments")
    storage, offset, size, stride = args[:4]
    if not isinstance(storage, Storage) or not _are_counts((offset,)):
        raise NoCheckpointsPickleError("a tensor without a storage or an offset")
    if not _are_counts(size) or not _are_counts(stride) or len(size) != len(stride):
        raise NoCheckpointsPickleError("a tensor whose size and stride are not as many counts, a few of each")
    if any(rest.pairs if isinstance(rest, Table) else type(rest) not in (bool, type(None)) for rest in args[4:]):
        raise NoCheckpointsPickleError("a tensor with hooks or metadata")
    count = math.prod(size)
    if min((offset, *size, *stride)) < 0:
        raise CheckpointError(f"has a tensor of shape {size}, stride {stride} and offset {offset}: one is negative.")
    if count > storage.numel or math.prod(length or 1 for length in size) >= LARGEST_COUNT:
        raise CheckpointError(f"has a tensor of shape {size} made of {storage.numel} stored elements.")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) if count else 0
    if last >= max(storage.numel, 1):
        raise CheckpointError(
            f"has a tensor of shape {size}, stride {stride} and offset {offset}, which reaches beyond its "
            f"{storage.numel} stored elements."
        )
    return StoredTensor(storage, offset, size, stride)


def _parameter(args: tuple[Any, ...]) -> StoredTensor:
    """(tensor, requires_grad, backward_hooks)"""
    if len(args) != 3 or not isinstance(args[0], StoredTensor):
        raise NoCheckpointsPickleError("a parameter without a tensor")
    return args[0]


def _ordered_table(args: tuple[Any, ...]) -> Table:
    if args:
        raise NoCheckpointsPickleError("an OrderedDict with arguments")
    return Table(is_ordered=True)


def _size(args: tuple[Any, ...]) -> tuple[int, ...]:
    if len(args) != 1 or not _are_counts(args[0]):
        raise NoCheckpointsPickleError("a torch.Size of no counts")
    return args[0]


def _typed_list(args: tuple[Any, ...]) -> list[Any]:
    if len(args) != 1 or type(args[0]) is not list:
        raise NoCheckpointsPickleError("a typed list of no list")
    return args[0]


def _tagged(args: tuple[Any, ...]) -> Any:
    """(list or dictionary, its type as a text)"""
    if len(args) != 2 or not isinstance(args[0], (list, Table)) or type(args[1]) is not str:
        raise NoCheckpointsPickleError("a type tag on something else")
    return args[0]


GLOBALS: dict[tuple[str, str], StorageType | Call] = {
    ("collections", "OrderedDict"): Call(_ordered_table),
    ("torch", "Size"): Call(_size),
    ("torch._utils", "_rebuild_tensor"): Call(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Call(_tensor),
    ("torch._utils", "_rebuild_parameter"): Call(_parameter),
    ("torch.jit._pickle", "restore_type_tag"): Call(_tagged),
    **{("torch.jit._pickle", f"build_{kind}list"): Call(_typed_list) for kind in ("int", "tensor", "double", "bool")},
    **{("torch", name): StorageType(dtype) for name, dtype in STORAGE_DTYPES.items()},
}
