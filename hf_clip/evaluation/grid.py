"""Several models on several data sets: each pair is a cell, which is measured once and kept.

    OUTPUT/results.json            a list of records, see `reports`
    OUTPUT/results.md              the same as tables
    OUTPUT/cells/NAME.json         a record for each cell, for `clip_benchmark build`
    OUTPUT/cells/NAME/             per_class.csv, confusion.png, reliability.png, mistakes.png, widths.png

A cell whose record is there is not measured again, unless an option, the model's files or the data have changed. A cell
that fails is reported, and the others are measured.
"""

import csv
import gc
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.folders import check_holds_model, in_one_line
from ..checkpoints.open_clip import CONFIG_FILE
from ..checkpoints.whole_file import write_json
from ..checkpoints.whole_folder import held_folder
from ..model.checked_files import one_line, read_object
from ..model.hub_repository import refuse_checkpoint_file
from ..zero_shot.embedding_head import FOLDER as HEADS
from .architecture import architecture_of
from .device import check_computes, dtype_named
from .feature_cache import optimize_and_remember
from .fingerprint import fingerprint_of_files
from .linear_probe import LinearProbeResult
from .processes import EXPECTED, Processes, current, is_cpu_wanted
from .reports import is_record, markdown_report, record_of, write_text
from .zero_shot import ZeroShotResult

IDENTITY = "identity"
"""Key of a record: a hash of everything that decided it."""


def load_model(name: str, dtype: str = "float32", device: str | None = None) -> tuple[Any, Any]:
    """Load a model and its processor for a measurement.

    Args:
        name: A folder or repository: ours, or transformers' CLIP or SigLIP.
        dtype: The dtype to compute in.
        device: "cpu", "cuda" and the like. None: a GPU if there is one.

    Returns:
        The model in evaluation mode, and its processor.

    Raises:
        ValueError: The dtype or device is unknown, or the name is that of a checkpoint file, to be converted first.
        OSError: The model is not there, its folder holds none, or it cannot be read.
    """
    from transformers import AutoModel, AutoProcessor

    kind = dtype_named(dtype)
    check_computes(device)
    refuse_checkpoint_file(name)
    _check_folder(name)
    device = device or ("cuda" if torch.cuda.is_available() and not is_cpu_wanted() else "cpu")
    with in_one_line(name):
        model = AutoModel.from_pretrained(name, dtype=kind)
        processor = AutoProcessor.from_pretrained(name)
    return model.to(device).eval(), processor


def _check_folder(name: str) -> None:
    """Refuse a folder of which `AutoModel` could not tell what it is, before transformers does so in many words."""
    check_holds_model(name)
    folder = Path(name)
    values = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    if "model_type" in values or not folder.is_dir():
        return
    if (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"{name} has the layout of open_clip. Convert it once, by `hf-clip convert {name} FOLDER`, and name that "
            f"folder."
        )
    raise ValueError(
        f"{name} is no model's folder: its config.json has no model_type. Name the folder or repository of a CLIP or "
        f"SigLIP."
    )


@dataclass
class Cell:
    """A model and a data set.   path: of its record"""

    model: str
    dataset: str
    path: Path
    identity: str


@dataclass
class Outcome:
    """What a grid gave.

    Attributes:
        records: Of all cells that there are now, in order.
        failures: `model on data set: error` of those that failed.
        skipped: Number of cells that were there already.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: int = 0


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "_", name.strip("/.")).strip("_")[-60:] or "unnamed"


WRITTEN_BESIDE = ("README.md", HEADS)
"""What evaluation itself writes into a model's folder. It does not change the model."""


def state_of(name: str, without: Sequence[str] = ()) -> str:
    """Return a text that changes with a local folder or file; of anything else its name."""
    place = Path(os.path.expanduser(name))
    return fingerprint_of_files(place, "", without) if place.exists() else name


