"""Zero-shot classification of a data set: accuracy as the papers report it, with what it was measured by.

Dimensions: I images, K classes, D embedding.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data.images import NOWHERE, ImagePlaces
from ..zero_shot.features import truncated
from ..zero_shot.progress import progress_bar
from .class_metrics import (
    Reliability,
    best_wrong_first,
    confusion_matrix,
    expected_calibration_error,
    reliability,
    roc_auc,
)
from .embedder import Embedder, Unreadable
from .feature_cache import FeatureCache, processor_settings
from .labelled_images import LabelledImages, open_labelled
from .metrics import mean_average_precision, mean_per_class_accuracy, top_k_accuracy
from .prompts_of_classes import ClassPrompts, class_matrices, class_prompts
from .widths import embedding_dim, read_widths, widths_in_words

METRICS = {
    "acc1": "the class has the highest logit",
    "acc5": "the class is among the five highest",
    "mean_per_class_recall": "acc1 of each class, averaged",
    "mean_of_acc1_and_acc5": "(acc1 + acc5) / 2",
    "roc_auc": "area under the ROC curve of the second of two classes",
    "mean_average_precision": "of several classes to an image",
    "mean_average_precision_11": "the same, at eleven levels of recall, as for VOC 2007",
    "ece": "expected calibration error: distance of confidence and accuracy; lower is better",
}
"""All metrics of this task, as fractions from 0 to 1. Which of them there are depends on the data."""

BINS = 15


@dataclass(frozen=True)
class Mistake:
    """An image that is taken for another class.

    Attributes:
        confidence: The confidence in the wrong class.
        name: Name of the row.
        label: The image's class.
        predicted: The class that it is taken for.
        image: The image as the row holds it.
    """

    confidence: float
    name: str
    label: str
    predicted: str
    image: Any


@dataclass(frozen=True)
class ClassFigures:
    """Figures of one class.

    Attributes:
        name: The class.
        images: Number of its images.
        recall: The fraction of its images that is taken for it.
        precision: The fraction of what is taken for it that is of it.
        taken_for: The class that its images are most often taken for wrongly. Empty if they never are.
    """

    name: str
    images: int
    recall: float
    precision: float
    taken_for: str


@dataclass
class ZeroShotResult:
    """What zero-shot classification of a data set gave.

    Attributes:
        metrics: Those of `METRICS` that there are, as fractions from 0 to 1.
        metric: The one that the data set is reported by.
        count: Number of images.
        unreadable: Images that cannot be opened, which are left out, each with its reason.
        labels: The K classes.
        per_class: Figures of each class; empty if an image may have several.
        confusion: (K, K) int64; row i, column j: images of class i taken for class j. None as above.
        reliability: Confidence and accuracy by bins. None as above.
        mistakes: The most confident mistakes, the worst first.
        places: Where the paths of their images may lead.
        widths: With `truncate_dim`: the metrics of each width that was asked for. All else is of the first of them.
        embedding_dim: D of the model.
        protocol: How it was measured, in words.
        precision: The dtype that the model computed in.
        split: The data set's split.
        processor: The image processor's settings.
    """

    metrics: dict[str, float]
    metric: str
    count: int
    labels: list[str]
    protocol: str
    precision: str
    processor: dict[str, Any]
    split: str = ""
    unreadable: list[str] = field(default_factory=list)
    per_class: list[ClassFigures] = field(default_factory=list)
    confusion: Tensor | None = None
    reliability: Reliability | None = None
    mistakes: list[Mistake] = field(default_factory=list)
    places: ImagePlaces = NOWHERE
    widths: dict[int, dict[str, float]] = field(default_factory=dict)
    embedding_dim: int | None = None

    @property
    def value(self) -> float:
        """The metric that the data set is reported by."""
        return self.metrics[self.metric]


def check_metric(metric: str | None, available: dict[str, float]) -> str | None:
    """Return a metric's name if there is such a metric. Raises ValueError otherwise."""
    if metric is not None and metric not in available:
        known = "this task does not have" if metric not in METRICS else "these data cannot be measured by"
        raise ValueError(f"The metric {metric!r} is one that {known}: there are {', '.join(available)}.")
    return metric


