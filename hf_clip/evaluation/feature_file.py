"""Features of a data set as a file, with which linear probes are fitted without a model and without images.

A safetensors file with these tensors::

    train.features       (I, D) features of images, not normalised
    train.labels         (I,) places of the classes from 0, whole numbers; or (I, K) zeros and ones. Without
                         `class_names` train has images of each class
    test.features        the same of the images that are measured
    test.labels
    validation.features  may be missing: what the regularisation is chosen on
    validation.labels
    train.pooled, ...    may be missing: (I, W) features before the projection
    texts                may be missing: (K, D) features of the classes' prompts, for LP++, of any length

and with metadata, all of which may be missing: `class_names` (a list as JSON), `model`, `dataset`, and the other fields
of `ProbeFeatures`. `hf-clip evaluate linear-probe --save-features` writes one, and so does any program::

    from safetensors.torch import save_file

    save_file({"train.features": x, "train.labels": y, "test.features": u, "test.labels": v}, "features.safetensors")

Dimensions: I images, K classes, W tower width, D embedding.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.whole_file import whole_file
from ..model.checked_files import MOST_DEPTH, nested_depth, one_line
from .split_features import ProbeFeatures, SplitFeatures, check_features

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
        ValueError: It is a folder, of another kind, cut off or damaged; or it holds what no probe can be fitted to.
    """
    path = Path(os.path.expanduser(path))
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "no regular file"
        raise ValueError(f"{path} is {what}, but a file of features is needed: name one that --save-features wrote.")
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
    # A stranger's texts are shown in a terminal, so they hold no control characters.
    found: dict[str, Any] = {name: one_line(metadata[name]) for name in TEXTS if name in metadata}
    found |= {name: _object(path, name, metadata[name]) for name in OBJECTS if name in metadata}
    splits = {}
    for name in SPLITS:
        there = [what for what in ("features", "labels", "pooled") if f"{name}.{what}" in tensors]
        if not there:
            continue
        if missing := [what for what in ("features", "labels") if what not in there]:
            raise ValueError(f"{path} has {name}.{there[0]}, but no {name}.{missing[0]}: write both, or neither.")
        splits[name] = SplitFeatures(
            _features(path, f"{name}.features", tensors),
            _labels(path, name, tensors[f"{name}.labels"]),
            _features(path, f"{name}.pooled", tensors) if "pooled" in there else None,
            one_line(metadata.get(f"{name}_split", name)),
        )
    if "class_names" not in found:
        found["class_names"] = _numbered_classes(path, splits["train"].labels)
    found = {"dataset": str(path)} | found | splits
    return ProbeFeatures(**found, texts=_features(path, "texts", tensors) if "texts" in tensors else None)


def _object(path: Path, name: str, text: str) -> Any:
    """Read one of `OBJECTS`."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: its metadata {name!r} are no JSON ({one_line(error)}).") from None
    except RecursionError:
        value = None
    if name == "processor":
        if not isinstance(value, dict) or nested_depth(value) > MOST_DEPTH:
            raise ValueError(
                f"{path}: its metadata 'processor' must be an object as JSON; write it again, or leave it out."
            )
        return value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(
            f"{path}: its metadata {name!r} must be a list of texts as JSON, but are {one_line(text, 80)}."
        )
    return value


def _numbered_classes(path: Path, labels: Tensor) -> list[str]:
    """Name the classes of a file that does not. Each of them has an image in train."""
    if labels.ndim == 2:
        return [f"class {place}" for place in range(labels.shape[1])]
    seen = labels.unique().tolist()
    gap = next((place for place, label in enumerate(seen) if label != place), None)
    if gap is not None and seen[0] >= 0:
        raise ValueError(
            f"{path}: train.labels hold {seen[-1]}, but not {gap}. Without class_names the labels are the numbers from "
            f"0 on, and train has images of each class: number them so, or put class_names into the metadata."
        )
    return [f"class {place}" for place in range(len(seen))]


def _features(path: Path, name: str, tensors: dict[str, Tensor]) -> Tensor:
    tensor = tensors[name]
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{path}: {name} are {tensor.dtype}, but real numbers are needed.")
    return tensor.float()


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
