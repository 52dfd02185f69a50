"""Features of all rows of a run, computed once by a model that is not trained, and stored in the output folder.

1. What the features are made of (weights, settings of the processor, rows, augmentation, seed) names their folder.
2. Of shards that an earlier run left there, some rows are computed again and compared.
3. The processes share the missing shards. Each writes its own, whole or not at all.

Invariant: what is stored does not depend on the number of processes or on when a run was killed: within a shard always
the same rows are computed together. Row by row, images are prepared as in training, and view v of an image is what
training would make of it in epoch v.

Dimensions: B batch, W width of a feature.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data.columns import UnusableRowError
from ..data.content import tokens_id
from ..model.configuration_hf_clip import BOOKKEEPING
from .agreement import done_together, of_main_process
from .data.collator import EMPTY, PairCollator
from .data.feature_shards import ROWS, Entries, FeatureShards, joined
from .data.image_batch import ImageBatch, PreparedImage
from .data.pairs import ANY, Draw, Pairs
from .data.rows_digest import digest_of_rows
from .data.stored_features import StoredFeatures
from .stopping import heed_in_worker

FOLDER = "frozen_features"
"""In the output folder."""

AT_ONCE = 64
"""Images or captions that are encoded together. Another number would change what is stored by rounding."""

CHECKED = 8
"""Rows that are computed again where features are found."""

MOST_ROUNDING = {"no": 1e-2, "bf16": 5e-2, "fp16": 5e-2}
"""How far features may be from those that were computed before, perhaps on another machine, as a part of their
length."""

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def holds_only_features(output_dir: str | Path) -> bool:
    """Whether an output folder has nothing but features, of a run that ended before its first step."""
    folder = Path(output_dir)
    return folder.is_dir() and [path.name for path in folder.iterdir() if not path.name.startswith(".")] == [FOLDER]


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


@dataclass(frozen=True)
class Encoder:
    """What makes features.

    Attributes:
        module: what has the weights; it is moved to the device.
        encode: the model's inputs (B, …) on the device → features (B, W).
        width: W.
        made_of: what its features depend on, as JSON can hold it.
        precision: of the run, as accelerate names it.
    """

    module: nn.Module
    encode: Callable[..., Tensor]
    width: int
    made_of: dict[str, Any]
    precision: str = "no"

    def __call__(self, device: torch.device, **inputs: Any) -> np.ndarray:
        """(B, W), float32."""
        casts: AbstractContextManager = nullcontext()
        if self.precision in AUTOCAST:
            casts = torch.autocast(device.type, AUTOCAST[self.precision])
        with torch.no_grad(), casts:
            features = self.encode(**{name: tensor.to(device) for name, tensor in inputs.items()})
        return features.float().cpu().numpy()


@dataclass(frozen=True)
class Wanted:
    """Features of one kind, of the rows of one `Pairs`.

    Attributes:
        kind: of the folder's name, such as "image".
        title: what the progress bar says.
        encoder: that makes them.
        pairs: whose rows they are of.
        collator: that prepares the rows as in training.
        of_texts: whether of captions, and not of images.
        views: of each image.
        prepared_by: what the preparation of images depends on beside the processor.
    """

    kind: str
    title: str
    encoder: Encoder
    pairs: Pairs
    collator: PairCollator
    of_texts: bool
    views: int = 1
    prepared_by: dict[str, Any] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """What the features are made of."""
        made_of = self.encoder.made_of | self.prepared_by | {"views": self.views, "precision": self.encoder.precision}
        return json.loads(json.dumps(made_of | {"data": digest_of_rows(self.pairs)}, default=str))

    def rows(self) -> np.ndarray:
        """Source and row of each, (2, rows)."""
        sources = [np.full(len(source.rows), place) for place, source in enumerate(self.pairs.sources)]
        rows = [source.rows for source in self.pairs.sources]
        return np.stack([np.concatenate(sources), np.concatenate(rows)]).astype(np.int64)


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
    own = missing[accelerator.process_index :: accelerator.num_processes]
    done_together(lambda: _write(wanted, shards, own, device, num_workers, accelerator.is_main_process))
    return StoredFeatures(shards)


def _write(
    wanted: Wanted, shards: FeatureShards, numbers: list[int], device: torch.device, num_workers: int, is_shown: bool
) -> None:
    if not numbers:
        return
    rows = wanted.rows()
    parts = {number: rows[:, number * ROWS : (number + 1) * ROWS] for number in numbers}
    total = sum(part.shape[1] for part in parts.values())
    compute = _texts if wanted.of_texts else _images
    with tqdm(total=total, desc=wanted.title, unit="row", disable=not is_shown) as bar:
        found: list[Entries] = []
        for number, is_last, count, entries in compute(wanted, parts, device, num_workers):
            found.append(entries)
            bar.update(count)
            if is_last:
                shards.write(number, joined(found))
                found = []


Parts = dict[int, np.ndarray]
"""The number of a shard → source and row of its rows, (2, rows)."""

Computed = Iterator[tuple[int, bool, int, Entries]]
"""Number of the shard, whether these are the last of it, how many rows they are of, and the entries."""


# --- images ----------------------------------------------------------------------------------------------------------


@dataclass
class _Opened:
    """What a worker makes of some rows. `images` has those of rows without a reason, view by view."""

    images: ImageBatch
    ids: list[int]
    reasons: list[str | None]


class _OpenedRows(Dataset):
    """Source and row → their images."""

    def __init__(self, wanted: Wanted):
        self.pairs, self.collator, self.views = wanted.pairs, wanted.collator, wanted.views

    def __getitems__(self, rows: Any) -> _Opened:
        images: list[PreparedImage] = []
        ids: list[int] = []
        reasons: list[str | None] = []
        for source, row in rows:
            draws = [Draw(source, row, ANY, view) for view in range(self.views)]
            stored = self.pairs.read(draws[0])
            try:
                if stored.reason is not None:
                    raise UnusableRowError(stored.reason)
                views, image_id = self.collator.prepare_images(
                    stored, [self.collator.choose(draw, stored)[1] for draw in draws]
                )
            except UnusableRowError as error:
                ids.append(0)
                reasons.append(str(error))
            else:
                images += views
                ids.append(image_id)
                reasons.append(None)
        return _Opened(self.collator.images.batch(images), ids, reasons)


def _as_it_is(opened: Any) -> Any:
    return opened


def _images(wanted: Wanted, parts: Parts, device: torch.device, num_workers: int) -> Computed:
    step = max(1, AT_ONCE // wanted.views)
    batches = [
        (number, first + step >= part.shape[1], part[:, first : first + step])
        for number, part in parts.items()
        for first in range(0, part.shape[1], step)
    ]
    loader = DataLoader(
        _OpenedRows(wanted),
        batch_sampler=[batch.T.tolist() for _, _, batch in batches],
        collate_fn=_as_it_is,
        num_workers=num_workers,
        worker_init_fn=heed_in_worker,
        generator=torch.Generator(),  # its start draws a number, which must not be one of the run's own
    )
    for (number, is_last, batch), opened in zip(batches, loader, strict=True):
        yield number, is_last, batch.shape[1], _encoded(wanted, batch, opened, device)


def _encoded(wanted: Wanted, rows: np.ndarray, opened: _Opened, device: torch.device) -> Entries:
    """The entries of rows (2, rows) whose images are open."""
    count, views = rows.shape[1], wanted.views
    features = np.zeros((count, views, wanted.encoder.width), dtype=np.float32)
    is_usable = np.array([reason is None for reason in opened.reasons], dtype=bool)
    if len(opened.images):
        found = wanted.encoder(device, pixel_values=opened.images)
        features[is_usable] = found.reshape(-1, views, wanted.encoder.width)
    zeros = np.zeros(count, dtype=np.int64)
    ids = np.array(opened.ids, dtype=np.int64)
    sources, numbers = rows
    return Entries(
        sources, numbers, zeros, ids, zeros.astype(bool), opened.reasons, [features[:, v] for v in range(views)]
    )


# --- captions --------------------------------------------------------------------------------------------------------


def _texts(wanted: Wanted, parts: Parts, device: torch.device, num_workers: int) -> Computed:
    for number, part in parts.items():
        yield number, True, part.shape[1], _entries_of_texts(wanted, part, device)


def _entries_of_texts(wanted: Wanted, rows: np.ndarray, device: torch.device) -> Entries:
    """An entry for each caption of some rows (2, rows), and one for a row without. Equal ones are encoded once."""
    collator = wanted.collator
    captions = list(_captions(wanted.pairs, rows))  # (place among the rows, place in its row, text, reason)
    known = collator.encode_together(text for _, _, text, _ in captions if text)
    tokens: list[tuple[int, ...]] = []
    is_cut: list[bool] = []
    reasons: list[str | None] = []
    for _, _, text, reason in captions:
        found: Sequence[int] = ()
        cut = False
        if reason is None:
            try:
                found, cut = known[text] if text in known else collator.encode(text)
            except UnusableRowError as error:
                reason = str(error)
        tokens.append(tuple(found))
        is_cut.append(cut)
        reasons.append(reason)
    features, numbers = _encode_texts(wanted, tokens, device)
    ids = [tokens_id(ids) if ids else 0 for ids in tokens]
    places = np.array([place for place, *_ in captions], dtype=np.int64)
    return Entries(
        rows[0, places],
        rows[1, places],
        np.array([place for _, place, *_ in captions], dtype=np.int64),
        np.array(ids, dtype=np.int64),
        np.array(is_cut, dtype=bool),
        reasons,
        [features[numbers]],
    )


def _captions(pairs: Pairs, rows: np.ndarray) -> Iterator[tuple[int, int, str, str | None]]:
    """Of each caption: the place of its row among these, its own in its row, its text, and why it cannot be used."""
    tables = [source.table.select_columns(source.columns_of_texts) for source in pairs.sources]
    for place, (number, row) in enumerate(rows.T.tolist()):
        stored = pairs.sources[number].row(tables[number][row], "")
        if stored.reason is not None:
            yield place, 0, "", stored.reason
            continue
        for caption, text in enumerate(stored.captions):
            yield place, caption, text, None if text else EMPTY


def _encode_texts(wanted: Wanted, tokens: list[tuple[int, ...]], device: torch.device) -> tuple[np.ndarray, list[int]]:
    """Features of different texts (n, W), the first of which are zeros, and for each text the number of its own."""
    different = sorted({ids for ids in tokens if ids}, key=lambda ids: (len(ids), ids))
    features = [np.zeros((1, wanted.encoder.width), dtype=np.float32)]
    for first in range(0, len(different), AT_ONCE):
        features.append(wanted.encoder(device, **wanted.collator.padded(different[first : first + AT_ONCE])))
    numbers = {ids: number for number, ids in enumerate(different, start=1)}
    return np.concatenate(features), [numbers.get(ids, 0) for ids in tokens]


# --- what is found ---------------------------------------------------------------------------------------------------


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
    again = _compute_again(wanted, rows[:, chosen], device)
    for place in range(len(again.rows)):
        source, row, caption = int(again.sources[place]), int(again.rows[place]), int(again.places[place])
        number = int(np.flatnonzero((rows[0] == source) & (rows[1] == row))[0]) // ROWS
        found = shards.read(number)
        entries = np.flatnonzero((found.sources == source) & (found.rows == row) & (found.places == caption))
        name = f"row {row} of {wanted.pairs.sources[source].name}"
        if what := _difference(wanted, again, place, found, entries):
            raise StaleFeaturesError(shards.folder, name, what)


def _compute_again(wanted: Wanted, rows: np.ndarray, device: torch.device) -> Entries:
    if wanted.of_texts:
        return _entries_of_texts(wanted, rows, device)
    return _encoded(wanted, rows, _OpenedRows(wanted).__getitems__(rows.T.tolist()), device)


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
    "Encoder",
    "StaleFeaturesError",
    "Wanted",
    "digest_of_module",
    "digest_of_tokenizer",
    "holds_only_features",
    "store",
]
