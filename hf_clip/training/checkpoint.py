"""Checkpoints: a run's states in a folder, from which it can go on.

    output_dir/checkpoints/step-00001000/     model, optimizer, schedule and random states (see states.py), and
                                              run.json: step, position in the data, the best figure so far
    output_dir/checkpoints/best/              the weights that were best (see best.py)

A checkpoint is written under another name and renamed when all its files are there. So whatever has a checkpoint's name
is complete.

Every process calls every function here, at the same step.
"""

import os
import re
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ..checkpoints.whole_file import write_json
from ..model.checked_files import read_json
from .data.bad_rows import BadRows
from .learner import Learner
from .option_names import RENAMED
from .plan import Plan
from .states import load_states, save_states

FOLDER = "checkpoints"
PREFIX = "step-"
STATE = "run.json"
UNFINISHED = ".unfinished"
FORMAT = 2
"""Of a checkpoint's files; the first was accelerate's own."""

COUNTED = {"drawn": int, "bad": int, "cut": int, "first": str}
"""What run.json says of each process's bad rows; the oldest have no `cut`."""


@dataclass
class RunState:
    """Where a run stands. This is what run.json holds.

    Attributes:
        format: of the checkpoint's files, see `FORMAT`.
        step: optimizer steps that are done.
        epoch, batch: the position in the data, see `Position`.
        best, best_step: the best figure so far and its step.
        evaluations_since: evaluations since then.
        losses, accuracies: of the batches since the last record.
        bad_rows: for each process the state of its counter, see `BadRows`.
        identity: what a resumed run must have in common with this one.
    """

    format: int = FORMAT
    step: int = 0
    epoch: int = 0
    batch: int = 0
    best: float | None = None
    best_step: int = 0
    evaluations_since: int = 0
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    bad_rows: list[dict[str, Any]] = field(default_factory=list)
    identity: dict[str, Any] = field(default_factory=dict)


# --- the folders -----------------------------------------------------------------------------------------------------


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints, oldest first. A folder whose name is no step is someone else's."""
    found = [path.parent for path in Path(output_dir, FOLDER).glob(f"{PREFIX}*/{STATE}")]
    return sorted((path for path in found if re.fullmatch(f"{PREFIX}[0-9]+", path.name)), key=step_of)


def step_of(folder: Path) -> int:
    """The step of a checkpoint, by its folder's name."""
    return int(folder.name.removeprefix(PREFIX))


def find_checkpoint(output_dir: str | Path, resume: str) -> Path:
    """The folder that `--resume_from_checkpoint` means.

    Args:
        output_dir: of the run.
        resume: `latest`, or a checkpoint's folder.

    Raises:
        FileNotFoundError: there is none. The message names those that there are.
    """
    found = list_checkpoints(output_dir)
    if resume == "latest":
        if not found:
            raise FileNotFoundError(f"There is no checkpoint in {Path(output_dir, FOLDER)} to go on from.")
        return found[-1]
    folder = Path(resume)
    if folder.resolve() not in [path.resolve() for path in found]:
        listed = ", ".join(str(path) for path in found) or "none"
        raise FileNotFoundError(f"There is no whole checkpoint {folder}; those of {output_dir}: {listed}.")
    return folder


def remove_older(output_dir: str | Path, keep: int) -> None:
    """Remove all checkpoints but the last `keep`. The main process calls this once the last has proved to be of use."""
    for folder in list_checkpoints(output_dir)[:-keep]:
        shutil.rmtree(folder)


