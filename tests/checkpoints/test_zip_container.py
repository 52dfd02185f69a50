"""Zip files that say two things, unpack to too much, or have other bytes than their checksums say."""

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_clip.checkpoints.archive import read_checkpoint
from hf_clip.checkpoints.errors import CheckpointError

from .hand_made import STATE, archive_of, pickled_tensor

LOCAL, CENTRAL = b"PK\x03\x04", b"PK\x01\x02"
PICKLE = b"\x80\x02}."


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert len(str(caught.value)) - len(str(path)) < 1000
    return str(caught.value)


def put(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def local(data: bytes, name: str) -> int:
    """Where the header before an entry begins."""
    return data.rindex(LOCAL, 0, data.index(name.encode()))


def central(data: bytes, name: str) -> int:
    """Where an entry's place in the directory begins."""
    return data.rindex(CENTRAL, 0, data.rindex(name.encode()))


def test_any_changed_byte_of_a_tensor_is_noticed(state_dict_file: Path):
    whole = state_dict_file.read_bytes()
    for tensor in STATE.values():
        raw = tensor.numpy().tobytes()
        assert whole.count(raw) == 1
        changed = bytearray(whole)
        changed[whole.index(raw) + len(raw) // 2] ^= 1
        state_dict_file.write_bytes(changed)
        assert "has not the bytes of which the file keeps the checksum (CRC-32)" in refusal(state_dict_file)
        read_checkpoint(state_dict_file, check_sums=False)  # for a file whose sha256 was compared
    state_dict_file.write_bytes(whole)
    read_checkpoint(state_dict_file)


def test_changed_pickle_and_byteorder_are_noticed(state_dict_file: Path):
    whole = state_dict_file.read_bytes()
    for text in (b"weight", b"little"):
        state_dict_file.write_bytes(whole.replace(text, text[:-1] + b"x", 1))
        assert "has not the bytes" in refusal(state_dict_file)


def test_only_what_is_used_is_read_and_checked(tmp_path: Path):
    """An optimizer's moments are three times the weights; nothing is made of them."""
    moments = torch.arange(1000.0)
    torch.save({"state_dict": STATE, "optimizer": {0: moments}}, tmp_path / "file.pt")
    raw = bytearray((tmp_path / "file.pt").read_bytes())
    raw[raw.index(moments.numpy().tobytes()) + 100] ^= 1
    (tmp_path / "file.pt").write_bytes(raw)
    assert read_checkpoint(tmp_path / "file.pt").tensors.keys() == STATE.keys()


CHANGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "trailing bytes": (lambda d: d + b"x", "doesn't end with its directory"),
    "comment": (lambda d: d[:-2] + b"\x01\x00x", "doesn't end with its directory"),
    "leading bytes": (lambda d: d[: d.index(CENTRAL)] + b"x" * 50 + d[d.index(CENTRAL) :], "something lies before"),
    "other name": (lambda d: put(d, local(d, "a/data.pkl") + 30, b"b"), "contradict each other"),
    "other method": (lambda d: put(d, local(d, "a/data.pkl") + 8, b"\x08"), "contradict each other"),
    "other flags": (lambda d: put(d, local(d, "a/data.pkl") + 6, b"\x02"), "contradict each other"),
    "other checksum": (lambda d: put(d, local(d, "a/data.pkl") + 14, b"1234"), "contradict each other"),
    "other size": (lambda d: put(d, local(d, "a/data.pkl") + 22, b"\x01"), "contradict each other"),
    "sizes that differ": (lambda d: put(d, central(d, "a/data.pkl") + 24, b"\x01"), "contradict each other"),
    "overlap": (lambda d: put(d, central(d, "a/version") + 42, b"\1\0\0\0"), "overlaps another entry"),
    "outside": (lambda d: put(d, central(d, "a/version") + 42, b"\xff\xff\xff\x7f"), "lies outside of the file"),
    "encrypted": (lambda d: put(d, central(d, "a/version") + 8, b"\x01"), "is encrypted or compressed in a way"),
    "bzip2": (lambda d: put(d, central(d, "a/version") + 10, b"\x0c"), "is encrypted or compressed in a way"),
    "unknown": (lambda d: put(d, central(d, "a/version") + 10, b"\x63"), "is encrypted or compressed in a way"),
    "no deflate": (
        lambda d: put(put(d, central(d, "a/data.pkl") + 10, b"\x08"), local(d, "a/data.pkl") + 8, b"\x08"),
        "truncated or damaged (a/data.pkl: Error -3",
    ),
    "long directory": (lambda d: put(d, len(d) - 10, b"\xff\xff\xff\x7f"), "its directory has 2147483647 bytes"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_archive_that_says_two_things_is_refused(tmp_path: Path, name: str):
    with zipfile.ZipFile(tmp_path / "file.pt", "w") as archive:
        archive.writestr("a/data.pkl", PICKLE + b" " * 10)
        archive.writestr("a/version", b"3")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        read_checkpoint(tmp_path / "file.pt")
    change, message = CHANGES[name]
    (tmp_path / "file.pt").write_bytes(change((tmp_path / "file.pt").read_bytes()))
    assert message in refusal(tmp_path / "file.pt")


def test_wide_directory_of_pytorch_is_held_to_the_same(state_dict_file: Path):
    whole = state_dict_file.read_bytes()
    record, locator = whole.rindex(b"PK\x06\x06"), whole.rindex(b"PK\x06\x07")
    changed = put(whole, record + 40, struct.pack("<Q", 1 << 40))
    state_dict_file.write_bytes(changed)
    assert "its directory has 1099511627776 bytes" in refusal(state_dict_file)
    state_dict_file.write_bytes(put(whole, locator + 8, struct.pack("<Q", 1)))
    assert "last records contradict each other" in refusal(state_dict_file)


def test_small_file_does_not_unpack_to_a_large_one(tmp_path: Path):
    for entry in ("byteorder", "extra.pkl", "data/0"):
        path = tmp_path / "bomb.pt"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", pickled_tensor(12_500_000, (12_500_000,), (1,)))
            archive.writestr(f"archive/{entry}", bytes(50_000_000))
        message = refusal(path)
        expected = "more than 32 times the bytes of the file" if entry == "data/0" else "50000000 bytes, far more"
        assert expected in message


def test_entry_that_unpacks_to_more_than_it_says(tmp_path: Path):
    with zipfile.ZipFile(tmp_path / "file.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", PICKLE + bytes(5_000_000))
    data = (tmp_path / "file.pt").read_bytes()
    data = put(put(data, 22, b"\x04\0\0\0"), central(data, "archive/data.pkl") + 24, b"\x04\0\0\0")
    (tmp_path / "file.pt").write_bytes(data)
    assert "has not the bytes" in refusal(tmp_path / "file.pt")


def test_hand_made_archive_is_read(tmp_path: Path):
    path = archive_of(tmp_path / "file.pt", pickled_tensor(4, (4,), (1,)), {"0": b"\0" * 16})
    assert torch.equal(read_checkpoint(path).tensors["a"], torch.zeros(4))
