"""Errors come whole out of another process: pickled, each keeps its message and what it says of its cause."""

import copy
import importlib
import pickle
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_clip
from hf_clip.checkpoints.errors import CheckpointError, NoCheckpointsPickleError
from hf_clip.checkpoints.whole_folder import DiskFullError, FolderInUseError
from hf_clip.evaluation.embedder import NotFiniteFeaturesError, UnreadableImagesError
from hf_clip.evaluation.numbered_row import CaptionedRowError, RowError
from hf_clip.evaluation.scored_images import ScoreError
from hf_clip.model.checked_files import DamagedWeightsError, FolderReplacedError
from hf_clip.model.fetch import FetchError
from hf_clip.model.open_image import UnreadableImageError
from hf_clip.model.repair_text import TextError
from hf_clip.model.text_ends import EndOfTextError
from hf_clip.search.embedding_place import EmbeddingFilesError
from hf_clip.search.index_table import SearchIndexError
from hf_clip.search.quantized_scan import QuantizedFileError
from hf_clip.search.row_filter import FilterError
from hf_clip.serve.batching import QueueFullError
from hf_clip.serve.request_error import RequestError
from hf_clip.training.checkpoint import UnwrittenCheckpointError
from hf_clip.training.data.loader import WorkerKilledError
from hf_clip.training.feature_store import StaleFeaturesError
from hf_clip.training.stopping import ProcessGoneError, Stopped
from hf_clip.zero_shot.prompts import LabelError
from hf_clip.zero_shot.text_batches import TextTooLongError

MADE: list[BaseException] = [
    UnreadableImageError(" is empty", 3),
    TextError("no text", 2),
    TextTooLongError("a text", 1, 90, 77),
    EndOfTextError("rows 1 and 2 have none", [1, 2]),
    LabelError("a label", 4),
    DamagedWeightsError("folder", "cut\noff"),
    FolderReplacedError("folder"),
    FolderInUseError(Path("folder"), "process 3"),
    DiskFullError(Path("here/folder"), 5000, 30),
    CheckpointError("file is damaged"),
    NoCheckpointsPickleError("a mark is missing"),
    NotFiniteFeaturesError("a feature is NaN", "a.png"),
    UnreadableImagesError("too many", 2, 9, ["a.png: empty"]),
    FetchError("http://x/y", "gone", 404, 3.0),
    Stopped(15, "a checkpoint"),
    RowError("row 3 cannot be used", 3),
    CaptionedRowError("row 3 has no caption", 3),
    ScoreError("row 3 has no score", 3),
    UnwrittenCheckpointError(Path("run/checkpoint-9"), 5000, None, Path("run/checkpoint-6")),
    WorkerKilledError("pairs.csv"),
    StaleFeaturesError(Path("run/frozen_features/image-1"), "row 3 of pairs.csv", "its image is another one"),
    ProcessGoneError("process 1"),
    SearchIndexError("there is no index", "photos-index"),
    QuantizedFileError("a file is damaged", "quantized-bits.safetensors"),
    FilterError("colour = 3", "no such column"),
    EmbeddingFilesError("a file is damaged", "embeddings-00000.parquet"),
    QueueFullError("text", 3),
    RequestError(429, "too much waits", "overloaded", "input", {"Retry-After": "3"}),
]


@pytest.mark.parametrize("error", MADE, ids=lambda error: type(error).__name__)
def test_error_is_the_same_after_a_way_through_another_process(error: BaseException):
    for arrived in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(arrived) is type(error)
        assert str(arrived) == str(error)
        assert vars(arrived) == vars(error)


def _below(kind: type) -> Iterator[type]:
    for inner in kind.__subclasses__():
        yield inner
        yield from _below(inner)


def test_every_error_that_is_made_of_more_than_its_message_is_tried_here():
    for module in pkgutil.walk_packages(hf_clip.__path__, "hf_clip."):
        importlib.import_module(module.name)
    made = {
        kind for kind in _below(BaseException) if kind.__module__.startswith("hf_clip.") and "__init__" in vars(kind)
    }
    assert made <= {type(error) for error in MADE}
