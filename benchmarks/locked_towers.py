"""How fast a step is with both towers locked: from stored features, and with the towers in memory.

Model and pairs are the demo's: a small ViT, digits of 16 × 16 pixels, 256 pairs in a batch. A step is all that a run
does for it: rows from the loader (with the workers that a run would have), embeddings, the loss, backward, AdamW over
the projections and the temperature. The losses of the first step must agree. To compute the features is not part of it.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
from torch import Tensor

from demo.digits import make_dataset
from demo.model import TOWERS, write_fresh_model
from hf_clip import HfClipModel, HfClipProcessor
from hf_clip.training.config import TrainingConfig
from hf_clip.training.data.augment import Augmentation
from hf_clip.training.data.collator import PairCollator
from hf_clip.training.data.load_pairs import load_pairs
from hf_clip.training.data.loader import PairLoader, build_loader
from hf_clip.training.data.pairs import Pairs
from hf_clip.training.data.stored_collator import StoredCollator, StoredPairs
from hf_clip.training.evaluating import INPUTS
from hf_clip.training.frozen_towers import FrozenTowers, store_towers_
from hf_clip.training.gradient_caching import backpropagate
from hf_clip.training.losses import ContrastiveResult, global_contrastive_loss
from hf_clip.training.optim import clamp_logit_scale_, create_optimizer
from hf_clip.training.trainable import lock_

from .measuring import OURS, Contender, Table, compare
from .settings import Settings

OPTIONS = ("batch",)
NEEDS_CEILING = False
IS_ON_CPU = True
PAIRS = 256
ROWS, QUICK_ROWS = 10_000, 1_000
ROUNDS, QUICK_ROUNDS = 9, 3
TOLERANCE = 1e-4
STORED = f"{OURS}, stored features"
IN_MEMORY = "towers in memory"


@dataclass
class Demo:
    """The demo's model, locked, its processor, and rows."""

    model: HfClipModel
    processor: HfClipProcessor
    pairs: Pairs
    folder: Path


def make_demo(folder: Path, rows: int) -> Demo:
    datasets.disable_progress_bars()
    table = make_dataset(TOWERS["vit"].image_size, rows)["train"]
    table.save_to_disk(str(folder / "pairs"))
    write_fresh_model(folder / "model", "vit", table["caption"][:], seed=0)
    model = HfClipModel.from_pretrained(folder / "model")
    lock_(model, "image,text")
    pairs = load_pairs(str(folder / "pairs"))
    assert isinstance(pairs, Pairs)
    return Demo(model, HfClipProcessor.from_pretrained(folder / "model"), pairs, folder)


def store(demo: Demo, folder: Path) -> FrozenTowers:
    """Compute all features; the towers leave the model."""
    config = TrainingConfig(
        model=str(demo.folder / "model"),
        dataset=[str(demo.folder / "pairs")],
        output_dir=str(folder),
        max_steps=1,
        lock="image,text",
        cache_frozen_features=True,
        augmentation="none",
    )
    alone = SimpleNamespace(
        device=torch.device("cpu"), mixed_precision="no", process_index=0, num_processes=1, is_main_process=True
    )
    given: dict[str, Any] = {"train": demo.pairs, "validation": [], "num_workers": 1}
    return store_towers_(demo.model, demo.processor, config, alone, **given)


def _loss(images: Tensor, texts: Tensor, scale: Tensor, _: Tensor | None) -> ContrastiveResult:
    return global_contrastive_loss(images, texts, scale)


def make_step(model: HfClipModel, loader: PairLoader) -> Callable[[], float]:
    model.train()
    optimizer, batches = create_optimizer(model, rates=1e-3), loader.batches()

    def step() -> float:
        _, batch = next(batches)
        result = backpropagate(model, {name: batch[name] for name in INPUTS}, _loss)
        optimizer.step()
        optimizer.zero_grad()
        clamp_logit_scale_(model)
        return result.global_loss.item()

    return step


def same_losses() -> Callable[[float], str | None]:
    expected: list[float] = []

    def check(loss: float) -> str | None:
        expected.append(loss)
        is_same = abs(loss - expected[0]) <= TOLERANCE * expected[0]
        return None if is_same else f"its loss is {loss:.4f}, where the other has {expected[0]:.4f}"

    return check


def steps_table(folder: Path, pairs: int, rows: int, rounds: int, seconds: float) -> Table:
    plain, locked = make_demo(folder / "plain", rows), make_demo(folder / "stored", rows)
    frozen, augmentation = store(locked, folder / "out"), Augmentation.parse("none")
    collator = StoredCollator(frozen.train, locked.processor, augmentation)
    loaders = (
        build_loader(StoredPairs(locked.pairs, frozen.train), collator, pairs, finish_images=False),
        build_loader(
            plain.pairs, PairCollator(plain.processor, augmentation), pairs, num_workers=1, finish_images=False
        ),
    )
    check = same_losses()
    table = Table(f"step with both towers locked, the demo's ViT, {pairs} pairs", "pairs", ours=(STORED,))
    contenders = [
        Contender(STORED, make_step(locked.model, loaders[0]), pairs, "float32", check),
        Contender(IN_MEMORY, make_step(plain.model, loaders[1]), pairs, "float32", check),
    ]
    return compare(table, contenders, rounds=rounds, seconds=seconds)


def run(settings: Settings) -> Iterator[Table]:
    rows = settings.choose(ROWS, QUICK_ROWS)
    for pairs in settings.batches or (PAIRS,):
        with tempfile.TemporaryDirectory() as folder:
            rounds = settings.rounds or settings.choose(ROUNDS, QUICK_ROUNDS)
            yield steps_table(Path(folder), pairs, rows, rounds, settings.seconds)