def cells_of(
    task: str,
    models: Sequence[str],
    datasets: Sequence[str],
    output: Path,
    options: dict[str, Any],
    *,
    are_read: bool = True,
) -> list[Cell]:
    """List the cells of models and data sets.

    Args:
        task: Name of the task.
        models: The models.
        datasets: The data sets.
        output: Folder of the results.
        options: What else decides a result. Files among them are known by their content's size and time.
        are_read: Whether models and data sets are read. Otherwise they are names alone, such as those that a file of
            features has from a stranger.
    """
    cells = []
    decided = json.dumps({name: state_of(str(value)) for name, value in sorted(options.items()) if value is not None})
    states = {name: state_of(name) if are_read else name for name in {*datasets}}
    states |= {name: state_of(name, WRITTEN_BESIDE) if are_read else name for name in {*models}}
    for model in dict.fromkeys(models):
        for dataset in dict.fromkeys(datasets):
            whole = "\0".join([task, model, dataset, states[model], states[dataset], decided])
            identity = hashlib.blake2b(whole.encode(), digest_size=8).hexdigest()
            chosen = hashlib.blake2b("\0".join([task, model, dataset, decided]).encode(), digest_size=4).hexdigest()
            name = f"{task}--{_slug(model)}--{_slug(dataset)}--{chosen}"
            cells.append(Cell(model, dataset, output / "cells" / f"{name}.json", identity))
    return cells


def _finished(cell: Cell) -> dict[str, Any] | None:
    record = _record_in(cell.path)
    return record if record is not None and record.get(IDENTITY) == cell.identity else None


def _record_in(path: Path) -> dict[str, Any] | None:
    """Read the record of a cell. None if there is none, or something else."""
    try:
        record = read_object(path)
    except (OSError, ValueError):
        return None
    return record if is_record(record) else None


def run_grid(
    task: str,
    models: Sequence[str],
    datasets: Sequence[str],
    output: str | Path,
    measure: Callable[[Any, Any, str], Any],
    *,
    options: dict[str, Any],
    split: str | None = None,
    dtype: str = "float32",
    device: str | None = None,
    optimize: bool = False,
    plots: bool = True,
    say: Callable[[str], None] = lambda line: None,
    needs_model: bool = True,
    load: Callable[[str], tuple[Any, Any]] | None = None,
    resume: bool = True,
) -> Outcome:
    """Measure all cells that are not there yet, and write the results of all.

    Within `processes.connected` the processes share the work, and the main one reads and writes the folder.

    Args:
        task: One of `reports.TASKS`.
        models: Folders or repositories.
        datasets: Data sets.
        output: Folder of the results.
        measure: A function from a model, a processor and a data set's name to a result.
        options: What else decides a result.
        split: The split that was asked for, for the records.
        dtype: The dtype to compute in.
        device: See `load_model`.
        optimize: Whether to optimize models for inference, see `HfClipModel.optimize_for_inference`.
        plots: Whether to draw pictures.
        say: Takes a line for each cell that is skipped or fails.
        needs_model: Whether models are loaded. Otherwise `measure` gets None in their place.
        load: A function from a model's name to the model and its processor. None: `load_model`.
        resume: Whether cells that are there already are skipped.

    Returns:
        The records, and what failed.

    Raises:
        FolderInUseError: Another program writes into the folder.
    """
    output, processes, outcome = Path(os.path.expanduser(output)), current(), Outcome()
    with processes.together("all cells"), _held(output, processes):
        cells = cells_of(
            task,
            models,
            datasets,
            output,
            options | {"split": split, "dtype": dtype, "optimize": optimize or None},
            are_read=needs_model,
        )
        for name in dict.fromkeys(cell.model for cell in cells):
            loaded = None if needs_model else (None, None)
            for cell in (cell for cell in cells if cell.model == name):
                what = f"{cell.model} on {cell.dataset}"
                if (record := processes.of_main(_finished(cell) if resume else None, what)) is not None:
                    outcome.skipped += 1
                    outcome.records.append(record)
                    say(f"{cell.model} on {cell.dataset}: measured before, {cell.path}")
                    continue
                try:
                    with processes.together(what):
                        if loaded is None and load is not None:
                            loaded = load(name)
                        elif loaded is None:
                            loaded = load_model(name, dtype, device)
                            if optimize:
                                say(f"{name}: {_optimized(loaded[0])}")
                        result = measure(*loaded, cell.dataset)
                        record = _keep(result, cell, task, split, loaded[0], plots, say) if processes.is_main else None
                    outcome.records.append(processes.of_main(record, "a record"))
                except EXPECTED as error:
                    outcome.failures.append(f"{cell.model} on {cell.dataset}: {one_line(error)}")
                    say(f"error: {outcome.failures[-1]}")
            del loaded
            gc.collect()
        if outcome.records and processes.is_main:
            write_results(output, say)
    return outcome


