"""Features of all rows of a run, computed once by a model that is not trained, and stored in the output folder.

1. What the features are made of (weights, settings of the processor, rows, augmentation, seed) names their folder.
2. Of shards that an earlier run left there, some rows are computed again and compared.
3. The processes share the missing shards. Each writes its own, whole or not at all.

Invariant: what is stored does not depend on the number of processes or on when a run was killed: within a shard always
the same rows are computed together. Row by row, images are prepared as in training, see `feature_computing`.

Dimensions: B batch, W width of a feature.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..model.configuration_hf_clip import BOOKKEEPING
from .agreement import done_together, of_main_process
from .data.feature_shards import ROWS, Entries, FeatureShards, joined
from .data.stored_features import StoredFeatures
from .feature_computing import Wanted, compute, compute_again

logger = logging.getLogger(__name__)

FOLDER = "frozen_features"
"""In the output folder."""

CHECKED = 8
"""Rows that are computed again where features are found."""

SHOWN = 8
"""Shards that a warning names."""

MOST_ROUNDING = {"no": 1e-2, "bf16": 5e-2, "fp16": 5e-2}
"""How far features may be from those that were computed before, perhaps on another machine, as a part of their
length."""


def holds_only_features(output_dir: str | Path) -> bool:
    """Whether an output folder has nothing but features, of a run that ended before its first step."""
    folder = Path(output_dir)
    return folder.is_dir() and [path.name for path in folder.iterdir() if not path.name.startswith(".")] == [FOLDER]


def check_folder(output_dir: str | Path) -> None:
    """Refuse an output folder in which something else is in the place of the features.

    Args:
        output_dir: The output folder, which need not be there.

    Raises:
        FileExistsError: There is a file, or a link that leads nowhere.
    """
    place = Path(output_dir, FOLDER)
    if (place.exists() or place.is_symlink()) and not place.is_dir():
        raise FileExistsError(
            f"{place} is no folder, but features of what is not trained are stored in a folder of that name: move it, "
            f"or name another --output_dir."
        )


class StaleFeaturesError(ValueError):
    """Stored features are not those that the model gives now.

    Attributes:
        folder: where they are.
        row: that was computed again, by its name.
        what: what differs.
    """

    def __init__(self, folder: Path, row: str, what: str):
        self.folder, self.row, self.what = folder, row, what
        super().__init__(
            f"The features in {folder} are not those of these data and this model: {row} was computed again, and "
            f"{what}. Delete that folder: the features are computed anew then."
        )

    def __reduce__(self) -> tuple[type, tuple[Path, str, str]]:
        return type(self), (self.folder, self.row, self.what)


def store(wanted: Wanted, folder: str | Path, accelerator: Any, num_workers: int) -> StoredFeatures:
    """Compute what is missing of some features. Every process calls this.

    Args:
        wanted: Which.
        folder: Of all features of a run, on a disk that all processes share.
        accelerator: What `accelerate launch` has set up.
        num_workers: Processes that open images, for each process of the run.

    Raises:
        StaleFeaturesError: What is stored are other features.
        DiskFullError: There is no room.
    """
    description = of_main_process(accelerator, wanted.describe)
    rows, device = wanted.rows(), accelerator.device
    shards = FeatureShards(folder, wanted.kind, description, rows.shape[1], wanted.encoder.width, wanted.views)
    missing = of_main_process(accelerator, shards.prepare)
    if missing or len(shards):
        wanted.encoder.module.to(device).eval()
    of_main_process(accelerator, lambda: check(wanted, shards, missing, device))
    of_main_process(accelerator, lambda: warn_of_unusable(wanted, shards, missing))
    own = missing[accelerator.process_index :: accelerator.num_processes]
    done_together(lambda: _write(wanted, shards, own, device, num_workers, accelerator.is_main_process))
    return done_together(lambda: StoredFeatures(shards))


def _write(
    wanted: Wanted, shards: FeatureShards, numbers: list[int], device: torch.device, num_workers: int, is_shown: bool
) -> None:
    if not numbers:
        return
    rows = wanted.rows()
    parts = {number: rows[:, number * ROWS : (number + 1) * ROWS] for number in numbers}
    total = sum(part.shape[1] for part in parts.values())
    with tqdm(total=total, desc=wanted.title, unit="row", disable=not is_shown) as bar:
        found: list[Entries] = []
        for number, is_last, count, entries in compute(wanted, parts, device, num_workers):
            found.append(entries)
            bar.update(count)
            if is_last:
                shards.write(number, joined(found))
                found = []


def check(wanted: Wanted, shards: FeatureShards, missing: Sequence[int], device: torch.device) -> None:
    """Compute some rows again whose features were found, and compare.

    Args:
        wanted: The features.
        shards: Where they are.
        missing: The shards that are not there.
        device: Where to compute.

    Raises:
        StaleFeaturesError: They differ.
    """
    there = [number for number in range(len(shards)) if number not in set(missing)]
    if not there:
        return
    rows = wanted.rows()
    chosen = np.concatenate([np.arange(number * ROWS, min((number + 1) * ROWS, rows.shape[1])) for number in there])
    chosen = chosen[np.unique(np.linspace(0, len(chosen) - 1, CHECKED).astype(int))]
    again = compute_again(wanted, rows[:, chosen], device)
    for place in range(len(again.rows)):
        source, row, caption = int(again.sources[place]), int(again.rows[place]), int(again.places[place])
        number = int(np.flatnonzero((rows[0] == source) & (rows[1] == row))[0]) // ROWS
        found = shards.read(number)
        entries = np.flatnonzero((found.sources == source) & (found.rows == row) & (found.places == caption))
        name = f"row {row} of {wanted.pairs.sources[source].name}"
        if what := _difference(wanted, again, place, found, entries):
            raise StaleFeaturesError(shards.folder, name, what)


def warn_of_unusable(wanted: Wanted, shards: FeatureShards, missing: Sequence[int]) -> None:
    """Say which of the shards that were found have rows whose images could not be used, perhaps for that moment.

    They are not tried again by themselves: a thousand addresses that are gone would be waited for at every start.

    Args:
        wanted: The features.
        shards: Where they are.
        missing: The shards that are not there.
    """
    if wanted.of_texts:  # a caption that could not be used then cannot be now
        return
    found = {number: shards.reasons(number) for number in range(len(shards)) if number not in set(missing)}
    having = [number for number, reasons in found.items() if reasons]
    if not having:
        return
    names = ", ".join(shards.path(number).name for number in having[:SHOWN]) + (", ..." if having[SHOWN:] else "")
    logger.warning(
        "%d rows of %s have no stored features, since their images could not be used when these were computed (%s); "
        "they are left out. If they can be used now, delete %d of the folders in %s, which are computed anew then: %s",
        *(sum(map(len, found.values())), wanted.pairs.name, found[having[0]][0], len(having), shards.folder, names),
    )


def _difference(wanted: Wanted, again: Entries, place: int, found: Entries, entries: np.ndarray) -> str:
    """What differs between an entry and what is found of it, in words; nothing where one of them has no features."""
    if len(entries) != 1:
        return f"it has {len(entries)} entries there"
    (entry,) = entries
    if again.reasons[place] is not None or found.reasons[entry] is not None:
        return ""  # such as an image that could not be fetched then, or cannot be now
    if again.ids[place] != found.ids[entry]:
        return f"its {'caption' if wanted.of_texts else 'image'} is another one"
    most = MOST_ROUNDING.get(wanted.encoder.precision, max(MOST_ROUNDING.values()))
    for ours, theirs in zip(again.views, found.views, strict=True):
        length = float(np.linalg.norm(ours[place]))
        part = float(np.linalg.norm(ours[place] - theirs[entry])) / max(length, 1e-12)
        if not part <= most:
            return f"its features differ by {part:.1e} of their length, where {most:g} may be rounding"
    return ""


def digest_of_module(module: nn.Module, config: Any) -> str:
    """A name of a model's weights and configuration.

    Args:
        module: Whose tensors count, with their names.
        config: Its configuration.
    """
    found = hashlib.blake2b(digest_size=16)
    values = {name: value for name, value in config.to_dict().items() if name not in BOOKKEEPING}
    found.update(f"{type(module).__name__} {json.dumps(values, sort_keys=True, default=str)}".encode())
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def digest_of_tokenizer(tokenizer: Any) -> str:
    """A name of the settings by which a text becomes tokens."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    settings |= {"truncation": None, "padding": None}  # of its last call
    settings |= {"class": type(tokenizer).__name__, "longest": tokenizer.model_max_length}
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()


__all__ = [
    "FOLDER",
    "StaleFeaturesError",
    "check_folder",
    "digest_of_module",
    "digest_of_tokenizer",
    "holds_only_features",
    "store",
]
