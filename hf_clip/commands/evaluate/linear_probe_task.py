"""`hf-clip evaluate linear-probe`."""

import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from ...model.checked_files import one_line
from ..program import Dtype
from .task_options import (
    BatchSize,
    Cache,
    ClassNames,
    Device,
    ImageColumn,
    LabelColumn,
    Metric,
    Output,
    Precision,
    Push,
    Split,
    Threads,
    UpdateCard,
    check_folder,
    check_task,
    expanded,
    run_task,
)


class ProtocolName(str, Enum):
    paper = "paper"
    openai = "openai"
    clip_benchmark = "clip_benchmark"


def read_shots(text: str | None) -> list[int]:
    """Read numbers of images of each class, such as "1,2,4,8,16"."""
    words = [word.strip() for word in (text or "").split(",") if word.strip()]
    is_read = all(re.fullmatch(r"0*[1-9][0-9]{0,17}", word) for word in words)
    if text is not None and not (words and is_read):
        raise ValueError(
            f"--few-shot is {one_line(repr(text), 80)}, but numbers of images of each class are needed, such as "
            f"1,2,4,8,16."
        )
    return [int(word) for word in words]


def check_unused(command: Callable[..., Any], **options: Any) -> None:
    """Raise ValueError for an option that has no effect with --features, if it is not the command's default."""
    parameters = inspect.signature(command).parameters
    for name, given in options.items():
        if given != parameters[name].default:
            raise ValueError(
                f"--features is what a model has made of a data set already: leave --{name.replace('_', '-')} out, "
                f"which has no effect on it."
            )


def check_sources(
    model: list[str], dataset: list[str], features: str | None, save_features: str | None, update_card: bool, push: bool
) -> None:
    """Raise ValueError unless there is either a file of features, or models and data sets."""
    if features is not None:
        for option, given in (("--model", model), ("--dataset", dataset), ("--save-features", save_features)):
            if given:
                raise ValueError(f"--features is what a model has made of a data set already: leave {option} out.")
        if push:
            raise ValueError("--push needs the model's repository: name it with --model, in place of --features.")
        if update_card:
            raise ValueError("--update-card needs the model's folder: name it with --model, in place of --features.")
        return
    for option, given in (("--model", model), ("--dataset", dataset)):
        if not given:
            raise ValueError(f"{option} is missing: name models and data sets, or a file of features by --features.")
    if save_features is not None and len(model) * len(dataset) > 1:
        raise ValueError(
            f"--save-features names one file, but there are {len(model)} models and {len(dataset)} data sets: name one "
            f"of each."
        )
    if save_features is not None and Path(save_features).exists():
        raise ValueError(f"{save_features} is there already: measure it by --features, or remove it.")
    if save_features is not None:
        check_folder(str(Path(save_features).absolute().parent))


def encode_data_set(
    loaded: Any, processor: Any, name: str, *, split: str | None, templates: str | None, **how: Any
) -> Any:
    """Encode the splits of a data set. One of the paper's comes with its own splits and templates."""
    from ...evaluation.paper_data_sets import resolve_data_set
    from ...evaluation.probe_encoding import encode_splits

    source, chosen, known = resolve_data_set(name, split)
    own = known.templates if known else None
    return encode_splits(loaded, processor, source, split=chosen, templates=templates or own, **how)


def save_encoded(
    path: str, encode: Callable[..., Any], model: str, dataset: str, dtype: str, device: str | None
) -> None:
    """Write the features that a model gives to a data set."""
    from ...evaluation.feature_file import write_features
    from ...evaluation.grid import load_model
    from ...evaluation.processes import current

    found = encode(*load_model(model, dtype, device), dataset)
    if current().is_main:
        write_features(path, replace(found, model=model, dataset=dataset))


