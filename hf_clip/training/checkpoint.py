"""Checkpoints: a run's states in a folder, from which it can go on.

    output_dir/checkpoints/step-00001000/     model, optimizer, schedule and random states (see states.py),
                                              run.json: step, position in the data, the best figure so far, and
                                              SHA256SUMS: a digest of each file
    output_dir/checkpoints/best/              the weights that were best (see best.py)

A checkpoint is written under another name, and renamed when all its files are on the disk. Before one is removed it is
renamed too. So whatever has a checkpoint's name was complete, and its digests tell whether it still is.

Every process calls every function here, at the same step.
"""

import os
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from pickle import UnpicklingError

import torch
from tqdm import tqdm

from ..checkpoints.whole_file import write_json
from ..checkpoints.whole_folder import free_bytes, is_full
from .agreement import done_together, of_main_process
from .checksums import SUMS, UNFINISHED, check_checksums, sync_folder, write_checksums
from .data.bad_rows import BadRows
from .feature_store import FOLDER as FEATURES
from .learner import Learner
from .plan import Plan
from .run_state import FORMAT, PREFIX, STATE, OlderFormatError, RunState, parse_state
from .states import load_states, save_states, states_size

FOLDER = "checkpoints"

# --- the folders -----------------------------------------------------------------------------------------------------


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints, oldest first. A folder whose name is no step is someone else's."""
    found = [path.parent for path in Path(output_dir, FOLDER).glob(f"{PREFIX}*/{STATE}")]
    return sorted((path for path in found if re.fullmatch(f"{PREFIX}[0-9]+", path.name)), key=step_of)


def step_of(folder: Path) -> int:
    """The step of a checkpoint, by its folder's name."""
    return int(folder.name.removeprefix(PREFIX))


def find_checkpoint(output_dir: str | Path, resume: str) -> Path:
    """The checkpoint that `--resume_from_checkpoint` means, each file of which is as it was written.

    Of damaged ones that are passed over for it, a line is printed.

    Args:
        output_dir: of the run.
        resume: `latest`, or a checkpoint's folder.

    Raises:
        FileNotFoundError: there is none. The message names those that there are.
        ValueError: it is damaged, or `latest` and all are; or it is of another version (`OlderFormatError`).
    """
    found = list_checkpoints(output_dir)
    if resume != "latest":
        folder = Path(resume)
        if folder.resolve() not in [path.resolve() for path in found]:
            listed = ", ".join(str(path) for path in found) or "none"
            raise FileNotFoundError(f"There is no whole checkpoint {folder}; those of {output_dir}: {listed}.")
        read_state(folder)
        return folder
    if not found:
        raise FileNotFoundError(f"There is no checkpoint in {Path(output_dir, FOLDER)} to go on from.")
    damaged = []
    for folder in reversed(found):
        try:
            read_state(folder)
        except OlderFormatError:
            raise
        except ValueError as error:
            damaged.append(error)
        else:
            for passed_over in damaged:
                line = str(passed_over).partition(" Go on from another")[0]
                sys.stderr.write(f"warning: {line} The run goes on from {folder}.\n")
            return folder
    raise damaged[0]


def read_state(folder: Path) -> RunState:
    """Where a checkpoint's run stood, after all its files were compared with their digests.

    Raises:
        ValueError: the checkpoint is damaged, or of another version (`OlderFormatError`).
    """
    try:
        return _checked_state(folder)
    except OlderFormatError:
        raise
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise _damaged(folder, error) from error


def _checked_state(folder: Path) -> RunState:
    state = parse_state(folder)
    if state.format > 2 or (folder / SUMS).exists():
        check_checksums(folder)
    return state


def _is_whole(folder: Path) -> bool:
    try:
        _checked_state(folder)
    except (OSError, ValueError, TypeError, RecursionError):
        return False
    return True


def _damaged(folder: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, UnpicklingError) or "weights_only" in str(error):  # torch tells how to read it nevertheless
        reason = "one of its files holds other things than tensors and numbers, or is cut off"
    others = (path for path in reversed(list_checkpoints(folder.parent.parent)) if path.name != folder.name)
    other = next(filter(_is_whole, others), None)
    advice = "There is no other that is whole: start anew"
    if other is not None:
        advice = f"Go on from another with --resume_from_checkpoint {other}"
    return ValueError(f"The checkpoint {folder} is damaged ({reason}). {advice}.")


def remove_older(output_dir: str | Path, keep: int) -> None:
    """Remove all checkpoints but the last `keep`. The main process calls this once the last has proved to be of use."""
    for folder in list_checkpoints(output_dir)[:-keep]:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a checkpoint, which has no checkpoint's name any more while it is incomplete."""
    removed = folder.with_name(f".{folder.name}-removed{UNFINISHED}")
    shutil.rmtree(removed, ignore_errors=True)
    os.replace(folder, removed)
    shutil.rmtree(removed, ignore_errors=True)


def remove_unfinished(output_dir: str | Path) -> None:
    """Remove what a run left that was killed while it wrote. Only the program that holds the folder may call this."""
    out, checkpoints = Path(output_dir), Path(output_dir, FOLDER)
    of_files = [
        path for path in out.glob(f".*{UNFINISHED}") if re.fullmatch(rf".+-[0-9a-f]{{32}}\{UNFINISHED}", path.name)
    ]
    of_checkpoints = (*checkpoints.glob(f".{PREFIX}*{UNFINISHED}"), *checkpoints.glob(f"*/.model*{UNFINISHED}"))
    of_features = [*Path(out, FEATURES).glob(f"**/.*{UNFINISHED}")]  # also of models and data that are used no more
    for path in (*of_checkpoints, *of_features, *of_files):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


