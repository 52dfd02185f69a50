"""Fixtures: data sets that leave nothing behind."""

import gc
import warnings
from collections.abc import Iterator

import datasets
import pytest


@pytest.fixture
def prepared_here(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `datasets` prepares goes into a folder of the test's own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("prepared"))
    # After a stream of parquet files `datasets` sleeps for five seconds, for the sake of threads at the program's end.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.05, raising=False)
    with warnings.catch_warnings():
        # `datasets` leaves tables open for the garbage collector, which would warn in the middle of another test.
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()
