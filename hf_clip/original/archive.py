"""Read the tensors of a checkpoint without running any of its code.

OpenAI published TorchScript archives: zip files whose `data.pkl` is a pickled tree of script objects, their
tensors' bytes lying uncompressed in `data/0`, `data/1`, ... `torch.save` writes a flat dictionary in the same
container. One reader takes both:

1. Every pickle in the archive, used or not, goes through an unpickler that knows only tensors, storages and
   plain containers. Script classes become inert records; any other name is refused.
2. Storages are mapped from the file, wherever they were saved from; nothing is read before it is used. (Those of
   compressed entries, and of files older than PyTorch 1.6, are unpacked into memory.)
3. Tensors found among the records' attributes are named by their path, as `state_dict()` names them.

Invariant: no function or class named by the file is ever called, only the few of this module.
"""

import io
import json
import math
import mmap
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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
LOCAL_FILE_HEADER = struct.Struct("<4s5H3L2H")
MOST_PICKLED_BYTES = 1 << 26
MOST_RECORDS = 100_000
"""Bounds that no checkpoint of a CLIP comes near: its pickle has some hundred kilobytes and a few thousand records."""

UNSAFE = (
    "which is neither a tensor nor a plain container and could run code. Take the checkpoint from a source you trust, "
    "or save its state dict anew."
)


SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


NESTED_WEIGHTS = ("state_dict", "model_state_dict", "model")
NESTED_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
"""Where training programs keep the weights, and their moving averages, beside epoch and optimizer."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that is refused; the message says which and what to do."""


@dataclass
class Checkpoint:
    """Tensors by name, mapped from the file at `path`.

    container: "torchscript", "state dict", "training checkpoint" or "safetensors"
    averages:  a training checkpoint's moving averages of the weights; of others, and where there are none, None
    """

    path: Path
    container: str
    tensors: dict[str, Tensor]
    averages: dict[str, Tensor] | None = None
    _mapping: mmap.mmap | None = field(default=None, repr=False)

    def forget_read_pages(self) -> None:
        """Give back the memory of what was read so far; tensors stay valid and are read from the file again.

        Changes made to the tensors in place are lost.
        """
        if self._mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._mapping.madvise(mmap.MADV_DONTNEED)


class ScriptObject:
    """An inert record of a pickled script module: its attributes and nothing else."""

    attributes: dict[str, Any]

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


@dataclass(frozen=True)
class StorageType:
    dtype: torch.dtype


@dataclass(frozen=True)
class Storage:
    """A run of `numel` elements lying in the archive's entry `data/<key>`."""

    key: str
    dtype: torch.dtype
    numel: int


def printable(name: str) -> str:
    """A name from a file as it may be shown: without line breaks or control characters."""
    return name if name.isprintable() else ascii(name)


def load_pickle(data: bytes, entry: str, rebuild: Callable[..., Any]) -> Any:
    """Unpickle `data`, after a look at its opcodes: a memo index beyond its length only serves to fill the memory."""
    if len(data) > MOST_PICKLED_BYTES:
        raise CheckpointError(f"is refused: its {entry} has {len(data)} bytes, far more than a checkpoint needs.")
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise pickle.UnpicklingError(f"a memo index of {argument}")
    return RestrictedUnpickler(data, entry, rebuild).load()


def _identity(value: Any, *_: Any) -> Any:
    return value