# --- of one run ------------------------------------------------------------------------------------------------------


class Checkpoints:
    """What writes the checkpoints of a run that is going on, and where the run stands.

    Attributes:
        state: where the run stands.
        resumed_at: the step that the run went on from, 0 for a new run.
    """

    def __init__(self, plan: Plan, learner: Learner, bad_rows: BadRows):
        """Begin a run, or restore what the checkpoint holds that the plan starts from.

        Raises:
            ValueError: it is damaged.
        """
        self.config, self.learner, self.bad_rows = plan.config, learner, bad_rows
        self.state = RunState(identity=plan.identity(), frozen=learner.frozen_digests())
        self.last = plan.start
        self.is_last_proved = True
        if self.last is not None:
            self.state = self._load(self.last, plan)
        self.resumed_at = self.state.step
        self.remember_step()

    def _load(self, folder: Path, plan: Plan) -> RunState:
        state, accelerator = parse_state(folder), self.learner.accelerator
        written_by = int(state.identity.get("processes", accelerator.num_processes))
        state.identity, state.format, state.frozen = plan.identity(), FORMAT, self.learner.frozen_digests()
        try:
            load_states(self.learner, folder, written_by)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a damaged file makes its reader do
            raise _damaged(folder, error) from error
        if len(state.bad_rows) == accelerator.num_processes:
            self.bad_rows.load_state_dict(state.bad_rows[accelerator.process_index])
        elif accelerator.is_main_process:  # of another number of processes: what counts is their sum
            for counter in state.bad_rows:
                self.bad_rows.add_state_dict(counter)
        return state

    def remember_step(self) -> None:
        """Remember what grows with each batch, as it is after a whole step."""
        state = self.state
        self._whole_step = (state.epoch, state.batch, [*state.losses], [*state.accuracies], self.bad_rows.state_dict())

    def is_within_step(self) -> bool:
        """Whether batches were counted since the last whole step."""
        return (self.state.epoch, self.state.batch) != self._whole_step[:2]

    def save(self) -> None:
        """Write a checkpoint, and remove those of later steps, which a run that went back left.

        Older ones stay until `prove`, since these weights may be those that the next loss is no number with.

        Raises:
            ValueError: weights are no numbers.
            UnwrittenCheckpointError: there is no room, and the run is not to go on without.
        """
        try:
            self._save()
        except UnwrittenCheckpointError as error:
            if not self.config.keep_going_without_checkpoints:
                raise
            if self.learner.accelerator.is_main_process:
                tqdm.write(f"warning: {error.what} The run goes on without.", file=sys.stderr)

    def _save(self) -> None:
        from accelerate.utils import gather_object

        if not self.learner.are_weights_finite():
            raise self.diverged(f"Weights became nan in step {self.state.step}")
        self.state.bad_rows = gather_object([self.bad_rows.state_dict()])
        self.last = self._write()
        self.is_last_proved = False

    def _write(self) -> Path:
        folder = Path(self.config.output_dir, FOLDER) / f"{PREFIX}{self.state.step:08}"
        unfinished, accelerator = folder.with_name(f".{folder.name}{UNFINISHED}"), self.learner.accelerator
        needed = states_size(self.learner)

        def begin() -> None:
            shutil.rmtree(unfinished, ignore_errors=True)
            free = free_bytes(folder.parent)
            if free is not None and free < needed:
                raise self._no_room(folder, needed)
            unfinished.mkdir(parents=True)

        def finish() -> None:
            write_json(unfinished / STATE, asdict(self.state))
            write_checksums(unfinished)
            if folder.exists():
                _remove(folder)
            os.replace(unfinished, folder)
            sync_folder(folder.parent)
            for other in list_checkpoints(self.config.output_dir):
                if step_of(other) > self.state.step:
                    _remove(other)

        try:
            of_main_process(accelerator, begin)
            done_together(lambda: save_states(self.learner, unfinished))
            of_main_process(accelerator, finish)
        except Exception as error:
            if accelerator.is_main_process:
                shutil.rmtree(unfinished, ignore_errors=True)
            if is_full(error) and not isinstance(error, UnwrittenCheckpointError):
                raise self._no_room(folder, needed) from error
            raise
        return folder

    def _no_room(self, folder: Path, needed: int) -> "UnwrittenCheckpointError":
        return UnwrittenCheckpointError(folder, needed, free_bytes(folder.parent), self.last)

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
            try:
                self._save()
            except UnwrittenCheckpointError as error:
                return f"{error.what} {error.remains}".rstrip(".")
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


class UnwrittenCheckpointError(OSError):
    """There is no room for a checkpoint; those before it are whole.

    Attributes:
        folder: where it was to be written.
        needed, free: bytes; `free` is None where it is not known.
        last: the last checkpoint that is whole, if any.
        what, remains: the two halves of the message.
    """

    def __init__(self, folder: Path, needed: int, free: int | None, last: Path | None):
        self.folder, self.needed, self.free, self.last = folder, needed, free, last
        left = "" if free is None else f", and {free:,} are free"
        self.what = f"No space left for the checkpoint {folder}: it needs {needed:,} bytes{left} in {folder.parent}."
        self.remains = "No checkpoint was written before."
        if last is not None:
            self.remains = f"{last} is whole: make room, and go on with --resume_from_checkpoint latest."
        super().__init__(f"{self.what} {self.remains} --keep_going_without_checkpoints trains on all the same.")

    def __reduce__(self) -> tuple[type, tuple[Path, int, int | None, Path | None]]:
        return type(self), (self.folder, self.needed, self.free, self.last)
