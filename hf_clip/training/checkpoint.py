"""Checkpoints of a run. Each is written beside its place and renamed: a checkpoint that has its name is whole.

    output_dir/checkpoints/step-00001000/     model, optimizer, schedule and random states, see states.py, and
                                              run.json: step, position in the data, the best figure so far
    output_dir/checkpoints/best/              the weights that were best

Every process calls every function here, at the same step.
"""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .option_names import RENAMED
from .states import Resumable, load_states, save_states

FOLDER = "checkpoints"
PREFIX = "step-"
STATE = "run.json"
BEST = "best"
UNFINISHED = ".unfinished"
FORMAT = 2
"""Of a checkpoint's files; the first was accelerate's own."""


@dataclass
class RunState:
    """Where a run stands.

    epoch, batch: what of the data is done, see `Position`
    best:         the best figure so far and its step; `evaluations_since` then
    losses, accuracies: of the batches since the last record
    bad_rows:     each process's counter of them
    identity:     what a resumed run must have in common with the one that wrote this
    format:       see `FORMAT`
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


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The whole ones, oldest first. Folders whose names are no steps are someone else's."""
    found = [path.parent for path in Path(output_dir, FOLDER).glob(f"{PREFIX}*/{STATE}")]
    return sorted((path for path in found if re.fullmatch(f"{PREFIX}[0-9]+", path.name)), key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def save_checkpoint(parts: Resumable, output_dir: str | Path, state: RunState) -> Path:
    """Write one, and remove those of later steps, which a run that went back left. Others stay: see `remove_older`."""
    accelerator = parts.accelerator
    folder = Path(output_dir, FOLDER) / f"{PREFIX}{state.step:08}"
    unfinished = folder.with_name(f".{folder.name}{UNFINISHED}")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    save_states(parts, unfinished)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (unfinished / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
        for other in list_checkpoints(output_dir):
            if step_of(other) > state.step:
                shutil.rmtree(other)
    accelerator.wait_for_everyone()
    return folder


def remove_older(output_dir: str | Path, keep: int) -> None:
    """Remove all but the last `keep`. The main process calls this once the last has proved to be of use."""
    for folder in list_checkpoints(output_dir)[:-keep]:
        shutil.rmtree(folder)


def remove_unfinished(output_dir: str | Path) -> None:
    """Remove what a run left that was killed while it wrote. Only who holds the folder may call this."""
    for path in Path(output_dir, FOLDER).glob(f".{PREFIX}*{UNFINISHED}"):
        shutil.rmtree(path, ignore_errors=True)
    Path(output_dir, FOLDER, BEST, f".model{UNFINISHED}").unlink(missing_ok=True)


def find_checkpoint(output_dir: str | Path, resume: str) -> Path:
    """The folder that `--resume_from_checkpoint` means. Raises FileNotFoundError that names what there is."""
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


def _damaged(folder: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, UnpicklingError) or "weights_only" in str(error):  # torch tells how to read it nevertheless
        reason = "one of its files holds other things than tensors and numbers, or is cut off"
    others = [str(path) for path in list_checkpoints(folder.parent.parent) if path.name != folder.name]
    advice = "There is no other: start anew"
    if others:
        advice = f"Go on from another with --resume_from_checkpoint {others[-1]}"
    return ValueError(f"The checkpoint {folder} is damaged ({reason}). {advice}.")


def read_state(folder: Path, identity: dict[str, Any]) -> RunState:
    """Where a checkpoint's run stood. Raises ValueError when this run differs from that one in `identity`."""
    try:
        values = json.loads((folder / STATE).read_text(encoding="utf-8"))
        _check_format(folder, values)
        state = RunState(**values)
        _check_types(state)
    except OlderFormatError:
        raise
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise _damaged(folder, error) from error
    state.identity = {RENAMED.get(name, name): value for name, value in state.identity.items()}
    if differing := [name for name, value in identity.items() if state.identity.get(name) != value]:
        name = differing[0]
        raise ValueError(
            f"{folder} was written by a run with {name} {state.identity.get(name)!r}, and this one has "
            f"{identity[name]!r}: it could not go on where that stopped. Start anew, or resume with the same options."
        )
    return state


class OlderFormatError(ValueError):
    """A checkpoint has files of another version, which this one does not read."""


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


def load_checkpoint(parts: Resumable, folder: Path, identity: dict[str, Any]) -> RunState:
    """Restore model, optimizer, schedule and random states; returns where the run stood. Raises as `read_state`."""
    state = read_state(folder, identity)
    try:
        load_states(parts, folder)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a damaged file makes its reader do
        raise _damaged(folder, error) from error
    return state


def save_best(accelerator: Any, output_dir: str | Path, weights: dict[str, Tensor], step: int) -> None:
    """Keep these weights as the best so far."""
    if accelerator.is_main_process:
        folder = Path(output_dir, FOLDER, BEST)
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f".model{UNFINISHED}"
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, unfinished, {"step": str(step)})
        os.replace(unfinished, folder / "model.safetensors")
    accelerator.wait_for_everyone()


def step_of_best(output_dir: str | Path) -> int | None:
    """After which step the weights that are kept as the best were saved; None where there are none.

    Raises ValueError where they are damaged.
    """
    path = Path(output_dir, FOLDER, BEST) / "model.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return int(file.metadata()["step"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged_best(path, error) from error


def load_best(output_dir: str | Path) -> dict[str, Tensor]:
    path = Path(output_dir, FOLDER, BEST) / "model.safetensors"
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _damaged_best(path, error) from error


def _damaged_best(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ValueError(
        f"The best weights so far, {path}, are damaged ({reason}). Delete that file: the best of the steps to come are "
        f"kept then."
    )
