"""The checkpoint reader: real TorchScript archives, their oddities, and files that must be refused unread."""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hf_clip.original import CheckpointError, read_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit, which writes these files, is deprecated

STATE = {
    "weight": torch.randn(3, 4).half(),
    "bias": torch.randn(4),
    "layers.0.scale": torch.tensor(2.5),
    "layers.0.count": torch.tensor(7),
}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


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


@pytest.fixture
def state_dict_file(tmp_path: Path) -> Path:
    torch.save(STATE, tmp_path / "state.pt")
    return tmp_path / "state.pt"


# --- files that are read -------------------------------------------------------------------------------------------


def test_scripted_archive_has_the_references_state_dict(archives: dict[str, Path], references: dict, tower: str):
    checkpoint = read_checkpoint(archives[tower])
    scalars = {"input_resolution", "context_length", "vocab_size"}
    assert checkpoint.container == "torchscript"
    assert scalars <= checkpoint.tensors.keys()
    assert_same({k: v for k, v in checkpoint.tensors.items() if k not in scalars}, references[tower].state_dict())


def test_reading_equals_what_torch_jit_would_have_loaded(archives: dict[str, Path], tower: str):
    executed = torch.jit.load(archives[tower], map_location="cpu")
    assert_same(read_checkpoint(archives[tower]).tensors, executed.state_dict())


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("offset", torch.ones(4))

    def forward(self, x):
        return self.linear(x) + self.offset


class Outer(nn.Module):
    """Two of the same class, so that names are mangled; attributes that are no tensors, as the originals have."""

    resolution: int
    name: str
    sizes: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Inner(), Inner()
        self.resolution, self.name, self.sizes = 224, "clip", [1, 2, 3]
        self.shared = nn.Parameter(torch.randn(6, 4).half())

    def forward(self, x):
        return self.second(self.first(x)) + float(self.resolution) + self.shared.float().sum() + float(len(self.sizes))


@pytest.mark.parametrize("way", ["scripted", "traced"])
def test_mangled_classes_and_other_attributes(way: str, tmp_path: Path):
    model = Outer().eval()
    compiled = torch.jit.script(model) if way == "scripted" else torch.jit.trace(model, torch.zeros(2, 4))
    torch.jit.save(compiled, str(tmp_path / "model.pt"))
    if way == "traced":
        with zipfile.ZipFile(tmp_path / "model.pt") as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
            assert b"___torch_mangle_" in archive.read(name)
    assert_same(read_checkpoint(tmp_path / "model.pt").tensors, model.state_dict())


def test_storages_saved_on_a_gpu_are_read_without_one(archives: dict[str, Path], references: dict, tmp_path: Path):
    """The published files say `cuda:0` in every storage. The pickled text is put there by hand."""

    def move(name: str, data: bytes) -> tuple[str, bytes]:
        assert not name.endswith("data.pkl") or b"X\x03\x00\x00\x00cpu" in data
        return name, data.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")

    path = rewrite(archives["vit"], tmp_path / "gpu.pt", move)
    found = read_checkpoint(path).tensors
    expected = references["vit"].state_dict()
    assert_same({k: found[k] for k in expected}, expected)


@pytest.mark.parametrize("root", ["ViT-B-32-model", "some where/deeper", "archive"])
def test_folder_inside_the_zip_may_have_any_name(state_dict_file: Path, tmp_path: Path, root: str):
    path = rewrite(state_dict_file, tmp_path / "renamed.pt", lambda n, d: (f"{root}/{n.split('/', 1)[1]}", d))
    assert_same(read_checkpoint(path).tensors, STATE)


def test_compressed_entries_are_read(state_dict_file: Path, tmp_path: Path):
    path = rewrite(state_dict_file, tmp_path / "small.pt", lambda n, d: (n, d), compress=True)
    assert_same(read_checkpoint(path).tensors, STATE)


def test_state_dict_old_and_new_and_safetensors(state_dict_file: Path, tmp_path: Path):
    torch.save(STATE, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(OrderedDict(STATE), tmp_path / "ordered.pt")
    torch.save({k: nn.Parameter(v, requires_grad=False) for k, v in STATE.items()}, tmp_path / "parameters.pt")
    save_file(STATE, tmp_path / "state.safetensors")
    for name in ("state.pt", "legacy.pt", "ordered.pt", "parameters.pt", "state.safetensors"):
        assert_same(read_checkpoint(tmp_path / name).tensors, STATE)


def test_views_keep_their_strides(tmp_path: Path):
    base = torch.arange(24.0).view(4, 6)
    state = {"transposed": base.T, "slice": base[1:3, ::2], "again": base, "empty": torch.empty(0, 3)}
    torch.save(state, tmp_path / "views.pt")
    assert_same(read_checkpoint(tmp_path / "views.pt").tensors, state)


def test_tensors_are_mapped_and_survive_being_forgotten(archives: dict[str, Path]):
    checkpoint = read_checkpoint(archives["vit"])
    before = checkpoint.tensors["positional_embedding"].clone()
    checkpoint.forget_read_pages()
    assert torch.equal(checkpoint.tensors["positional_embedding"], before)


# --- files that are refused ----------------------------------------------------------------------------------------


class Planted:
    """Pickles as a call of `os.mkdir`: a harmless stand-in for anything."""

    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def planted_pickle(target: Path) -> bytes:
    return pickle.dumps(Planted(target), protocol=2)


@pytest.mark.parametrize("entry", ["data.pkl", "constants.pkl", "attributes.pkl", "extra/hidden.pkl"])
def test_planted_code_in_any_pickle_is_refused_and_not_run(archives: dict[str, Path], tmp_path: Path, entry: str):
    target = tmp_path / "executed"
    path = tmp_path / "planted.pt"
    rewrite(archives["vit"], path, lambda n, d: None if n.split("/", 1)[1] == entry else (n, d))
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].split("/")[0]
        archive.writestr(f"{root}/{entry}", planted_pickle(target))
    with pytest.raises(CheckpointError, match=r"refused: its .*pkl asks for (posix|nt)\.mkdir.*could run code"):
        read_checkpoint(path)
    assert not target.exists()
    pickle.loads(planted_pickle(target))
    assert target.exists()  # the plant does work where pickles are trusted


