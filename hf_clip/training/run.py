"""A run from its first batch to its last: what happens between the optimizer steps, and when.

The steps themselves stand in `run_steps`. Around them each part has one job: `Counts` counts,
`Evaluations` measures, `BestWeights` keeps the best, `Checkpoints` writes and restores, `Records` notes, and
`outcome`, `results` and `publishing` make what is left at the end. `Run` says when it is whose turn.

Every process has one `Run` and calls it alike.
"""

import math
import sys
import time
from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from .averaging import spans_all_steps
from .best import BestWeights
from .checkpoint import Checkpoints
from .chosen_metric import value_of
from .counting import Counts, shown_on_the_bar
from .data.bad_rows import find_refusal
from .data.loader import PairLoader, Position
from .evaluating import Evaluations, Validation
from .failures import EXPECTED
from .gathering import exchange_counts, world_size
from .guarding import shown_guard_metric
from .learner import Learner
from .losses import ContrastiveResult
from .outcome import Outcome, final_outcome, present_outcome
from .output import prepare_output
from .plan import Plan
from .publishing import publish, publish_if_possible
from .records import DEFAULT_METRIC, Records
from .results import save_results
from .stopping import Signals, Stopped
from .summary import gain_in_words, guard_in_words, sentence, wait_in_words


class Run:
    """One run. Train on each of its `batches`, tell it the result with `batch_done`, and `finish` it.

    Attributes:
        state: where it stands.
    """

    def __init__(
        self, plan: Plan, learner: Learner, loader: PairLoader, validation: Validation | None, signals: Signals
    ):
        """A new run, or one that goes on from the checkpoint that the options name. Nothing is written yet.

        Args:
            plan: what it is to do.
            learner: what it trains.
            loader: of the pairs to train on.
            validation: what it is evaluated on.
            signals: what this process is told from outside.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: the checkpoint is damaged, or of another run.
        """
        assert loader.bad_rows is not None
        self.plan, self.config, self.learner, self.signals = plan, plan.config, learner, signals
        self.loader, self.bad_rows, self.accelerator = loader, loader.bad_rows, learner.accelerator
        self.checkpoints = Checkpoints(plan, learner, self.bad_rows)
        self.state = self.checkpoints.state
        self.records = Records(self.config, self.accelerator)
        self.best = BestWeights(self.config, learner, self.state)
        self.evaluations = Evaluations(plan, learner, validation, self.records, self.checkpoints, self.best)
        has_negatives = bool(self.config.negative_caption_column)
        self.counts = Counts(learner, self.state, self.bad_rows, has_negatives)
        self._position: Position | None = None
        self._bar = tqdm(disable=True)

    # --- the batches ------------------------------------------------------------------------------------------------

    def is_over(self) -> bool:
        """Whether no step is left."""
        return self.best.is_given_up() or self.state.step >= self.plan.total_steps

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """What to train on, from where the run stands until it is over.

        When the first batch is there, the model is evaluated and the output folder is made. A signal to any process, or
        data that any process cannot read, end the run between two batches, with a checkpoint of the last step.

        Raises:
            Stopped: a signal ended the run.
            Exception: the data cannot be read, in all processes.
        """
        found = self.loader.batches(Position(self.state.epoch, self.state.batch))
        is_main, has_begun = self.accelerator.is_main_process, False
        with tqdm(total=self.plan.total_steps, initial=self.state.step, desc="Training", disable=not is_main) as bar:
            self._bar = bar
            while not self.is_over():
                started, item, failure = time.perf_counter(), None, None
                try:
                    item = next(found)
                except Exception as error:  # a worker's error comes as any
                    failure = error
                waited = time.perf_counter() - started
                self._check_failures(failure)
                self.counts.add_wait(waited)
                if not has_begun:
                    self._begin()
                    has_begun = True
                    if self.is_over():
                        return
                assert item is not None
                started = time.perf_counter()
                self._position, batch = item
                yield batch
                assert self._position is None, "batch_done is to be called for every batch"
                self.counts.trained += time.perf_counter() - started
            if not has_begun:  # it goes on behind its last step
                self._begin()

    def check_loss(self, *losses: Tensor) -> None:
        """Refuse a loss that is no number, before it goes into the weights. All processes have the same losses.

        Args:
            losses: each a term of the global batch's loss, (). Together they show that the weights are good.

        Raises:
            ValueError: the loss is no number. The message names the last good checkpoint.
        """
        for loss in losses:
            if not math.isfinite(loss.item()):
                raise self.checkpoints.diverged(f"The loss became {loss.item()} at step {self.state.step + 1}")
        self.checkpoints.prove()

    def batch_done(self, result: ContrastiveResult, rates: dict[str, float]) -> None:
        """Count the present batch. After a whole optimizer step, log, evaluate and save what is due.

        Args:
            result: of the batch.
            rates: with which the step was taken, see `learning_rates`.
        """
        assert self._position is not None, "batch_done is to be called once for every batch"
        self.state.epoch, self.state.batch = self._position
        self._position = None
        self.counts.add(result, self.plan.global_batch)
        if self.accelerator.sync_gradients:
            self._step_done(rates)

    def finish(self) -> Outcome:
        """Evaluate the last step, save the result and publish it.

        Returns:
            What was saved.

        Raises:
            ValueError: the weights are no numbers, or too many rows could not be used.
            PublishingError: the result was saved, but not published.
            Stopped: a signal came after the last step. The result was saved, but not published.
        """
        self.bad_rows.complete()
        if self.best.is_given_up() and self.accelerator.is_main_process:
            print(self.best.describe_end())
        if self.evaluations.step != self.state.step:
            self.evaluations.run()
        self._check_rows()
        last = self.evaluations.figures
        outcome = final_outcome(self.config, self.learner, self.checkpoints, self.evaluations, self.records)
        if self.accelerator.is_main_process:
            self._say_what_was_gained(outcome, last)
            self._save(outcome)
            if self.config.push_to_hub:
                if (signum := self.signals.received) is not None:
                    raise Stopped(signum, f"the model is in {self.config.output_dir}, and was not published")
                publish(self.config, f"{self.state.step} steps of training")
            print(f"Saved to {self.config.output_dir}")
        self.accelerator.end_training()
        return outcome

    # --- what is due ------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Evaluate the model that training starts from, then make the folder. What is refused here leaves none."""
        is_new, evaluations = self.config.resume_from_checkpoint is None, self.evaluations
        if is_new and evaluations.validation is not None:
            evaluations.start_figures = evaluations.measure()
            self._check_rows()
            self.best.check(evaluations.start_figures)
        if self.accelerator.is_main_process:
            prepare_output(self.plan)
        self.accelerator.wait_for_everyone()
        if not is_new:
            self.records.forget_after(self.state.step)
            evaluations.start_figures = self.records.figures_of(0)
            evaluations.catch_up()
        elif evaluations.start_figures:
            evaluations.take(evaluations.start_figures)
        decay, steps = self.config.ema_decay, self.plan.total_steps
        if decay is not None and spans_all_steps(decay, steps) and self.accelerator.is_main_process:
            tqdm.write(
                f"note: --ema_decay {decay:g} spans more steps than the {steps} of this run: all count alike, as with "
                f"{1 - 1 / steps:.3g}."
            )
        self.signals.are_deferred = True
        self.counts.begin()

    def _step_done(self, rates: dict[str, float]) -> None:
        self.state.step += 1
        if self.learner.average is not None:
            self.learner.average.update(self.learner.model)
        self._bar.update()
        if self.state.step % self.config.logging_steps == 0 or self.state.step == self.plan.total_steps:
            record = self.counts.take_record(rates)
            self.records.add(record)
            self._bar.set_postfix(**shown_on_the_bar(record))
        self.checkpoints.remember_step()
        self._check_rows()
        is_evaluated, is_saved = map(self._is_due, (self.config.steps_between_evaluations, self.config.save_steps))
        # A run that was told to stop puts off what takes long: its last step is saved before the next batch.
        if (is_evaluated or is_saved) and not self._is_told_to_stop():
            with self.counts.paused():
                if is_evaluated:
                    self.evaluations.run()
                if is_saved:
                    self.checkpoints.save()
                self._check_rows()
                if is_saved and self.config.hub_strategy == "every_save":
                    self._publish_step()

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0 and self.state.step < self.plan.total_steps

    def _is_told_to_stop(self) -> bool:
        return any(told for (told,) in exchange_counts([self.signals.received or 0], self.accelerator.device))

    def _check_failures(self, failure: Exception | None) -> None:
        """Raise, in all processes, what any process says: a signal before an error, which may come from it.

        A signal waits for the end of an accumulated step, whose batches count in BatchNorm's statistics already.
        """
        told = exchange_counts([self.signals.received or 0, int(failure is not None)], self.accelerator.device)
        signum, has_failed = (max(column) for column in zip(*told, strict=True))
        if signum and (has_failed or not self.checkpoints.is_within_step()):
            raise Stopped(signum, self.checkpoints.save_whole_step())
        if not has_failed:
            return
        text = _first_text("" if failure is None else " ".join(str(failure).split()) or type(failure).__name__)
        remains = self.checkpoints.save_whole_step()
        if failure is not None and (not remains or not isinstance(failure, EXPECTED)):
            if remains:
                print(sentence(remains), file=sys.stderr)
            raise failure
        raise ValueError(f"{text} {sentence(remains) if remains else ''}".strip()) from failure

    def _check_rows(self) -> None:
        """Stop when any process has met too many rows that cannot be used, without losing what was trained."""
        validation = self.evaluations.validation
        counters = [self.bad_rows, *([] if validation is None else validation.bad_rows)]
        refusal = find_refusal(counters, self.accelerator.device)
        if not refusal:
            return
        if not self.checkpoints.save_whole_step():
            raise ValueError(f"{refusal} Repair the data, or pass a higher --max_bad_fraction.")
        raise ValueError(
            f"{refusal} Repair the data and start anew, or go on from {self.checkpoints.last} with "
            f"--resume_from_checkpoint latest and a higher --max_bad_fraction."
        )

    # --- what is left -----------------------------------------------------------------------------------------------

    def _save(self, outcome: Outcome) -> None:
        validation = self.evaluations.validation
        guard = validation.guard.protocol if validation is not None and validation.guard is not None else None
        save_results(self.plan, self.learner.processor, outcome, self.evaluations.start_figures, self.records, guard)

    def _publish_step(self) -> None:
        outcome = present_outcome(self.learner, self.config, self.state.step, self.evaluations.figures)
        if self.accelerator.is_main_process:
            self._save(outcome)
            publish_if_possible(self.config, f"Step {self.state.step}")
        self.accelerator.wait_for_everyone()

    def _say_what_was_gained(self, outcome: Outcome, last: dict[str, float]) -> None:
        """Print what the saved weights are better at. last: the figures of the last step"""
        if self.state.step > self.checkpoints.resumed_at:
            print(wait_in_words(self.counts.waited, self.counts.trained))
        chosen, start = self.config.metric_for_best_model, self.evaluations.start_figures
        metric = chosen or DEFAULT_METRIC
        if not start or not outcome.figures:
            return
        end = None if outcome.step == self.state.step else (self.state.step, value_of(metric, last))
        saved = (outcome.step, value_of(metric, outcome.figures))
        is_best_kept = chosen is not None
        print(gain_in_words(metric, value_of(metric, start), saved, end, is_best_kept, outcome.alpha))
        if (guard := shown_guard_metric(outcome.figures)) is not None and guard in start:
            by_guard = len(self.config.alphas) > 1 if chosen is None else guard in chosen
            print(guard_in_words(guard, start[guard], outcome.figures[guard], by_guard))


def _first_text(text: str) -> str:
    """Of all processes' texts the first that is not empty."""
    if world_size() == 1:
        return text
    texts = [""] * world_size()
    dist.all_gather_object(texts, text)
    return next(each for each in texts if each)
