"""LoRA through `peft`: small trained factors beside frozen matrices (Hu et al. 2021).

Adapters stand where a weight was still to be trained, so a lock that was set before says where: in one tower, or in
its last blocks. They are put into the model itself, which keeps its class, its calls and the names of its modules.

Invariant: until `merge_lora_` every tensor of the model but the temperature stays bit-equal.
"""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import nn

from ..extras import require
from .trainable import TEMPERATURE, freeze_batch_norm_

NOT_ADAPTED = "patch_embedding"
"""A ViT's patches are pixels cut out: adapters stand on the maps between features alone."""


def import_peft() -> Any:
    """The package peft. Raises ImportError with the way to install it."""
    require("LoRA", "lora")
    return import_module("peft")


def lora_targets(model: nn.Module) -> list[str]:
    """The names of the matrices and convolutions of a model that are still trained.

    They are q_proj, k_proj, v_proj, out_proj, fc1 and fc2 of transformers, all convolutions of ResNets, q_proj, k_proj
    and v_proj of attention pools, and the projections.
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.requires_grad and not name.endswith(NOT_ADAPTED)
    ]


def add_lora_(
    model: Any,
    rank: int,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: str | Iterable[str] | None = None,
) -> list[str]:
    """Put adapters into an HfClipModel, and freeze all else but the temperature. Lock the model first.

    Args:
        model: An HfClipModel. Its BatchNorms are frozen too.
        rank: Width of the factors.
        alpha: The product of the factors is multiplied by `alpha / rank`. None multiplies it by 1.
        dropout: On what goes into the adapters.
        targets: Ends of the names of the modules to adapt, such as ["q_proj", "v_proj"]. None adapts all of
            `lora_targets`.

    Returns:
        The names of the adapted modules.

    Raises:
        ImportError: peft is not installed.
        ValueError: There is nothing to adapt, or an argument does not fit the model.
    """
    if rank < 1:
        raise ValueError(f"The LoRA rank is {rank}, but must be at least 1.")
    if not 0 <= dropout < 1:
        raise ValueError(f"The LoRA dropout is {dropout}, but must be at least 0 and below 1.")
    peft = import_peft()
    if getattr(model, "peft_config", None):
        raise ValueError("This model has adapters already; merge them with merge_lora_ before adding others.")
    possible = lora_targets(model)
    if not possible:
        raise ValueError(
            "LoRA has nothing to adapt: every matrix is locked. Leave a tower or the projections unlocked."
        )
    chosen = possible
    if targets is not None:
        targets = [targets] if isinstance(targets, str) else [str(target) for target in targets]
        if not targets:
            raise ValueError("LoRA was given no targets to adapt; name some, or leave them out to adapt all matrices.")
        ends = [f".{target}" for target in targets]
        chosen = [name for name in possible if f".{name}".endswith(tuple(ends))]
        for target, end in zip(targets, ends, strict=True):
            if not any(f".{name}".endswith(end) for name in possible):
                kinds = sorted({name.rpartition(".")[2] for name in possible} - {"0"})
                raise ValueError(f"There is no matrix {target!r} to adapt; there are {', '.join(kinds)}.")
    largest = max(min(matrix.shape) for matrix in (model.get_submodule(name).weight.flatten(1) for name in chosen))
    if rank > largest:
        raise ValueError(
            f"The LoRA rank is {rank}, but no matrix here has a rank above {largest}: take less, such as 16, or train "
            f"without LoRA."
        )
    freeze_batch_norm_(model)
    scale = rank if alpha is None else alpha
    model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=scale, lora_dropout=dropout, target_modules=chosen))
    for parameter in temperature_of(model).values():
        parameter.requires_grad_(True)
    return chosen


def temperature_of(model: Any) -> dict[str, nn.Parameter]:
    """The logit scale, and the logit bias where there is one."""
    return {name: getattr(model, name) for name in TEMPERATURE if getattr(model, name, None) is not None}


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    layer_class = import_module("peft.tuners.lora").LoraLayer
    return [(name, module) for name, module in model.named_modules() if isinstance(module, layer_class)]


@torch.no_grad()
def merge_lora_(model: Any) -> Any:
    """Add the adapters' products to their matrices, and remove the adapters.

    To save a model that goes on training, merge a copy: `merge_lora_(copy.deepcopy(model)).save_pretrained(...)`.

    Args:
        model: An HfClipModel with adapters.

    Returns:
        The same model, which is a plain HfClipModel again.

    Raises:
        ValueError: There are no adapters, or a product is not finite.
    """
    if not getattr(model, "peft_config", None):
        raise ValueError("This model has no adapters to merge; add_lora_ adds them.")
    for name, layer in _lora_layers(model):
        layer.merge(safe_merge=True)
        parent = model.get_submodule(name.rpartition(".")[0]) if "." in name else model
        setattr(parent, name.rpartition(".")[2], layer.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False
    return model