class RestrictedUnpickler(pickle.Unpickler):
    """An unpickler that can build tensors, script records and plain containers, and nothing else.

    rebuild: makes a tensor of (storage, offset, size, stride); a pickle that is only inspected passes a stand-in
    """

    def __init__(self, data: bytes, entry: str, rebuild: Callable[..., Any]):
        super().__init__(io.BytesIO(data))
        self.entry = entry
        # Made anew for every pickle: whatever a file attaches to a class stays within that file.
        self.script_class = type("ScriptObject", (ScriptObject,), {})
        self.allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): tuple,
            ("torch._utils", "_rebuild_tensor"): lambda *args: rebuild(*args[:4]),
            ("torch._utils", "_rebuild_tensor_v2"): lambda *args: rebuild(*args[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda *args: args[0],
            **{
                ("torch.jit._pickle", name): lambda *args: args[0]
                for name in (
                    "build_intlist",
                    "build_tensorlist",
                    "build_doublelist",
                    "build_boollist",
                    "restore_type_tag",
                )
            },
            **{("torch", name): StorageType(dtype) for name, dtype in STORAGE_DTYPES.items()},
        }

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return self.script_class
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        raise CheckpointError(f"refused: its {self.entry} asks for {printable(f'{module}.{name}')}, {UNSAFE}")

    def persistent_load(self, reference: Any) -> Storage:
        kind, storage_type, key, _location, numel = reference
        if kind != "storage" or not isinstance(storage_type, StorageType):
            raise pickle.UnpicklingError(f"unknown kind of stored object {reference!r}")
        if numel < 0:
            raise pickle.UnpicklingError(f"a storage of {numel} elements")
        return Storage(str(key), storage_type.dtype, int(numel))


class ZipStorages:
    """The storages of one archive, mapped from the file; a compressed one is unpacked into memory instead."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, root: str):
        self.archive = archive
        self.root = root
        with path.open("rb") as file:
            self.mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.loaded: dict[str, Tensor] = {}

    def _bytes_at(self, entry: zipfile.ZipInfo) -> tuple[Any, int]:
        """A buffer and the offset in it at which the entry's bytes start."""
        if entry.compress_type != zipfile.ZIP_STORED:
            return bytearray(self.archive.read(entry)), 0
        header = LOCAL_FILE_HEADER.unpack_from(self.mapping, entry.header_offset)
        name_length, extra_length = header[-2:]
        start = entry.header_offset + LOCAL_FILE_HEADER.size + name_length + extra_length
        if header[0] != b"PK\x03\x04" or start + entry.compress_size > len(self.mapping):
            raise zipfile.BadZipFile(f"the entry {printable(entry.filename)} lies outside of the file")
        return self.mapping, start

    def rebuild(self, storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        """A view of the stored bytes as a tensor of `size`, strided; bounds are checked."""
        if math.prod(size) > storage.numel:
            raise CheckpointError(f"has a tensor of shape {tuple(size)} made of {storage.numel} stored elements.")
        if storage.key not in self.loaded:
            name = f"{self.root}data/{storage.key}"
            entry = self.archive.getinfo(name)
            needed = storage.numel * storage.dtype.itemsize
            if entry.file_size != needed:
                raise CheckpointError(f"is damaged: {name} has {entry.file_size} bytes, but {needed} are needed.")
            if storage.numel == 0:
                self.loaded[storage.key] = torch.empty(0, dtype=storage.dtype)
            else:
                buffer, start = self._bytes_at(entry)
                self.loaded[storage.key] = torch.frombuffer(
                    buffer, dtype=storage.dtype, count=storage.numel, offset=start
                )
        return self.loaded[storage.key].as_strided(tuple(size), tuple(stride), offset)


def _tensors_of(root: ScriptObject) -> dict[str, Tensor]:
    """Name every tensor in a tree of script records by its path; other attributes are passed over."""
    found: dict[str, Tensor] = {}
    records, visited = [("", root)], 0
    while records:
        prefix, record = records.pop()
        visited += 1
        if visited > MOST_RECORDS:  # records may share children, so a small file can describe an endless tree
            raise CheckpointError(f"is refused: it describes more than {MOST_RECORDS} modules.")
        for name, value in getattr(record, "attributes", {}).items():
            if isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value
            elif isinstance(value, ScriptObject):
                records.append((f"{prefix}{name}.", value))
    return found


def _only_tensors(state: Any) -> dict[str, Tensor]:
    values = state if isinstance(state, dict) else {}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _nested_weights(state: dict[str, Any], names: tuple[str, ...]) -> dict[str, Tensor]:
    return next((tensors for name in names if (tensors := _only_tensors(state.get(name)))), {})


def _from_state_dict(path: Path, state: Any, mapping: mmap.mmap | None = None) -> Checkpoint:
    """A flat dictionary of tensors, or a training checkpoint that has one nested beside other things."""
    if not isinstance(state, dict):
        raise CheckpointError(f"holds a {type(state).__name__}, but a dictionary of tensors is needed.")
    averages = _nested_weights(state, NESTED_AVERAGES)
    if tensors := _nested_weights(state, NESTED_WEIGHTS) or averages:
        return Checkpoint(path, "training checkpoint", tensors, averages or None, mapping)
    if tensors := _only_tensors(state):
        return Checkpoint(path, "state dict", tensors, None, mapping)
    names = ", ".join(printable(str(name)) for name in list(state)[:5]) or "nothing"
    raise CheckpointError(
        f"holds no tensors at its top level or in {', '.join(NESTED_WEIGHTS)}, only: {names}. Save the state dict by "
        f"itself."
    )


def _read_entry(archive: zipfile.ZipFile, name: str) -> bytes:
    if (size := archive.getinfo(name).file_size) > MOST_PICKLED_BYTES:
        raise CheckpointError(f"is refused: its {printable(name)} has {size} bytes, far more than a checkpoint needs.")
    return archive.read(name)


def _read_zip(path: Path) -> Checkpoint:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if len(set(names)) < len(names):
            raise CheckpointError(
                "is refused: it has two entries of the same name, and readers differ in which they see."
            )
        roots = sorted((name.removesuffix("data.pkl") for name in names if name.endswith("data.pkl")), key=len)
        if not roots:
            raise CheckpointError("is a zip file, but no PyTorch archive: it has no data.pkl.")
        root = roots[0]
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise CheckpointError("was saved on a big-endian machine; save it anew on a little-endian one.")
        for name in names:
            if name.endswith("pkl") and name != f"{root}data.pkl":
                load_pickle(_read_entry(archive, name), name, rebuild=_identity)
        storages = ZipStorages(path, archive, root)
        loaded = load_pickle(_read_entry(archive, f"{root}data.pkl"), f"{root}data.pkl", storages.rebuild)
    if isinstance(loaded, ScriptObject):
        return Checkpoint(path, "torchscript", _tensors_of(loaded), None, storages.mapping)
    return _from_state_dict(path, loaded, storages.mapping)


def _read_safetensors(path: Path) -> Checkpoint:
    with safe_open(path, "pt"):  # checks the header: names, dtypes, and that ranges fill the file
        pass
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    (length,) = struct.unpack_from("<Q", mapping)
    header = json.loads(mapping[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if (dtype := SAFETENSORS_DTYPES.get(entry["dtype"])) is None:
            raise CheckpointError(f"has {printable(name)} of dtype {entry['dtype']}, which no CLIP has.")
        count, start = math.prod(entry["shape"]), 8 + length + entry["data_offsets"][0]
        flat = (
            torch.frombuffer(mapping, dtype=dtype, count=count, offset=start) if count else torch.empty(0, dtype=dtype)
        )
        tensors[name] = flat.view(entry["shape"])
    return Checkpoint(path, "safetensors", tensors, None, mapping)


def _read_legacy(path: Path) -> Checkpoint:
    """A `torch.save` file from before PyTorch 1.6, which is no zip; PyTorch's own restricted unpickler reads it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" not in str(error) and "GLOBAL" not in str(error):
            raise
        raise CheckpointError(f"refused: its pickle asks for something {UNSAFE}") from None
    return _from_state_dict(path, state)


def _check_tensors(tensors: dict[str, Tensor]) -> None:
    """Refuse what no checkpoint of a CLIP holds, before anything is done with it."""
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise CheckpointError(f"names a tensor {name!r}, but names are texts.")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in SAFETENSORS_DTYPES.values():
            kind = "meta" if tensor.is_meta else f"{tensor.layout} {tensor.dtype}"
            raise CheckpointError(f"has {printable(name)} as a {kind} tensor; plain tensors of numbers are needed.")


def _reader_for(start: bytes) -> Callable[[Path], Checkpoint]:
    if start[:4] == b"PK\x03\x04":
        return _read_zip
    if start[8:9] == b"{":
        return _read_safetensors
    if start[:1] == b"\x80":  # the pickle protocol's first byte
        return _read_legacy
    raise CheckpointError("is neither a PyTorch checkpoint nor a safetensors file; name a file such as ViT-B-32.pt.")


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a TorchScript archive, a state-dict `.pt` or a safetensors file; which one is seen from its bytes.

    No code of the file is run. Tensors keep their dtypes and are mapped from the file.

    Raises FileNotFoundError, IsADirectoryError, or CheckpointError for a file that is empty, truncated, something
    else, or that asks for more than tensors and plain containers.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; a checkpoint file is needed, such as ViT-B-32.pt.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint file {path}; check the path.")
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        raise CheckpointError(f"{path} is empty; copy or download it again.")
    try:
        checkpoint = _reader_for(start)(path)
        _check_tensors(checkpoint.tensors)
        _check_tensors(checkpoint.averages or {})
        return checkpoint
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None
    except (zipfile.BadZipFile, SafetensorError, KeyError, EOFError, struct.error, RuntimeError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); copy or download it again.") from error
    except (
        pickle.UnpicklingError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        RecursionError,
        OverflowError,
        MemoryError,
    ) as error:
        reason = printable(str(error).split("\n")[0]) or type(error).__name__
        raise CheckpointError(f"{path} holds a pickle that is no checkpoint's ({reason}).") from error
