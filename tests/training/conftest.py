"""Fixtures: data sets that leave nothing behind, and a process group of this process alone."""

import gc
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch.distributed
import torch.utils.data
from transformers import AutoProcessor, ProcessorMixin

from .sources import COUNT, broken, captions, corrupt_exif, jpeg, write_tar


@pytest.fixture(scope="module")
def kept_until_now() -> None:
    """What earlier files have imported and keep need not be looked at after each test, as in `fixtures.py`."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def prepared_here(
    kept_until_now: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """What `datasets` prepares goes into a folder of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("prepared"))
    # After a stream of parquet files `datasets` sleeps for five seconds, for the sake of threads at the program's end.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05, raising=False)
    # So long a loader waits for a worker that does not end by itself, after a run that failed.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    with warnings.catch_warnings():
        # `datasets` leaves tables open for the garbage collector, which would warn in the middle of another test.
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@pytest.fixture(scope="session")
def processor(repositories: dict[str, Path]) -> ProcessorMixin:
    """Of a model of 48 pixels and 20 tokens."""
    return AutoProcessor.from_pretrained(repositories["vit"])


@pytest.fixture(scope="session")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    images = [jpeg(index) for index in range(COUNT)]
    return str(write_tar(tmp_path_factory.mktemp("shard") / "shard.tar", images, captions(COUNT)))


@pytest.fixture(scope="session")
def shard_with_bad_rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """22 images, of which those in places 3, 4 and 9 cannot be decoded, and 6 has a damaged EXIF block."""
    images = [jpeg(index) for index in range(COUNT)]
    bad = broken()
    images[3], images[4], images[9], images[6] = bad["truncated"], bad["text"], bad["nothing"], corrupt_exif()
    return str(write_tar(tmp_path_factory.mktemp("bad") / "shard.tar", images, captions(COUNT)))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def signals_of_a_terminal() -> Iterator[None]:
    """Signals end this process as one that a person started; `nohup` and a script's background ignore some."""
    ends: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    ignored = [signum for signum in ends if signal.getsignal(signum) is signal.SIG_IGN]
    before = {signum: signal.signal(signum, ends[signum]) for signum in ignored}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)
