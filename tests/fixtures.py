"""Fixtures: reduced reference models, the repositories they convert to, OpenAI's tokenizer, real images.

conftest.py loads them.
"""

import gc
import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, Phase, settings
from PIL import Image
from torch import nn
from transformers import AutoModel

from conversion.reference import build_reference, write_archive
from hf_clip import HfClipModel, HfClipTokenizer, convert
from hf_clip.checkpoints.vocabulary import installed_vocabulary

from .small import DIMENSIONS, IMAGE_SIZES
from .two_processes import TwoProcesses

transformers.logging.set_verbosity_error()
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

# Every run tries the same examples, and takes as long for one as its machine needs.
quiet = [HealthCheck.too_slow]
settings.register_profile("same", derandomize=True, database=None, deadline=None, suppress_health_check=quiet)
settings.load_profile("same")
if "CI" in os.environ:
    # To look for a smaller example of a failure may take five minutes. The blob that is printed finds it at home.
    phases = [Phase.explicit, Phase.reuse, Phase.generate]
    settings.register_profile("as found", settings(), phases=phases, print_blob=True)
    settings.load_profile("as found")


def pytest_make_parametrize_id(config: pytest.Config, val: Any, argname: str) -> None:
    """Refuse a parameter whose bytes or path would become part of a test's name.

    The workers of one run must collect equal names, and a path or compressed bytes may differ from process to process.
    """
    if isinstance(val, (bytes, bytearray, os.PathLike)):
        raise pytest.UsageError(f"The parameter {argname} is {type(val).__name__}: give it a name, with ids=[...].")


def pytest_collection() -> None:
    gc.disable()  # until all is imported


def pytest_collection_finish() -> None:
    """Keep the garbage collector away from what stays until the end.

    Libraries and tests are a million and a half objects. To look through them takes a second, and without this it
    would be done again and again, for a sixth of the time that all tests take.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a test draws does not depend on what ran before it."""
    draw_anew(f"fixtures of {item.nodeid}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Nor on which fixtures were there already. It draws other numbers than they: two models shall be two."""
    draw_anew(item.nodeid)


def draw_anew(name: str) -> None:
    seed = zlib.crc32(name.encode())
    torch.default_generator.manual_seed(seed)  # torch.manual_seed looks for devices, too
    np.random.seed(seed)  # noqa: NPY002 (what libraries draw from)
    random.seed(seed)


@pytest.fixture(params=["vit", "resnet"])
def tower(request: pytest.FixtureRequest) -> str:
    """Both kinds of image tower, one after the other."""
    return request.param


@pytest.fixture(scope="session")
def references() -> dict[str, nn.Module]:
    """The reference implementation's reduced models, float32, in evaluation mode. Tests must not change them."""
    return {tower: build_reference(dimensions, seed=1) for tower, dimensions in DIMENSIONS.items()}


@pytest.fixture(scope="session")
def archives(references: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reduced models in the original file format."""
    folder = tmp_path_factory.mktemp("archives")
    for tower, model in references.items():
        write_archive(model, folder / f"{tower}.pt", IMAGE_SIZES[tower])
    return {tower: folder / f"{tower}.pt" for tower in references}


@pytest.fixture(scope="session")
def repositories(archives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same, converted. Tests must not write there."""
    folder = tmp_path_factory.mktemp("repositories")
    for tower, archive in archives.items():
        convert(archive, folder / tower)
    return {tower: folder / tower for tower in archives}


@pytest.fixture
def repository(tower: str, repositories: dict[str, Path]) -> Path:
    return repositories[tower]


@pytest.fixture
def reference(tower: str, references: dict[str, nn.Module]) -> nn.Module:
    return references[tower]


@pytest.fixture
def model(repository: Path) -> HfClipModel:
    """A model of our own to do with as one likes, in evaluation mode."""
    return AutoModel.from_pretrained(repository).eval()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data to train on and models to begin with, see `write_digits`. Tests must not write there."""
    from .finetuning import write_digits

    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder)
    return folder


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoProcesses]:
    """Two processes that train together; see the class."""
    processes = TwoProcesses(tmp_path_factory.mktemp("two-processes"))
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def vocabulary() -> Path:
    path = installed_vocabulary()
    assert path is not None, "the extra `test` brings openai-clip, which has the file"
    return path


@pytest.fixture(scope="session")
def tokenizer(vocabulary: Path) -> HfClipTokenizer:
    """OpenAI's tokenizer with all 49,408 ids."""
    return HfClipTokenizer.from_vocabulary_file(vocabulary)


@pytest.fixture(scope="session")
def photographs() -> dict[str, Image.Image]:
    """Real images that ship with scikit-image: landscape, portrait, grey, nearly square."""
    from skimage import data

    names = ("astronaut", "chelsea", "coffee", "camera", "rocket")
    found = {name: Image.fromarray(getattr(data, name)()) for name in names}
    found["portrait"] = found["coffee"].transpose(Image.Transpose.ROTATE_90)
    return found
