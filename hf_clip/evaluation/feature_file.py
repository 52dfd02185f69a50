"""Features of a data set as a file, with which linear probes are fitted without a model and without images.

A safetensors file with these tensors:

    train.features       (I, D) features of images, not normalised
    train.labels         (I,) places of the classes from 0, whole numbers; or (I, K) zeros and ones
    test.features        the same of the images that are measured
    test.labels
    validation.features  may be missing: what the regularisation is chosen on
    validation.labels
    train.pooled, ...    may be missing: (I, W) features before the projection
    texts                may be missing: (K, D) features of the classes' prompts, for LP++

and with metadata, all of which may be missing: `class_names` (a list as JSON), `model`, `dataset`, and the other fields
of `ProbeFeatures`. `hf-clip evaluate linear-probe --save-features` writes one, and so does any program:

    from safetensors.torch import save_file

    save_file({"train.features": x, "train.labels": y, "test.features": u, "test.labels": v}, "features.safetensors")

Dimensions: I images, K classes, W tower width, D embedding.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.whole_file import whole_file
from .probe_features import ProbeFeatures, SplitFeatures, check_features

SPLITS = ("train", "validation", "test")
TEXTS = ("model", "dataset", "architecture", "tower", "precision", "prompts")
OBJECTS = ("class_names", "processor", "unreadable")
CHECKSUM = "checksum"


def _tensors_of(features: ProbeFeatures) -> dict[str, Tensor]:
    found = {} if features.texts is None else {"texts": features.texts}
    for name, split in features.splits.items():
        found |= {f"{name}.features": split.projected, f"{name}.labels": split.labels}
        if split.pooled is not None:
            found[f"{name}.pooled"] = split.pooled
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for name, text in sorted(metadata.items()):
        state.update(f"{name}={text}\0".encode())
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def write_features(path: str | Path, features: ProbeFeatures) -> None:
    """Write features as a file, whole or not at all.

    Args:
        path: The file.
        features: What `encode_splits` gave.
    """
    tensors = _tensors_of(features)
    metadata = {name: str(getattr(features, name)) for name in TEXTS}
    metadata |= {name: json.dumps(getattr(features, name), default=str) for name in OBJECTS}
    metadata |= {f"{name}_split": split.name for name, split in features.splits.items()}
    metadata[CHECKSUM] = _checksum(tensors, metadata)
    with whole_file(path) as unfinished:
        save_file(tensors, unfinished, metadata)


def read_features(path: str | Path) -> ProbeFeatures:
    """Read features from a file.

    Args:
        path: The file.

    Returns:
        The features.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is of another kind, cut off or damaged; or it holds what no probe can be fitted to.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file of features {str(path)!r}; `hf-clip evaluate linear-probe --save-features FILE` writes "
            f"one."
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}): it is of another kind, or cut off. Write it again."
        ) from error
    needed = [f"{split}.{what}" for split in ("train", "test") for what in ("features", "labels")]
    if missing := [name for name in needed if name not in tensors]:
        there = ", ".join(sorted(tensors)[:5])
        raise ValueError(
            f"{path} has no {missing[0]}, so it is no file of features: {', '.join(needed)} are needed. Its tensors "
            f"are {there}{', ...' if len(tensors) > 5 else ''}."
        )
    stored = metadata.pop(CHECKSUM, None)
    if stored is not None and stored != _checksum(tensors, metadata):
        raise ValueError(f"{path} is damaged: its content does not fit its checksum. Write it again.")
    return check_features(_features_of(path, tensors, metadata))


def _features_of(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> ProbeFeatures:
    found: dict[str, Any] = {name: metadata[name] for name in TEXTS if name in metadata}
    for name in OBJECTS:
        try:
            found |= {name: json.loads(metadata[name])} if name in metadata else {}
        except ValueError as error:
            raise ValueError(f"{path}: its metadata {name!r} are no JSON ({error}).") from error
    splits = {}
    for name in SPLITS:
        if f"{name}.features" not in tensors:
            continue
        if f"{name}.labels" not in tensors:
            raise ValueError(f"{path} has {name}.features, but no {name}.labels.")
        pooled = tensors.get(f"{name}.pooled")
        splits[name] = SplitFeatures(
            tensors[f"{name}.features"].float(),
            _labels(path, name, tensors[f"{name}.labels"]),
            None if pooled is None else pooled.float(),
            metadata.get(f"{name}_split", name),
        )
    labels = splits["train"].labels
    if "class_names" not in found:
        count = labels.shape[1] if labels.ndim == 2 else 1 + max(int(s.labels.max()) for s in splits.values() if len(s))
        found["class_names"] = [f"class {place}" for place in range(count)]
    texts = tensors.get("texts")
    found = {"dataset": str(path)} | found | splits
    return ProbeFeatures(**found, texts=None if texts is None else texts.float())


def _labels(path: Path, split: str, labels: Tensor) -> Tensor:
    if labels.is_floating_point() or labels.is_complex() or labels.ndim not in (1, 2):
        raise ValueError(
            f"{path}: {split}.labels are {labels.dtype} of shape {tuple(labels.shape)}, but whole numbers are needed: "
            f"(images,) places of the classes, or (images, classes) zeros and ones."
        )
    if labels.ndim == 1:
        return labels.long()
    if bool(((labels != 0) & (labels != 1)).any()):
        raise ValueError(f"{path}: {split}.labels of shape {tuple(labels.shape)} must be zeros and ones.")
    return labels.bool()
