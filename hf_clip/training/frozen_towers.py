"""Locked towers that leave memory: their features are computed once, before training, and stored.

What is stored is a tower's pooled output (W,), before the projection. In the model a `StoredTower` takes the tower's
place, which gives back what it is called with: so projections, loss and all else compute what they computed before, and
no other part of the program knows of it. The tower's weights lie in a file beside the features, from where a model gets
them that is evaluated alone, saved or published.

Invariant: training is the same as without. Where images are augmented, epoch e sees view e mod K of each, and with
`--captions all` the views are others than without: see `feature_computing`.

Dimensions: B batch, W tower width.
"""

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..evaluation.feature_cache import processor_settings
from ..model.modeling_hf_clip import HfClipModel
from .agreement import of_main_process
from .checksums import check_checksums, checked_folder
from .config import TrainingConfig
from .data.augment import Augmentation
from .data.collator import PairCollator
from .data.pairs import Pairs, PairStream
from .data.stored_collator import Stores
from .feature_computing import Encoder, Wanted
from .feature_store import FOLDER, digest_of_module, digest_of_tokenizer, store
from .run_state import NEW_RUN, check_frozen
from .trainable import TOWERS
from .validation_sets import ValidationPairs

WEIGHTS = "tower.safetensors"


class StoredTower(nn.Module):
    """Stands where a tower was, and is called with the tower's pooled output.

    Args:
        config: Of the tower.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def get_input_embeddings(self) -> None:
        """It has none; FSDP2 asks for them."""

    def forward(self, pooled: Tensor, *given: Any, **named: Any) -> BaseModelOutputWithPooling:
        """Return `pooled` (B, W) as `pooler_output`. What else a tower takes has no effect."""
        return BaseModelOutputWithPooling(pooler_output=pooled)


def check_cacheable(model: HfClipModel, config: TrainingConfig) -> None:
    """Refuse locked towers that would give another output at every step.

    Args:
        model: Locked, adapted.
        config: The options.

    Raises:
        ValueError: A tower has dropout.
    """
    for tower in config.cached_towers:
        module: Any = getattr(model, TOWERS[tower])
        if module.config.attention_dropout:
            raise ValueError(
                f"--cache_frozen_features computes the features of the locked {tower} tower once, but it has "
                f"attention_dropout {module.config.attention_dropout:g}, with which they would be others in each step: "
                f"set it to 0 in the model's config.json, or leave the option out."
            )


def replace_towers_(model: HfClipModel, config: TrainingConfig) -> None:
    """Let locked towers leave a model."""
    for tower in config.cached_towers:
        setattr(model, TOWERS[tower], StoredTower(getattr(model, TOWERS[tower]).config))


@contextmanager
def without_towers(model: HfClipModel, names: Iterable[str]) -> Iterator[None]:
    """Within this block a whole model is called with the stored features of towers that it has.

    Args:
        model: Which has the towers again afterwards.
        names: Of the towers in the model.
    """
    towers = {name: getattr(model, name) for name in names}
    for name, tower in towers.items():
        setattr(model, name, StoredTower(tower.config))
    try:
        yield
    finally:
        for name, tower in towers.items():
            setattr(model, name, tower)


@dataclass(frozen=True)
class StoredSet:
    """What is stored of one validation set.

    Attributes:
        stores: Of its rows.
        class_features: (K, W) the text tower's output for the classes' prompts, where there are some.
    """

    stores: Stores = field(default_factory=Stores)
    class_features: Tensor | None = None


@dataclass
class FrozenTowers:
    """What became of towers that left memory.

    Attributes:
        files: Of each tower, by its name in the model, the folder with its weights.
        train: What is stored of the rows to train on.
        validation: What is stored of each validation set.
        digests: Of each tower's weights and configuration, by its name in a checkpoint.
    """

    files: dict[str, Path] = field(default_factory=dict)
    train: Stores = field(default_factory=Stores)
    validation: list[StoredSet] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """How the names of the towers' tensors begin in the whole model."""
        return tuple(f"{name}." for name in self.files)

    def weights(self) -> dict[str, Tensor]:
        """The towers' tensors, by the whole model's names.

        Raises:
            OSError, ValueError: A file is missing, or is not as it was written.
        """
        found: dict[str, Tensor] = {}
        for name, folder in self.files.items():
            try:
                check_checksums(folder)
            except (OSError, ValueError) as error:
                kind = OSError if isinstance(error, OSError) else ValueError  # others take more than a message
                raise kind(
                    f"The weights of a locked tower in {folder} are missing or damaged ({error}). Go on with "
                    f"--resume_from_checkpoint latest, which writes them again, or start anew."
                ) from error
            found |= {f"{name}.{inner}": tensor for inner, tensor in load_file(folder / WEIGHTS).items()}
        return found