def _scores(model: Any, cosines: Tensor, scores: str) -> tuple[Tensor, Tensor]:
    """Return logits and probabilities (I, K)."""
    logits = cosines * float(model.logit_scale.detach().float().exp())
    if scores == "softmax":
        return logits, logits.softmax(-1)
    bias = getattr(model, "logit_bias", None)
    return logits, (logits + (0.0 if bias is None else float(bias.detach()))).sigmoid()


def _scores_of(model: Any) -> str:
    """Return what the model was trained by: "softmax" or "sigmoid"."""
    if "siglip" in str(model.config.model_type):
        return "sigmoid"
    return getattr(model.config, "contrastive_loss", "softmax")


class _Mistakes:
    """The most confident mistakes of those that are seen."""

    def __init__(self, most: int, labels: list[str]):
        self.most, self.labels, self.number = most, labels, 0
        self.heap: list[tuple[float, int, Mistake]] = []

    def look(self, rows: list[Any], probabilities: Tensor) -> None:
        if self.most == 0:
            return
        confidences, places = probabilities.max(dim=-1)
        for row, confidence, place in zip(rows, confidences.tolist(), places.tolist(), strict=True):
            if place in row.labels or not row.labels:
                continue
            self.number -= 1  # among equal ones the first stays
            names = self.labels[row.labels[0]], self.labels[place]
            entry = (confidence, self.number, Mistake(confidence, row.name, *names, row.image))
            (heapq.heappush if len(self.heap) < self.most else heapq.heappushpop)(self.heap, entry)

    def worst_first(self) -> list[Mistake]:
        return [mistake for _, _, mistake in sorted(self.heap, key=lambda entry: entry[:2], reverse=True)]


