"""Heads on frozen image embeddings: trained on one split, measured on another that they have not seen.

`head_fits` says how the layers are found.

Dimensions: I images, D embedding, K labels.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..extras import require
from ..zero_shot.embedding_head import EmbeddingHead, reference_image
from ..zero_shot.progress import progress_bar
from .correlation import mean_absolute_error, pearson, spearman
from .embedder import Embedder, Unreadable
from .feature_cache import processor_settings
from .head_fits import HELD_OUT, check_enough, check_options, divide, fit_labels, fit_scores
from .labelled_images import LabelledImages, open_labelled
from .scored_images import ScoredImages, open_scored
from .zero_shot import label_metrics


@dataclass
class HeadResult:
    """What training and measuring a head gave.

    Attributes:
        head: The head.
        metrics: On the held-out split. Of scores `spearman`, `pearson` and `mean_absolute_error`; of labels `acc1`,
            `acc5`, `mean_per_class_recall`, and `roc_auc` of two classes.
        count: Number of held-out images.
        trained_on: Number of images that the head was trained on.
        protocol: How it was trained and measured, in words.
        precision: The dtype that the model computed in.
        processor: The image processor's settings.
        split: The held-out split.
        unreadable: Images that cannot be opened, which are left out, each with its reason.
        metric: The one that the head is reported by.
    """

    head: EmbeddingHead
    metrics: dict[str, float]
    count: int
    trained_on: int
    protocol: str
    precision: str
    processor: dict[str, Any]
    split: str = ""
    unreadable: list[str] = field(default_factory=list)
    metric: str = "spearman"

    @property
    def value(self) -> float:
        """The metric that the head is reported by."""
        return self.metrics[self.metric]


@dataclass
class _Encoded:
    """Images of a split.   features: (I, D)   targets: (I,) scores or places of labels"""

    features: Tensor
    targets: Tensor
    split: str
    unreadable: list[str]

    def rows(self, chosen: np.ndarray) -> "_Encoded":
        return _Encoded(self.features[chosen], self.targets[chosen], self.split, self.unreadable)


def _open(dataset: Any, split: str | None, columns: dict[str, Any], is_labels: bool, class_names: Any) -> Any:
    if not is_labels:
        return open_scored(dataset, split, score_column=columns["score_column"], image_column=columns["image_column"])
    found = open_labelled(
        dataset,
        split,
        class_names=class_names,
        label_column=columns["label_column"],
        image_column=columns["image_column"],
    )
    if found.is_multi_label:
        raise ValueError(f"{found.name} may give an image several labels, but a head for one label is trained.")
    return found


def _open_both(
    dataset: Any, train_split: str, split: str | None, columns: dict[str, Any], is_labels: bool, class_names: Any
) -> tuple[Any, Any]:
    """Open the split to train on and the one to measure on: the same object twice if they are one."""
    held_out = _open(dataset, split, columns, is_labels, class_names)
    is_one = not held_out.split or held_out.split == train_split
    train = held_out if is_one else _open(dataset, train_split, columns, is_labels, class_names)
    if train.split == held_out.split:  # a split may have several names, such as val
        train = held_out
    if is_labels:
        _check_labels(train, held_out)
    return train, held_out


def _encode(embedder: Embedder, data: LabelledImages | ScoredImages, feature_cache: Any, progress: bool) -> _Encoded:
    unreadable = Unreadable(data.name, data.count)
    cache = embedder.cache_in(feature_cache, data.fingerprint)
    parts: list[Tensor] = []
    targets: list[float | int] = []
    with progress_bar(f"Embedding {data.name}, {data.split}", "image", data.count, progress) as update:
        for rows, features in embedder.images(data.rows(), places=data.places, unreadable=unreadable, cache=cache):
            parts.append(features)
            targets += [row.score if isinstance(data, ScoredImages) else row.labels[0] for row in rows]
            update(len(rows))
    if not parts:
        raise ValueError(f"{data.name} has no rows in its split {data.split!r}.")
    kind = torch.float64 if isinstance(data, ScoredImages) else torch.int64
    return _Encoded(torch.cat(parts), torch.tensor(targets, dtype=kind), data.split, unreadable.reasons)


def _divided(images: _Encoded, is_labels: bool, hidden: int | None, seed: int) -> tuple[_Encoded, _Encoded]:
    """Divide images into those to train on, and a fifth to measure on."""
    part = math.ceil(HELD_OUT * len(images.targets))
    check_enough(len(images.targets) - part, hidden, part)
    kept, rest = divide(images.targets, is_labels, seed)
    return images.rows(kept), images.rows(rest)


def _measure(head: EmbeddingHead, held_out: _Encoded) -> dict[str, float]:
    outputs, targets = head.outputs(held_out.features), held_out.targets
    if head.kind == "scores":
        if len(targets) < 2 or targets.max() == targets.min():
            raise ValueError(
                f"All {len(targets)} held-out images have one score, so nothing can be measured: check the split "
                f"{held_out.split!r}."
            )
        predicted = outputs[:, 0]
        return {
            "spearman": spearman(predicted, targets),
            "pearson": pearson(predicted, targets),
            "mean_absolute_error": mean_absolute_error(predicted, targets),
        }
    return label_metrics(outputs, targets)


def _check_labels(train: LabelledImages, held_out: LabelledImages) -> None:
    if train.labels != held_out.labels:
        differing = sorted({*train.labels} ^ {*held_out.labels}) or train.labels
        raise ValueError(
            f"The splits {train.split!r} and {held_out.split!r} of {train.name} have different classes: "
            f"{differing[0]!r} is not in both, or not at one place. Pass class names, with --class-names."
        )


def evaluate_head(
    model: Any,
    processor: Any,
    dataset: Any,
    *,
    score_column: str | None = None,
    label_column: str | None = None,
    hidden: int | None = None,
    train_split: str = "train",
    split: str | None = None,
    class_names: Any = None,
    image_column: str | None = None,
    seed: int = 0,
    batch_size: int = 32,
    feature_cache: Any = None,
    threads: int | None = None,
    progress: bool = False,
) -> HeadResult:
    """Train a head on a model's image embeddings, and measure it on images that it has not seen.

    The model stays as it is. Where the two splits are the same one, a fifth of its images is held out at random.

    Args:
        model: A model of the CLIP family: ours, or transformers' CLIP or SigLIP.
        processor: Its processor.
        dataset: Whatever `open_scored` takes, and for labels whatever `open_labelled` takes.
        score_column: The column of scores. None: the head is for labels.
        label_column: The column of labels. None: the only one that can be it.
        hidden: Width of a hidden layer. None: the head is linear.
        train_split: Name of the split to train on.
        split: Name of the split to measure on. None: the only one, or `test`, or `validation`.
        class_names: Names of the classes. None: those that come with the data.
        image_column: The column of images. None: the only one that can be it.
        seed: Of all that is random, from 0 to 2³² - 1.
        batch_size: Number of images encoded at once.
        feature_cache: Folder in which image features are kept. None: they are not kept.
        threads: Number of threads that open images. None: the number of processors.
        progress: Whether to show a progress bar.

    Returns:
        The result, whose `head.save` writes the head.

    Raises:
        ScoreError: A score is no finite number. A ValueError; its `index` is the row's place.
        LabelError: A label is none of the classes. A ValueError; its `index` is the row's place.
        UnreadableImagesError: More than 1 % of the images cannot be opened. A ValueError.
        ValueError: A split or a column is missing, all scores or labels are the same, or there are too few images.

    Example::

        result = evaluate_head(model, processor, "photos.csv", score_column="aesthetic")
        print(result.metrics["spearman"])
        result.head.save("clip-vit-b32/heads/aesthetic.safetensors")
    """
    require("Training a head", "eval", ["sklearn"])
    if score_column is not None and (label_column is not None or class_names is not None):
        raise ValueError("A head is trained on scores or on labels: name a column of scores, or labels, and not both.")
    check_options(hidden, seed)
    is_labels = score_column is None
    columns = {"score_column": score_column, "label_column": label_column, "image_column": image_column}
    train_data, held_out_data = _open_both(dataset, train_split, split, columns, is_labels, class_names)
    is_one = train_data is held_out_data
    embedder = Embedder(model, processor, batch_size=batch_size, threads=threads)
    with embedder.evaluating():
        train = _encode(embedder, train_data, feature_cache, progress)
        if is_one:
            unreadable = train.unreadable
            train, held_out = _divided(train, is_labels, hidden, seed)
        else:
            held_out = _encode(embedder, held_out_data, feature_cache, progress)
            unreadable = train.unreadable + held_out.unreadable
        reference = embedder.encode(embedder.prepare(reference_image())[None])[0]
    labels = held_out_data.labels if is_labels else [str(score_column)]
    if is_labels:
        layers, described = fit_labels(train.features, train.targets, len(labels), hidden=hidden, seed=seed)
    else:
        layers, described = fit_scores(train.features, train.targets, hidden=hidden, seed=seed)
    head = EmbeddingHead("labels" if is_labels else "scores", labels, layers, reference)
    measured = "a fifth of it, held out at random" if is_one else f"the split {held_out.split}"
    kind = "linear" if hidden is None else "MLP"
    result = HeadResult(
        head=head,
        metrics=_measure(head, held_out),
        count=len(held_out.targets),
        trained_on=len(train.targets),
        protocol=f"{kind} head on normalised features, {described}; trained on {len(train.targets)} images "
        f"of {train.split or 'the data set'}, measured on {measured}",
        precision=embedder.precision,
        processor=processor_settings(processor),
        split=held_out.split,
        unreadable=unreadable,
        metric="acc1" if is_labels else "spearman",
    )
    head.facts = {"metrics": result.metrics, "protocol": result.protocol}
    return result
