"""Files that the checkpoint reader must refuse unread: those that ask for code, and those that fit no model."""

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_clip.checkpoints.archive import read_checkpoint
from hf_clip.checkpoints.errors import CheckpointError
from hf_clip.checkpoints.safetensors_stream import read_metadata

from .hand_made import STATE, Planted, archive_of, pickled_tensor, planted_pickle, rewrite, word

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit, which writes these files, is deprecated


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
        with pytest.raises(
            CheckpointError, match="refused: its .*could run code. Take the checkpoint from a source"
        ) as caught:
            read_checkpoint(path)
        assert "weights_only" not in str(caught.value)
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


@pytest.mark.parametrize(
    ("numel", "size", "stride", "message"),
    [
        (4, (2**45,), (0,), r"a tensor of shape \(35184372088832,\) made of 4 stored elements"),
        (-1, (4,), (1,), "a storage of -1 elements"),
        (4, (4,), (2,), r"shape \(4,\), stride \(2,\) and offset 0, which reaches beyond its 4 stored elements"),
        (4, (-4,), (1,), r"shape \(-4,\), stride \(1,\) and offset 0: one is negative"),
        (4, (4,), (-1,), r"shape \(4,\), stride \(-1,\) and offset 0: one is negative"),
        (2, (2,), (1,), "has 16 bytes, but 8 are needed"),
        (2**61, (4,), (1,), "has 16 bytes, but 9223372036854775808 are needed"),
        (2**62, (4,), (1,), "a storage of 4611686018427387904 elements"),
        (4, (0, 2**62), (1, 1), "is no checkpoint's"),
        (4, (0, 2**61, 2**61), (1, 1, 1), "made of 4 stored elements"),
        (4, (1,) * 9, (1,) * 9, "is no checkpoint's"),
    ],
)
def test_tensor_that_does_not_fit_its_storage_is_refused(
    tmp_path: Path, numel: int, size: tuple[int, ...], stride: tuple[int, ...], message: str
):
    path = archive_of(tmp_path / "file.pt", pickled_tensor(numel, size, stride), {"0": b"\0" * 16})
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


def test_hand_made_tensor_that_fits_is_read(tmp_path: Path):
    path = archive_of(tmp_path / "file.pt", pickled_tensor(4, (2, 2), (1, 2)), {"0": b"\0" * 16})
    assert torch.equal(read_checkpoint(path).tensors["a"], torch.zeros(2, 2))


def test_endless_tree_of_modules_is_refused(tmp_path: Path):
    """Thirty records, each the parent of the next one twice, describe a billion modules."""

    def record(index: int) -> bytes:
        content = b"N" if index == 0 else record(index - 1)
        state = b"}(" + word("a") + content + b"q" + bytes([index]) + word("b") + b"h" + bytes([index]) + b"u"
        return b"c__torch__.x\nY\n)\x81" + state + b"b"

    with pytest.raises(CheckpointError, match="its modules have more than 1000000 attributes"):
        read_checkpoint(archive_of(tmp_path / "file.pt", b"\x80\x02" + record(30) + b"."))


@pytest.mark.parametrize(
    "pickled",
    [b"\x80\x02Nr\xff\xff\xff\x0f.", b"\x80\x04\x8e" + b"\xff" * 8 + b".", b"\x80\x02(((((."],
    ids=["memo", "length", "marks"],
)
def test_pickle_that_asks_for_too_much_is_refused(tmp_path: Path, pickled: bytes):
    with pytest.raises(CheckpointError, match="file.pt (holds a pickle that is no checkpoint's|is truncated)"):
        read_checkpoint(archive_of(tmp_path / "file.pt", pickled))


def test_compressed_entry_larger_than_its_tensor_is_not_unpacked(tmp_path: Path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickled_tensor(4, (4,), (1,)))
        archive.writestr("archive/data/0", b"\0" * 10_000_000)
        archive.writestr("archive/extra.pkl", b"\0" * 70_000_000)
    with pytest.raises(CheckpointError, match="extra.pkl has 70000000 bytes, far more than a checkpoint needs"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_the_same_name_are_refused(tmp_path: Path, state_dict_file: Path):
    with zipfile.ZipFile(state_dict_file, "a") as archive:
        archive.writestr(archive.namelist()[0], b"N.")
    with pytest.raises(CheckpointError, match="two entries of the same name"):
        read_checkpoint(state_dict_file)


def test_names_from_a_file_cannot_write_to_the_terminal(tmp_path: Path):
    torch.save({"evil\nerror: fine\x1b[2J": 1}, tmp_path / "file.pt")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "file.pt")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({0: torch.ones(2)}, "names a tensor 0, but names are texts"),
        (
            {"a": torch.ones(2, dtype=torch.complex64)},
            "torch.ComplexFloatStorage.* plain tensors of numbers",
        ),
    ],
)
def test_tensors_of_another_kind_are_refused(tmp_path: Path, state: dict, message: str):
    torch.save(state, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "file.pt")
    torch.save(state, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "legacy.pt")


def test_float8_safetensors_are_refused(tmp_path: Path):
    save_file({"a": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match="has a of dtype F8_E4M3, which no CLIP has"):
        read_checkpoint(tmp_path / "file.safetensors")


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
    (tmp_path / "text.pt").write_text("version 1 of something that is no checkpoint")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    torch.save([1, 2, 3], tmp_path / "list.pt")
    torch.save({"epoch": 3, "weights": dict(STATE)}, tmp_path / "nested.pt")
    messages = {
        "empty.pt": "is empty; copy or download it again",
        "text.pt": "is neither a PyTorch checkpoint nor a safetensors file",
        "other.zip": "is a zip file, but no PyTorch archive: it has no data.pkl",
        "list.pt": "holds a list, but a dictionary of tensors is needed",
        "nested.pt": "no tensors at its top level or in state_dict, model_state_dict, model, only: epoch, weights",
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


@pytest.mark.parametrize("read", [read_checkpoint, read_metadata], ids=["tensors", "metadata"])
def test_long_words_of_a_safetensors_header_are_shown_in_short(tmp_path: Path, read: Callable[[Path], object]):
    header = json.dumps({"a": {"dtype": "x" * 100_000, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "file.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(CheckpointError, match="truncated or damaged") as caught:
        read(tmp_path / "file.safetensors")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a":%s,"a":%s}', "two values of the same name"),
        ('{"a":%s}', "of a shape that no CLIP has"),
    ],
    ids=["twice", "dimensions"],
)
def test_header_that_says_what_no_model_has(tmp_path: Path, header: str, message: str):
    entry = json.dumps({"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]})
    encoded = header.replace("%s", entry).encode()
    (tmp_path / "file.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + b"\0" * 4)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "file.safetensors")


def test_header_longer_than_any_models_is_refused(tmp_path: Path):
    (tmp_path / "file.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}" + b" " * 100)
    with pytest.raises(CheckpointError, match="its header has 1099511627776 bytes"):
        read_checkpoint(tmp_path / "file.safetensors")
