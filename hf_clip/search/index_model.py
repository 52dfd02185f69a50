"""The model of which an index is made: known by its files, compared by its weights, and loaded late.

Nothing here imports torch before a model is loaded, so that an index that has nothing to encode is fast.

Dimensions: D embedding.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .index_table import IndexDescription, IndexTables, SearchIndexError

MODEL_FILES = "model files"
"""The note by which a model is known without a hash of its weights."""

MODEL_PLACE = "model"
"""The note of where the model was found last. The description of an index says where it was first."""


def model_files(name: str) -> list[list[Any]]:
    """The files of a model with their sizes and times, or where they lie in the Hub's cache. Empty if nothing is known.

    They change whenever the model does, and are much faster to look at than its weights.
    """
    place = Path(os.path.expanduser(name))
    if not name or not place.exists():
        from huggingface_hub import try_to_load_from_cache

        try:
            cached = try_to_load_from_cache(name, "config.json")
        except ValueError:  # no name of a repository
            return []
        return [[os.path.realpath(cached)]] if isinstance(cached, str) else []
    files = [place] if place.is_file() else sorted(path for path in place.iterdir() if path.is_file())
    return [[str(path.resolve()), (state := path.stat()).st_size, state.st_mtime_ns] for path in files]


def load(name: str) -> tuple[Any, Any]:
    """Load a model onto the device that computes fastest, and its processor.

    Raises:
        OSError: There is no such model.
        ValueError: A file of it is damaged.
    """
    if name.startswith((".", "/", "~")) and not os.path.exists(os.path.expanduser(name)):  # said before torch is there
        raise FileNotFoundError(f"There is no model {name}; check the path.")
    from ..checkpoints.in_memory import load_model
    from ..registration import register
    from ..zero_shot.pipeline import default_device

    register()  # the commands of an index begin without
    model, processor = load_model(name)
    return model.to(default_device()), processor


def name_of(model: Any) -> str:
    """Where a model is, given that or the model; empty where it does not say."""
    return str(model) if isinstance(model, (str, os.PathLike)) else str(getattr(model, "name_or_path", "") or "")


def loaded(model: Any, processor: Any) -> tuple[Any, Any]:
    """A model and its processor: those that are given, or what lies where `model` says."""
    return load(str(model)) if isinstance(model, (str, os.PathLike)) else (model, processor)


def describe(model: Any, processor: Any, name: str) -> IndexDescription:
    """What the embeddings of a model are made of. `name` is a folder, a repository or a file, and may be empty."""
    from ..evaluation.feature_cache import processor_settings, weights_hash

    settings = json.loads(json.dumps(processor_settings(processor), default=str))
    where = os.path.abspath(os.path.expanduser(name)) if name and os.path.exists(os.path.expanduser(name)) else name
    return IndexDescription(model.config.projection_dim, weights_hash(model), settings, where)


def text_weights(model: Any) -> dict[str, Any]:
    """The weights of a model's text tower by their names."""
    from ..evaluation.feature_cache import TEXT_PARTS

    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(TEXT_PARTS)}


def hash_of_tensors(tensors: Mapping[str, Any]) -> str:
    """A hash of tensors and their names."""
    import torch

    state = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def is_same_model(tables: IndexTables, name: str) -> bool:
    """Whether a model's files are those by which the index knows its model. Its weights need no hash then."""
    files = model_files(name)
    return bool(files) and files == tables.noted(MODEL_FILES)


def check_model(tables: IndexTables, found: IndexDescription) -> None:
    """Raise SearchIndexError if an index was made of another model."""
    made_of = tables.description
    if found.weights != made_of.weights or found.width != made_of.width:
        raise SearchIndexError(
            f"The index {tables.place} was made of another model ({made_of.model or 'in memory'}) than "
            f"{found.model or 'the one that was given'}: their embeddings cannot be compared. Name that model, or "
            f"another index with --index.",
            tables.place,
        )
    if found.processor != made_of.processor:
        names = [
            name
            for name in {*found.processor, *made_of.processor}
            if found.processor.get(name) != made_of.processor.get(name)
        ]
        raise SearchIndexError(
            f"The index {tables.place} was made with other settings of the image processor "
            f"({', '.join(sorted(names))}): use the same, or another index.",
            tables.place,
        )


__all__ = [
    "MODEL_FILES",
    "MODEL_PLACE",
    "check_model",
    "describe",
    "hash_of_tensors",
    "is_same_model",
    "load",
    "loaded",
    "model_files",
    "name_of",
    "text_weights",
]