def accuracies(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Compute top-1 and top-5 accuracy, those of them that can be below 1 with so many classes.

    Args:
        logits: (I, K), higher for a more likely class.
        labels: (I,) class ids, integers from 0 to K - 1.

    Returns:
        `acc1` and `acc5`, from 0 to 1. Empty for a single class.

    Raises:
        ValueError: The shapes do not fit, a label is out of range, or logits are NaN.
    """
    ks = [k for k in (1, 5) if k < logits.shape[1]]
    return {f"acc{k}": value for k, value in top_k_accuracy(logits, labels, ks).items()} if ks else {}


def label_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Compute how well images are told apart that have one class each.

    Args:
        logits: (I, K), higher for a more likely class.
        labels: (I,) class ids, integers from 0 to K - 1.

    Returns:
        `acc1` and `acc5` as of `accuracies`, `mean_per_class_recall`, and `roc_auc` of two classes that both occur.
    """
    found = accuracies(logits, labels)
    found["mean_per_class_recall"] = mean_per_class_accuracy(logits, labels)
    if logits.shape[1] == 2 and 0 < int(labels.sum()) < len(labels):
        found["roc_auc"] = roc_auc(logits[:, 1] - logits[:, 0], labels == 1)
    return found


def single_label_figures(
    logits: Tensor, probabilities: Tensor, labels: Tensor, names: list[str], bins: int = BINS
) -> dict[str, Any]:
    """Compute all figures of data with one class to an image, as fields of a result.

    Args:
        logits: (I, K).
        probabilities: (I, K).
        labels: (I,) places of the classes.
        names: The K classes.
        bins: Number of bins of the calibration error.
    """
    found = label_metrics(logits, labels)
    if "acc5" in found:
        found["mean_of_acc1_and_acc5"] = (found["acc1"] + found["acc5"]) / 2
    predictions = best_wrong_first(logits, labels)
    confidences, is_right = probabilities.gather(1, predictions[:, None])[:, 0], predictions == labels
    found["ece"] = expected_calibration_error(confidences, is_right, bins)
    confusion = confusion_matrix(labels, predictions, len(names))
    return {
        "metrics": found,
        "confusion": confusion,
        "per_class": per_class_figures(confusion, names),
        "reliability": reliability(confidences, is_right, bins),
    }


def per_class_figures(confusion: Tensor, names: list[str]) -> list[ClassFigures]:
    """Compute recall and precision of each class that has images, out of a confusion matrix (K, K)."""
    wrong = confusion.clone().fill_diagonal_(0)
    figures = []
    for place, name in enumerate(names):
        count, taken = int(confusion[place].sum()), int(confusion[:, place].sum())
        right, other = int(confusion[place, place]), int(wrong[place].argmax())
        taken_for = names[other] if wrong[place, other] else ""
        figures.append(ClassFigures(name, count, right / max(count, 1), right / max(taken, 1), taken_for))
    return [row for row in figures if row.images]


def _is_right(rows: list[tuple[int, ...]], classes: int) -> Tensor:
    """Return (I, K) bool of each row's classes."""
    found = torch.zeros(len(rows), classes, dtype=torch.bool)
    for place, labels in enumerate(rows):
        found[place, list(labels)] = True
    return found


def multi_label_figures(logits: Tensor, is_right: Tensor) -> dict[str, float]:
    """Compute the metrics of data with several classes to an image.   logits: (I, K)   is_right: (I, K) bool"""
    occurs = is_right.any(0)  # a class that no image has has no precision
    if not occurs.any():
        raise ValueError("No image has a label, so there is nothing to measure; check the column of labels.")
    columns = logits[:, occurs], is_right[:, occurs]
    return {
        "mean_average_precision": mean_average_precision(*columns),
        "mean_average_precision_11": mean_average_precision(*columns, eleven_point=True),
    }


@dataclass
class _Compared:
    """Images of a data set, compared with its classes.

    Attributes:
        data: The data set.
        labels: The classes of each of the I images.
        cosines: For each width the cosine similarities, in parts (B, K) that are (I, K) together.
        mistakes: The most confident ones.
        unreadable: Images that cannot be opened, each with its reason.
    """

    data: LabelledImages
    labels: list[tuple[int, ...]]
    cosines: list[list[Tensor]]
    mistakes: _Mistakes
    unreadable: list[str]


def _compare(
    embedder: Embedder,
    data: LabelledImages,
    prompts: ClassPrompts,
    widths: list[int | None],
    cache: FeatureCache | None,
    progress: bool,
    mistakes: _Mistakes,
) -> _Compared:
    """Encode the images of a data set, and compare them with its classes at each width."""
    scores, unreadable = _scores_of(embedder.model), Unreadable(data.name, data.count)
    labels: list[tuple[int, ...]] = []
    parts: list[list[Tensor]] = [[] for _ in widths]
    with embedder.evaluating(), progress_bar(f"Zero-shot on {data.name}", "image", data.count, progress) as update:
        weights = class_matrices(embedder, prompts, widths)
        for rows, features in embedder.images(data.rows(), places=data.places, unreadable=unreadable, cache=cache):
            for found, width, matrix in zip(parts, widths, weights, strict=True):
                found.append(truncated(features, width) @ matrix)
            mistakes.look(rows, _scores(embedder.model, parts[0][-1], scores)[1])
            labels += [row.labels for row in rows]
            update(len(rows))
    if not labels:
        raise ValueError(f"{data.name} has no rows in its split {data.split!r}.")
    return _Compared(data, labels, parts, mistakes, unreadable.reasons)


def _figures(compared: _Compared, number: int, model: Any, bins: int) -> dict[str, Any]:
    """Compute the figures of the width at a place, as fields of a result."""
    data, labels = compared.data, compared.labels
    logits, probabilities = _scores(model, torch.cat(compared.cosines[number]), _scores_of(model))
    if data.is_multi_label:
        return {"metrics": multi_label_figures(logits, _is_right(labels, len(data.labels)))}
    firsts = torch.tensor([first for (first,) in labels])
    return single_label_figures(logits, probabilities, firsts, data.labels, bins)


def evaluate_zero_shot(
    model: Any,
    processor: Any,
    dataset: Any,
    *,
    split: str | None = None,
    class_names: Any = None,
    templates: Any = None,
    metric: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    batch_size: int = 32,
    bins: int = BINS,
    mistakes: int = 0,
    feature_cache: Any = None,
    threads: int | None = None,
    progress: bool = False,
    truncate_dim: int | Sequence[int] | None = None,
) -> ZeroShotResult:
    """Measure zero-shot classification of a data set.

    Args:
        model: A model of the CLIP family: ours, or transformers' CLIP or SigLIP.
        processor: Its processor.
        dataset: A folder of class folders, or whatever else `open_labelled` takes.
        split: Name of the split. None: the only one, or `test`, or `validation`.
        class_names: Names of the classes. None: those that come with the data.
        templates: See `class_prompts`. None: those that come with the data, else "a photo of a {}."
        metric: The metric that the data set is reported by, one of `METRICS`. None: acc1, or mean_average_precision.
        image_column: The column of images. None: the only one that can be it.
        label_column: The column of labels. None: the only one that can be it.
        batch_size: Number of images encoded at once.
        bins: Number of bins of the calibration error.
        mistakes: Number of mistakes to keep, the most confident ones.
        feature_cache: Folder in which image features are kept. None: they are not kept.
        threads: Number of threads that open images. None: the number of processors.
        progress: Whether to show a progress bar.
        truncate_dim: How many of a feature's first numbers are compared; or several such widths, at each of which the
            model is measured. Images and prompts are encoded once. None: all numbers.

    Returns:
        The result.

    Raises:
        LabelError: A label is none of the classes. A ValueError; its `index` is the row's place.
        UnreadableImagesError: More than 1 % of the images cannot be opened. A ValueError.
        NotFiniteFeaturesError: The model gives NaN. A ValueError.
        ValueError: The split is empty, columns or class names are missing, the metric does not fit the data, or a
            width is not from 1 to D.

    Example::

        result = evaluate_zero_shot(model, processor, "flowers/", templates="a photo of a {}, a type of flower.")
        print(f"{result.value:.1%} of {result.count} images")
    """
    data: LabelledImages = open_labelled(
        dataset, split, class_names=class_names, image_column=image_column, label_column=label_column
    )
    embedder = Embedder(model, processor, batch_size=batch_size, threads=threads)
    prompts = class_prompts(data.class_names, templates, data.templates)
    scores, named = _scores_of(model), read_widths(truncate_dim, model)
    cache = embedder.cache_in(feature_cache, data.fingerprint)
    widths: list[int | None] = [*named] or [None]
    compared = _compare(embedder, data, prompts, widths, cache, progress, _Mistakes(mistakes, data.labels))
    fields, *others = (_figures(compared, number, model, bins) for number in range(len(compared.cosines)))
    chosen = check_metric(metric, fields["metrics"]) or next(iter(fields["metrics"]))
    return ZeroShotResult(
        **fields,
        metric=chosen,
        count=len(compared.labels),
        labels=data.labels,
        protocol=f"zero-shot, {len(data.labels)} classes, {prompts.described}; confidence by {scores}"
        + widths_in_words(named, model),
        precision=embedder.precision,
        split=data.split,
        processor=processor_settings(processor),
        unreadable=compared.unreadable,
        mistakes=compared.mistakes.worst_first(),
        places=data.places,
        widths={width: found["metrics"] for width, found in zip(named, [fields, *others], strict=False)},
        embedding_dim=embedding_dim(model),
    )
