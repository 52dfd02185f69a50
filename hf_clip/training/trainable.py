"""What is trained: the parts of a model, locked towers, and BatchNorm that stays as it is.

A CLIP has four parts: the towers `image` and `text`, their `projections`, and the `temperature` (the logit scale, and
the logit bias where there is one). A tower's parameters stand on levels. Level 0 has the embeddings or the stem. Each
layer of a transformer, or stage of a ResNet, is a level. The highest level has the final LayerNorm or the attention
pool.

Invariant: what is locked stays bit-equal, running statistics included. Parameters keep their names, so a model saves
and loads as if nothing had been locked.
"""

import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from torch import nn

from ..model.resnet_tower import BatchNorm

TOWERS = {"image": "vision_model", "text": "text_model"}
PROJECTIONS = {"image": "visual_projection", "text": "text_projection"}
TEMPERATURE = ("logit_scale", "logit_bias")
PARTS = ("image", "text", "projections", "temperature")

_BLOCK = re.compile(r"encoder\.layers\.(?P<layer>\d+)\.|layer(?P<stage>\d+)\.")
_ABOVE_THE_BLOCKS = ("final_layer_norm.", "post_layernorm.", "attnpool.")


def part_of(name: str) -> str:
    """The part of the model that a parameter of this name belongs to."""
    module = name.split(".")[0]
    if module in TEMPERATURE:
        return "temperature"
    if module in PROJECTIONS.values():
        return "projections"
    for tower, tower_module in TOWERS.items():
        if module == tower_module:
            return tower
    raise ValueError(
        f"The parameter {name!r} belongs to no part of a CLIP: pass an HfClipModel, without what it was wrapped in "
        f"(`accelerator.unwrap_model`)."
    )


def count_blocks(model: Any, tower: str) -> int:
    """Layers of a transformer, or stages of a ResNet."""
    return getattr(model, TOWERS[tower]).config.num_hidden_layers


def level_of(name: str, blocks: int) -> int:
    """The level within its tower, 0 to blocks + 1, of a parameter or module of this full name."""
    inner = name.partition(".")[2]
    if match := _BLOCK.match(inner):
        return int(match["stage"]) if match["layer"] is None else int(match["layer"]) + 1
    return blocks + 1 if inner.startswith(_ABOVE_THE_BLOCKS) else 0


def parse_lock(spec: str | None) -> dict[str, int | None]:
    """Read which towers are locked.

    Args:
        spec: `"image"` or `"text"` for a whole tower, `"image:2"` for all but its last two blocks, `"image,text:4"` for
            both towers. None locks nothing.

    Returns:
        For each locked tower how many of its last blocks stay unlocked. None stands for a tower that is locked with
        its projection.

    Raises:
        ValueError: It cannot be read.
    """
    lock: dict[str, int | None] = {}
    for item in filter(None, (item.strip() for item in (spec or "").split(","))):
        tower, colon, count = (piece.strip() for piece in item.partition(":"))
        if tower not in TOWERS:
            near = get_close_matches(tower, TOWERS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{tower!r} cannot be locked, but 'image', 'text' or both, as in 'image,text:4'.{hint}")
        if tower in lock:
            raise ValueError(f"The lock {spec!r} names {tower!r} twice; name it once.")
        if colon and not count.isdecimal():
            raise ValueError(
                f"The lock {item!r} needs the number of blocks that stay unlocked behind its colon, as in '{tower}:2'."
            )
        lock[tower] = int(count) if colon else None
    return lock


def lock_(model: Any, spec: str | None) -> None:
    """Lock towers of an HfClipModel: their parameters get no gradients, their BatchNorms no statistics.

    `"image"` locks the image tower and its projection, as in Zhai et al. 2022 (LiT), and `"text"` the text tower
    likewise. `"image:2"` leaves the last two layers of a ViT, or stages of a ResNet, unlocked, with what follows them:
    the final LayerNorm or attention pool, and the projection. `"image:0"` leaves only what follows them. `"image,text"`
    locks both towers and no projection, since the temperature alone could not learn anything.

    Calling it again locks more and unlocks nothing.

    Args:
        model: An HfClipModel.
        spec: See above and `parse_lock`.

    Raises:
        ValueError: It cannot be read, or leaves more blocks than the tower has.
    """
    lock = parse_lock(spec)
    for tower, unlocked in lock.items():
        if unlocked is not None and unlocked > (blocks := count_blocks(model, tower)):
            kind = "stages" if hasattr(getattr(model, TOWERS[tower]), "attnpool") else "layers"
            raise ValueError(
                f"The lock '{tower}:{unlocked}' leaves {unlocked} blocks unlocked, but that tower has {blocks} {kind}."
            )
    for tower, unlocked in lock.items():
        module = getattr(model, TOWERS[tower])
        blocks = count_blocks(model, tower)
        highest = blocks + 1 if unlocked is None else blocks - unlocked
        for name, parameter in module.named_parameters():
            if level_of(f"{TOWERS[tower]}.{name}", blocks) <= highest:
                parameter.requires_grad_(False)
        for name, norm in _batch_norms(module):
            if level_of(f"{TOWERS[tower]}.{name}.", blocks) <= highest:
                _freeze(norm)
    whole = [tower for tower, unlocked in lock.items() if unlocked is None]
    if len(whole) == 1:
        getattr(model, PROJECTIONS[whole[0]]).requires_grad_(False)


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm that stays in evaluation mode whatever mode its model is put into.

    Modules become this by their class alone, so that tensors, their names and hooks stay what they are.
    """

    def train(self, mode: bool = True) -> "FrozenBatchNorm2d":
        super().train(False)
        return self


def _batch_norms(model: nn.Module) -> Iterator[tuple[str, BatchNorm]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, BatchNorm))


def _freeze(norm: BatchNorm) -> None:
    norm.__class__ = FrozenBatchNorm2d
    norm.requires_grad_(False)
    norm.eval()


def freeze_batch_norm_(model: nn.Module) -> int:
    """Freeze the statistics, gains and biases of every BatchNorm for good.

    This is for fine-tuning. The statistics of few or narrow batches would replace those of 400 million images. A
    gradient cache needs the same output for an image whichever batch it is in.

    Returns:
        How many BatchNorms there are. A ViT has none.
    """
    norms = [norm for _, norm in _batch_norms(model)]
    for norm in norms:
        _freeze(norm)
    return len(norms)


def synchronize_batch_norm_(model: nn.Module, device_type: str) -> None:
    """Let BatchNorms that are not frozen take their statistics over all processes, for training from scratch.

    Args:
        model: An HfClipModel.
        device_type: Where it will be trained, as `accelerator.device.type`.

    Raises:
        ValueError: There is no BatchNorm to synchronise, or torch cannot do it on this device.
    """
    waiting = [name for name, norm in _batch_norms(model) if not isinstance(norm, FrozenBatchNorm2d)]
    if not waiting:
        why = "all of them are frozen" if any(_batch_norms(model)) else "this image tower has none"
        raise ValueError(f"There is no BatchNorm to synchronise: {why}. Leave synchronising out.")
    if device_type == "cpu":
        raise ValueError("BatchNorm is synchronised between GPUs, but this runs on a CPU. Leave synchronising out.")
    for name in waiting:
        parent = model.get_submodule(name.rpartition(".")[0])
        child = name.rpartition(".")[2]
        setattr(parent, child, nn.SyncBatchNorm.convert_sync_batchnorm(getattr(parent, child)))
