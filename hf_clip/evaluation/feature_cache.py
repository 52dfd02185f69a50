"""Image features on disk, so that a data set is encoded once for each model.

Features depend on the weights of the image tower, the image processor's settings, the data and the precision. A hash of
these names a folder:

    KEY/cache.json            what the features were made of
    KEY/00000.safetensors     features of the first rows, which of them these are, and why others are missing
    KEY/00001.safetensors     ...

A file appears when it is whole and carries a checksum, so a run that was interrupted goes on after the last one. Any
change makes another folder: other weights, another size of images, a file of the data that was written anew.

Dimensions: I images, D embedding.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.whole_file import whole_file, write_json
from ..model.configuration_hf_clip import BOOKKEEPING
from ..zero_shot.features import image_processor_of
from .processes import current

ROWS_AT_LEAST = 2048
"""Number of rows after which a file is written."""

DESCRIPTION = "cache.json"
TEXT_PARTS = ("text_model.", "text_projection.", "logit_scale", "logit_bias")
NOT_SETTINGS = ("processor_class", "auto_map", "image_processor_type", "feature_extractor_type", "num_threads")

logger = logging.getLogger(__name__)


def _digest(*contents: Any) -> str:
    state = hashlib.blake2b(digest_size=16)
    for content in contents:
        state.update(content)
    return state.hexdigest()


_remembered: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
"""Hashes of models that were optimized since. Such a model shows its weights no more, and they cannot change."""


def optimize_and_remember(model: Any) -> list[str]:
    """Optimize a model for inference, in place, and remember by which weights its features are cached.

    Returns:
        Descriptions of what was changed, see `optimize_for_inference`.
    """
    if model not in _remembered:
        _remembered[model] = weights_hash(model)
    return model.optimize_for_inference()


def weights_hash(model: Any) -> str:
    """Return a hash of what an image's feature depends on in a model: the image tower's weights and configuration."""
    if getattr(model, "optimizations", None) is not None and model in _remembered:
        return _remembered[model]
    state = hashlib.blake2b(digest_size=16)
    config = getattr(model.config, "vision_config", model.config).to_dict()
    config = {name: value for name, value in config.items() if name not in BOOKKEEPING}
    state.update(f"{type(model).__name__} {json.dumps(config, sort_keys=True, default=str)}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(TEXT_PARTS):
            continue
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.numel():
            state.update(flat.view(torch.uint8).numpy())
    return state.hexdigest()


def processor_settings(processor: Any) -> dict[str, Any]:
    """Return the settings of an image processor that decide what an image becomes."""
    image_processor = image_processor_of(processor)
    values = image_processor.to_dict() | {"class": type(image_processor).__name__}
    return {name: value for name, value in sorted(values.items()) if name not in NOT_SETTINGS and value is not None}


@dataclass(frozen=True)
class CachedRows:
    """What a file holds.

    Attributes:
        path: The file's folder.
        start: The first row.
        stop: The row behind the last.
        rows: The rows that have features.
        reasons: Why the others have none, `name: reason`.
        features: (rows, D), float32.
    """

    path: Path
    start: int
    stop: int
    rows: list[int]
    reasons: list[str]
    features: Tensor


class FeatureCache:
    """The features of one data set by one model. Of several processes the main one reads and writes them.

    Args:
        folder: Folder of all caches.
        model: The model.
        processor: Its processor.
        precision: The dtype that the model computes in.
        fingerprint: Fingerprint of the data.
        features: Which features of an image these are. None: the normalised embedding.

    Raises:
        ValueError: The fingerprint is None; or the folder holds features of other origin.
    """

    def __init__(
        self,
        folder: str | Path,
        model: Any,
        processor: Any,
        precision: str,
        fingerprint: str | None,
        features: str | None = None,
    ):
        if fingerprint is None:
            raise ValueError(
                "The features of these data cannot be kept, since it isn't known when the data change: name a folder "
                "or files, go online so that a repository's commit can be asked for, or leave the feature cache out."
            )
        self.processes = current()
        self.folder = Path()
        self.pending: list[tuple[list[int], Tensor]] = []
        self.pending_reasons: list[str] = []
        self.number, self.start, self.stop = 0, 0, 0
        if not self.processes.is_main:
            return
        self.description = {
            "weights": weights_hash(model),
            "processor": json.loads(json.dumps(processor_settings(processor), default=str)),
            "data": fingerprint,
            "precision": precision,
        }
        if features is not None:
            self.description["features"] = features
        key = _digest(json.dumps(self.description, sort_keys=True).encode())
        self.folder = Path(os.path.expanduser(folder)) / key
        self._prepare()

    def _prepare(self) -> None:
        path = self.folder / DESCRIPTION
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            if any(self.folder.glob("*.safetensors")):
                raise ValueError(f"The feature cache {self.folder} has no {DESCRIPTION}; remove that folder.")
            write_json(path, self.description)
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read ({error}); remove that folder.") from error
        if found != self.description:
            names = [
                name
                for name, value in self.description.items()
                if not isinstance(found, dict) or found.get(name) != value
            ]
            raise ValueError(
                f"The feature cache {self.folder} was made of something else ({', '.join(names)} differ): it is of "
                f"another model or other data. Remove that folder."
            )

    def read(self) -> Iterator[CachedRows]:
        """Yield what the files hold, in order, up to the first that is missing or damaged. All processes call this."""
        found = self._read_files() if self.processes.is_main else iter(())
        while (known := self.processes.of_main(next(found, None), "the feature cache")) is not None:
            yield known

    def _read_files(self) -> Iterator[CachedRows]:
        while (path := self._path()).exists():
            found = _read_file(path, self.start)
            if found is None:
                logger.warning("%s is damaged; its images are encoded again.", path)
                return
            self.number, self.start, self.stop = self.number + 1, found.stop, found.stop
            yield found

    def _path(self) -> Path:
        return self.folder / f"{self.number:05d}.safetensors"

    def add(self, rows: list[int], lost: list[int], reasons: list[str], features: Tensor) -> None:
        """Add features of the next rows, which are written once there are enough.

        Args:
            rows: The rows that have features.
            lost: The rows that have none.
            reasons: Why they have none.
            features: (rows, D).
        """
        if not self.processes.is_main:
            return
        self.pending.append((rows, features))
        self.pending_reasons += reasons
        self.stop += len(rows) + len(lost)
        if self.stop - self.start >= ROWS_AT_LEAST:
            self.finish()

    def finish(self) -> None:
        """Write what waits."""
        if self.stop == self.start:
            return
        rows = [row for given, _ in self.pending for row in given]
        found = [features for given, features in self.pending if given]
        features = torch.cat(found) if found else torch.zeros(0, 1)
        tensors = {"features": features.float().contiguous(), "rows": torch.tensor(rows, dtype=torch.int64)}
        metadata = {"start": str(self.start), "stop": str(self.stop), "reasons": json.dumps(self.pending_reasons)}
        metadata["checksum"] = _checksum(tensors, metadata)
        with whole_file(self._path()) as unfinished:
            save_file(tensors, unfinished, metadata)
        self.number, self.start = self.number + 1, self.stop
        self.pending, self.pending_reasons = [], []


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    texts = [f"{name}={metadata[name]}\0".encode() for name in ("start", "stop", "reasons")]
    return _digest(*texts, *(tensors[name].numpy().tobytes() for name in ("features", "rows")))


def _read_file(path: Path, start: int) -> CachedRows | None:
    """Return what a file holds, or None if it is damaged or does not begin at `start`."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("features", "rows")}
        if metadata["checksum"] != _checksum(tensors, metadata) or int(metadata["start"]) != start:
            return None
        rows, reasons = tensors["rows"].tolist(), json.loads(metadata["reasons"])
        return CachedRows(path.parent, start, int(metadata["stop"]), rows, reasons, tensors["features"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None