def _write_weights(folder: Path, module: nn.Module) -> None:
    """Write a tower's weights, where they are not there already."""
    try:
        check_checksums(folder)
        return
    except (OSError, ValueError):
        shutil.rmtree(folder, ignore_errors=True)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}
    with checked_folder(
        folder, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    ) as unfinished:
        save_file(tensors, unfinished / WEIGHTS)


def _encoder_of(model: HfClipModel, tower: str, processor: Any, precision: str) -> Encoder:
    module: Any = getattr(model, TOWERS[tower])

    def pooled(pixel_values: Tensor | None = None, input_ids: Tensor | None = None, **named: Any) -> Tensor:
        given = pixel_values if input_ids is None else input_ids
        return module(given, **named, return_dict=True).pooler_output

    made_of: dict[str, Any] = {
        "features": f"pooled output of the {tower} tower",
        "weights": digest_of_module(module, module.config),
    }
    if tower == "image":
        made_of["processor"] = processor_settings(processor)
    else:
        made_of["tokenizer"] = digest_of_tokenizer(processor.tokenizer)
    return Encoder(module, pooled, module.config.hidden_size, made_of, precision, f"The locked {tower} tower")


def _stores(
    encoders: dict[str, Encoder],
    pairs: Pairs | PairStream,
    collator: PairCollator,
    views: int,
    which: str,
    **shared: Any,
) -> Stores:
    """What is stored of the rows of some pairs. which: their name on the progress bar"""
    assert isinstance(pairs, Pairs), "streams are refused"
    prepared_by: dict[str, Any] = {"on_device": collator.images.on_device, "augmentation": None}
    if collator.images.augmented is not None:
        prepared_by["augmentation"] = asdict(collator.images.augmented.augmentation) | {"seed": collator.seed}
    found = {}
    for tower, encoder in encoders.items():
        is_text = tower == "text"
        found[tower] = store(
            Wanted(
                kind=tower,
                title=f"{tower.capitalize()} features, {which}",
                encoder=encoder,
                pairs=pairs,
                collator=collator,
                of_texts=is_text,
                views=1 if is_text else views,
                prepared_by={} if is_text else prepared_by,
            ),
            **shared,
        )
    return Stores(found.get("image"), found.get("text"))


def store_towers_(
    model: HfClipModel,
    processor: Any,
    config: TrainingConfig,
    accelerator: Any,
    *,
    train: Pairs | PairStream,
    validation: Sequence[ValidationPairs],
    num_workers: int,
    written: Mapping[str, str] = NEW_RUN,
) -> FrozenTowers:
    """Compute the features of locked towers, or find them, and let the towers leave the model.

    Every process calls this.

    Args:
        model: Locked, and not yet wrapped.
        processor: The model's.
        config: The options.
        accelerator: What `accelerate launch` has set up.
        train: Pairs to train on.
        validation: The sets of pairs to evaluate on.
        num_workers: Processes that open images, for each process of the run.
        written: Digests that a checkpoint has from which the run goes on, see `RunState.frozen`.

    Raises:
        ValueError: A tower is another one than the checkpoint's.
        StaleFeaturesError: Features that were found are not those of this model and these data.
        DiskFullError: There is no room for them.
    """
    folder = Path(config.output_dir, FOLDER).resolve()
    encoders = {
        tower: _encoder_of(model, tower, processor, accelerator.mixed_precision) for tower in config.cached_towers
    }
    found = FrozenTowers()
    for tower, encoder in encoders.items():
        name, digest = f"locked {tower} tower", encoder.made_of["weights"]
        check_frozen(written, name, digest, f"--model {config.model}")
        found.digests[name] = digest
        place = folder / f"{tower}-tower-{digest[:16]}"
        of_main_process(accelerator, partial(_write_weights, place, encoder.module))
        found.files[TOWERS[tower]] = place
    settings: dict[str, Any] = {"seed": config.seed, "on_device": config.augment_on == "device"}
    shared: dict[str, Any] = {"folder": folder, "accelerator": accelerator, "num_workers": num_workers}
    augmented = PairCollator(processor, Augmentation.parse(config.augmentation), **settings)
    found.train = _stores(encoders, train, augmented, config.cached_views, "training pairs", **shared)
    for each in validation:
        plain, features = PairCollator(processor, **settings), None
        which = "validation pairs" if len(validation) == 1 else f"validation pairs of {each.name}"
        stores = _stores(encoders, each.pairs, plain, 1, which, **shared)
        if each.class_prompts and "text" in encoders:
            tokens = plain.tokenize(each.class_prompts)
            features = torch.from_numpy(encoders["text"](accelerator.device, **tokens))
        found.validation.append(StoredSet(stores, features))
    replace_towers_(model, config)
    return found


__all__ = ["FrozenTowers", "StoredTower", "check_cacheable", "replace_towers_", "store_towers_", "without_towers"]
