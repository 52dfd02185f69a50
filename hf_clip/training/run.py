"""A run between its steps: what is counted and logged, evaluated, kept and, at the end, saved.

The steps themselves are in finetune.py. `Run` knows what comes around them; every process has one and calls it alike.
"""

import copy
import json
import math
import resource
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import ProcessorMixin
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..modeling_hf_clip import HfClipModel
from ..publishing import PublishingError
from .averaging import MovingAverage, interpolate_weights
from .bad_rows import BadRows, find_refusal
from .card import RunFacts
from .checkpoint import (
    RunState,
    find_checkpoint,
    list_checkpoints,
    load_best,
    load_checkpoint,
    save_best,
    save_checkpoint,
    step_of,
    step_of_best,
)
from .collator import PairCollator
from .config import TrainingConfig
from .data import PairLoader, Position
from .evaluating import NotFiniteError, evaluate
from .lora import add_lora_, merge_lora_
from .losses import ContrastiveResult
from .results import METRICS_FILE, publish_results, read_metrics, save_results
from .sharding import check_wrapper, whole_parameters, whole_weights
from .trainable import lock_

LONGEST_UPLOAD = timedelta(hours=6)
DEFAULT_METRIC = "recall@1"
TRACKERS = ("tensorboard", "wandb", "trackio")


