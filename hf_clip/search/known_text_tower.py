"""The text tower of an index's model, run without torch and transformers, whose import takes longer than a search.

1. When a model is loaded for an index by torch, its text tower is run in numpy too, on a few texts. If the embeddings
   are equal up to rounding, the index notes what the tower is besides its weights, and the model's files.
2. While the files are the same, with the same sizes and times, a search encodes texts in numpy. Otherwise it loads the
   model by torch, as in 1.

Nothing is copied: the weights are read from the model's own file, each time.
"""

import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .index_errors import SearchIndexError
from .index_model import MODEL_PLACE, model_files

if TYPE_CHECKING:
    from ..zero_shot.plain_text_tower import PlainTextTower
    from .index_table import IndexTables

NOTE = "text tower"

MOST_DIFFERENCE = 1e-5
"""Length of the difference of two embeddings of a text, which are of length one. A score differs by no more."""

COMPARED = ("a photo of a dog.", "Two Cafés & a “red” car, 1999", "one two three four five six seven eight " * 11)
"""Texts of several lengths, with characters beyond ASCII, and one that is longer than any text tower takes."""


def folder_of(name: str) -> Path | None:
    """The folder of a model's files: its own, or that in the Hub's cache. None: it has none."""
    place = Path(os.path.expanduser(name))
    if not name:  # of a model in memory
        return None
    if place.is_dir():
        return place.resolve()
    if place.exists():
        return None
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):  # no name of a repository
        cached = try_to_load_from_cache(name, "config.json")
        return Path(cached).parent if isinstance(cached, str) else None
    return None


def note_text_tower(tables: "IndexTables", name: str, model: Any, processor: Any) -> None:
    """Note how texts are encoded without torch; or that they cannot be, so that it is not tried again.

    Args:
        tables: The index.
        name: Where the model is.
        model: HfClipModel, as it was loaded from there, in float32.
        processor: Its processor.
    """
    folder = folder_of(name)
    if folder is None:
        return
    files = model_files(str(folder))
    known = tables.noted(NOTE)
    if known and (known.get("folder"), known.get("files")) == (str(folder), files):
        return
    settings = _compare(folder, model, processor)
    if files == model_files(str(folder)):
        with suppress(SearchIndexError):  # an index that may only be read
            tables.note(NOTE, {"folder": str(folder), "files": files, "settings": settings})


def _compare(folder: Path, model: Any, processor: Any) -> dict[str, Any] | None:
    """The settings with which the tower in numpy gives the model's embeddings. None: there are none."""
    import numpy as np

    from ..zero_shot.features import encode_texts
    from ..zero_shot.plain_text_tower import PlainTextTower, TextTowerSettings

    settings = TextTowerSettings.of(model.config.text_config)
    if settings is None:
        return None
    try:
        found = PlainTextTower(folder, settings).encode(COMPARED)
    except (OSError, ValueError):  # files in another layout
        return None
    expected = encode_texts(model, processor, COMPARED, truncation=True).float().cpu().numpy()
    if found.shape != expected.shape or not np.linalg.norm(found - expected, axis=1).max() <= MOST_DIFFERENCE:
        return None
    return asdict(settings)


def known_text_tower(tables: "IndexTables", name: str | None = None) -> "PlainTextTower | None":
    """The text tower of an index's model in numpy.

    Args:
        tables: The index.
        name: Where the model is now, if the caller says so.

    Returns:
        The tower. None: it is not known, or the model's files have changed.
    """
    known = tables.noted(NOTE)
    folder = folder_of(name or tables.noted(MODEL_PLACE) or tables.description.model)
    if not known or not known.get("settings") or folder is None:
        return None
    if (known.get("folder"), known.get("files")) != (str(folder), model_files(str(folder))):
        return None
    from ..zero_shot.plain_text_tower import PlainTextTower, TextTowerSettings

    try:
        return PlainTextTower(folder, TextTowerSettings(**known["settings"]))
    except (OSError, ValueError, TypeError):  # torch says what is wrong; TypeError: a note of another version
        return None


__all__ = ["known_text_tower", "note_text_tower"]
