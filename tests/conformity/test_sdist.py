"""Where transformers' tests come from: what is fetched is checked, and nothing else is kept."""

import hashlib
from pathlib import Path

import pytest

from . import sdist

ARCHIVE = b"an archive"
NAME = f"transformers-{sdist.transformers.__version__}.tar.gz"


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, bytes]:
    """Pages of an index by address, and an empty cache."""
    pages: dict[str, bytes] = {"https://index/files/" + NAME: ARCHIVE}
    monkeypatch.setattr(sdist, "read", pages.__getitem__)
    monkeypatch.setenv("PIP_INDEX_URL", "https://index/simple/")
    monkeypatch.setenv("HF_CLIP_SDISTS", str(tmp_path / "cache"))
    return pages


def page(checksum: str, name: str = NAME) -> bytes:
    return f'<a href="../../files/{name}#{checksum}">{name}</a>'.encode()


def test_archive_is_kept_once_its_checksum_is_right(index: dict[str, bytes], tmp_path: Path):
    index["https://index/simple/transformers/"] = page(f"sha256={hashlib.sha256(ARCHIVE).hexdigest()}")
    path = sdist.cached_archive()
    assert [path] == list((tmp_path / "cache").iterdir())
    assert path.read_bytes() == ARCHIVE
    index.clear()
    assert sdist.cached_archive() == path


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (page("sha256=" + "0" * 64), "but the index says 0000"),
        (page("md5=0"), "gives no sha256 of"),
        (page("", name="transformers-0.1.tar.gz"), "has no transformers-"),
    ],
    ids=["another sum", "no sum", "another version"],
)
def test_nothing_is_kept_of_anything_else(index: dict[str, bytes], tmp_path: Path, answer: bytes, message: str):
    index["https://index/simple/transformers/"] = answer
    with pytest.raises(OSError, match=message):
        sdist.cached_archive()
    assert not (tmp_path / "cache").exists()
