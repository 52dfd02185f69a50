"""LoRA through `peft`: small trained factors beside frozen matrices (Hu et al. 2021).

Adapters stand where a weight was still to be trained, so a lock that was set before says where: in one tower, or in
its last blocks. They are put into the model itself, which keeps its class, its calls and the names of its modules.

Invariant: until `merge_lora_` every tensor of the model but the temperature stays bit-equal. So an `Adapter`, which
holds the factors and the temperature, makes the trained model out of the one that training started from.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..extras import require
from .config import TrainingConfig
from .trainable import TEMPERATURE, freeze_batch_norm_

NOT_ADAPTED = "patch_embedding"
"""A ViT's patches are pixels cut out: adapters stand on the maps between features alone."""

ADAPTER_FOLDER = "adapter"
"""Where a run leaves its adapter, in its output folder."""

PEFT_PREFIX = "base_model.model."
"""In front of all names of tensors in PEFT's files."""


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
    if alpha is not None and alpha <= 0:
        raise ValueError(f"The LoRA alpha is {alpha}, but must be above 0: at 0 the factors would have no effect.")
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


def add_lora_of_run_(model: Any, config: TrainingConfig) -> None:
    """`add_lora_` as the options of a run ask for it. Without `--lora_rank` it does nothing."""
    if config.lora_rank is not None:
        add_lora_(
            model,
            config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            targets=config.lora_target_modules or None,
        )


def temperature_of(model: Any) -> dict[str, nn.Parameter]:
    """The logit scale, and the logit bias where there is one."""
    return {name: getattr(model, name) for name in TEMPERATURE if getattr(model, name, None) is not None}


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    layer_class = import_module("peft.tuners.lora").LoraLayer
    return [(name, module) for name, module in model.named_modules() if isinstance(module, layer_class)]


@dataclass(frozen=True)
class Adapter:
    """What LoRA trains beside the temperature, as PEFT stores it.

    Attributes:
        config: peft's LoraConfig.
        factors: tensors by their names in PEFT's files.
    """

    config: Any
    factors: dict[str, Tensor]

    def save(self, folder: str | Path, model: Any, *, base: str | None = None, part: float = 1.0) -> None:
        """Write adapter_config.json and adapter_model.safetensors.

        PEFT adds the factors to the model that training started from. It also takes the temperature from the file.

        Args:
            folder: Where to; it is made.
            model: The trained model, whose temperature the adapter gets.
            base: The repository or folder that training started from, which the adapter names.
            part: α of an average with the pretrained weights. The product of the factors is multiplied by it.
        """
        config = copy.copy(self.config)
        config.lora_alpha, config.base_model_name_or_path = self.config.lora_alpha * part, base
        config.save_pretrained(str(folder))
        tensors = self.factors | {PEFT_PREFIX + name: tensor for name, tensor in temperature_of(model).items()}
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(stored, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})


def adapter_of(model: Any) -> Adapter:
    """The adapter of a model, apart from it. Call it before `merge_lora_`.

    Args:
        model: An HfClipModel with adapters.

    Raises:
        ValueError: There are no adapters.
    """
    if not getattr(model, "peft_config", None):
        raise ValueError("This model has no adapters to save; add_lora_ adds them.")
    config = copy.copy(model.peft_config["default"])
    config.target_modules = sorted(config.target_modules)  # a set, whose order would differ from run to run
    config.inference_mode = True
    factors = model.get_adapter_state_dict("default")
    return Adapter(config, {PEFT_PREFIX + name: tensor for name, tensor in factors.items()})


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
