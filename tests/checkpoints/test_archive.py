"""The checkpoint reader: real TorchScript archives, state dicts and training checkpoints, and their oddities."""

import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hf_clip.checkpoints.archive import read_checkpoint

from .hand_made import STATE, rewrite

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit, which writes these files, is deprecated


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


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


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_of_torch_save_is_read(tmp_path: Path, protocol: int):
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.pt"
        torch.save(STATE, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
        assert_same(read_checkpoint(path).tensors, STATE)


def test_training_checkpoint_with_all_that_lies_beside_the_weights(tmp_path: Path):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10)
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    scheduler.step()
    state = {
        "epoch": 3,
        "name": "run",
        "best": None,
        "seed": 2**40,
        "sizes": model[0].weight.shape,
        "state_dict": {f"module.{name}": tensor for name, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "scheduler": {name: value for name, value in scheduler.state_dict().items() if not callable(value)},
        "scaler": {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 0},
        "rng": torch.get_rng_state(),
    }
    for zipped in (True, False):
        torch.save(state, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
        checkpoint = read_checkpoint(tmp_path / "file.pt")
        assert checkpoint.container == "training checkpoint"
        assert_same(checkpoint.tensors, state["state_dict"])


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
