"""Files whose sha256 is known, by OpenAI's names or by the Hub's cache."""

import hashlib
import shutil
from pathlib import Path

import pytest

from hf_clip import convert
from hf_clip.checkpoints.download import cached_sum, verify_file
from hf_clip.checkpoints.errors import CheckpointError
from hf_clip.checkpoints.original import read_original


def cache(files: dict[str, bytes], root: Path) -> Path:
    """A snapshot of a repository as the Hub's cache keeps it: links to files that are named for their content."""
    snapshot, blobs = root / "models--org--clip" / "snapshots" / ("0" * 40), root / "models--org--clip" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name, content in files.items():
        large = name.endswith((".safetensors", ".pt"))
        digest = hashlib.sha256(content) if large else hashlib.sha1(content)
        (blobs / digest.hexdigest()).write_bytes(content)
        (snapshot / name).symlink_to(Path("..", "..", "blobs", digest.hexdigest()))
    return snapshot


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.resolve().write_bytes(data)


def test_repository_of_the_cache_is_compared_with_the_hubs_sum(repositories: dict[str, Path], tmp_path: Path):
    """Safetensors files keep no checksum of their own: elsewhere than in the cache a changed weight is not seen."""
    files = {path.name: path.read_bytes() for path in repositories["vit"].iterdir()}
    snapshot = cache(files, tmp_path / "hub")
    convert(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == files["model.safetensors"]
    flip(snapshot / "model.safetensors", -100)
    with pytest.raises(CheckpointError, match="has sha256 .*but the Hub's file has .*Remove .*downloads it anew"):
        convert(snapshot, tmp_path / "changed")
    assert not (tmp_path / "changed").exists()
    convert(snapshot, tmp_path / "unverified", verify=False)


def test_checkpoint_of_the_cache_is_compared_with_the_hubs_sum(archives: dict[str, Path], tmp_path: Path):
    snapshot = cache({"model.pt": archives["resnet"].read_bytes()}, tmp_path)
    read_original(snapshot / "model.pt")
    flip(snapshot / "model.pt", 5000)
    with pytest.raises(CheckpointError, match="but the Hub's file has"):
        read_original(snapshot / "model.pt")
    with pytest.raises(CheckpointError, match="keeps the checksum"):
        read_original(snapshot / "model.pt", verify=False)


def test_nothing_is_known_of_other_files(repositories: dict[str, Path], tmp_path: Path):
    snapshot = cache({"config.json": b"{}", "a.safetensors": b"x"}, tmp_path)
    assert cached_sum(snapshot / "config.json") is None
    assert cached_sum(snapshot / "a.safetensors") == hashlib.sha256(b"x").hexdigest()
    copied = tmp_path / "blobs" / hashlib.sha256(b"x").hexdigest()
    copied.parent.mkdir()
    shutil.copy(snapshot / "a.safetensors", copied)
    assert cached_sum(copied) is None
    assert not verify_file(copied)
    assert not verify_file(repositories["vit"] / "model.safetensors")
    assert not verify_file(tmp_path / "missing.safetensors")
