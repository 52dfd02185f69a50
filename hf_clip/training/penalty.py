"""A penalty on the distance from the weights that training started from (L2-SP, Li et al. 2018; ProLIP, Fahes et al.
2024).

Penalty = w · Σ ‖θ − θ₀‖² over what is trained, so its gradient is 2 w (θ − θ₀). This is added to the loss's gradient
after the processes have exchanged that, once in a step: so it is exact with any number of processes and micro-batches.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .averaging import whole_tensor


class PenaltyTowardsStart:
    """Draws what is trained towards the weights that it has when this is made.

    Make it of the model itself, after all locks, and after it was wrapped.

    Args:
        model: An HfClipModel. Sharded parameters are kept as they are sharded.
        weight: w above.
    """

    def __init__(self, model: nn.Module, weight: float):
        self.weight = weight
        self.start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def add_gradients_(self, model: nn.Module, scaler: Any = None) -> None:
        """Add the penalty's gradients to those of the loss.

        Args:
            model: The model that this was made of.
            scaler: The GradScaler by which the loss's gradients are scaled, in float16.
        """
        factor = 2 * self.weight * (1.0 if scaler is None else scaler.get_scale())
        for name, start in self.start.items():
            parameter = model.get_parameter(name)
            gradient = factor * (parameter - start)
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    @torch.no_grad()
    def value(self, model: nn.Module) -> float:
        """Compute the penalty. Every process calls this."""
        squares: list[Tensor] = [
            whole_tensor((model.get_parameter(name) - start).square().sum()) for name, start in self.start.items()
        ]
        return self.weight * sum(square.item() for square in squares)
