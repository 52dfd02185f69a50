"""The teacher of a run: its embeddings of all rows are computed once, before training, and stored.

The teacher sees each image as its own processor makes it, without augmentation, and each caption. It is not in memory
while the student learns. What the student learns from it is `distillation_loss`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.folders import in_one_line
from ..evaluation.feature_cache import processor_settings
from ..model.modeling_hf_clip import HfClipModel
from ..model.processing_hf_clip import HfClipProcessor
from .config import TrainingConfig
from .data.collator import PairCollator
from .data.pairs import Pairs, PairStream
from .data.stored_collator import TEACHER_IMAGES, TEACHER_TEXTS
from .data.stored_features import StoredFeatures
from .distillation import Distillation, distillation_loss
from .feature_computing import Encoder, Wanted
from .feature_store import FOLDER, digest_of_module, digest_of_tokenizer, store
from .run_state import NEW_RUN, check_frozen

TEACHER = "teacher"
"""Its name in a checkpoint."""


@dataclass(frozen=True)
class Teacher:
    """A teacher whose embeddings are stored.

    Attributes:
        images, texts: Its embeddings of the rows to train on, of length one.
        scale: What its cosines are multiplied by.
        digest: Of its weights and configuration.
    """

    images: StoredFeatures
    texts: StoredFeatures
    scale: float
    digest: str

    def distill(
        self, batch: dict[str, Tensor], image_embeds: Tensor, text_embeds: Tensor, logit_scale: Tensor, ring: bool
    ) -> Distillation:
        """How far the student is from the teacher on a batch. Every process calls this.

        Args:
            batch: Pairs of this process, with the teacher's embeddings.
            image_embeds: (B, D) the student's.
            text_embeds: (B, D) likewise.
            logit_scale: () as the student has it.
            ring: Whether texts are passed around the processes.
        """
        return distillation_loss(
            image_embeds,
            text_embeds,
            logit_scale,
            local_teacher_images=batch[TEACHER_IMAGES],
            local_teacher_texts=batch[TEACHER_TEXTS],
            teacher_scale=self.scale,
            ring=ring,
        )


def _encoders(model: HfClipModel, processor: Any, precision: str) -> dict[str, Encoder]:
    def images(pixel_values: Tensor) -> Tensor:
        return nn.functional.normalize(model.encode_image(pixel_values).float(), dim=-1)

    def texts(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return nn.functional.normalize(model.encode_text(input_ids, attention_mask).float(), dim=-1)

    made_of = {"features": "normalised embeddings", "weights": digest_of_module(model, model.config)}
    of_images = made_of | {"processor": processor_settings(processor)}
    of_texts = made_of | {"tokenizer": digest_of_tokenizer(processor.tokenizer)}
    width = model.config.projection_dim
    return {
        "image": Encoder(model, images, width, of_images, precision, "The teacher"),
        "text": Encoder(model, texts, width, of_texts, precision, "The teacher"),
    }


def make_teacher(
    config: TrainingConfig,
    accelerator: Any,
    train: Pairs | PairStream,
    num_workers: int,
    written: Mapping[str, str] = NEW_RUN,
) -> Teacher | None:
    """Load the teacher that the options name, and compute its embeddings, or find them. Every process calls this.

    Args:
        config: The options.
        accelerator: What `accelerate launch` has set up.
        train: Pairs to train on.
        num_workers: Processes that open images, for each process of the run.
        written: Digests that a checkpoint has from which the run goes on, see `RunState.frozen`.

    Returns:
        None without `--teacher`.

    Raises:
        OSError, ValueError: There is no such model, it is another one than the checkpoint's, or its embeddings cannot
            be stored.
    """
    if config.teacher is None:
        return None
    assert isinstance(train, Pairs), "streams are refused"
    with in_one_line(config.teacher):
        model = HfClipModel.from_pretrained(config.teacher, dtype=torch.float32).eval()
        processor = HfClipProcessor.from_pretrained(config.teacher)
    encoders = _encoders(model, processor, accelerator.mixed_precision)
    digest = encoders["image"].made_of["weights"]
    check_frozen(written, TEACHER, digest, f"--teacher {config.teacher}")
    collator = PairCollator(processor, seed=config.seed)
    found = {
        kind: store(
            Wanted(f"teacher-{kind}", f"Teacher's {kind}s", encoder, train, collator, of_texts=kind == "text"),
            Path(config.output_dir, FOLDER).resolve(),
            accelerator,
            num_workers,
        )
        for kind, encoder in encoders.items()
    }
    scale = model.logit_scale.exp().item()
    if config.teacher_temperature is not None:
        scale = 1 / config.teacher_temperature
    return Teacher(found["image"], found["text"], scale, digest)


__all__ = ["TEACHER", "Teacher", "make_teacher"]
