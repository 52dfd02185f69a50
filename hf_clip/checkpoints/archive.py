"""Read the tensors of a checkpoint without running any of its code.

OpenAI published TorchScript archives: zip files whose `data.pkl` is a pickled tree of script objects, their
tensors' bytes lying uncompressed in `data/0`, `data/1`, ... `torch.save` writes a flat dictionary in the same
container, and before PyTorch 1.6 a row of pickles with the bytes behind them. One reader takes all:

1. Every pickle in the file, used or not, goes through a machine that knows only tensors, storages and plain
   containers, see `pickle_machine`. Script classes become inert records; any other name is refused.
2. Tensors found among the records' attributes are named by their path, as `state_dict()` names them.
3. The storages of those that are wanted are mapped from the file, wherever they were saved from, and their checksums
   are compared. (Compressed ones are unpacked into memory.)

Invariants: no function or class named by the file is ever called. What a file costs to read, in time and in memory, is
bounded by its size on disk, and so is every message by a line.

Archives keep a CRC-32 of every entry. Safetensors files and those of before PyTorch 1.6 keep no checksum: only their
structure can be checked, or the sha256 of the whole file where it is known, see `download`.
"""

import json
import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..model.checked_files import one_line
from .errors import MOST_SHOWN, CheckpointError
from .pickle_machine import LONGEST_NAME, MOST_PICKLED_BYTES, OpcodeBudget, PickleMachine
from .stored_values import MOST_DIMENSIONS, Record, Storage, StoredTensor, Table
from .zip_container import ZipContainer

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

MOST_TENSORS = 20_000
MOST_ATTRIBUTES = 1_000_000
MOST_HEADER_BYTES = 1 << 24
"""Bounds that no CLIP comes near: the largest have some thousand tensors and 200 kilobytes of header."""

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
LONGEST_START = 16
"""Bytes by which the kinds of files are told apart."""


@dataclass
class Checkpoint:
    """Tensors by name, mapped from the file at `path`.

    Attributes:
        path: The file.
        container: "torchscript", "state dict", "training checkpoint" or "safetensors".
        tensors: The tensors, by the names that the file has for them.
        averages: The moving averages of the weights, if a training checkpoint holds any; else None.
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


class Storages(Protocol):
    def locate(self, storage: Storage) -> tuple[mmap.mmap | bytearray, int]:
        """A buffer that holds all of the storage's bytes, and where in it they begin."""


class Tensors:
    """Makes tensors from their descriptions, as views of the stored bytes. Each storage is located and checked once."""

    def __init__(self, storages: Storages):
        self.storages = storages
        self.made: dict[str, Tensor] = {}

    def make(self, described: StoredTensor) -> Tensor:
        storage = described.storage
        if storage.key not in self.made:
            buffer, start = self.storages.locate(storage)
            if storage.numel:
                flat = torch.frombuffer(buffer, dtype=storage.dtype, count=storage.numel, offset=start)
            else:
                flat = torch.empty(0, dtype=storage.dtype)
            self.made[storage.key] = flat
        return described.view(self.made[storage.key])

    def make_all(self, described: dict[str, StoredTensor]) -> dict[str, Tensor]:
        return {name: self.make(tensor) for name, tensor in described.items()}


@dataclass
class ZipStorages:
    """The storages of one archive: its entries `data/<key>`."""

    container: ZipContainer
    root: str
    check_sums: bool

    def locate(self, storage: Storage) -> tuple[mmap.mmap | bytearray, int]:
        name = f"{self.root}data/{storage.key}"
        entry = self.container.entries.get(name)
        if entry is None:
            raise CheckpointError(
                f"is truncated or damaged: it lacks {one_line(name, MOST_SHOWN)}; copy or download it again."
            )
        needed = storage.numel * storage.dtype.itemsize
        if entry.file_size != needed:
            raise CheckpointError(
                f"is damaged: {one_line(name, MOST_SHOWN)} has {entry.file_size} bytes, but {needed} are needed."
            )
        return self.container.locate(entry, self.check_sums)


class LegacyStorages:
    """The storages of a file from before PyTorch 1.6. They follow the pickles and end where the file ends.

    Each storage is its number of elements in eight bytes, followed by the elements.
    """

    def __init__(self, mapping: mmap.mmap, position: int, keys: list[Any], storages: dict[str, Storage]):
        self.mapping = mapping
        self.starts: dict[str, int] = {}
        if not all(type(key) is str for key in keys) or len(keys) != len(storages) or set(keys) != storages.keys():
            raise CheckpointError("is damaged: its pickle and its list of storages contradict each other.")
        for key in keys:
            storage, start = storages[key], position + 8
            count = int.from_bytes(mapping[position:start], "little", signed=True)
            position = start + storage.numel * storage.dtype.itemsize
            if position > len(mapping) or count != storage.numel:
                raise CheckpointError(
                    f"is truncated or damaged: it lacks elements of its storage {one_line(key, MOST_SHOWN)}; copy or "
                    f"download it again."
                )
            self.starts[key] = start
        if position != len(mapping):
            raise CheckpointError(f"is damaged: {len(mapping) - position} bytes follow its last storage.")

    def locate(self, storage: Storage) -> tuple[mmap.mmap | bytearray, int]:
        return self.mapping, self.starts[storage.key]