def test_planted_code_beside_tensors_is_refused(tmp_path: Path):
    for zipped in (True, False):
        target, path = tmp_path / f"executed-{zipped}", tmp_path / f"{zipped}.pt"
        torch.save(STATE | {"extra": Planted(target)}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError):
            read_checkpoint(path)
        assert not target.exists()


@pytest.mark.parametrize("name", ["builtins eval", "os system", "torch._utils _rebuild_sparse_tensor", "torch load"])
def test_only_named_functions_are_known(name: str, tmp_path: Path):
    module, function = name.split()
    call = b"\x80\x02c" + f"{module}\n{function}\n".encode() + b"X\x01\x00\x00\x001\x85R."
    with zipfile.ZipFile(tmp_path / "file.pt", "w") as archive:
        archive.writestr("archive/data.pkl", call)
    with pytest.raises(CheckpointError, match=f"asks for {module}.{function}"):
        read_checkpoint(tmp_path / "file.pt")


def test_dotted_names_do_not_reach_through_an_allowed_module(tmp_path: Path):
    """Protocol 4 lets a pickle name attributes of attributes: `torch.jit._pickle` → `torch.os.system`."""
    out = io.BytesIO()
    pickler = pickle.Pickler(out, protocol=4)
    pickler.dump(0)
    call = b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93\x8c\x04true\x85R."
    with zipfile.ZipFile(tmp_path / "file.pt", "w") as archive:
        archive.writestr("archive/data.pkl", call)
    with pytest.raises(CheckpointError, match=r"asks for torch.os\.system"):
        read_checkpoint(tmp_path / "file.pt")


def test_script_class_is_inert(tmp_path: Path):
    """A script object's class may be called and given a state; neither does anything."""
    out = b"\x80\x02c__torch__.x\nY\n)\x81}X\x01\x00\x00\x00aK\x01sb."
    with zipfile.ZipFile(tmp_path / "file.pt", "w") as archive:
        archive.writestr("archive/data.pkl", out)
    checkpoint = read_checkpoint(tmp_path / "file.pt")
    assert checkpoint.tensors == {}


def test_size_beyond_the_storage_is_refused(tmp_path: Path, state_dict_file: Path):
    def shorten(name: str, data: bytes) -> tuple[str, bytes]:
        return name, data[:-2] if name.endswith("data/0") else data

    with pytest.raises(CheckpointError, match="is damaged: .*data/0 has"):
        read_checkpoint(rewrite(state_dict_file, tmp_path / "short.pt", shorten))


def test_big_endian_file_is_refused(tmp_path: Path, state_dict_file: Path):
    path = rewrite(state_dict_file, tmp_path / "big.pt", lambda n, d: (n, b"big" if n.endswith("byteorder") else d))
    with pytest.raises(CheckpointError, match="big-endian"):
        read_checkpoint(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["archive", "state dict", "legacy", "safetensors"])
def test_truncated_file_says_so(
    archives: dict[str, Path], state_dict_file: Path, tmp_path: Path, kind: str, share: float
):
    torch.save(STATE, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(STATE, tmp_path / "state.safetensors")
    whole = {
        "archive": archives["resnet"],
        "state dict": state_dict_file,
        "legacy": tmp_path / "legacy.pt",
        "safetensors": tmp_path / "state.safetensors",
    }[kind].read_bytes()
    path = tmp_path / "truncated"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=f"{path} ") as caught:
        read_checkpoint(path)
    assert "copy or download it again" in str(caught.value) or "holds a pickle" in str(caught.value)


def test_files_that_are_no_checkpoints(tmp_path: Path):
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("version https://git-lfs.github.com/spec/v1")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    torch.save([1, 2, 3], tmp_path / "list.pt")
    torch.save({"epoch": 3, "state_dict": dict(STATE)}, tmp_path / "nested.pt")
    messages = {
        "empty.pt": "is empty; copy or download it again",
        "text.pt": "is neither a PyTorch checkpoint nor a safetensors file",
        "other.zip": "is a zip file, but no PyTorch archive: it has no data.pkl",
        "list.pt": "holds a list, but a dictionary of tensors is needed",
        "nested.pt": "no tensors at its top level, only: epoch, state_dict",
    }
    for name, message in messages.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            read_checkpoint(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(FileNotFoundError, match="There is no checkpoint file"):
        read_checkpoint(tmp_path / "missing.pt")
    with pytest.raises(IsADirectoryError, match="is a folder; a checkpoint file is needed"):
        read_checkpoint(tmp_path)


def test_header_of_a_safetensors_file_that_lies(tmp_path: Path):
    header = b'{"a":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}}'
    (tmp_path / "file.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_checkpoint(tmp_path / "file.safetensors")
