"""The layers of a head on frozen embeddings, trained by scikit-learn.

- Scores, linear: ridge regression, whose λ leave-one-out validation chooses.
- Labels, linear: logistic regression, whose C a fifth of the training images chooses.
- Scores or labels, with a hidden layer: a ReLU network, trained by Adam until a tenth of the training images gets no
  better.

Scaling of features and scores becomes part of the layers.

Dimensions: I images, D embedding, K labels.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..zero_shot.embedding_head import Layer

HELD_OUT = 0.2
"""Part of the images that is held out where data have one split, and by which C is chosen."""

LAMBDAS = np.logspace(-4, 3, 15)
CS = np.logspace(-1, 4, 11)

TRAINING: dict[str, Any] = {"early_stopping": True, "n_iter_no_change": 50, "max_iter": 1000}
"""Of a hidden layer. The accuracy on a tenth of few images stands still for many epochs before it rises."""

NEVER = -1e4
"""Bias of a class without a training image: its probability is zero."""

FEWEST, FEWEST_HIDDEN = 10, 40
"""Training images without which there is no head."""

STOPPED_BY = 0.1
"""Part of the images by which the training of a hidden layer is stopped: scikit-learn's default."""

WIDEST = 65536
"""Units of a hidden layer. Of wider ones the weights alone would fill the memory of most computers."""

COARSEST = 1e-3
"""The distance of neighbouring float32 numbers of the scores' size, as a part of the scores' standard deviation."""

SMALLEST = 1e-30
"""Standard deviation of scores below which a layer's weights would lose digits in float32."""

SEEDS = 2**32
"""Seeds are below this: scikit-learn takes no others."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Within this block scikit-learn says nothing of a fit's largest number of steps, or of classes of few images."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes is greater than 50%", UserWarning)
        yield


def check_options(hidden: int | None, seed: int) -> None:
    """Raise ValueError for the width of a hidden layer, or a seed, that no head can be trained with."""
    if hidden is not None and hidden < 1:
        raise ValueError(f"The hidden layer has width {hidden}, but at least 1 is needed; leave it out for none.")
    if hidden is not None and hidden > WIDEST:
        raise ValueError(f"The hidden layer has width {hidden}, but {WIDEST} is the most; take a smaller one, or none.")
    if not 0 <= seed < SEEDS:
        raise ValueError(f"The seed is {seed}, but a whole number from 0 to {SEEDS - 1} is needed.")


def divide(targets: Tensor, is_labels: bool, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide images at random into four fifths and one, with each class in proportion where there are enough.

    Of labels the first part has two classes wherever the images have.
    """
    from sklearn.model_selection import train_test_split

    values = targets.numpy()
    classes, counts = np.unique(values, return_counts=True)
    can_be_even = is_labels and counts.min() >= 2 and len(classes) <= HELD_OUT * len(values)
    kept, held_out = train_test_split(
        np.arange(len(values)), test_size=HELD_OUT, random_state=seed, stratify=values if can_be_even else None
    )
    if is_labels and len(classes) > 1 and (values[kept] == values[kept[0]]).all():
        moved = held_out[values[held_out] != values[kept[0]]][0]
        kept, held_out = np.append(kept, moved), held_out[held_out != moved]
    return np.sort(kept), np.sort(held_out)


