"""The data of a run, opened: pairs to train on, sets to evaluate on, and a guard set."""

import os
from dataclasses import dataclass
from typing import Any

from transformers import ProcessorMixin

from ..data.sources import Source, names_a_source, parse_sources
from ..evaluation.labelled_images import LabelledImages
from .config import TrainingConfig
from .data.collator import PairCollator
from .data.load_pairs import hold_out, load_pairs, read_validation, with_replay
from .data.pairs import Pairs, PairStream
from .data.survey import (
    LOOKED_AT,
    OPENED,
    Look,
    check_negatives,
    describe_captions,
    describe_found_columns,
    describe_negatives,
    look_at,
)
from .guarding import open_guard
from .validation_sets import ValidationPairs


@dataclass
class Data:
    """Pairs to train on and those to evaluate on.

    guard:         images that show what the model forgets
    look:          at rows to train on
    """

    train: Pairs | PairStream
    validation_sets: list[ValidationPairs]
    look: Look
    guard: LabelledImages | None = None

    @property
    def validation(self) -> Pairs | PairStream | None:
        """The pairs of the first validation set."""
        return self.validation_sets[0].pairs if self.validation_sets else None

    @property
    def class_prompts(self) -> list[str] | None:
        """The class prompts of the first validation set."""
        return self.validation_sets[0].class_prompts if self.validation_sets else None


def _find_labels(pairs: Pairs | PairStream) -> list[str] | None:
    """Where all captions are a template over one and the same label, carry the labels along; returns all captions."""
    readers = [source.captions for source in pairs.sources]
    first = readers[0]
    if any(len(r.columns) != 1 or r.names != first.names or r.column != first.column or not r.names for r in readers):
        return None
    ((column, names),) = first.names.items()
    for source in pairs.sources:
        source.label_column = column
    return [first.column.format(**{column: name}) for name in names]


def open_data(config: TrainingConfig, num_processes: int = 1) -> Data:
    """Open the data and look at some rows. `config` gets batches that are no larger than the data.

    Args:
        config: the options.
        num_processes: of the run.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: a source, split or column is wrong. The message says which.
    """
    chosen: dict[str, Any] = {
        "image_column": config.image_column,
        "caption_column": config.caption_column,
        "captions": config.captions,
        "streaming": config.streaming,
        "image_folders": config.image_folders,
    }
    negatives = config.negative_caption_column
    train = load_pairs(config.dataset, split=config.split, negative_caption_column=negatives, **chosen)
    if config.captions == "all" and isinstance(train, Pairs) and not train.has_several_captions:
        raise ValueError("--captions all would have no effect: a row of this data has one caption.")
    chosen["passed_over"] = negatives  # wrong captions are no captions of other data either
    evaluated: list[tuple[str, Pairs | PairStream]] = []
    for one in config.validation_sets:
        amount = read_validation(one.source)
        if isinstance(amount, str) and names_a_source(amount):
            validation = _open_validation(amount, config, chosen)
        elif isinstance(amount, str):
            validation = load_pairs(config.dataset, split=amount, **(chosen | {"captions": "all"}))
        else:
            train, validation = hold_out(train, amount, config.seed)
            for source in validation.sources:  # which is measured as without them
                source.negatives = ()
        evaluated.append((one.name, validation))
    if (old := config.replayed) is not None and old.weight is not None:  # behind what is held out
        named = {"image_column": None, "caption_column": config.replay_caption_column}
        train = with_replay(train, load_pairs(Source(old.path), split=config.split, **(chosen | named)), old.weight)
    sets = [ValidationPairs(name, pairs, _find_labels(pairs)) for name, pairs in evaluated]
    look = look_at(train, max(LOOKED_AT, config.per_device_train_batch_size * num_processes))
    check_negatives(look, negatives)
    for _, pairs in evaluated:
        look_at(pairs, OPENED)
    if look.is_whole:
        config.limit_batch_size(look.draws, num_processes, train.name)
    return Data(train, sets, look, open_guard(config))


def _open_validation(path: str, config: TrainingConfig, chosen: dict[str, Any]) -> Pairs | PairStream:
    """Pairs to evaluate on from a source of their own. chosen: as `load_pairs` takes it"""
    sources = [source for source in (*parse_sources(config.dataset), config.replayed) if source is not None]
    if any(_is_trained_on(path, source.path, config.split) for source in sources):
        raise ValueError(
            f"--validation {path} is a source that is trained on: name another, or one of its splits, or hold rows out "
            f"with a number (500) or a part (0.05) of them."
        )
    return load_pairs(Source(path), split=None, **(chosen | {"captions": "all"}))


def _is_trained_on(path: str, source: str, split: str) -> bool:
    """Whether a source is one that is trained on, or the folder or file of its split, however it is written."""
    place, trained = (os.path.realpath(os.path.expanduser(each)) for each in (path, source))
    return path == source or place == trained or os.path.splitext(place)[0] == os.path.join(trained, split)


def describe_start(config: TrainingConfig, data: Data, processor: ProcessorMixin) -> list[str]:
    """Lines to be said when a run begins: what was chosen where nothing was given, and what is odd about the data."""
    is_masked, collator = config.mask_duplicates == "on", PairCollator(processor)
    captions = describe_captions(data.look.captions, collator, is_masked=is_masked)
    notes = [*config.notes, *describe_found_columns(data.train)] if config.caption_column is None else config.notes
    return notes + captions + describe_negatives(data.look, collator, is_masked=is_masked)