def _check_names(names: Any) -> None:
    """Refuse more tensors, or longer names, than any model has. They would only keep the reader busy."""
    if len(names) > MOST_TENSORS:
        raise CheckpointError(f"is refused: it has {len(names)} tensors, but no CLIP has more than {MOST_TENSORS}.")
    longest = max(names, key=len, default="")
    if len(longest) > LONGEST_NAME:
        raise CheckpointError(f"is refused: it names a tensor {one_line(longest, MOST_SHOWN)}, which no CLIP has.")


def _tensors_of(root: Record) -> dict[str, StoredTensor]:
    """Name every tensor in a tree of script records by its path; other attributes are passed over."""
    found: dict[str, StoredTensor] = {}
    records, visited = [("", root)], 0
    while records:
        prefix, record = records.pop()
        attributes = record.attributes or Table()
        visited += 1 + len(attributes.pairs)
        # Records may share children, so a small file can describe an endless tree.
        if visited > MOST_ATTRIBUTES:
            raise CheckpointError(f"is refused: its modules have more than {MOST_ATTRIBUTES} attributes.")
        for name, value in attributes.named().items():
            if isinstance(value, (StoredTensor, Record)) and len(prefix) + len(name) >= LONGEST_NAME:
                raise CheckpointError(f"is refused: it names a tensor or module {one_line(prefix + name, MOST_SHOWN)}.")
            if isinstance(value, StoredTensor):
                found[f"{prefix}{name}"] = value
            elif isinstance(value, Record):
                records.append((f"{prefix}{name}.", value))
    return found


def _only_tensors(state: Any) -> dict[str, StoredTensor]:
    if not isinstance(state, Table):
        return {}
    for key, value in state.pairs:
        if isinstance(value, StoredTensor) and type(key) is not str:
            shown = str(key) if type(key) in (int, float, bool) else f"by a {type(key).__name__}"
            raise CheckpointError(f"names a tensor {shown}, but names are texts.")
    return {name: value for name, value in state.named().items() if isinstance(value, StoredTensor)}


def _nested_weights(state: dict[str, Any], names: tuple[str, ...]) -> dict[str, StoredTensor]:
    return next((tensors for name in names if (tensors := _only_tensors(state.get(name)))), {})


def _of_pickle(path: Path, value: Any, storages: Storages, mapping: mmap.mmap) -> Checkpoint:
    """A tree of script records, a flat dictionary of tensors, or a training checkpoint that has one beside others."""
    averages: dict[str, StoredTensor] = {}
    if isinstance(value, Record):
        container, tensors = "torchscript", _tensors_of(value)
    elif not isinstance(value, Table):
        raise CheckpointError(f"holds a {type(value).__name__}, but a dictionary of tensors is needed.")
    else:
        state = value.named()
        averages = _nested_weights(state, NESTED_AVERAGES)
        if tensors := _nested_weights(state, NESTED_WEIGHTS) or averages:
            container = "training checkpoint"
        elif tensors := _only_tensors(value):
            container = "state dict"
        else:
            names = ", ".join(one_line(name, MOST_SHOWN) for name in list(state)[:5]) or "nothing"
            raise CheckpointError(
                f"holds no tensors at its top level or in {', '.join(NESTED_WEIGHTS)}, only: {names}. Save the state "
                f"dict by itself."
            )
    _check_names(tensors)
    _check_names(averages)
    makes = Tensors(storages)
    return Checkpoint(path, container, makes.make_all(tensors), makes.make_all(averages) or None, mapping)


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _read_zip(path: Path, check_sums: bool) -> Checkpoint:
    mapping = _map(path)
    container = ZipContainer(path, mapping)
    try:
        names = list(container.entries)
        roots = sorted((name.removesuffix("data.pkl") for name in names if name.endswith("data.pkl")), key=len)
        if not roots:
            raise CheckpointError("is a zip file, but no PyTorch archive: it has no data.pkl.")
        root, budget = roots[0], OpcodeBudget()
        if f"{root}byteorder" in names and container.read(f"{root}byteorder", most=16) != b"little":
            raise CheckpointError("was saved on a big-endian machine; save it anew on a little-endian one.")

        def unpickle(name: str) -> Any:
            data = container.read(name, MOST_PICKLED_BYTES)
            return PickleMachine(data, one_line(name, MOST_SHOWN), budget).run()

        for name in names:
            if name.endswith("pkl") and name != f"{root}data.pkl":
                unpickle(name)
        value = unpickle(f"{root}data.pkl")
        return _of_pickle(path, value, ZipStorages(container, root, check_sums), mapping)
    finally:
        container.close()


