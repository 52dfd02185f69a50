"""Damaged and hostile files, drawn at random: each is refused in one line, or read as what it says.

Every case is one of:

- refused: an error of ours, one line of bounded length
- identical: the same model as before the damage; or, where a file keeps no checksum of what was changed, the model that
  PyTorch's or safetensors' own reader finds in the same file
- changed, traceback, hang: none may be

The seed is in FUZZ_SEED, or 0, and every case has its number, so that what is found can be had again.
"""

import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conversion.reference import build_reference, write_archive
from hf_clip import convert
from hf_clip.checkpoints.archive import read_checkpoint
from hf_clip.checkpoints.errors import CheckpointError
from hf_clip.checkpoints.original import read_original

from . import damage

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.jit, which writes these files, is deprecated

SEED = int(os.environ.get("FUZZ_SEED", "0"))
SECONDS = 120
"""For one case, on a machine that has other things to do; none takes a tenth of that on one that has not."""

DIMENSIONS = {
    "embed_dim": 16,
    "context_length": 8,
    "vocab_size": 600,
    "transformer_width": 64,
    "transformer_heads": 1,
    "transformer_layers": 1,
    "image_resolution": 8,
    "vision_layers": 1,
    "vision_width": 64,
    "vision_patch_size": 4,
}
State = dict[str, Tensor]


class HangError(BaseException):
    """No end within the time of a case."""


@contextmanager
def time_limit() -> Iterator[None]:
    def interrupt(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and found[name].shape == tensor.shape and found[name].equal(tensor)
        for name, tensor in expected.items()
    )


def is_one_line(error: BaseException) -> bool:
    return len(str(error)) < 1500 and str(error).isprintable()


def read(path: Path) -> State:
    """The model as `convert` would write it; every byte of it is used."""
    _, config, tensors = read_original(path)
    return {name: tensor.clone() for name, tensor in tensors.items()} | {
        "layers": torch.tensor(config.text_config.num_hidden_layers)
    }


def outcome(path: Path, expected: State, library: Callable[[Path], State] | None) -> str:
    try:
        with time_limit():
            found = read(path)
    except HangError:
        return "hang"
    except CheckpointError as error:
        return "refused" if is_one_line(error) else f"traceback: {len(str(error))} characters: {str(error)[:200]!r}"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {str(error)[:200]}"
    if same(found, expected):
        return "identical"
    # Another model, which is right only where the file says so to others, too.
    theirs = library(path) if library else {}
    ours = read_checkpoint(path).tensors
    return "identical" if same(ours, {name: tensor for name, tensor in theirs.items() if name in ours}) else "changed"


def load_with_torch(path: Path) -> State:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        return {}
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


KINDS: dict[str, tuple[Callable[[bytes, random.Random], bytes], Callable[[Path], State] | None]] = {
    "archive": (damage.archive, None),
    "state dict": (damage.archive, None),
    "pickle": (damage.pickle_of_archive, load_with_torch),
    "legacy": (damage.legacy, load_with_torch),
    "safetensors": (damage.safetensors, load_file),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A whole file of every kind, of one small model."""
    folder = tmp_path_factory.mktemp("sources")
    model = build_reference(DIMENSIONS, seed=1)
    write_archive(model, folder / "archive", 8)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(state, folder / "state dict")
    torch.save(state, folder / "legacy", _use_new_zipfile_serialization=False)
    save_file(state, folder / "safetensors")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {"pickle": files["state dict"]}


def count(kind: str, cases: int, sources: dict[str, bytes], tmp_path: Path) -> None:
    change, library = KINDS[kind]
    path = tmp_path / "file.pt"
    path.write_bytes(sources[kind])
    expected = read(path)
    found: Counter[str] = Counter()
    wrong = []
    for number in range(cases):
        path.write_bytes(change(sources[kind], random.Random(f"{SEED} {kind} {number}")))
        result = outcome(path, expected, library)
        found[result.split(":")[0]] += 1
        if result not in ("refused", "identical"):
            wrong.append(f"case {number}: {result}")
    print(f"seed {SEED}, {kind}: {dict(found)}")
    assert not wrong, f"seed {SEED}, {kind}: " + "; ".join(wrong[:10])
    assert found["refused"] > cases / 4


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_checkpoints(kind: str, sources: dict[str, bytes], tmp_path: Path):
    count(kind, 32, sources, tmp_path)


def folder_outcome(folder: Path, out: Path, expected: bytes) -> str:
    try:
        with time_limit():
            convert(folder, out, offline=True)
    except HangError:
        return "hang"
    except (OSError, ValueError) as error:
        if out.exists():
            return "changed: something is half-written"
        line = " ".join(str(error).split())  # as the program prints it
        return "refused" if len(line) < 1500 and line.isprintable() else f"traceback: {len(line)}: {line[:200]!r}"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {str(error)[:200]}"
    return "identical" if (out / "model.safetensors").read_bytes() == expected else "changed"


def count_folders(cases: int, sources: dict[str, bytes], tmp_path: Path) -> None:
    """Folders are judged by their weights: other numbers in a description are another model, as sound as the first."""
    (tmp_path / "file.pt").write_bytes(sources["archive"])
    whole, wrong = tmp_path / "whole", []
    found: Counter[str] = Counter()
    convert(tmp_path / "file.pt", whole)
    expected = (whole / "model.safetensors").read_bytes()
    for number in range(cases):
        folder, out = tmp_path / f"{number}", tmp_path / f"{number}-out"
        shutil.copytree(whole, folder)
        damage.folder(folder, random.Random(f"{SEED} folder {number}"))
        result = folder_outcome(folder, out, expected)
        found[result.split(":")[0]] += 1
        if result not in ("refused", "identical"):
            wrong.append(f"case {number}: {result}")
        shutil.rmtree(folder)
        shutil.rmtree(out, ignore_errors=True)
    print(f"seed {SEED}, folder: {dict(found)}")
    assert not wrong, f"seed {SEED}, folder: " + "; ".join(wrong[:10])
    assert found["refused"] > cases / 4


def test_damaged_folders(sources: dict[str, bytes], tmp_path: Path):
    count_folders(40, sources, tmp_path)


@pytest.mark.slow
def test_many_damaged_folders(sources: dict[str, bytes], tmp_path: Path):
    count_folders(300, sources, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_checkpoints(kind: str, sources: dict[str, bytes], tmp_path: Path):
    count(kind, 340, sources, tmp_path)
