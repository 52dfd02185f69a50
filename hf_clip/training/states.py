"""The files of a checkpoint. None of them can run code when it is read.

    model.safetensors             whole, by the model's own names
    optimizer.pt                  tensors, numbers and containers: read with torch's `weights_only`
    moving_average.safetensors    with --ema_decay
    schedule.json                 scheduler, gradient scaler, the moving average's numbers
    random_states_00000.json      of each process
    zero/                         under DeepSpeed, in place of the first two: what its engine writes

They are the same for one process, DDP and FSDP2, whose weights and optimizer are gathered. accelerate's `load_state`
and torch's distributed checkpoints unpickle some of their files, so neither is used. DeepSpeed's engine reads its own
files. It is made to use `weights_only`, with the four classes allowed that it writes.

Every process calls every function here.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checkpoints.whole_file import write_json
from ..model.checked_files import read_json
from .learner import Learner
from .sharding import is_deepspeed, is_fsdp2, whole_weights

MODEL, OPTIMIZER, AVERAGE = "model.safetensors", "optimizer.pt", "moving_average.safetensors"
SCHEDULE, ZERO = "schedule.json", "zero"

ZERO_CLASSES = {
    "deepspeed.runtime.fp16.loss_scaler": ("LossScaler", "DynamicLossScaler"),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.utils.tensor_fragment": ("fragment_address",),
}
"""What DeepSpeed's files hold besides tensors and containers: classes that keep numbers."""

FORCED, FORCED_OFF = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


def _random_states_file(process_index: int) -> str:
    return f"random_states_{process_index:05}.json"


def _random_states(device: torch.device) -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    name, keys, *rest = numpy.random.get_state()  # noqa: NPY002  (of those who still draw from it)
    states = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, numpy.asarray(keys).tolist(), *rest],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
    }
    if device.type != "cpu":
        states[device.type] = bytes(_device_generator(device).get_rng_state().tolist()).hex()
    return states


def _set_random_states(states: dict[str, Any], device: torch.device) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(states["torch"])), dtype=torch.uint8))
    if device.type != "cpu":
        stored = torch.tensor(list(bytes.fromhex(states[device.type])), dtype=torch.uint8)
        _device_generator(device).set_rng_state(stored)


def _device_generator(device: torch.device) -> Any:
    """The module that has the random state of this process's accelerator."""
    return torch.get_device_module(device)


def save_states(learner: Learner, folder: Path) -> None:
    """Write all files of a checkpoint.

    What needs the other processes is done before anything is written: a process that cannot write leaves none waiting.

    Args:
        learner: whose states are written.
        folder: that exists.
    """
    accelerator = learner.accelerator
    tensors: dict[str, dict[str, Tensor]] = {}
    optimizer: dict[str, Any] | None = None
    if not is_deepspeed(accelerator):
        tensors[MODEL] = whole_weights(accelerator, learner.wrapped, learner.model)
        optimizer = _optimizer_state(learner)
    schedule: dict[str, Any] = {"scheduler": learner.scheduler.state_dict()}
    if accelerator.scaler is not None:
        schedule["scaler"] = accelerator.scaler.state_dict()
    if learner.average is not None:
        schedule["moving_average"] = learner.average.state_dict()
        tensors[AVERAGE] = schedule["moving_average"].pop("weights")
    if is_deepspeed(accelerator):
        learner.wrapped.save_checkpoint(str(folder), ZERO)
    if accelerator.is_main_process:
        for name, weights in tensors.items():
            save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, folder / name)
        if optimizer is not None:
            torch.save(optimizer, folder / OPTIMIZER)
        write_json(folder / SCHEDULE, schedule)
    states = _random_states(accelerator.device)
    write_json(folder / _random_states_file(accelerator.process_index), states)


BESIDES = 1 << 20
"""Bytes of a checkpoint that are no tensors, at most: names, random states, numbers."""


