"""finetune.py with DeepSpeed's own engine, which accelerate would only start on GPUs, in gloo processes on a CPU."""

import os
import sys
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from hf_clip.commands import finetune
from hf_clip.training import matryoshka_loss, run_steps


def main() -> int:
    def use_cpu(self: PartialState) -> None:
        self.device = torch.device("cpu")

    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = use_cpu
    run_steps.sharding.LARGEST_KEPT_WHOLE = largest = int(os.environ["KEPT_WHOLE"])
    original = run_steps.sharding.prepare

    def prepare(accelerator: Any, model: Any, *arguments: Any) -> Any:
        wrapped, optimizer = original(accelerator, model, *arguments)
        assert type(wrapped).__name__ == "DeepSpeedEngine"
        assert accelerator.num_processes == 2
        is_zero3 = run_steps.sharding.is_zero3(accelerator)
        for parameter in model.vision_model.parameters():
            assert (parameter.numel() == 0) == is_zero3
            assert not is_zero3 or parameter.ds_persist == (parameter.ds_numel <= largest)
        return wrapped, optimizer

    run_steps.sharding.prepare = prepare
    expected = {"bf16": torch.bfloat16, "no": torch.float32}[os.environ["ACCELERATE_MIXED_PRECISION"]]
    contrast = matryoshka_loss.global_contrastive_loss

    def global_contrastive_loss(image_embeds: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
        assert image_embeds.dtype == expected
        return contrast(image_embeds, *arguments, **settings)

    matryoshka_loss.global_contrastive_loss = global_contrastive_loss
    return finetune.main()


if __name__ == "__main__":
    sys.exit(main())
