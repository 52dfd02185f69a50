"""Real optimizer steps on the reduced models."""

import torch
from torch import Tensor, nn

from hf_clip.training.optim import clamp_logit_scale_

from ..small import random_images, texts


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """Names of the tensors that are no longer bit-equal."""
    return {name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)}


def take_steps(model: nn.Module, tower: str, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    """Train as finetune.py does, in training mode."""
    model.train()
    for step in range(steps):
        model(
            pixel_values=random_images(tower, seed=step), input_ids=texts(seed=step), return_loss=True
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        clamp_logit_scale_(model)