def linear_probe(
    model: Annotated[
        list[str] | None,
        typer.Option(help="Folders or repositories: ours, or stock CLIP or SigLIP.", metavar="M [M ...]"),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            help="As in zero-shot, with at least two splits; a folder has train/ and test/, and perhaps val/.",
            metavar="D [D ...]",
        ),
    ] = None,
    protocol: Annotated[
        ProtocolName, typer.Option(help="How the probe is fitted: as the paper, its repository or CLIP_benchmark do.")
    ] = ProtocolName.paper,
    output: Output = "results",
    train_split: Annotated[str, typer.Option(help="Split to fit to.")] = "train",
    validation_split: Annotated[
        str | None, typer.Option(help="Split to choose the regularisation on. Default: validation, if there is one.")
    ] = None,
    split: Split = None,
    validation_part: Annotated[
        float | None,
        typer.Option(help="Part of train to hold out where there is no validation split. Default: paper 0.2, else 0."),
    ] = None,
    few_shot: Annotated[
        str | None, typer.Option(help="Images of each class for few-shot probes: 1,2,4,8,16.", metavar="K[,K...]")
    ] = None,
    few_shot_draws: Annotated[int, typer.Option(help="Draws of these images, for mean and standard deviation.")] = 5,
    lp_plus_plus: Annotated[
        bool, typer.Option("--lp-plus-plus", help="Fit LP++ (arXiv:2404.02285) to the same few images.")
    ] = False,
    templates: Annotated[str | None, typer.Option(help="Templates of the classes' prompts, for LP++.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of what is held out, of AdamW, and of the first draw.")] = 0,
    class_names: ClassNames = None,
    metric: Metric = None,
    features: Annotated[
        str | None, typer.Option(help="Features in place of models and data sets, see the guide.", metavar="FILE")
    ] = None,
    save_features: Annotated[
        str | None, typer.Option(help="Write the features, for --features.", metavar="FILE", callback=expanded)
    ] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    batch_size: BatchSize = 32,
    no_plots: Annotated[bool, typer.Option("--no-plots", help="Draw no pictures.")] = False,
    feature_cache: Cache = None,
    dtype: Precision = Dtype.float32,
    device: Device = None,
    threads: Threads = None,
    update_card: UpdateCard = False,
    push: Push = False,
) -> None:
    """Fit a linear classifier to frozen features and measure it: all metrics of zero-shot, by a named protocol.

    Examples:

        hf-clip evaluate linear-probe --model clip-vit-b32/ --dataset flowers/ --protocol paper

        hf-clip evaluate linear-probe --model clip-vit-b32/ --dataset flowers/ --few-shot 1,2,4,8,16 --lp-plus-plus

        hf-clip evaluate linear-probe --features features.safetensors --protocol openai
    """
    from ...evaluation.feature_file import read_features
    from ...evaluation.linear_probe import probe_features
    from ...evaluation.paper_data_sets import find_paper_data_set
    from ...evaluation.probe_protocols import find_protocol
    from ...evaluation.processes import current

    models, datasets, shots = model or [], dataset or [], read_shots(few_shot)
    check_sources(models, datasets, features, save_features, update_card, push)
    find_protocol(protocol.value, seed=seed)
    of_data: dict[str, Any] = {"train_split": train_split, "validation_split": validation_split, "split": split}
    of_data |= {"class_names": class_names, "templates": templates}
    of_data |= {"image_column": image_column, "label_column": label_column}
    of_encoding: dict[str, Any] = {"batch_size": batch_size, "feature_cache": feature_cache}
    if features is not None:
        check_unused(linear_probe, **of_data, **of_encoding, dtype=dtype, threads=threads)
    progress = sys.stderr.isatty()

    def encode(loaded: Any, processor: Any, name: str) -> Any:
        how = of_encoding | {"threads": threads, "progress": progress, "with_texts": lp_plus_plus}
        return encode_data_set(loaded, processor, name, **of_data, **how)

    if save_features is not None:
        with current().together("encoding"):
            check_task("linear-probe", models, output, metric=metric, update_card=update_card, push=push)
            save_encoded(save_features, encode, models[0], datasets[0], dtype.value, device)
        features = save_features
    given = None if features is None else read_features(features)
    if given is not None:
        models, datasets = [given.model or str(features)], [given.dataset]

    def measure(loaded: Any, processor: Any, name: str) -> Any:
        known = find_paper_data_set(name)
        return probe_features(
            encode(loaded, processor, name) if given is None else given,
            protocol=protocol.value,
            metric=metric or (known.metric if known else None),
            validation_part=validation_part,
            few_shot=shots,
            draws=few_shot_draws,
            lp_plus_plus=lp_plus_plus,
            seed=seed,
            device=(device or "cpu") if loaded is None else str(loaded.device),
            progress=progress,
        )

    options = of_data | {"protocol": protocol.value, "features": features, "metric": metric, "seed": seed}
    options |= {"validation_part": validation_part, "few_shot": few_shot, "few_shot_draws": few_shot_draws}
    options |= {"lp_plus_plus": lp_plus_plus}
    run_task(
        "linear-probe",
        models,
        datasets,
        output,
        measure,
        options,
        split=split,
        dtype=dtype,
        device=device,
        update_card=update_card,
        push=push,
        plots=not no_plots,
        needs_model=given is None,
    )
