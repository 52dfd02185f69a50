"""The average of weights along a run: an exponential moving average. Of two models: `hf_clip.checkpoints.wise_ft`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.wise_ft import wide


def whole_tensor(tensor: Any) -> Tensor:
    """A sharded tensor gathered on every process; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded_like(tensor: Tensor, example: Any) -> Tensor:
    """This process's part of a whole tensor that all processes have, where `example` is sharded."""
    if not hasattr(example, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, example.device_mesh, example.placements)


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """A model's present weights in the computer's memory, for an average later on."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}


Access = Callable[..., AbstractContextManager]
"""What makes a context in which a model's weights can be read, `access()`, and written, `access(written=True)`."""


def at_any_time(written: bool = False) -> AbstractContextManager:
    """`Access` to a model that holds its weights as they are."""
    return nullcontext()


@contextmanager
def weights_swapped_in(model: nn.Module, weights: Mapping[str, Tensor], access: Access = at_any_time) -> Iterator[None]:
    """Within this block a model has other weights, and afterwards its own again, bit for bit.

    Args:
        model: Whose weights are swapped.
        weights: All or some of the model's tensors, by name.
        access: What makes the model's weights readable and writable; see `Access`.
    """
    with access():
        own = model.state_dict()
        kept = {name: own[name].clone() for name in weights}
    try:
        _overwrite(model, weights, access)
        yield
    finally:
        _overwrite(model, kept, access)


@torch.no_grad()
def _overwrite(model: nn.Module, weights: Mapping[str, Tensor], access: Access) -> None:
    with access(written=True):
        # Asked for anew: FSDP2 may hold other weights gathered, and lets go of them where its state is asked for.
        own = model.state_dict()
        for name, tensor in weights.items():
            own[name].copy_(tensor)


USUAL_WARMUP, SHORTEST_WARMUP = 9.0, 1.0
"""k of `MovingAverage`: with 9 after step n the decay is at most (1 + n) / (10 + n), with 1 all steps count alike."""


def spans_all_steps(decay: float, total_steps: int) -> bool:
    """Whether a moving average of this decay would span more steps than the run has."""
    return total_steps * (1 - decay) < SHORTEST_WARMUP


def warmup_of(decay: float, total_steps: int | None) -> float:
    """k of `MovingAverage`.

    Args:
        decay: Of the average.
        total_steps: Of the run, or None for a run of any length.
    """
    return USUAL_WARMUP if total_steps is None else min(max(total_steps * (1 - decay), SHORTEST_WARMUP), USUAL_WARMUP)


class MovingAverage:
    """An exponential moving average of what is trained, for evaluation and saving.

    After step n, counted from 1, average ← d · average + (1 − d) · weights, where d = min(decay, (1 + n) / (1 + k +
    n)). The average starts at the weights it is made from. Because d is small at first, these and the first steps soon
    lose their weight, and no correction is needed. After step n the average spans about the last n / k steps. (timm's
    ModelEmaV3 is the same with `warmup_power` 1 and `warmup_gamma` k.)

    k is 9, as usual, in a run that is long enough to reach the decay. In a shorter run of T steps d would never reach
    it, and all decays would give one result. There k = T · (1 − decay), so that d reaches the decay at the end of the
    run. k is at least 1. With k = 1 the average is the mean of all steps; that is so for any decay above 1 − 1 / T
    (`spans_all_steps`).

    Trainable parameters and running statistics are averaged in float32, since steps below bfloat16's resolution would
    be lost. All processes of a run have the same parameters and so the same average. Running statistics differ between
    processes, in the model as here, unless BatchNorm is synchronised or frozen.

    Give it the model itself, not what it is wrapped in, after all changes, locks and adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = 0.9999,
        access: Access = at_any_time,
        total_steps: int | None = None,
    ):
        """`total_steps`: of the run; None for a run of any length, with the usual warm-up."""
        if not 0 < decay < 1:
            raise ValueError(f"The moving average's decay is {decay}, but must be between 0 and 1, such as 0.9999.")
        self.decay, self.access = decay, access
        self.updates = 0
        self.warmup = warmup_of(decay, total_steps)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        buffers = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
        with access():
            self.weights = {name: wide(tensor.detach()).clone() for name, tensor in (trained | buffers).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after an optimizer step."""
        present = dict(model.named_parameters()) | dict(model.named_buffers())
        if missing := self.weights.keys() - present.keys():
            raise ValueError(
                f"The moving average was made of other parameters: there is no {min(missing)} now. Make it after all "
                f"locks and adapters, and update it with the model itself, not with what it is wrapped in."
            )
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (1 + self.warmup + self.updates))
        with self.access():
            for name, average in self.weights.items():
                average.lerp_(present[name].to(average.device, average.dtype), 1 - decay)

    def swapped_in(self, model: nn.Module) -> Any:
        """`with average.swapped_in(model):` the model has the averaged weights, and afterwards its own again."""
        return weights_swapped_in(model, self.weights, self.access)

    def state_dict(self) -> dict[str, Any]:
        weights = {name: whole_tensor(tensor) for name, tensor in self.weights.items()}
        return {"decay": self.decay, "updates": self.updates, "weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        _check_resumed(self.weights, state["weights"])
        self.decay, self.updates = state["decay"], state["updates"]
        for name, tensor in state["weights"].items():
            own = self.weights[name]
            self.weights[name] = sharded_like(tensor.to(own.device, copy=True), own)


def _check_resumed(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    if differing := sorted(
        name
        for name in own.keys() | saved.keys()
        if name not in own or name not in saved or own[name].shape != saved[name].shape
    ):
        raise ValueError(
            f"The saved moving average doesn't fit this run: {differing[0]} differs. Resume with the same model, locks "
            f"and adapters."
        )
