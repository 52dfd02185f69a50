"""Checkpoints made by hand: pickles opcode by opcode, archives entry by entry."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch

STATE = {
    "weight": torch.randn(3, 4).half(),
    "bias": torch.randn(4),
    "layers.0.scale": torch.tensor(2.5),
    "layers.0.count": torch.tensor(7),
}


def word(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def archive_of(path: Path, pickled: bytes, storages: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, data in (storages or {}).items():
            archive.writestr(f"archive/data/{name}", data)
    return path


def rewrite(
    path: Path, out: Path, change: Callable[[str, bytes], tuple[str, bytes] | None], compress: bool = False
) -> Path:
    """Copy a zip file entry by entry through `change`, which may rename, alter or drop an entry."""
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w", kind) as target:
        for entry in source.infolist():
            if (changed := change(entry.filename, source.read(entry))) is not None:
                target.writestr(*changed)
    return out


def pickled_tensor(numel: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A state dict {"a": tensor} as torch.save pickles it, with numbers of one's choice."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if isinstance(value, Marker) else None

    class Marker:
        pass

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Marker(), 0, size, stride, False, OrderedDict())

    out = io.BytesIO()
    Pickler(out, protocol=2).dump({"a": Tensor()})
    return out.getvalue()


class Planted:
    """Pickles as a call of `os.mkdir`: a harmless stand-in for anything."""

    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def planted_pickle(target: Path) -> bytes:
    return pickle.dumps(Planted(target), protocol=2)
