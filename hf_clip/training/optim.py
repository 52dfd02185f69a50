"""The optimizer, and what it must not touch."""

import math

import torch
from torch import nn

from .config import TrainingConfig

MAX_LOGIT_SCALE = math.log(100)
"""The temperature is kept from scaling logits by more than 100 (section 2.5)."""


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices: not for gains, biases, positions, the class token or the logit scale."""
    return parameter.ndim >= 2 and "position" not in name


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay on the model's matrices (section 2.5)."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[is_decayed(name, parameter)].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": config.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )
