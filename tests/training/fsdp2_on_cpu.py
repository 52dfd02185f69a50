"""finetune.py with accelerate's FSDP2, which accelerate would only run on GPUs, in gloo processes on a CPU.

The environment's GRADIENTS names a file for the first step's gradients, as they are before clipping; OPTIONS are given
to the plugin.
"""

import json
import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from hf_clip.commands import finetune
from hf_clip.training.averaging import whole_tensor


def keep_gradients(path: str) -> None:
    """Write the gradients of the first step that this process's run takes to `path`."""
    average = finetune.sharding.average_left_out_gradients

    def average_and_keep(accelerator: Any, model: nn.Module) -> None:
        average(accelerator, model)
        found = {name: whole_tensor(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
        if accelerator.is_main_process:
            torch.save(found, path)
        finetune.sharding.average_left_out_gradients = average

    finetune.sharding.average_left_out_gradients = average_and_keep


def main() -> int:
    make = finetune.make_accelerator

    def make_sharding(config: Any) -> Any:
        accelerator = make(config)
        options = {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap", "cpu_ram_efficient_loading": False}
        plugin = FullyShardedDataParallelPlugin(**options | json.loads(os.environ.get("OPTIONS", "{}")))
        PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
        return accelerator

    def prepare(*arguments: Any) -> Any:
        wrapped, optimizer = original(*arguments)
        plain = {name for name, p in wrapped.named_parameters() if not hasattr(p, "full_tensor")}
        assert plain <= {"logit_scale", "logit_bias"}, plain
        assert dist.get_world_size() == 2
        return wrapped, optimizer

    original, finetune.sharding.prepare = finetune.sharding.prepare, prepare
    finetune.make_accelerator = make_sharding
    if path := os.environ.get("GRADIENTS"):
        keep_gradients(path)
    return finetune.main()


if __name__ == "__main__":
    sys.exit(main())
