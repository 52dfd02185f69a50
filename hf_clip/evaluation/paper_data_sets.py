"""The 27 data sets that the paper measures on, with its metric for each and its figures, as a table.

Of 23 the Hub holds a copy, most of them in `clip-benchmark`'s layout with class names and templates. A copy may differ
in its classes, its templates or its split from what the paper used; figures are to be compared with that in mind.
"""

import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..hub.published_figures import DATA_SETS, LINEAR_PROBE, ZERO_SHOT
from .labelled_images import LabelledImages, open_labelled

SOURCE = "Radford et al. 2021, arXiv:2103.00020, tables 9 (metrics), 10 (linear probe) and 11 (zero-shot)"

METRICS = {
    "accuracy": "acc1",
    "mean per class": "mean_per_class_recall",
    "11-point mAP": "mean_average_precision_11",
    "mean of top-1 and top-5": "mean_of_acc1_and_acc5",
    "ROC AUC": "roc_auc",
}
"""The paper's metrics, and our names."""

REPOSITORIES = {
    "Food101": "ethz/food101",
    "CIFAR10": "clip-benchmark/wds_vtab-cifar10",
    "CIFAR100": "clip-benchmark/wds_vtab-cifar100",
    "SUN397": "clip-benchmark/wds_sun397",
    "StanfordCars": "clip-benchmark/wds_cars",
    "FGVCAircraft": "clip-benchmark/wds_fgvc_aircraft",
    "VOC2007": "clip-benchmark/wds_voc2007_multilabel",
    "DTD": "clip-benchmark/wds_vtab-dtd",
    "OxfordPets": "clip-benchmark/wds_vtab-pets",
    "Caltech101": "clip-benchmark/wds_vtab-caltech101",
    "Flowers102": "clip-benchmark/wds_vtab-flowers",
    "MNIST": "clip-benchmark/wds_mnist",
    "FER2013": "clip-benchmark/wds_fer2013",
    "STL10": "clip-benchmark/wds_stl10",
    "EuroSAT": "clip-benchmark/wds_vtab-eurosat",
    "RESISC45": "clip-benchmark/wds_vtab-resisc45",
    "GTSRB": "clip-benchmark/wds_gtsrb",
    "KITTI": "clip-benchmark/wds_vtab-kitti_closest_vehicle_distance",
    "Country211": "clip-benchmark/wds_country211",
    "PCam": "clip-benchmark/wds_vtab-pcam",
    "CLEVRCounts": "clip-benchmark/wds_vtab-clevr_count_all",
    "RenderedSST2": "clip-benchmark/wds_renderedsst2",
    "ImageNet": "clip-benchmark/wds_imagenet1k",
}
"""Copies on the Hub that are read as they are. The paper's other data sets have none."""

SPLITS = {"Food101": "validation"}
"""Splits to measure on, where it is not `test`."""

TEMPLATES = {
    "Food101": ("a photo of {}, a type of food.",),
    "Birdsnap": ("a photo of a {}, a type of bird.",),
    "OxfordPets": ("a photo of a {}, a type of pet.",),
    "FGVCAircraft": ("a photo of a {}, a type of aircraft.", "a photo of the {}, a type of aircraft."),
    "Flowers102": ("a photo of a {}, a type of flower.",),
    "Country211": (
        "a photo i took in {}.",
        "a photo i took while visiting {}.",
        "a photo from my home country of {}.",
        "a photo from my visit to {}.",
        "a photo showing the country of {}.",
    ),
    "MNIST": ('a photo of the number: "{}".',),
    "RenderedSST2": ("a {} review of a movie.",),
    "HatefulMemes": ("a {}.",),
}
"""OpenAI's templates, where the copy brings none."""


@dataclass(frozen=True)
class PaperDataSet:
    """A data set of the paper.

    Attributes:
        name: Its short name, which `--dataset` takes.
        title: Its name in the paper.
        metric: The metric that the paper reports, one of `hf_clip.evaluation.zero_shot.METRICS`.
        repository: A copy on the Hub. None if there is none that is read as it is.
        split: The split to measure on.
        templates: Templates, where the copy brings none.
        zero_shot: Model → the paper's zero-shot figure, in per cent.
        linear_probe: Model → the paper's linear probe, in per cent.
    """

    name: str
    title: str
    metric: str
    repository: str | None
    split: str
    templates: list[str] | None
    zero_shot: dict[str, float]
    linear_probe: dict[str, float]


def _figures(table: dict[str, dict[str, str]], column: str) -> dict[str, float]:
    return {model: float(cells[column]) for model, cells in table.items() if cells[column]}


@cache
def paper_data_sets() -> list[PaperDataSet]:
    """Return the 27 data sets, in the paper's order."""
    return [
        PaperDataSet(
            name=entry.column,
            title=entry.name,
            metric=METRICS[entry.metric],
            repository=REPOSITORIES.get(entry.column),
            split=SPLITS.get(entry.column, "test"),
            templates=list(TEMPLATES[entry.column]) if entry.column in TEMPLATES else None,
            zero_shot=_figures(ZERO_SHOT, entry.column),
            linear_probe=_figures(LINEAR_PROBE, entry.column),
        )
        for entry in DATA_SETS
    ]


def find_paper_data_set(source: str) -> PaperDataSet | None:
    """Find the data set that a name, a repository or a folder of a repository's name stands for.

    Returns None for any other data set.
    """
    last = Path(source).name.lower()
    for entry in paper_data_sets():
        names = [entry.name.lower(), *([entry.repository.lower()] if entry.repository else [])]
        if source.lower() in names or last == names[-1].rpartition("/")[2]:
            return entry
    return None


def resolve_data_set(source: str, split: str | None) -> tuple[str, str | None, PaperDataSet | None]:
    """Find what the name of a data set stands for.

    Args:
        source: A short name of the paper's table, or anything else.
        split: The split, if it is named.

    Returns:
        The repository, or `source` itself; the split; and the entry of the paper's table if there is one.

    Raises:
        ValueError: It is one of the paper's that the Hub has no copy of.
    """
    found = find_paper_data_set(source)
    if found is None or Path(os.path.expanduser(source)).exists() or "/" in source:
        return source, split, found
    if found.repository is None:
        raise ValueError(
            f"{source} is one of the paper's data sets, but the Hub has no copy that is read as it is: name your own "
            f"folder or files."
        )
    return found.repository, split or found.split, found


def open_named(source: str, split: str | None = None, **options: Any) -> tuple[LabelledImages, str | None]:
    """Open a data set of images with labels by its name, with the paper's templates where it brings none.

    Args:
        source: A short name of the paper's table, or whatever else `open_labelled` takes.
        split: The split. None: the paper's, or that of `open_labelled`.
        **options: Arguments of `open_labelled`.

    Returns:
        The data set, and the paper's metric for it. None for other data sets.

    Raises:
        FileNotFoundError: There is nothing of that name.
        ValueError: A split, a column or the class names are missing; or the split is empty.
    """
    found, chosen, known = resolve_data_set(source, split)
    data = open_labelled(found, chosen, **options)
    if known is None:
        return data, None
    return replace(data, templates=data.templates or known.templates), known.metric