def remove_unfinished(output_dir: str | Path) -> None:
    """Remove what a run left that was killed while it wrote. Only the program that holds the folder may call this."""
    checkpoints = Path(output_dir, FOLDER)
    for path in (*checkpoints.glob(f".{PREFIX}*{UNFINISHED}"), *checkpoints.glob(f"*/.model*{UNFINISHED}")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


# --- reading ---------------------------------------------------------------------------------------------------------


class OlderFormatError(ValueError):
    """A checkpoint has files of another version, which this one does not read."""


def read_state(folder: Path) -> RunState:
    """Where a checkpoint's run stood. Options that were renamed since have their present names.

    Raises:
        ValueError: run.json is damaged, or of another version (`OlderFormatError`).
    """
    try:
        values = read_json(folder / STATE)
        _check_format(folder, values)
        state = RunState(**values)
        _check_types(state)
    except OlderFormatError:
        raise
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise _damaged(folder, error) from error
    state.identity = {RENAMED.get(name, name): value for name, value in state.identity.items()}
    return state


def check_identity(folder: Path, state: RunState, identity: dict[str, Any]) -> None:
    """Refuse a checkpoint of a run that differs from this one.

    Args:
        folder: of the checkpoint.
        state: as `read_state` returns it.
        identity: of this run, see `Plan.identity`.

    Raises:
        ValueError: an option, the number of steps or processes, or the launcher's settings differ.
    """
    for name, value in identity.items():
        if (written := state.identity.get(name)) != value:
            raise ValueError(
                f"{folder} was written by a run with {name} {written!r}, and this one has {value!r}: it could not go "
                f"on where that stopped. Start anew, or resume with the same options."
            )


def _damaged(folder: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, UnpicklingError) or "weights_only" in str(error):  # torch tells how to read it nevertheless
        reason = "one of its files holds other things than tensors and numbers, or is cut off"
    others = [str(path) for path in list_checkpoints(folder.parent.parent) if path.name != folder.name]
    advice = "There is no other: start anew"
    if others:
        advice = f"Go on from another with --resume_from_checkpoint {others[-1]}"
    return ValueError(f"The checkpoint {folder} is damaged ({reason}). {advice}.")


def _check_format(folder: Path, values: Any) -> None:
    if isinstance(values, dict) and "step" in values and (found := values.get("format", 1)) != FORMAT:
        reason = "some of its files could run code when they are read" if found == 1 else "this one cannot read it"
        raise OlderFormatError(
            f"The checkpoint {folder} was written by another version of hf_clip (format {str(found)[:20]}, this one's "
            f"is {FORMAT}): {reason}. Go on with the version that wrote it, or start anew."
        )


def _check_types(state: RunState) -> None:
    """Raises ValueError for values that no run wrote."""
    for known in fields(RunState):
        value, usual = getattr(state, known.name), getattr(RunState(), known.name)
        is_right = value is None or type(value) in (int, float) if known.name == "best" else type(value) is type(usual)
        if not is_right or (type(value) is int and value < 0):
            raise ValueError(f"{known.name} in {STATE} is {str(value)[:50]!r}")
    if any(type(number) not in (int, float) for number in (*state.losses, *state.accuracies)):
        raise ValueError(f"losses and accuracies in {STATE} are not all numbers")
    if state.bad_rows and len(state.bad_rows) != state.identity.get("processes"):
        raise ValueError(f"bad_rows in {STATE} has {len(state.bad_rows)} counters, which is not one for each process")
    for counter in state.bad_rows:
        values = {"cut": 0} | counter if isinstance(counter, dict) else {}
        is_right = values.keys() == COUNTED.keys() and all(type(values[name]) is kind for name, kind in COUNTED.items())
        if not is_right or min(values["drawn"], values["bad"], values["cut"]) < 0:
            raise ValueError(f"bad_rows in {STATE} has {str(counter)[:50]!r}")


# --- of one run ------------------------------------------------------------------------------------------------------


class Checkpoints:
    """What writes the checkpoints of a run that is going on, and where the run stands.

    Attributes:
        state: where the run stands.
        resumed_at: the step that the run went on from, 0 for a new run.
    """

    def __init__(self, plan: Plan, learner: Learner, bad_rows: BadRows):
        """Begin a run, or restore what the checkpoint holds that `--resume_from_checkpoint` names.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            ValueError: it is damaged, or of another run.
        """
        self.config, self.learner, self.bad_rows = plan.config, learner, bad_rows
        self.state = RunState(identity=plan.identity())
        self.last: Path | None = None
        self.is_last_proved = True
        if self.config.resume_from_checkpoint is not None:
            self.last = find_checkpoint(self.config.output_dir, self.config.resume_from_checkpoint)
            self.state = self._load(self.last, plan)
        self.resumed_at = self.state.step
        self.remember_step()

    def _load(self, folder: Path, plan: Plan) -> RunState:
        state = read_state(folder)
        check_identity(folder, state, plan.identity())
        try:
            load_states(self.learner, folder)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a damaged file makes its reader do
            raise _damaged(folder, error) from error
        if state.bad_rows:
            self.bad_rows.load_state_dict(state.bad_rows[self.learner.accelerator.process_index])
        return state

    def remember_step(self) -> None:
        """Remember what grows with each batch, as it is after a whole step."""
        state = self.state
        self._whole_step = (state.epoch, state.batch, [*state.losses], [*state.accuracies], self.bad_rows.state_dict())

    def is_within_step(self) -> bool:
        """Whether batches were counted since the last whole step."""
        return (self.state.epoch, self.state.batch) != self._whole_step[:2]

    def save(self) -> Path:
        """Write a checkpoint, and remove those of later steps, which a run that went back left.

        Older ones stay until `prove`, since these weights may be those that the next loss is no number with.

        Raises:
            ValueError: weights are no numbers.
        """
        from accelerate.utils import gather_object

        if not self.learner.are_weights_finite():
            raise self.diverged(f"Weights became nan in step {self.state.step}")
        self.state.bad_rows = gather_object([self.bad_rows.state_dict()])
        self.last = self._write()
        self.is_last_proved = False
        return self.last

    def _write(self) -> Path:
        accelerator, output_dir = self.learner.accelerator, self.config.output_dir
        folder = Path(output_dir, FOLDER) / f"{PREFIX}{self.state.step:08}"
        unfinished = folder.with_name(f".{folder.name}{UNFINISHED}")
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        accelerator.wait_for_everyone()
        save_states(self.learner, unfinished)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(unfinished / STATE, asdict(self.state))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(unfinished, folder)
            for other in list_checkpoints(output_dir):
                if step_of(other) > self.state.step:
                    shutil.rmtree(other)
        accelerator.wait_for_everyone()
        return folder

    def save_whole_step(self) -> str:
        """See to it that there is a checkpoint of the last whole step.

        Returns:
            What remains of the run, in words; an empty text where no step was done.
        """
        if self.state.step == 0:
            return ""
        if self.last is None or step_of(self.last) != self.state.step:
            self.state.epoch, self.state.batch, self.state.losses, self.state.accuracies, rows = self._whole_step
            self.bad_rows.load_state_dict(rows)
            self.save()
        return (
            f"the {self.state.step} steps so far are in {self.last}; --resume_from_checkpoint latest goes on from there"
        )

    def prove(self) -> None:
        """The loss is a number with the last checkpoint's weights: remove older ones beyond `save_total_limit`."""
        if not self.is_last_proved:
            self.is_last_proved = True
            if self.learner.accelerator.is_main_process:
                remove_older(self.config.output_dir, self.config.save_total_limit)

    def diverged(self, what: str) -> ValueError:
        """The error for weights, as they are after the present step, that are of no use any more.

        Args:
            what: what was seen of it, as the beginning of the message.
        """
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
            f"{what} (logit scale {self.learner.model.logit_scale.exp().item():.1f}); {saved}. Lower --learning_rate, "
            f"raise --warmup_steps, or train in bf16 instead of fp16."
        )
