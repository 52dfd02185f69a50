"""Fit the scale, bias and thresholds that turn cosine similarities into scores, on images whose labels are known.

Dimensions: I images, K labels, U background labels, M = K + U columns.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Set
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .matrix import ClassifierMatrix
from .prompts import LabelError, as_plain

SMALLEST_SCALE, LARGEST_SCALE = 1e-2, 1e4


def _minimise(loss: Callable[[float], float], low: float, high: float, points: int = 65, steps: int = 40) -> float:
    """Find the minimum of a function in an interval: the best point of a grid, refined by golden-section search."""
    grid = torch.linspace(low, high, points, dtype=torch.float64).tolist()
    best = min(range(points), key=lambda place: loss(grid[place]))
    left, right = grid[max(best - 1, 0)], grid[min(best + 1, points - 1)]
    golden = (5**0.5 - 1) / 2
    inner = [right - golden * (right - left), left + golden * (right - left)]
    values = [loss(x) for x in inner]
    for _ in range(steps):
        if values[0] <= values[1]:
            right, inner[1], values[1] = inner[1], inner[0], values[0]
            inner[0] = right - golden * (right - left)
            values[0] = loss(inner[0])
        else:
            left, inner[0], values[0] = inner[0], inner[1], values[1]
            inner[1] = left + golden * (right - left)
            values[1] = loss(inner[1])
    return (left + right) / 2


def fit_softmax_scale(cosines: Tensor, is_right: Tensor) -> float:
    """Find the logit scale at which the true labels are most likely under a softmax (Guo et al. 2017).

    If every image were classified rightly, the best scale would be infinite. The rule of succession prevents this: the
    target probability of the true label is (I + 1) / (I + 2) and not 1.

    Args:
        cosines: (I, M).
        is_right: (I, M) bool. True at an image's label; for an image with none of the labels, true at all background
            labels.

    Returns:
        The logit scale, which is one over the temperature.
    """
    cosines, doubt = cosines.double(), 1 / (len(cosines) + 2)
    right = torch.where(is_right, 0.0, -torch.inf)

    def loss(log_scale: float) -> float:
        log_probabilities = (cosines * math.exp(log_scale)).log_softmax(-1)
        likely = (log_probabilities + right).logsumexp(-1)
        return -((1 - doubt) * likely + doubt * log_probabilities.mean(-1)).mean().item()

    return math.exp(_minimise(loss, math.log(SMALLEST_SCALE), math.log(LARGEST_SCALE)))


def fit_sigmoid(cosines: Tensor, is_right: Tensor) -> tuple[float, float]:
    """Find the logit scale and bias at which independent labels are most likely (Platt 1999, with his targets).

    Args:
        cosines: (I, K).
        is_right: (I, K) bool. True where an image has a label.

    Returns:
        The logit scale and the logit bias.
    """
    cosines = cosines.double()
    positives, negatives = is_right.sum().item(), (~is_right).sum().item()
    targets = torch.where(is_right, (positives + 1) / (positives + 2), 1 / (negatives + 2)).double()
    centre, spread = cosines.mean(), cosines.std().clamp(min=1e-6)  # standardised values suit the optimiser
    standard = (cosines - centre) / spread
    parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = standard * parameters[0] + parameters[1]
        loss = -(targets * logsigmoid(logits) + (1 - targets) * logsigmoid(-logits)).mean()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    slope, offset = parameters.detach()
    return float(slope / spread), float(offset - slope * centre / spread)


def fit_thresholds(scores: Tensor, is_right: Tensor) -> Tensor:
    """Find for each label the threshold at which its F1 on these images is highest.

    A threshold lies half-way between two images' scores. The threshold of a label that no image has lies above all
    scores.

    Args:
        scores: (I, K).
        is_right: (I, K) bool. True where an image has a label.

    Returns:
        The thresholds (K,), float32. A label is given from this score on.
    """
    ordered, places = scores.double().sort(dim=0, descending=True)
    hits = is_right.gather(0, places).cumsum(0)  # (I, K): number of right images among the first 1, 2, ...
    given = torch.arange(1, len(scores) + 1, device=scores.device)[:, None]
    f1 = 2 * hits / (given + is_right.sum(0))
    is_last_of_equals = torch.ones_like(f1, dtype=torch.bool)
    is_last_of_equals[:-1] = ordered[:-1] > ordered[1:]
    last = f1.where(is_last_of_equals, -1.0).argmax(dim=0)  # (K,)
    above = ordered.gather(0, last[None])[0]
    below = ordered.gather(0, (last + 1).clamp(max=len(scores) - 1)[None])[0]
    middle = ((above + below) / 2).float()
    thresholds = torch.where(middle > below.float(), middle, above.float())  # adjacent float32 have no middle
    beyond = torch.nextafter(ordered[0].float(), torch.tensor(torch.inf, device=scores.device))
    return torch.where(is_right.any(0), thresholds, beyond)


def _softmax_targets(is_right: Tensor, columns: int) -> Tensor:
    """Return `is_right` (I, K) with the background's columns, (I, M), for `fit_softmax_scale`.

    Raises LabelError for an image with several labels, and for one without any if there is no background.
    """
    if (several := is_right.sum(-1) > 1).any():
        index = int(several.int().argmax())
        raise LabelError(
            f"Image {index} has several labels, but a softmax shares one out among them; build the classifier "
            f'with scores="sigmoid".',
            index,
        )
    is_none = ~is_right.any(-1, keepdim=True)  # (I, 1)
    count = columns - is_right.shape[1]
    if is_none.any() and count == 0:
        index = int(is_none.int().argmax())
        raise LabelError(
            f"Image {index} has none of the labels, but there are no background labels for it; pass some to "
            f"ZeroShotClassifier, or leave the image out.",
            index,
        )
    return torch.cat([is_right, is_none.expand(-1, count)], dim=1)


def calibrate_(matrix: ClassifierMatrix, features: Tensor, is_right: Tensor) -> float:
    """Fit a classifier's scale, bias and thresholds on images whose labels are known.

    Args:
        matrix: The classifier, which is changed.
        features: (I, D) of any length.
        is_right: (I, K) bool. True where an image has a label.

    Returns:
        F1 over all pairs of an image and a label at the thresholds.

    Raises:
        LabelError: The labels of an image cannot be used with a softmax. A ValueError; its `index` is the image's
            place.
        ValueError: For a sigmoid, all pairs are right, or none is.
    """
    cosines = matrix.cosines(features)  # (I, M)
    if matrix.scores == "softmax":
        matrix.logit_scale = fit_softmax_scale(cosines, _softmax_targets(is_right, cosines.shape[1]))
    elif matrix.scores == "sigmoid":
        if is_right.all() or not is_right.any():
            raise ValueError(
                f"All {is_right.numel()} pairs of image and label are {'right' if is_right.any() else 'wrong'}; "
                f"to calibrate, images with and without a label are needed."
            )
        matrix.logit_scale, matrix.logit_bias = fit_sigmoid(cosines[:, : len(matrix.labels)], is_right)
    scores = matrix.score(features)[:, : len(matrix.labels)]
    matrix.thresholds = fit_thresholds(scores, is_right).cpu()
    given = scores >= matrix.thresholds.to(scores.device)
    return float(2 * (given & is_right).sum() / (given.sum() + is_right.sum()).clamp(min=1))


def read_known_labels(labels: Any, names: list[str]) -> Tensor:
    """Read the known labels of images.

    Args:
        labels: For each image a label or its place, None for none of them, or several; or for all images together a
            bool array or tensor (I, K).
        names: The K labels.

    Returns:
        (I, K) bool. True where an image has a label.

    Raises:
        LabelError: An image has a label that is none of `names`. A ValueError; its `index` is the image's place.
        ValueError: `labels` has another shape, or is no list.
    """
    if str(getattr(labels, "dtype", None)) in ("bool", "torch.bool"):
        if labels.ndim != 2 or labels.shape[1] != len(names):
            raise ValueError(f"labels have shape {tuple(labels.shape)}, but (images, {len(names)}) is needed.")
        return torch.as_tensor(labels)
    labels = labels.tolist() if hasattr(labels, "tolist") else labels  # of an array or a tensor
    if isinstance(labels, (str, Mapping, Set)) or not isinstance(labels, Iterable):
        raise ValueError(f"labels is a {type(labels).__name__}, but for each image its label is needed, in a list.")
    labels = list(labels)
    place = {label: index for index, label in enumerate(names)}
    is_right = torch.zeros(len(labels), len(names), dtype=torch.bool)
    for row, given in enumerate(labels):
        several = [given] if isinstance(given, str) or not isinstance(given, Iterable) else given
        for label in [] if given is None else several:
            is_number = isinstance(label, Integral) and not isinstance(label, bool)
            index = place.get(label, -1) if isinstance(label, str) else int(label) if is_number else -1
            if not 0 <= index < len(names):
                raise LabelError(
                    f"Image {row} has the label {as_plain(label)!r}, which is none of this classifier's; None "
                    f"stands for none of them.",
                    row,
                )
            is_right[row, index] = True
    return is_right