def fit_scores(
    features: Tensor, scores: Tensor, *, hidden: int | None = None, seed: int = 0
) -> tuple[list[Layer], str]:
    """Train the layers of a head for scores.

    Args:
        features: (I, D), of length one.
        scores: (I,) finite numbers.
        hidden: Width of a hidden layer. None: there is none.
        seed: Of the hidden layer's first weights and of the images it is stopped by.

    Returns:
        The layers, and how they were trained, in words.

    Raises:
        ValueError: There are too few images; or the scores are all the same, or too close to each other for their size.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.neural_network import MLPRegressor

    check_enough(len(scores), hidden)
    values = scores.double()
    mean, spread = _mean_and_spread(values)
    targets, inputs = ((values - mean) / spread).numpy(), features.double().numpy()
    if hidden is None:
        ridge = RidgeCV(LAMBDAS).fit(inputs, targets)
        layers = [_layer(ridge.coef_[None], np.array([ridge.intercept_]))]
        described = f"ridge regression, λ = {ridge.alpha_:.3g} by leave-one-out"
    else:
        scale = math.sqrt(features.shape[1])
        network = MLPRegressor(
            hidden_layer_sizes=(hidden,), **TRAINING, batch_size=_batch_size(len(inputs)), random_state=seed
        )
        with _quiet():
            network.fit(inputs * scale, targets)
        layers, described = _layers_of(network, scale), f"{hidden} hidden units, {network.n_iter_} epochs"
    weight, bias = layers[-1]
    layers[-1] = (weight * spread, bias * spread + mean)
    return layers, described


def fit_labels(
    features: Tensor, labels: Tensor, count: int, *, hidden: int | None = None, seed: int = 0
) -> tuple[list[Layer], str]:
    """Train the layers of a head for labels.

    Args:
        features: (I, D), of length one.
        labels: (I,) int64, from 0 to K - 1.
        count: The number K of labels. One without an image gets the probability zero.
        hidden: Width of a hidden layer. None: there is none.
        seed: Of the hidden layer's first weights, and of the images by which C is chosen or training is stopped.

    Returns:
        The layers, and how they were trained, in words.

    Raises:
        ValueError: There is only one class among the images, or there are too few images.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    check_enough(len(labels), hidden)
    present, counts = labels.unique(return_counts=True)
    if len(present) < 2:
        raise ValueError(
            f"All {len(labels)} training images are of one class, so there is nothing to tell apart: check the column "
            f"of labels and the split."
        )
    inputs, targets = features.double().numpy(), labels.numpy()
    if hidden is None:
        kept, chosen_by = divide(labels, is_labels=True, seed=seed)
        best = (-1.0, 0.0)
        with _quiet():
            for c in CS:
                tried = LogisticRegression(C=c, max_iter=1000).fit(inputs[kept], targets[kept])
                best = max(best, (tried.score(inputs[chosen_by], targets[chosen_by]), -c))
            fitted = LogisticRegression(C=-best[1], max_iter=1000).fit(inputs, targets)
        layers = [_layer(fitted.coef_, fitted.intercept_)]
        described = f"logistic regression, C = {-best[1]:.3g} by a fifth of the training images"
    else:
        if int(counts.min()) < 2:
            raise ValueError(
                f"The class {int(present[counts.argmin()])} has one training image, but a head with a hidden layer "
                f"needs two of each class. Leave --hidden out, or the class."
            )
        if math.ceil(STOPPED_BY * len(labels)) < len(present):
            raise ValueError(
                f"There are {len(labels)} training images of {len(present)} classes, but a head with a hidden layer "
                f"needs {round(1 / STOPPED_BY)} for each class, since a tenth of them ends its training: leave "
                f"--hidden out, or take more data."
            )
        scale = math.sqrt(features.shape[1])
        network = MLPClassifier(
            hidden_layer_sizes=(hidden,), **TRAINING, batch_size=_batch_size(len(inputs)), random_state=seed
        )
        with _quiet():
            network.fit(inputs * scale, targets)
        layers, described = _layers_of(network, scale), f"{hidden} hidden units, {network.n_iter_} epochs"
    layers[-1] = _spread_out(layers[-1], present, count)
    return layers, described


def _mean_and_spread(values: Tensor) -> tuple[float, float]:
    """Compute mean and standard deviation of scores (I,). Raises ValueError if float32 cannot tell them apart."""
    lowest, highest = float(values.min()), float(values.max())
    largest = max(-lowest, highest)
    if lowest == highest and largest < 2**53:  # larger whole numbers may differ in a file, and be one in float64
        raise ValueError(
            f"All {len(values)} training images have the score {lowest:g}, so there is nothing to learn: check the "
            f"column of scores."
        )
    mean, spread = float(values.mean()), float(values.std())
    if largest * torch.finfo(torch.float32).eps > COARSEST * spread:
        raise ValueError(
            f"The scores lie from {lowest:.10g} to {highest:.10g}, too close to each other for numbers of this size, "
            f"since a head computes in float32: subtract a number from all scores, such as {mean:.3g}."
        )
    if spread < SMALLEST:
        raise ValueError(
            f"The scores lie from {lowest:g} to {highest:g}, but a head computes in float32, which needs larger "
            f"numbers: multiply all scores by one number."
        )
    return mean, spread


def check_enough(count: int, hidden: int | None, held_out: int = 0) -> None:
    """Raise ValueError if there are too few images to train on, beside those that are held out."""
    fewest = FEWEST if hidden is None else FEWEST_HIDDEN
    if count < fewest:
        beside = f" beside the {held_out} held out" if held_out else ""
        layer = "" if hidden is None else " with a hidden layer"
        raise ValueError(
            f"There are {count} training images{beside}, but a head{layer} needs at least {fewest}: take another "
            f"split, or more data."
        )


def _batch_size(count: int) -> int:
    """Return scikit-learn's 200, or less of few images, so that an epoch has several steps."""
    return min(200, max(8, count // 20))


def _layer(weight: np.ndarray, bias: np.ndarray) -> Layer:
    return torch.from_numpy(np.array(weight, np.float32)), torch.from_numpy(np.array(bias, np.float32))


def _layers_of(network: Any, scale: float) -> list[Layer]:
    """Return scikit-learn's layers, of which the first takes features that are not scaled."""
    layers = [_layer(weight.T, bias) for weight, bias in zip(network.coefs_, network.intercepts_, strict=True)]
    return [(layers[0][0] * scale, layers[0][1]), *layers[1:]]


def _spread_out(layer: Layer, present: Tensor, count: int) -> Layer:
    """Give each of K labels an output, where the layer has those of the labels that are present. Of two it has one."""
    weight, bias = layer
    if len(weight) == 1:  # the logit of the second of two
        weight, bias = torch.cat([torch.zeros_like(weight), weight]), torch.cat([torch.zeros_like(bias), bias])
    whole = torch.zeros(count, weight.shape[1]), torch.full((count,), NEVER)
    whole[0][present], whole[1][present] = weight, bias
    return whole
