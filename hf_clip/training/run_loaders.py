"""The loaders of a run: of the pairs to train on, and of each validation set."""

import os
from dataclasses import replace
from typing import Any

from ..inference.cpu import count_cores
from .config import TrainingConfig
from .data.augment import Augmentation
from .data.bad_rows import BadRows
from .data.collator import PairCollator
from .data.loader import PairLoader, build_loader
from .data.pairs import Pairs, PairStream
from .data.stored_collator import StoredCollator, StoredPairs, Stores
from .evaluating import EvaluatedPairs, Validation
from .frozen_towers import FrozenTowers, StoredSet
from .guarding import Guard
from .learner import Learner
from .run_data import Data
from .validation_sets import prefix_of

LARGEST_EVALUATED_BATCH = 256

MOST_WORKERS = 16
"""Of one process, where the options do not say: more than most GPUs can follow. Each holds two batches."""


def find_num_workers(accelerator: Any) -> int:
    """How many workers a loader of this process has where the options do not say: see `MOST_WORKERS`.

    A GPU leaves all cores but one to them, of which the processes of this machine have as many each. Without a GPU the
    cores compute, and one worker is enough.

    Args:
        accelerator: what `accelerate launch` has set up.
    """
    if accelerator.device.type == "cpu":
        return 1
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    return min(max(count_cores() // on_this_machine - 1, 1), MOST_WORKERS)


def workers_of(config: TrainingConfig, accelerator: Any) -> int:
    """How many workers a loader of this process has."""
    return find_num_workers(accelerator) if config.dataloader_num_workers is None else config.dataloader_num_workers


def build_loaders(data: Data, learner: Learner, config: TrainingConfig) -> tuple[PairLoader, Validation | None]:
    """What this process trains on and what it is evaluated on.

    Args:
        data: as `check_run` returns it.
        learner: whose processor prepares images and captions.
        config: the options.
    """
    accelerator, processor = learner.accelerator, learner.processor
    frozen = learner.frozen or FrozenTowers()
    shared: dict[str, Any] = {
        "num_processes": accelerator.num_processes,
        "process_index": accelerator.process_index,
        "pin_memory": accelerator.device.type == "cuda",
        "seed": config.seed,
        "finish_images": False,
    }
    is_masked = config.mask_duplicates == "on"
    prepared: dict[str, Any] = {
        "seed": config.seed,
        "on_device": config.augment_on == "device",
        "keep_own": not is_masked,
    }

    def make(pairs: Pairs | PairStream, stores: Stores, size: int, **chosen: Any) -> PairLoader:
        augmentation = Augmentation.parse(config.augmentation) if chosen.get("training", True) else None
        bad_rows, workers = BadRows(config.max_bad_fraction), workers_of(config, accelerator)
        if not stores.is_any:
            collator = PairCollator(processor, augmentation, **prepared)
        else:
            assert isinstance(pairs, Pairs), "streams are refused"
            collator, pairs = StoredCollator(stores, processor, augmentation, **prepared), StoredPairs(pairs, stores)
            if stores.is_all and config.dataloader_num_workers is None:
                workers = 0  # to look features up takes less time than to send them
        return build_loader(pairs, collator, size, bad_rows=bad_rows, num_workers=workers, **chosen, **shared)

    size = config.per_device_train_batch_size
    stores = frozen.train
    if learner.teacher is not None:
        stores = replace(stores, teacher_images=learner.teacher.images, teacher_texts=learner.teacher.texts)
    train = make(data.train, stores, size)
    if not data.validation_sets:
        return train, None
    size = min(size, LARGEST_EVALUATED_BATCH)
    stored, sets = frozen.validation or [StoredSet()] * len(data.validation_sets), []
    for place, (each, found) in enumerate(zip(data.validation_sets, stored, strict=True)):
        class_tokens = PairCollator(processor).tokenize(each.class_prompts) if each.class_prompts else None
        if found.class_features is not None:
            class_tokens = {"input_ids": found.class_features}
        # The workers of several sets would all wait at once, each with batches in memory.
        loader = make(each.pairs, found.stores, size, training=False, keep_workers=len(stored) == 1)
        sets.append(EvaluatedPairs(loader, class_tokens, prefix_of(config.validation_sets, place)))
    guard = None if data.guard is None else Guard(data.guard, processor, min(config.pairs_at_once or size, size))
    return train, Validation(tuple(sets), guard, tuple(config.widths), tuple(frozen.files))