def make_accelerator(config: TrainingConfig) -> Any:
    """What `accelerate launch` has set up. Raises ValueError for a wrapper or tracker that cannot be, ImportError for a
    missing tracker."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    for name in config.report_to:
        if name not in TRACKERS:
            raise ValueError(f"report_to has {name!r}, but must be of {', '.join(TRACKERS)}.")
        if find_spec(name) is None:  # accelerate would pass over it
            raise ImportError(f"--report_to {name} needs a package that is not installed: pip install {name}")
    handlers: list[Any] = []
    if config.hub_strategy == "checkpoint":  # the others wait while the main process uploads
        handlers.append(InitProcessGroupKwargs(timeout=LONGEST_UPLOAD))
    accelerator = Accelerator(
        log_with=config.report_to or None, project_dir=config.output_dir, kwargs_handlers=handlers or None
    )
    check_wrapper(accelerator, config)
    unset_hf_deepspeed_config()  # models are built whole, then split
    return accelerator


def launch_settings(accelerator: Any) -> dict[str, Any]:
    """What `accelerate launch` decides of a run, by name. Call it before anything is prepared."""
    kind = accelerator.distributed_type.value
    wrapper = {"FSDP": "FSDP2", "DEEPSPEED": "ZeRO"}.get(kind, "DDP" if accelerator.num_processes > 1 else "none")
    if kind == "DEEPSPEED":
        wrapper = f"{wrapper} {accelerator.state.deepspeed_plugin.zero_stage}"
    return {
        "processes": accelerator.num_processes,
        "wrapper": wrapper,
        "mixed_precision": accelerator.mixed_precision,
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "compiler": accelerator.state.dynamo_plugin.backend.value.lower(),
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's, or of a CPU run this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Run:
    """See the module.

    wrapped: the model as accelerate made it.   model: the model itself
    bad_rows: what counts those of the training data and those of the validation data
    launched: see `launch_settings`
    """

    def __init__(
        self,
        config: TrainingConfig,
        accelerator: Any,
        wrapped: Any,
        model: HfClipModel,
        processor: ProcessorMixin,
        optimizer: Any,
        scheduler: Any,
        bad_rows: tuple[BadRows, BadRows],
        pretrained: dict[str, Tensor] | None,
        total_steps: int,
        launched: dict[str, Any],
    ):
        self.config, self.accelerator, self.total_steps = config, accelerator, total_steps
        self.launched = launched
        self.wrapped, self.model, self.processor, self.optimizer = wrapped, model, processor, optimizer
        (self.bad_rows, self.bad_validation_rows), self.pretrained = bad_rows, pretrained
        access = partial(whole_parameters, accelerator, model)
        self.average = MovingAverage(model, config.ema_decay, access) if config.ema_decay is not None else None
        accelerator.register_for_checkpointing(scheduler)
        if self.average is not None:
            accelerator.register_for_checkpointing(self.average)
        self.global_batch = config.batch_size * accelerator.num_processes
        self.state = RunState(identity=self._identity())
        self.validation: PairLoader | None = None
        self.class_tokens: dict[str, Tensor] | None = None
        self.figures: dict[str, float] = {}
        self.bar: Any = None
        self.evaluated_step = -1
        self.saved_step: int | None = None
        self.alpha: float | None = None
        self.seen, self.since = 0, time.perf_counter()
        self.is_stopped = False

    def _identity(self) -> dict[str, Any]:
        counts = {"pairs in a batch": self.global_batch, "steps": self.total_steps}
        return self.config.identity() | counts | self.launched

    def set_validation(self, loader: PairLoader | None, class_prompts: list[str] | None) -> None:
        self.validation = loader
        if loader is not None and class_prompts is not None:
            self.class_tokens = PairCollator(self.processor).tokenize(class_prompts)

    def start(self) -> None:
        """Begin, or go on from the checkpoint that `--resume` names."""
        if self.config.report_to:
            plain = {k: v for k, v in self.config.to_dict().items() if isinstance(v, (int, float, str, bool))}
            self.accelerator.init_trackers("hf_clip", config=plain)
        if self.config.resume is not None:
            folder = find_checkpoint(self.config.output_dir, self.config.resume)
            self.state = load_checkpoint(self.accelerator, folder, self._identity())
            if self.state.bad_rows:
                self.bad_rows.load_state_dict(self.state.bad_rows[self.accelerator.process_index])
            if self.state.best is not None and step_of_best(self.config.output_dir) != self.state.best_step:
                self.state.best = None  # a run that went back: the best weights are of a step that it will not reach
            self._forget_records_after(self.state.step)
        self.since = time.perf_counter()

    def _forget_records_after(self, step: int) -> None:
        """Steps that are done again are recorded again."""
        if self.accelerator.is_main_process:
            folder = Path(self.config.output_dir)
            kept = [record for record in read_metrics(folder) if record["step"] <= step]
            (folder / METRICS_FILE).write_text("".join(f"{json.dumps(record)}\n" for record in kept))
        self.accelerator.wait_for_everyone()

    def is_over(self) -> bool:
        return self.is_stopped or self.state.step >= self.total_steps

    # --- after every batch ------------------------------------------------------------------------------------------

    def check_loss(self, loss: Tensor) -> None:
        """Stop at a loss that is no number; all processes have the same, so all stop."""
        if not math.isfinite(loss.item()):
            raise self._diverged(f"The loss became {loss.item()} at step {self.state.step + 1}")

    def _diverged(self, what: str) -> ValueError:
        """The error for weights, as they are after the present step, that are of no use any more."""
        found = list_checkpoints(self.config.output_dir)
        # One of the present step has these same weights; of earlier ones the loss was still a number.
        good = [folder for folder in found if step_of(folder) < self.state.step]
        same = [folder for folder in found if step_of(folder) == self.state.step]
        if good:
            saved = f"the last good checkpoint is {good[-1]}"
        elif same:
            saved = f"no good checkpoint was saved ({same[0]} has the weights that gave this)"
        else:
            saved = "no checkpoint was saved"
        return ValueError(
            f"{what} (logit scale {self.model.logit_scale.exp().item():.1f}); {saved}. Lower --learning_rate, raise "
            f"--warmup_steps, or train in bf16 instead of fp16."
        )

    def count(self, position: Position, result: ContrastiveResult, local_pairs: int) -> None:
        self.state.epoch, self.state.batch = position
        self.state.losses.append(result.global_loss.item())
        self.state.accuracies.append(result.global_accuracy.item())
        self.seen += local_pairs * self.accelerator.num_processes

    def after_step(self, rates: dict[str, float]) -> None:
        """What follows an optimizer step: the moving average, a record, a checkpoint."""
        self.state.step += 1
        if self.average is not None:
            self.average.update(self.model)
        if self.bar is not None:
            self.bar.update()
        if self.state.step % self.config.logging_steps == 0 or self.state.step == self.total_steps:
            self._log(rates)
        self._check_rows()
        every, started = self.config.checkpoint_steps, time.perf_counter()
        if every is not None and self.state.step % every == 0 and self.state.step < self.total_steps:
            self._evaluate()
            self._compare()
            self._save_checkpoint()
            self._check_rows()
            if self.config.hub_strategy == "checkpoint":
                self._publish_checkpoint()
            self.since += time.perf_counter() - started  # the speed is that of training

    def _save_checkpoint(self) -> Path:
        from accelerate.utils import gather_object

        self.state.bad_rows = gather_object([self.bad_rows.state_dict()])
        return save_checkpoint(self.accelerator, self.config.output_dir, self.state, self.config.keep_checkpoints)

    def _check_rows(self) -> None:
        """Stop when any process has met too many rows that cannot be used, without losing what was trained."""
        counters = [self.bad_rows, self.bad_validation_rows]
        if refusal := find_refusal(counters, self.accelerator.device):
            raise ValueError(
                f"{refusal} Repair the data and start anew, or go on from {self._save_checkpoint()} with --resume "
                f"latest and a higher --max_bad_fraction."
            )

    def _log(self, rates: dict[str, float]) -> None:
        device = self.accelerator.device
        record = {
            "step": self.state.step,
            "loss": mean(self.state.losses),
            "accuracy": mean(self.state.accuracies),
            "learning_rate": max(rates.values()),
            "logit_scale": self.model.logit_scale.exp().item(),
            "images_per_second": self.seen / (time.perf_counter() - self.since),
            "peak_memory_gb": peak_memory(device) / 1e9,
        }
        if len(set(rates.values())) > 1:
            record |= {f"learning_rate_{part}": rate for part, rate in rates.items()}
        if self.model.logit_bias is not None:
            record["logit_bias"] = self.model.logit_bias.item()
        self.state.losses, self.state.accuracies = [], []
        self.seen, self.since = 0, time.perf_counter()
        self._record(record)
        if self.bar is not None:
            self.bar.set_postfix(
                loss=f"{record['loss']:.3f}",
                acc=f"{record['accuracy']:.0%}",
                scale=f"{record['logit_scale']:.1f}",
                images_per_s=f"{record['images_per_second']:.0f}",
                mem=f"{record['peak_memory_gb']:.1f}GB",
            )

    def _record(self, record: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            with (Path(self.config.output_dir) / METRICS_FILE).open("a") as file:
                file.write(json.dumps(record) + "\n")
        if self.config.report_to:
            self.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=int(record["step"]))

    # --- evaluation -------------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        if self.validation is None:
            return
        self.evaluated_step = self.state.step
        with self.average.swapped_in(self.model) if self.average is not None else nullcontext():
            self.bad_validation_rows.restart()
            try:
                self.figures = evaluate(self.wrapped, self.validation, self.accelerator.device, self.class_tokens)
            except NotFiniteError:
                raise self._diverged(f"Features became nan after step {self.state.step}") from None
        self._record({"step": self.state.step, **self.figures})

    def _compare(self) -> None:
        """Keep the weights if they are the best so far; stop when there was no new best for too long."""
        metric = self.config.keep_best
        if metric is None:
            return
        if metric not in self.figures:
            raise ValueError(
                f"--keep_best {metric} was not measured; measured were {', '.join(self.figures)}. Zero-shot accuracy "
                f"needs captions made of labels by a template."
            )
        if self.state.best is None or self.figures[metric] > self.state.best:
            self.state.best, self.state.best_step = self.figures[metric], self.state.step
            self.state.evaluations_since = 0
            save_best(self.accelerator, self.config.output_dir, self._weights(), self.state.step)
        else:
            self.state.evaluations_since += 1
            patience = self.config.patience
            if patience is not None and self.state.evaluations_since >= patience:
                self.is_stopped = True

    def _weights(self) -> dict[str, Tensor]:
        """The weights that count, whole, on the CPU; every process calls this."""
        with self.average.swapped_in(self.model) if self.average is not None else nullcontext():
            return whole_weights(self.accelerator, self.wrapped, self.model)

    # --- the end ----------------------------------------------------------------------------------------------------

    def _publish_checkpoint(self) -> None:
        """Save and push what there is so far; a push that fails is said and doesn't end the run."""
        weights = self._weights()
        if self.accelerator.is_main_process:
            try:
                self._save(self._merged(weights), f"Step {self.state.step}")
            except PublishingError as error:
                print(f"\nnote: {error}", file=sys.stderr)
        self.accelerator.wait_for_everyone()

    def _merged(self, weights: dict[str, Tensor]) -> HfClipModel:
        """A model of its own on the CPU with these weights, adapters merged."""
        with torch.device("meta"):  # a copy of the model would bring its wrapper along
            model = HfClipModel(copy.deepcopy(self.model.config))
            if self.config.lora_rank is not None:
                lock_(model, self.config.lock)
                add_lora_(model, self.config.lora_rank)
        model.load_state_dict(weights, assign=True)
        return merge_lora_(model) if self.config.lora_rank is not None else model

    def _save(self, model: HfClipModel, message: str) -> None:
        has_curve = save_results(
            model,
            self.processor,
            model.state_dict(),
            self.config,
            self.figures,
            RunFacts(
                step=self.state.step if self.saved_step is None else self.saved_step,
                total_steps=self.total_steps,
                global_batch=self.global_batch,
                launched=self.launched,
                alpha=self.alpha,
            ),
        )
        if not has_curve:
            print("note: the curve of the card was not drawn: pip install matplotlib", file=sys.stderr)
        if self.config.push_to_hub is not None:
            print(publish_results(self.config, message))

    def _average_with_pretrained(self, model: HfClipModel) -> None:
        """WiSE-FT: the one α, or of a range the best on the validation data."""
        assert self.pretrained is not None
        finetuned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        best: tuple[float, float] | None = None
        metric = self.config.keep_best or DEFAULT_METRIC
        alphas = self.config.alphas
        chosen = alphas[0]
        for alpha in alphas if self.validation is not None else []:
            model.load_state_dict(interpolate_weights(self.pretrained, finetuned, alpha))
            device = self.accelerator.device
            figures = evaluate(model.to(device), self.validation, device, self.class_tokens)  # type: ignore[arg-type]
            model.cpu()
            self._record({"step": self.state.step, "alpha": alpha, **figures})
            if best is None or figures[metric] > best[0]:
                best, chosen, self.figures = (figures[metric], alpha), alpha, figures
        model.load_state_dict(interpolate_weights(self.pretrained, finetuned, chosen))
        self.alpha = chosen
        if len(alphas) > 1 and self.accelerator.is_main_process:
            print(f"averaged with the pretrained weights at α = {chosen:g}, the best of {len(alphas)} at {metric}")

    def finish(self) -> None:
        """Save the result: the last weights or the best, averaged where asked for, and publish it."""
        self.bad_rows.complete()
        if self.evaluated_step != self.state.step:
            self._evaluate()
            self._compare()
        self._check_rows()
        weights = self._weights()
        if self.config.keep_best is not None and self.state.best_step != self.state.step:
            weights = load_best(self.config.output_dir)
            self.figures = self._figures_of(self.state.best_step)
            self.saved_step = self.state.best_step
        elif not all(bool(tensor.isfinite().all()) for tensor in weights.values()):
            raise self._diverged(f"Weights became nan in step {self.state.step}")
        model = self._merged(weights)
        if self.config.alphas:
            self._average_with_pretrained(model)
        if self.accelerator.is_main_process:
            self._save(model, f"{self.state.step} steps of training")
            print(f"Saved to {self.config.output_dir}")
        self.accelerator.end_training()

    def _figures_of(self, step: int) -> dict[str, float]:
        records = read_metrics(Path(self.config.output_dir))
        found = [r for r in records if r["step"] == step and DEFAULT_METRIC in r and "alpha" not in r]
        return {name: value for name, value in found[-1].items() if name != "step"}