def _optimized(model: Any) -> str:
    """Optimize a model in place if it can be, and say in words what was done."""
    if not hasattr(model, "optimize_for_inference"):
        return f"not optimized, since {type(model).__name__} has no optimize_for_inference"
    return f"optimized: {'; '.join(optimize_and_remember(model))}"


@contextmanager
def _held(output: Path, processes: Processes) -> Iterator[None]:
    """Let the main process hold the folder of the results within a `with` block."""
    if not processes.is_main:
        yield
        return
    output.mkdir(parents=True, exist_ok=True)
    with held_folder(output.resolve()):
        yield


def _keep(
    result: Any, cell: Cell, task: str, split: str | None, model: Any, plots: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    """Write what belongs to a cell; the record comes last, since it says that the cell is finished."""
    record = record_of(
        result,
        task=task,
        model=cell.model,
        dataset=cell.dataset,
        split=split,
        architecture=result.architecture if model is None else architecture_of(model.config),
    )
    if isinstance(result, (ZeroShotResult, LinearProbeResult)):
        folder = cell.path.with_suffix("")
        if result.per_class:
            write_text(folder / "per_class.csv", per_class_csv(result))
        if plots:
            for picture in draw(result, f"{Path(cell.model).name} on {Path(cell.dataset).name}", folder):
                say(f"picture: {picture}")
    if plots and len(widths := getattr(result, "widths", {})) > 1:
        from .plots import plot_widths

        picture = cell.path.with_suffix("") / "widths.png"
        values = {width: figures[result.metric] for width, figures in widths.items()}
        title = f"{Path(cell.model).name} on {Path(cell.dataset).name}"
        plot_widths(values, result.metric, title, picture)
        say(f"picture: {picture}")
    record[IDENTITY] = cell.identity
    write_json(cell.path, record)
    return record


def per_class_csv(result: ZeroShotResult | LinearProbeResult) -> str:
    """Write the figures of each class as CSV, in the classes' order."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["class", "images", "recall", "precision", "most often taken for"])
    for row in result.per_class:
        writer.writerow([row.name, row.images, f"{row.recall:.4f}", f"{row.precision:.4f}", row.taken_for])
    return buffer.getvalue()


def draw(result: ZeroShotResult | LinearProbeResult, title: str, folder: Path) -> Iterator[Path]:
    """Draw the pictures of a result into a folder, and yield their paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from .plots import plot_confusion, plot_mistakes, plot_reliability

    if isinstance(result, LinearProbeResult):
        title += f"\nlinear probe, {result.protocol_name}"
    if result.reliability is not None:
        plot_reliability(result.reliability, result.metrics["ece"], title, folder / "reliability.png")
        yield folder / "reliability.png"
    if result.confusion is not None:
        plot_confusion(result.confusion, result.labels, title, folder / "confusion.png")
        yield folder / "confusion.png"
    if isinstance(result, ZeroShotResult) and result.mistakes:
        plot_mistakes(result.mistakes, f"{title}: the most confident mistakes", folder / "mistakes.png", result.places)
        yield folder / "mistakes.png"


def write_results(output: Path, say: Callable[[str], None] = lambda line: None) -> list[dict[str, Any]]:
    """Write results.json and results.md out of the records of all cells in a folder, and return the records.

    A file that holds no record is left out, which `say` is told.
    """
    found = []
    for path in sorted((output / "cells").glob("*.json")):
        record = _record_in(path)
        if record is None:
            say(f"left out of the results: {path} holds no record of a measurement; remove it.")
            continue
        found.append({name: value for name, value in record.items() if name != IDENTITY})
    write_json(output / "results.json", found)
    write_text(output / "results.md", markdown_report(found))
    return found
