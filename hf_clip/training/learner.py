"""The model in training and everything that changes its weights."""

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin

from ..model.modeling_hf_clip import HfClipModel
from .averaging import MovingAverage
from .config import TrainingConfig
from .frozen_towers import FrozenTowers
from .gathering import exchange_counts
from .lora import Adapter, adapter_of, add_lora_of_run_, merge_lora_
from .penalty import PenaltyTowardsStart
from .sharding import whole_weights
from .teacher import TEACHER, Teacher
from .trainable import lock_


@dataclass
class Learner:
    """A model with its optimizer, as `build_learner` makes it. Every process has one and calls it alike.

    Attributes:
        accelerator: what `accelerate launch` has set up.
        wrapped: the model as accelerate made it. It computes.
        model: the model itself.
        processor: the model's.
        optimizer: as accelerate made it.
        scheduler: of the learning rates.
        average: the moving average of the weights, where the run has one.
        pretrained: the weights from before training, where the result is averaged with them.
        penalty: towards the weights from before training, where the run has one.
        parameters: how many numbers are trained, and how many there are, before a wrapper splits them.
        frozen: towers that left memory, where the run has any.
        teacher: whose affinities are learned, where the run has one.
    """

    accelerator: Any
    wrapped: Any
    model: HfClipModel
    processor: ProcessorMixin
    optimizer: Any
    scheduler: Any
    average: MovingAverage | None = None
    pretrained: dict[str, Tensor] | None = None
    penalty: PenaltyTowardsStart | None = None
    parameters: tuple[int, int] = (0, 0)
    frozen: FrozenTowers | None = None
    teacher: Teacher | None = None

    def frozen_digests(self) -> dict[str, str]:
        """Of the models that are not in a checkpoint: locked towers that left memory, and the teacher."""
        of_teacher = {} if self.teacher is None else {TEACHER: self.teacher.digest}
        return of_teacher if self.frozen is None else of_teacher | self.frozen.digests

    def averaged(self) -> AbstractContextManager:
        """Within this block the model has the weights that are evaluated and saved: the average's, if there is one."""
        return nullcontext() if self.average is None else self.average.swapped_in(self.model)

    def weights(self) -> dict[str, Tensor]:
        """The weights that are evaluated and saved, on the CPU: whole, but without towers that left memory."""
        with self.averaged():
            return whole_weights(self.accelerator, self.wrapped, self.model)

    def whole(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights, and beside them those of towers that left memory."""
        return weights if self.frozen is None else weights | self.frozen.weights()

    def are_weights_finite(self) -> bool:
        """Whether all trained weights of all processes are numbers. Each process looks at its own part."""
        parts = [getattr(p, "ds_tensor", p) for p in self.model.parameters() if p.requires_grad]
        local = [part.to_local() if hasattr(part, "to_local") else part for part in parts]
        is_finite = all(bool(part.detach().isfinite().all()) for part in local)
        return all(finite for (finite,) in exchange_counts([int(is_finite)], self.accelerator.device))

    def plain_model(self, weights: dict[str, Tensor], config: TrainingConfig) -> tuple[HfClipModel, Adapter | None]:
        """A model of its own on the CPU, and what was trained of it by LoRA.

        Args:
            weights: as `weights` returns them.
            config: of the run, which says where adapters are.

        Returns:
            The model with these weights, adapters merged, and the adapter by itself, where the run has one.
        """
        with torch.device("meta"):  # a copy of the model would bring its wrapper along
            model = HfClipModel(copy.deepcopy(self.model.config))
            if config.lora_rank is not None:
                lock_(model, config.lock)
                add_lora_of_run_(model, config)
        model.load_state_dict(self.whole(weights), assign=True)
        if config.lora_rank is None:
            return model, None
        adapter = adapter_of(model)
        return merge_lora_(model), adapter
