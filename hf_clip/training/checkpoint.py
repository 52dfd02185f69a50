"""Checkpoints of a run: written beside their place and renamed, so that one that is there is whole.

    output_dir/checkpoints/step-00001000/     what accelerate saves of model, optimizer, schedule and random states,
                                              and run.json: step, position in the data, the best figure so far
    output_dir/checkpoints/best/              the weights that were best

Every process calls every function here, at the same step.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = "checkpoints"
PREFIX = "step-"
STATE = "run.json"
BEST = "best"


@dataclass
class RunState:
    """Where a run stands.

    epoch, batch: what of the data is done, see `Position`
    best:         the best figure so far and its step; `evaluations_since` then
    losses, accuracies: of the batches since the last record
    bad_rows:     each process's counter of them
    identity:     what a resumed run must have in common with the one that wrote this
    """

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
    """The whole ones, oldest first."""
    found = Path(output_dir, FOLDER).glob(f"{PREFIX}*/{STATE}")
    return sorted((path.parent for path in found), key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def save_checkpoint(accelerator: Any, output_dir: str | Path, state: RunState, keep: int) -> Path:
    """Write one, and remove all but the last `keep`, and those of later steps: a run that went back left them."""
    folder = Path(output_dir, FOLDER) / f"{PREFIX}{state.step:08}"
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        (unfinished / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
        found = list_checkpoints(output_dir)
        place = found.index(folder) + 1
        for other in (*found[: max(place - keep, 0)], *found[place:]):
            shutil.rmtree(other)
    accelerator.wait_for_everyone()
    return folder


def find_checkpoint(output_dir: str | Path, resume: str) -> Path:
    """The folder that `--resume` means. Raises FileNotFoundError that names what there is."""
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
    reason = " ".join(str(error).split()) or type(error).__name__
    others = [str(path) for path in list_checkpoints(folder.parent.parent) if path.name != folder.name]
    advice = f"Go on from another with --resume {others[-1]}" if others else "There is no other: start anew"
    return ValueError(f"The checkpoint {folder} is damaged ({reason}). {advice}.")


def read_state(folder: Path, identity: dict[str, Any]) -> RunState:
    """Where a checkpoint's run stood. Raises ValueError when this run differs from that one in `identity`."""
    try:
        state = RunState(**json.loads((folder / STATE).read_text()))
    except (ValueError, TypeError) as error:
        raise _damaged(folder, error) from error
    if differing := [name for name, value in identity.items() if state.identity.get(name) != value]:
        name = differing[0]
        raise ValueError(
            f"{folder} was written by a run with {name} {state.identity.get(name)!r}, and this one has "
            f"{identity[name]!r}: it could not go on where that stopped. Start anew, or resume with the same options."
        )
    return state


def load_checkpoint(accelerator: Any, folder: Path, identity: dict[str, Any]) -> RunState:
    """Restore model, optimizer, schedule and random states; returns where the run stood. Raises as `read_state`."""
    from accelerate.utils import load

    state = read_state(folder, identity)
    random_states = folder / f"random_states_{accelerator.process_index}.pkl"
    try:
        if random_states.is_file():  # accelerate would go on without those that it cannot read
            load(random_states)
        accelerator.load_state(str(folder))
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
        unfinished = folder / ".model.unfinished"
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, unfinished, {"step": str(step)})
        os.replace(unfinished, folder / "model.safetensors")
    accelerator.wait_for_everyone()


def step_of_best(output_dir: str | Path) -> int | None:
    """After which step the weights that are kept as the best were saved; None where there are none."""
    path = Path(output_dir, FOLDER, BEST) / "model.safetensors"
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        return int(file.metadata()["step"])


def load_best(output_dir: str | Path) -> dict[str, Tensor]:
    return load_file(Path(output_dir, FOLDER, BEST) / "model.safetensors")
