"""Runs with accelerate's FSDP2, which accelerate would only use on GPUs, in gloo processes on a CPU."""

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from hf_clip.commands import finetune
from hf_clip.training import run_steps, sharding
from hf_clip.training.averaging import whole_tensor


def keeping_gradients(path: str) -> Any:
    """Within this block the gradients of a run's first step, as they are before clipping, are written to `path`."""
    average, kept = sharding.average_left_out_gradients, []

    def average_and_keep(accelerator: Any, model: nn.Module) -> None:
        average(accelerator, model)
        if not kept:
            found = {name: whole_tensor(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
            kept.append(found)
            if accelerator.is_main_process:
                torch.save(found, path)

    return patch.object(sharding, "average_left_out_gradients", average_and_keep)


def run(words: list[str], plugin: dict[str, Any], gradients: str) -> int:
    """Do one run under FSDP2.

    Args:
        words: its command line.
        plugin: options of accelerate's plugin.
        gradients: a file for those of the first step.

    Returns:
        The exit status.
    """
    make, prepare = run_steps.make_accelerator, sharding.prepare

    def make_sharding(config: Any) -> Any:
        accelerator = make(config)
        options = {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap", "cpu_ram_efficient_loading": False}
        PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(**options | plugin)
        return accelerator

    def prepare_and_check(*arguments: Any) -> Any:
        wrapped, optimizer = prepare(*arguments)
        plain = {name for name, p in wrapped.named_parameters() if not hasattr(p, "full_tensor")}
        assert plain <= {"logit_scale", "logit_bias"}, plain
        assert dist.get_world_size() == 2
        return wrapped, optimizer

    with (
        patch.object(run_steps, "make_accelerator", make_sharding),
        patch.object(sharding, "prepare", prepare_and_check),
        keeping_gradients(gradients),
    ):
        return finetune.main(words)