def _read_legacy(path: Path, _check_sums: bool) -> Checkpoint:
    """A `torch.save` file of before PyTorch 1.6: a magic number, a version, a machine, the value, keys of storages."""
    mapping, budget, position = _map(path), OpcodeBudget(), 0
    values, storages = [], {}
    for _ in range(5):
        machine = PickleMachine(mapping, "pickle", budget, position)
        values.append(machine.run())
        position = machine.position
        storages.update(machine.storages)
        if values[0] != LEGACY_MAGIC or (len(values) > 1 and values[1] != LEGACY_PROTOCOL):
            raise CheckpointError("is a pickle that torch.save didn't write; save the state dict with torch.save.")
    _, _, machine_values, value, keys = values
    if not isinstance(machine_values, Table) or machine_values.named().get("little_endian") is not True:
        raise CheckpointError("was saved on a big-endian machine; save it anew on a little-endian one.")
    if type(keys) is not list:
        raise CheckpointError("is damaged: it has no list of its storages; copy or download it again.")
    return _of_pickle(path, value, LegacyStorages(mapping, position, keys, storages), mapping)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise CheckpointError("is refused: its header has two values of the same name.")
    return values


def _read_safetensors(path: Path, _check_sums: bool) -> Checkpoint:
    mapping = _map(path)
    (length,) = struct.unpack_from("<Q", mapping)
    if length > MOST_HEADER_BYTES:
        raise CheckpointError(f"is damaged or refused: its header has {length} bytes, far more than a CLIP needs.")
    try:
        with safe_open(path, "pt"):  # checks the header: names, dtypes, and that ranges fill the file
            pass
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"is truncated or damaged ({one_line(error, MOST_SHOWN)}); copy or download it again."
        ) from None
    header = json.loads(mapping[8 : 8 + length], object_pairs_hook=_once)
    header.pop("__metadata__", None)
    _check_names(header)
    tensors = {}
    for name, entry in header.items():
        shape, count = entry["shape"], math.prod(entry["shape"])
        if (dtype := SAFETENSORS_DTYPES.get(entry["dtype"])) is None:
            raise CheckpointError(
                f"has {one_line(name, MOST_SHOWN)} of dtype {one_line(entry['dtype'], MOST_SHOWN)}, which no CLIP has."
            )
        if len(shape) > MOST_DIMENSIONS or (count == 0 and max(shape) > len(mapping)):
            raise CheckpointError(f"has {one_line(name, MOST_SHOWN)} of a shape that no CLIP has.")
        start = 8 + length + entry["data_offsets"][0]
        flat = (
            torch.frombuffer(mapping, dtype=dtype, count=count, offset=start) if count else torch.empty(0, dtype=dtype)
        )
        tensors[name] = flat.view(shape)
    return Checkpoint(path, "safetensors", tensors, None, mapping)


def _reader_for(start: bytes) -> Callable[[Path, bool], Checkpoint]:
    if start[:4] == b"PK\x03\x04":
        return _read_zip
    if start[8:9] == b"{":
        return _read_safetensors
    if start[:1] == b"\x80":  # the pickle protocol's first byte
        return _read_legacy
    raise CheckpointError("is neither a PyTorch checkpoint nor a safetensors file; name a file such as ViT-B-32.pt.")


def read_checkpoint(path: str | Path, *, check_sums: bool = True) -> Checkpoint:
    """Read a TorchScript archive, a state-dict `.pt` or a safetensors file; which one is seen from its bytes.

    No code of the file is run. Tensors keep their dtypes and are mapped from the file.

    Args:
        path: The file.
        check_sums: Compare the checksums of an archive's tensors. It is read once for that, at the speed of the disk
            or of CRC-32. To be left out where the whole file was checked, or where no tensor will be used.

    Raises:
        FileNotFoundError: There is no such file.
        IsADirectoryError: The path is a folder's.
        CheckpointError: The file is empty, truncated, damaged, something else, or asks for more than tensors and plain
            containers.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; a checkpoint file is needed, such as ViT-B-32.pt.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint file {path}; check the path.")
    with path.open("rb") as file:
        start = file.read(LONGEST_START)
    if not start:
        raise CheckpointError(f"{path} is empty; copy or download it again.")
    try:
        return _reader_for(start)(path, check_sums)
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None


__all__ = ["SAFETENSORS_DTYPES", "Checkpoint", "CheckpointError", "read_checkpoint"]
