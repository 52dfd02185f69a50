"""A run between its steps: what is counted and logged, evaluated and kept.

The steps themselves are in finetune.py. `Run` knows what comes around them; every process has one and calls it alike.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from transformers import ProcessorMixin

from ..model.modeling_hf_clip import HfClipModel
from .averaging import MovingAverage, spans_all_steps
from .checkpoint import (
    RunState,
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    remove_older,
    save_best,
    save_checkpoint,
    step_of,
    step_of_best,
)
from .config import TrainingConfig
from .data.bad_rows import BadRows, find_refusal, part_cut
from .data.collator import PairCollator
from .data.loader import PairLoader, Position
from .evaluating import NotFiniteError, TooFewPairsError, evaluate
from .failures import EXPECTED
from .losses import ContrastiveResult, exchange_counts, world_size
from .results import METRICS_FILE, read_metrics
from .saving import DEFAULT_METRIC, finish, publish_checkpoint
from .sharding import whole_parameters, whole_weights
from .states import Resumable
from .stopping import Signals, Stopped
from .summary import figures_in_words

GO_ON = "--resume_from_checkpoint latest goes on from there"


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
    signals:  what the process was told from outside
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
        signals: Signals,
    ):
        self.config, self.accelerator, self.total_steps = config, accelerator, total_steps
        self.launched, self.signals = launched, signals
        self.wrapped, self.model, self.processor, self.optimizer = wrapped, model, processor, optimizer
        (self.bad_rows, self.bad_validation_rows), self.pretrained = bad_rows, pretrained
        access = partial(whole_parameters, accelerator, model)
        decay = config.ema_decay
        self.average = MovingAverage(model, decay, access, total_steps) if decay is not None else None
        self.parts = Resumable(accelerator, wrapped, model, optimizer, scheduler, self.average)
        self.global_batch = config.per_device_train_batch_size * accelerator.num_processes
        self.state = RunState(identity=self._identity())
        self.validation: PairLoader | None = None
        self.class_tokens: dict[str, Tensor] | None = None
        self.figures: dict[str, float] = {}
        self.start_figures: dict[str, float] = {}
        self.bar: Any = None
        self.evaluated_step = -1
        self.saved_step: int | None = None
        self.alpha: float | None = None
        self.seen, self.since = 0, time.perf_counter()
        self.waited, self.trained, self.resumed_at = 0.0, 0.0, 0
        self.is_stopped = False
        self.last_checkpoint: Path | None = None
        self.is_last_checkpoint_proved = True
        self._remember_step()

    def _identity(self) -> dict[str, Any]:
        counts = {"pairs in a batch": self.global_batch, "steps": self.total_steps}
        return self.config.identity() | counts | self.launched

    def set_validation(self, loader: PairLoader | None, class_prompts: list[str] | None) -> None:
        self.validation = loader
        if loader is not None and class_prompts is not None:
            self.class_tokens = PairCollator(self.processor).tokenize(class_prompts)

    def start(self) -> None:
        """Go on from the checkpoint that `--resume_from_checkpoint` names. Nothing is written before `begin`."""
        if self.config.resume_from_checkpoint is None:
            return
        folder = find_checkpoint(self.config.output_dir, self.config.resume_from_checkpoint)
        self.state = load_checkpoint(self.parts, folder, self._identity())
        if self.state.bad_rows:
            self.bad_rows.load_state_dict(self.state.bad_rows[self.accelerator.process_index])
        if self.state.best is not None and step_of_best(self.config.output_dir) != self.state.best_step:
            self.state.best = None  # a run that went back: the best weights are of a step that it will not reach
        self.last_checkpoint, self.resumed_at = folder, self.state.step
        self._remember_step()

    def begin(self, prepare_output: Callable[[], None]) -> None:
        """Evaluate the model that training starts from, then make the folder: what is refused here leaves none."""
        is_new = self.config.resume_from_checkpoint is None
        if is_new and self.validation is not None:
            self.start_figures = self._measure()
            self._check_metric(self.start_figures)
            self._check_rows()
        if self.accelerator.is_main_process:
            prepare_output()
        self.accelerator.wait_for_everyone()
        if self.config.report_to:
            plain = {k: v for k, v in self.config.to_dict().items() if isinstance(v, (int, float, str, bool))}
            self.accelerator.init_trackers("hf_clip", config=plain)
        if not is_new:
            self._forget_records_after(self.state.step)
            self.start_figures = self.figures_of(0)
            self._catch_up()
        elif self.start_figures:
            self._take_figures(self.start_figures)
            self._compare()
        decay = self.config.ema_decay
        if decay is not None and spans_all_steps(decay, self.total_steps):
            self._say(
                f"note: --ema_decay {decay:g} spans more steps than the {self.total_steps} of this run: all count "
                f"alike, as with {1 - 1 / self.total_steps:.3g}."
            )
        self.signals.are_deferred = True
        self.since = time.perf_counter()

    def _catch_up(self) -> None:
        """Evaluate a checkpoint's step that was to be evaluated, but was told to stop before."""
        every, step = self.config.steps_between_evaluations, self.state.step
        if self.validation is None or every is None or step % every or step >= self.total_steps:
            return
        is_missing = self.accelerator.is_main_process and not self.figures_of(step)
        if any(missing for (missing,) in exchange_counts([int(is_missing)], self.accelerator.device)):
            self._evaluate()
            self._compare()

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(line)

    def _forget_records_after(self, step: int) -> None:
        """Steps that are done again are recorded again."""
        if self.accelerator.is_main_process:
            folder = Path(self.config.output_dir)
            kept = [record for record in read_metrics(folder) if record["step"] <= step]
            (folder / METRICS_FILE).write_text("".join(f"{json.dumps(record)}\n" for record in kept))
        self.accelerator.wait_for_everyone()

    def is_over(self) -> bool:
        return self.is_stopped or self.state.step >= self.total_steps

    def batches(
        self, loader: PairLoader, prepare_output: Callable[[], None]
    ) -> Iterator[tuple[Position, dict[str, Tensor]]]:
        """What to train on, from where the run stands until it is over. With the first batch the run begins.

        A signal to any process, and data that any process cannot read, end them all here, between two batches, with a
        checkpoint of the last step.
        """
        found = loader.batches(Position(self.state.epoch, self.state.batch))
        has_begun = False
        while not self.is_over():
            started, item, failure = time.perf_counter(), None, None
            try:
                item = next(found)
            except Exception as error:  # a worker's error comes as any
                failure = error
            waited = time.perf_counter() - started
            self._check_failures(failure)
            if not has_begun:
                self.begin(prepare_output)
                has_begun = True
                if self.is_over():
                    return
            assert item is not None
            started = time.perf_counter()
            yield item
            self.waited += waited
            self.trained += waited + time.perf_counter() - started
        if not has_begun:  # it goes on behind its last step
            self.begin(prepare_output)

    def _check_failures(self, failure: Exception | None) -> None:
        """Raise, in all processes, what any process says: a signal before an error, which may come from it.

        A signal waits for the end of an accumulated step, whose batches count in BatchNorm's statistics already.
        """
        told = exchange_counts([self.signals.received or 0, int(failure is not None)], self.accelerator.device)
        signum, has_failed = (max(column) for column in zip(*told, strict=True))
        is_within_step = (self.state.epoch, self.state.batch) != self.whole_step[:2]
        if signum and (has_failed or not is_within_step):
            saved = self._save_last_step()
            remains = f"the {self.state.step} steps so far are in {saved}; {GO_ON}"
            raise Stopped(signum, remains if saved is not None else "")
        if not has_failed:
            return
        text = _first_text("" if failure is None else " ".join(str(failure).split()) or type(failure).__name__)
        saved = self._save_last_step()
        remains = "" if saved is None else f"The steps so far are in {saved}; {GO_ON}."
        if failure is not None and (saved is None or not isinstance(failure, EXPECTED)):
            if remains:
                print(remains, file=sys.stderr)
            raise failure
        raise ValueError(f"{text} {remains}") from failure

    def _remember_step(self) -> None:
        """What of the state grows with each batch, as it is after a whole step."""
        state = self.state
        self.whole_step = (state.epoch, state.batch, [*state.losses], [*state.accuracies], self.bad_rows.state_dict())

    def _save_last_step(self) -> Path | None:
        """A checkpoint of the last whole step; None where there was none, the one that there is where it is saved."""
        if self.state.step == 0:
            return None
        if self.last_checkpoint is None or step_of(self.last_checkpoint) != self.state.step:
            self.state.epoch, self.state.batch, self.state.losses, self.state.accuracies, rows = self.whole_step
            self.bad_rows.load_state_dict(rows)
            self._save_checkpoint()
        return self.last_checkpoint

    def check_loss(self, loss: Tensor) -> None:
        """Stop at a loss that is no number; all processes have the same, so all stop."""
        if not math.isfinite(loss.item()):
            raise self.diverged(f"The loss became {loss.item()} at step {self.state.step + 1}")
        if not self.is_last_checkpoint_proved:
            self.is_last_checkpoint_proved = True
            if self.accelerator.is_main_process:
                remove_older(self.config.output_dir, self.config.save_total_limit)

    def diverged(self, what: str) -> ValueError:
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
        self._remember_step()
        self._check_rows()
        started = time.perf_counter()
        is_evaluated = self._is_due(self.config.steps_between_evaluations)
        is_saved = self._is_due(self.config.save_steps)
        if is_evaluated or is_saved:
            if self._is_told_to_stop():
                return
            if is_evaluated:
                self._evaluate()
                self._compare()
            if is_saved:
                self._save_checkpoint()
            self._check_rows()
            if is_saved and self.config.hub_strategy == "every_save":
                publish_checkpoint(self)
            besides = time.perf_counter() - started
            self.since += besides  # the speed is that of training
            self.trained -= besides

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0 and self.state.step < self.total_steps

    def _is_told_to_stop(self) -> bool:
        return any(told for (told,) in exchange_counts([self.signals.received or 0], self.accelerator.device))

    def _save_checkpoint(self) -> Path:
        """Older ones are removed when the next loss is a number: these weights may be those that give none."""
        from accelerate.utils import gather_object

        if not self._are_weights_finite():
            raise self.diverged(f"Weights became nan in step {self.state.step}")
        self.state.bad_rows = gather_object([self.bad_rows.state_dict()])
        self.last_checkpoint = save_checkpoint(self.parts, self.config.output_dir, self.state)
        self.is_last_checkpoint_proved = False
        return self.last_checkpoint

    def _are_weights_finite(self) -> bool:
        """Each process looks at its own part."""
        parts = [getattr(p, "ds_tensor", p) for p in self.model.parameters() if p.requires_grad]
        local = [part.to_local() if hasattr(part, "to_local") else part for part in parts]
        is_finite = all(bool(part.detach().isfinite().all()) for part in local)
        return all(finite for (finite,) in exchange_counts([int(is_finite)], self.accelerator.device))

    def _check_rows(self) -> None:
        """Stop when any process has met too many rows that cannot be used, without losing what was trained."""
        counters = [self.bad_rows, self.bad_validation_rows]
        refusal = find_refusal(counters, self.accelerator.device)
        if not refusal:
            return
        if (saved := self._save_last_step()) is None:
            raise ValueError(f"{refusal} Repair the data, or pass a higher --max_bad_fraction.")
        raise ValueError(
            f"{refusal} Repair the data and start anew, or go on from {saved} with --resume_from_checkpoint latest and "
            f"a higher --max_bad_fraction."
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
            "truncated_captions": part_cut(self.bad_rows, device),
        }
        if len(set(rates.values())) > 1:
            record |= {f"learning_rate_{part}": rate for part, rate in rates.items()}
        if self.model.logit_bias is not None:
            record["logit_bias"] = self.model.logit_bias.item()
        self.state.losses, self.state.accuracies = [], []
        self.seen, self.since = 0, time.perf_counter()
        self.record(record)
        if self.bar is not None:
            self.bar.set_postfix(
                loss=f"{record['loss']:.3f}",
                acc=f"{record['accuracy']:.0%}",
                scale=f"{record['logit_scale']:.1f}",
                images_per_s=f"{record['images_per_second']:.0f}",
                mem=f"{record['peak_memory_gb']:.1f}GB",
            )

    def record(self, record: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            with (Path(self.config.output_dir) / METRICS_FILE).open("a") as file:
                file.write(json.dumps(record) + "\n")
        if self.config.report_to:
            self.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=int(record["step"]))

    # --- evaluation -------------------------------------------------------------------------------------------------

    def _measure(self) -> dict[str, float]:
        """The figures of the present weights, or of their average, on the validation data."""
        assert self.validation is not None
        try:
            with self.average.swapped_in(self.model) if self.average is not None else nullcontext():
                self.bad_validation_rows.restart()
                return evaluate(self.wrapped, self.validation, self.accelerator.device, self.class_tokens)
        except NotFiniteError:
            if self.state.step == 0:
                raise
            raise self.diverged(f"Features became nan after step {self.state.step}") from None
        except TooFewPairsError as error:  # data that are gone
            if (saved := self._save_last_step()) is None:
                raise
            raise ValueError(f"{error} The steps so far are in {saved}; {GO_ON}.") from error

    def _evaluate(self) -> None:
        if self.validation is not None:
            self._take_figures(self._measure())

    def _take_figures(self, figures: dict[str, float]) -> None:
        self.figures, self.evaluated_step = figures, self.state.step
        self.record({"step": self.state.step, **figures})
        name = f"step {self.state.step}" if self.state.step else "at the start"
        self._say(f"{name}: {figures_in_words(figures)}")

    def _compare(self) -> None:
        """Keep the weights if they are the best so far; stop when there was no new best for too long."""
        metric = self.config.metric_for_best_model
        if metric is None:
            return
        self._check_metric(self.figures)
        if self.state.best is None or self.figures[metric] > self.state.best:
            self.state.best, self.state.best_step = self.figures[metric], self.state.step
            self.state.evaluations_since = 0
            save_best(self.accelerator, self.config.output_dir, self.weights(), self.state.step)
        else:
            self.state.evaluations_since += 1
            patience = self.config.early_stopping_patience
            if patience is not None and self.state.evaluations_since >= patience:
                self.is_stopped = True

    def _check_metric(self, figures: dict[str, float]) -> None:
        metric = self.config.metric_for_best_model
        if metric is not None and metric not in figures:
            raise ValueError(
                f"--metric_for_best_model {metric} was not measured; measured were {', '.join(figures)}. Zero-shot "
                f"accuracy needs captions made of labels by a template."
            )

    def weights(self) -> dict[str, Tensor]:
        """The weights that count, whole, on the CPU; every process calls this."""
        with self.average.swapped_in(self.model) if self.average is not None else nullcontext():
            return whole_weights(self.accelerator, self.wrapped, self.model)

    # --- the end ----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Evaluate what there is not an evaluation of, and save the result."""
        self.bad_rows.complete()
        if self.evaluated_step != self.state.step:
            self._evaluate()
            self._compare()
        self._check_rows()
        finish(self)

    def figures_of(self, step: int) -> dict[str, float]:
        records = read_metrics(Path(self.config.output_dir))
        found = [r for r in records if r["step"] == step and DEFAULT_METRIC in r and "alpha" not in r]
        return {name: value for name, value in found[-1].items() if name != "step"} if found else {}


def _first_text(text: str) -> str:
    """Of all processes' texts the first that is not empty."""
    if world_size() == 1:
        return text
    texts = [""] * world_size()
    dist.all_gather_object(texts, text)
    return next(each for each in texts if each)
