"""What linear probes are fitted to: features and labels of a data set's splits.

Of each image there are two features, neither of them normalised:

- `pooled`, the image tower's output before the projection: of a ViT the class token after the last LayerNorm;
- `projected`, the embedding.

Both come out of one pass, so that all protocols work on the same encoded images. A ResNet has no `pooled` features:
its attention pool ends in the projection.

Dimensions: B batch, I images, K classes, W tower width, D embedding.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..model.checked_files import one_line

MOST_CLASSES = 1 << 15
"""Largest number of classes. The table of all pairs of this many takes 8 GiB."""


@dataclass(frozen=True)
class SplitFeatures:
    """Features and labels of a split.

    Attributes:
        projected: (I, D), float32.
        labels: (I,) places of the classes, int64; or (I, K) bool if an image may have several classes.
        pooled: (I, W), float32. None if there are none.
        name: The split's name.
    """

    projected: Tensor
    labels: Tensor
    pooled: Tensor | None = None
    name: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> "SplitFeatures":
        """Return some rows, by their places or by a mask."""
        pooled = None if self.pooled is None else self.pooled[rows]
        return SplitFeatures(self.projected[rows], self.labels[rows], pooled, self.name)

    def join(self, other: "SplitFeatures") -> "SplitFeatures":
        """Return the rows of both."""
        pooled = None
        if self.pooled is not None and other.pooled is not None:
            pooled = torch.cat([self.pooled, other.pooled])
        labels = torch.cat([self.labels, other.labels])
        return SplitFeatures(torch.cat([self.projected, other.projected]), labels, pooled, self.name)


@dataclass(frozen=True)
class ProbeFeatures:
    """Features and labels of all splits, and where they come from.

    Attributes:
        class_names: The K classes.
        train: What is fitted.
        test: What is measured.
        validation: What strengths of regularisation are chosen on. None if the data set has no such split.
        texts: (K, D) features of the classes' prompts, of any length. None if they were not encoded.
        prompts: How these prompts were made, in words.
        model: The model's name.
        dataset: The data set's name.
        architecture: One of OpenAI's architectures, or the model type. Empty if it isn't known.
        tower: "vit", "resnet", or empty if it isn't known.
        precision: The dtype that the model computed in.
        processor: The image processor's settings.
        unreadable: Images that cannot be opened, which are left out, each with its reason.
    """

    class_names: list[str]
    train: SplitFeatures
    test: SplitFeatures
    validation: SplitFeatures | None = None
    texts: Tensor | None = None
    prompts: str = ""
    model: str = ""
    dataset: str = "the features"
    architecture: str = ""
    tower: str = ""
    precision: str = "float32"
    processor: dict[str, Any] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)

    @property
    def is_multi_label(self) -> bool:
        """Whether an image may have several classes."""
        return self.train.labels.ndim == 2

    @property
    def splits(self) -> dict[str, SplitFeatures]:
        """The splits that there are: "train", "validation", "test"."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in found.items() if split is not None}


def check_features(features: ProbeFeatures) -> ProbeFeatures:
    """Return features that a probe can be fitted to.

    Raises:
        ValueError: The classes' names are no texts, or too many; a split is empty; shapes do not fit; a feature is not
            finite; a text's feature is zero; a label is out of range; or all images of train are of one class.
    """
    source, names = features.dataset, features.class_names
    classes = len(names)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < classes:
        raise ValueError(f"{source}: class_names must be a list of texts, each once, but are {one_line(names, 80)}.")
    if not features.is_multi_label and classes > MOST_CLASSES:
        raise ValueError(
            f"{source} has {classes:,} classes, but images of at most {MOST_CLASSES:,} are counted in a table of all "
            f"pairs of classes; leave out the classes that have no images."
        )
    for title, split in features.splits.items():
        if len(split.labels) == 0:
            raise ValueError(f"{source} has no images in its split {title!r}, but a linear probe needs some.")
        _check_split(source, title, split, features)
        if title == "train" and not features.is_multi_label and len(found := split.labels.unique()) < 2:
            raise ValueError(
                f"{source}: all images of its split 'train' are of one class, {names[int(found[0])]!r}: a linear probe "
                f"needs images of at least two."
            )
    if features.texts is not None:
        _check_texts(source, features.texts, classes, features.train.projected.shape[1])
    return features


def _check_texts(source: str, texts: Tensor, classes: int, width: int) -> None:
    if tuple(texts.shape) != (classes, width):
        raise ValueError(
            f"{source}: texts have shape {tuple(texts.shape)}, but ({classes}, {width}) is needed: a feature for each "
            f"class, as long as an image's."
        )
    if not (is_finite := texts.isfinite().all(1)).all():
        raise ValueError(
            f"{source}: row {int((~is_finite).int().argmax())} of texts holds NaN or infinity: look for the prompt, or "
            f"for the weights, that it comes from."
        )
    check_directions(source, "texts", texts)


def check_directions(source: str, title: str, features: Tensor) -> None:
    """Raise ValueError if a feature (N, D) is zero, and so cannot have length one."""
    if (is_zero := (features == 0).all(1)).any():
        raise ValueError(
            f"{source}: row {int(is_zero.int().argmax())} of {title} is zero, so it has no direction: look for what it "
            f"comes from, or leave it out."
        )


def _check_split(source: str, title: str, split: SplitFeatures, features: ProbeFeatures) -> None:
    like, classes = features.train, len(features.class_names)
    for name, tensor, first in (
        ("features", split.projected, like.projected),
        ("pooled features", split.pooled, like.pooled),
    ):
        if tensor is None and first is None:
            continue
        if tensor is None or first is None or tensor.ndim != 2 or tensor.shape[1:] != first.shape[1:]:
            shapes = [None if one is None else tuple(one.shape) for one in (tensor, first)]
            raise ValueError(
                f"{source}: {name} of {title!r} have shape {shapes[0]} and those of 'train' {shapes[1]}, but (images, "
                f"width) with one width is needed."
            )
        if tensor.shape[1] == 0:
            raise ValueError(f"{source}: {name} of {title!r} have width 0, but at least 1 is needed.")
        if len(tensor) != len(split.labels):
            raise ValueError(f"{source}: {title!r} has {len(tensor)} {name}, but {len(split.labels)} labels.")
        if not (is_finite := tensor.isfinite().all(1)).all():
            row = int((~is_finite).int().argmax())
            raise ValueError(
                f"{source}: row {row} of {title!r} has {name} that hold NaN or infinity: look for the image, or for "
                f"the weights, that they come from."
            )
    if features.is_multi_label:
        if tuple(split.labels.shape[1:]) != (classes,) or split.labels.dtype != torch.bool:
            raise ValueError(
                f"{source}: labels of {title!r} are {split.labels.dtype} of shape {tuple(split.labels.shape)}, but "
                f"true or false for each of {classes} classes is needed."
            )
        return
    if split.labels.ndim != 1 or split.labels.dtype != torch.int64:
        raise ValueError(
            f"{source}: labels of {title!r} are {split.labels.dtype} of shape {tuple(split.labels.shape)}, but whole "
            f"numbers (images,) are needed."
        )
    is_wrong = (split.labels < 0) | (split.labels >= classes)
    if is_wrong.any():
        row = int(is_wrong.int().argmax())
        raise ValueError(
            f"{source}: row {row} of {title!r} has the label {int(split.labels[row])}, but there are {classes} "
            f"classes: a number from 0 to {classes - 1} is needed."
        )