def states_size(learner: Learner) -> int:
    """About how many bytes the files of a checkpoint will have, of all processes."""
    model, optimizer = learner.model, learner.optimizer
    # ZeRO 3 splits parameters, and says how many numbers they have.
    parts = [getattr(p, "ds_numel", p.numel()) * p.element_size() for p in model.parameters()]
    parts += [buffer.numel() * buffer.element_size() for buffer in model.buffers()]
    if learner.average is not None:
        parts += [tensor.numel() * tensor.element_size() for tensor in learner.average.weights.values()]
    if is_deepspeed(learner.accelerator):  # a copy and two moments in float32
        parts += [3 * 4 * getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad]
    else:
        states = [value for state in optimizer.state.values() for value in state.values()]
        parts += [value.numel() * value.element_size() for value in states if isinstance(value, Tensor)]
    return sum(parts) + BESIDES


def load_states(learner: Learner, folder: Path, written_by: int) -> None:
    """Restore what `save_states` wrote. Raises whatever a damaged file makes its reader raise.

    Args:
        learner: whose states are replaced.
        folder: of the checkpoint.
        written_by: how many processes wrote it.
    """
    accelerator = learner.accelerator
    schedule = read_json(folder / SCHEDULE)
    states = None  # those that a process began with, where none has written a file for it
    if accelerator.process_index < written_by:
        states = read_json(folder / _random_states_file(accelerator.process_index))
    if accelerator.scaler is not None:
        _check_names(schedule["scaler"], accelerator.scaler.state_dict())
        accelerator.scaler.load_state_dict(schedule["scaler"])
    if is_deepspeed(accelerator):
        with _weights_only():
            path, _ = learner.wrapped.load_checkpoint(str(folder), ZERO)
        if path is None:
            raise FileNotFoundError(f"there is no {ZERO} in it")
    else:
        _load_model(learner, folder)
        _load_optimizer(learner, folder)
    _check_names(schedule["scheduler"], learner.scheduler.state_dict())
    learner.scheduler.load_state_dict(schedule["scheduler"])
    if learner.average is not None:
        weights: dict[str, Tensor] = load_file(folder / AVERAGE)
        learner.average.load_state_dict(schedule["moving_average"] | {"weights": weights})
    if states is not None:
        _set_random_states(states, accelerator.device)


def _check_names(state: dict[str, Any], own: dict[str, Any]) -> None:
    """Schedulers take whatever names a file has for attributes of theirs."""
    if differing := sorted(state.keys() ^ own.keys()):
        raise ValueError(f"{SCHEDULE} has other entries than this version's: {differing[0]}")


def _load_model(learner: Learner, folder: Path) -> None:
    accelerator = learner.accelerator
    if not is_fsdp2(accelerator):
        learner.model.load_state_dict(load_file(folder / MODEL))
        return
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    state = load_file(folder / MODEL) if accelerator.is_main_process else {}
    set_model_state_dict(learner.model, state, options=_gathered())


def _optimizer_state(learner: Learner) -> dict[str, Any]:
    if not is_fsdp2(learner.accelerator):
        return learner.optimizer.state_dict()
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return get_optimizer_state_dict(learner.model, learner.optimizer, options=_gathered())


def _load_optimizer(learner: Learner, folder: Path) -> None:
    accelerator = learner.accelerator
    is_read = accelerator.is_main_process or not is_fsdp2(accelerator)
    state = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True) if is_read else {}
    if not is_fsdp2(accelerator):
        learner.optimizer.load_state_dict(state)
        return
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    set_optimizer_state_dict(learner.model, learner.optimizer, state, options=_gathered())


def _gathered() -> Any:
    """FSDP2: whole on the main process, from which the others get their parts."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)


@contextmanager
def _weights_only() -> Iterator[None]:
    """Within this block torch.load takes tensors, containers and DeepSpeed's classes, whatever it is called with."""
    before = {name: os.environ.pop(name, None) for name in (FORCED, FORCED_OFF)}
    os.environ[FORCED] = "1"
    allowed = [getattr(import_module(module), name) for module, names in ZERO_CLASSES.items() for name in names]
    try:
        with torch.serialization.safe_globals(allowed):
            yield
    finally:
        del os.environ[FORCED]
        os.environ.update({name: value for name, value in before.items() if value is not None})
