"""Where a run stands: what a checkpoint's run.json holds. It is read within limits, whatever stands in the file."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..model.checked_files import read_json
from .option_names import RENAMED

STATE = "run.json"
FORMAT = 3
"""Of a checkpoint's files; the first was accelerate's own, the second had no checksums."""
READ = (2, FORMAT)
LARGEST = 1e300
PREFIX = "step-"
"""Of a checkpoint's folder, before the number of its step."""

COUNTED = {"drawn": int, "bad": int, "cut": int, "negatives": int, "first": str}
"""What run.json says of each process's bad rows; older ones have no `cut` or `negatives`."""


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
        frozen: digests of models that are not in a checkpoint, by their names. Older ones have none.
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
    frozen: dict[str, str] = field(default_factory=dict)


class OlderFormatError(ValueError):
    """A checkpoint has files of another version, which this one does not read."""


def parse_state(folder: Path) -> RunState:
    """Read run.json. Options that were renamed since have their present names.

    Args:
        folder: of the checkpoint.

    Raises:
        OlderFormatError: It is of another version.
        OSError, ValueError, TypeError, RecursionError: It is damaged: it has a field that no run writes.
    """
    values = read_json(folder / STATE)
    _check_format(folder, values)
    state = RunState(**values)
    _check_types(state)
    _check_sizes(state, folder)
    state.identity = {RENAMED.get(name, name): value for name, value in state.identity.items()}
    return state


def check_identity(folder: Path, state: RunState, identity: dict[str, Any]) -> None:
    """Refuse a checkpoint of a run that differs from this one.

    Another number of processes is no difference where the batches have as many pairs: the order of the pairs is that of
    the whole batches, of which each process has its share.

    Args:
        folder: of the checkpoint.
        state: as it was read.
        identity: of this run, see `Plan.identity`.

    Raises:
        ValueError: an option, the number of steps or of pairs in a batch, or the launcher's settings differ.
    """
    ours, theirs = (_without_processes(each) for each in (identity, state.identity))
    for name, value in ours.items():
        if (written := theirs.get(name)) == value:
            continue
        reason, advice = "it could not go on where that stopped", "Start anew, or resume with the same options."
        if name == IN_A_BATCH:
            reason = "the order of the pairs is that of the batches, and each pair is contrasted with all of its batch"
            counts = [each.get("processes") for each in (state.identity, identity)]
            if type(written) is int and counts[0] != counts[1] and written % int(counts[1] or 1) == 0:
                advice = f"Pass --per_device_train_batch_size {written // int(counts[1] or 1)}, or start anew."
        elif name == "processes":
            reason = f"each process of {identity['wrapper']} reads the file that it has written"
        raise ValueError(
            f"{folder} was written by a run with {name} {written!r}, and this one has {value!r}: {reason}. {advice}"
        )


NEW_RUN: Mapping[str, str] = MappingProxyType({})
"""Stands for the digests of a checkpoint where there is none."""


def check_frozen(written: Mapping[str, str], name: str, digest: str, option: str) -> None:
    """Refuse another tower or teacher than the run began with, before anything is computed with it.

    A checkpoint has no towers whose features are stored, and no teacher. A resumed run loads them anew, by names under
    which other weights may lie by now.

    Args:
        written: What the checkpoint says of them, see `RunState.frozen`; empty for a new run.
        name: Which it is.
        digest: Of its weights and configuration, as they are now.
        option: That names where it is loaded from.

    Raises:
        ValueError: It is another one.
    """
    if written.get(name, digest) != digest:
        raise ValueError(
            f"The {name} is another one than the run began with: {option} gives one with the digest {digest}, and the "
            f"checkpoint says {str(written[name])[:50]}. Put the model that it began with back there, or start anew."
        )


IN_A_BATCH = "pairs in a batch"
WHOLE = ("none", "DDP", "FSDP2")
"""Wrappers whose states are gathered for a checkpoint, so that any number of processes can read them."""


def _without_processes(identity: dict[str, Any]) -> dict[str, Any]:
    """The same for all wrappers of `WHOLE` and any number of processes."""
    if identity.get("wrapper") not in WHOLE:
        return identity
    return {name: value for name, value in identity.items() if name not in ("processes", "wrapper")}


def _check_format(folder: Path, values: Any) -> None:
    if isinstance(values, dict) and "step" in values and (found := values.get("format", 1)) not in READ:
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
    if state.bad_rows and len(state.bad_rows) != state.identity.get("processes"):
        raise ValueError(f"bad_rows in {STATE} has {len(state.bad_rows)} counters, which is not one for each process")
    for counter in state.bad_rows:
        values = {"cut": 0, "negatives": 0} | counter if isinstance(counter, dict) else {}
        is_right = values.keys() == COUNTED.keys() and all(type(values[name]) is kind for name, kind in COUNTED.items())
        is_counted = is_right and all(0 <= values[name] <= values["drawn"] for name in ("bad", "cut"))
        if not is_counted or values["negatives"] < 0:
            raise ValueError(f"bad_rows in {STATE} has {str(counter)[:50]!r}")


def _check_sizes(state: RunState, folder: Path) -> None:
    """Raises ValueError for numbers that contradict each other."""
    numbers = (*state.losses, *state.accuracies, 0 if state.best is None else state.best)
    if any(type(number) not in (int, float) or not abs(number) < LARGEST for number in numbers):
        raise ValueError(f"losses, accuracies and best in {STATE} are not all numbers")
    if len(state.losses) != len(state.accuracies):
        raise ValueError(f"{STATE} has {len(state.losses)} losses and {len(state.accuracies)} accuracies")
    names = ("steps", "gradient_accumulation_steps", "processes")
    counts = [state.identity.get(name, usual) for name, usual in zip(names, (state.step, 1, 1), strict=True)]
    if any(type(count) is not int or count < 1 for count in counts):
        raise ValueError(f"steps, parts of a step and processes in {STATE} are {str(counts)[:50]}")
    steps, parts, _ = counts
    most = {"step": steps, "best_step": state.step, "evaluations_since": state.step + 1}
    # Each epoch that is over had a batch.
    most |= {"epoch": state.step * parts, "batch": state.step * parts - state.epoch}
    for name, limit in most.items():
        if (value := getattr(state, name)) > limit:
            raise ValueError(f"{name} in {STATE} is {str(value)[:50]}, and can be {limit} at most")
    if folder.name.startswith(PREFIX) and int(folder.name.removeprefix(PREFIX)) != state.step:
        raise ValueError(f"step in {STATE} is {state.step}, and the folder's name has another")
