"""Contrastive training of a CLIP on pictures with captions.

    accelerate launch finetune.py --model clip-vit-b32/ --dataset my/pairs --output_dir fine-tuned/

This version trains in one process. The output folder holds the model, its processor and metrics.jsonl.
"""

import json
import math
import os
import sys
import time
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm
from transformers import (
    AutoModel,
    AutoProcessor,
    HfArgumentParser,
    PreTrainedModel,
    ProcessorMixin,
    get_scheduler,
)

import hf_clip  # noqa: F401  (registers the classes)
from hf_clip.training.collator import PairCollator
from hf_clip.training.config import TrainingConfig
from hf_clip.training.data import BadRows, build_loader
from hf_clip.training.optim import MAX_LOGIT_SCALE, build_optimizer
from hf_clip.training.pairs import load_pairs
from hf_clip.whole_folder import check_destination, whole_folder


def load_model(name: str) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A model and its processor, from a folder or the Hub. Raises FileNotFoundError for a folder that isn't there."""
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise FileNotFoundError(f"There is no model folder {name}; check the path.")
    return AutoModel.from_pretrained(name), AutoProcessor.from_pretrained(name)


def train(config: TrainingConfig) -> None:
    """Train one model as `config` says and save it. Raises OSError or ValueError for what cannot be done."""
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise ValueError(
            f"{accelerator.num_processes} processes were launched, but the loss compares the pairs of one process "
            f"only: use `accelerate launch --num_processes 1`."
        )
    if accelerator.device.type == "cpu" and torch.get_num_threads() == 1 < (os.cpu_count() or 1):
        print(
            f"note: `accelerate launch` gives a process one CPU thread unless told otherwise; this machine has "
            f"{os.cpu_count()}: pass --num_cpu_threads_per_process before the program's name.",
            file=sys.stderr,
        )
    output = check_destination(config.output_dir, config.overwrite)
    model, processor = load_model(config.model)
    pairs = load_pairs(
        config.dataset,
        split=config.split,
        image_column=config.image_column,
        caption_column=config.caption_column,
    )
    loader = build_loader(
        pairs,
        PairCollator(processor, seed=config.seed),
        config.batch_size,
        seed=config.seed,
        num_workers=config.num_workers,
        bad_rows=BadRows(),
    )
    set_seed(config.seed)

    optimizer = build_optimizer(model, config)
    scheduler = get_scheduler("cosine", optimizer, config.warmup_steps, config.max_steps)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    logit_scale = accelerator.unwrap_model(model).logit_scale

    model.train()
    started, losses = time.perf_counter(), []
    with (
        whole_folder(output) as folder,
        (folder / "metrics.jsonl").open("w") as metrics,
        tqdm(total=config.max_steps, desc="Training") as bar,
    ):
        for step, (_, batch) in enumerate(islice(loader.batches(), config.max_steps), start=1):
            learning_rate = scheduler.get_last_lr()[0]
            batch = {
                name: batch[name].to(accelerator.device) for name in ("pixel_values", "input_ids", "attention_mask")
            }
            loss = model(**batch, return_loss=True).loss
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            with torch.no_grad():
                logit_scale.clamp_(max=MAX_LOGIT_SCALE)

            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise ValueError(
                    f"The loss became {losses[-1]} at step {step} (logit scale {logit_scale.exp().item():.1f}); "
                    f"nothing was saved. Lower --learning_rate, or raise --warmup_steps."
                )
            bar.update()
            if step % config.logging_steps == 0 or step == config.max_steps:
                record = {
                    "step": step,
                    "loss": sum(losses) / len(losses),
                    "learning_rate": learning_rate,
                    "logit_scale": logit_scale.exp().item(),
                    "images_per_second": step * config.batch_size / (time.perf_counter() - started),
                }
                losses.clear()
                metrics.write(json.dumps(record) + "\n")
                bar.set_postfix(loss=f"{record['loss']:.3f}", images_per_s=f"{record['images_per_second']:.0f}")
        accelerator.unwrap_model(model).save_pretrained(folder)
        processor.save_pretrained(folder)
    print(f"Saved to {config.output_dir}")


def main() -> int:
    try:
        (config,) = HfArgumentParser(
            TrainingConfig, description="Contrastive training of a CLIP on pictures with captions."
        ).parse_args_into_dataclasses()
        train(config)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was saved", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
