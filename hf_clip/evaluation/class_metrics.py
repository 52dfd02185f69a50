"""Figures for each class, calibration and pairs, as pure functions of tensors; see `metrics` for ranks and retrieval.

Dimensions: I images, K classes, N pairs, M bins.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .metrics import ranks_of_labels


def confusion_matrix(labels: Tensor, predictions: Tensor, count: int) -> Tensor:
    """Count how often images of each class are taken for each class.

    Args:
        labels: (I,) class ids, integers from 0 to K - 1.
        predictions: (I,) class ids, integers from 0 to K - 1.
        count: The number of classes K.

    Returns:
        (K, K), int64. Row i, column j: images of class i that are taken for class j.

    Raises:
        ValueError: The shapes do not fit, or an id is out of range.
    """
    for name, ids in (("labels", labels), ("predictions", predictions)):
        if ids.shape != labels.shape or ids.ndim != 1:
            raise ValueError(f"labels have shape {tuple(labels.shape)} and {name} {tuple(ids.shape)}; (I,) is needed.")
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < count:
            raise ValueError(
                f"{name} are from {int(ids.min())} to {int(ids.max())}, but there are {count} classes: 0 to "
                f"{count - 1} is needed."
            )
    return (labels.long() * count + predictions.long()).bincount(minlength=count * count).view(count, count)


def best_wrong_first(logits: Tensor, labels: Tensor) -> Tensor:
    """Choose a class for each image. Among equal logits a wrong class is taken before the right one.

    Args:
        logits: (I, K), higher for a more likely class.
        labels: (I,) class ids, integers from 0 to K - 1.

    Returns:
        (I,) class ids, int64. They are right where `top_k_accuracy` at 1 counts an image as right.

    Raises:
        ValueError: The shapes do not fit, a label is out of range, or logits are NaN.
    """
    ranks = ranks_of_labels(logits, labels)
    others = logits.scatter(1, labels.long()[:, None], -torch.inf).argmax(1)
    return torch.where(ranks == 0, labels.long(), others)


@dataclass(frozen=True)
class Reliability:
    """How often images are right at each level of confidence; a bin without images has 0 everywhere.

    Attributes:
        edges: (M + 1,) from 0 to 1.
        counts: (M,) images in each bin.
        confidence: (M,) their mean confidence.
        accuracy: (M,) the fraction of them that is right.
    """

    edges: Tensor
    counts: Tensor
    confidence: Tensor
    accuracy: Tensor


def reliability(confidences: Tensor, is_right: Tensor, bins: int = 15) -> Reliability:
    """Sort images into bins of equal width by their confidence. A bin contains its upper edge, and the first 0 too.

    Args:
        confidences: (I,) probabilities of the predicted classes.
        is_right: (I,) bool.
        bins: The number of bins M.

    Returns:
        Edges, counts, mean confidence and accuracy of the bins, float64 and int64, on the CPU.

    Raises:
        ValueError: The shapes do not fit, or a confidence is not from 0 to 1.
    """
    if confidences.ndim != 1 or confidences.shape != is_right.shape or len(confidences) == 0 or bins < 1:
        raise ValueError(
            f"confidences have shape {tuple(confidences.shape)}, is_right {tuple(is_right.shape)}, and there are "
            f"{bins} bins, but (I,) for both with at least one image, and one bin, are needed."
        )
    if not bool(((confidences >= 0) & (confidences <= 1)).all()):
        raise ValueError("confidences hold values that are not from 0 to 1; they must be probabilities.")
    values = confidences.double().cpu()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    place = (torch.bucketize(values, edges) - 1).clamp(min=0)
    counts = place.bincount(minlength=bins)
    at_least_one = counts.clamp(min=1)
    confidence = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, values) / at_least_one
    accuracy = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, is_right.double().cpu()) / at_least_one
    return Reliability(edges, counts, confidence, accuracy)


def expected_calibration_error(confidences: Tensor, is_right: Tensor, bins: int = 15) -> float:
    """Compute the mean distance of confidence and accuracy over bins of equal width (Guo et al. 2017).

    Args:
        confidences: (I,) probabilities of the predicted classes.
        is_right: (I,) bool.
        bins: The number of bins.

    Returns:
        The sum over the bins of the distance of their mean confidence and their accuracy, weighted by their images.

    Raises:
        ValueError: The shapes do not fit, or a confidence is not from 0 to 1.
    """
    found = reliability(confidences, is_right, bins)
    return ((found.confidence - found.accuracy).abs() * found.counts).sum().item() / len(confidences)


def roc_auc(scores: Tensor, is_right: Tensor) -> float:
    """Compute the area under the ROC curve: how often a right image has a higher score than a wrong one.

    Args:
        scores: (I,), higher for an image that is more likely right.
        is_right: (I,) bool.

    Returns:
        The area. Pairs of equal scores count a half, as in scikit-learn.

    Raises:
        ValueError: All images are right, or none is; or scores are NaN.
    """
    if scores.ndim != 1 or scores.shape != is_right.shape or scores.isnan().any():
        raise ValueError(
            f"scores have shape {tuple(scores.shape)} and is_right {tuple(is_right.shape)}, but (I,) for both is "
            f"needed, without NaN."
        )
    right, wrong = scores[is_right].double(), scores[~is_right].double().sort().values
    if len(right) == 0 or len(wrong) == 0:
        raise ValueError(f"{len(right)} of {len(scores)} images are right, but the curve needs right and wrong ones.")
    below = torch.searchsorted(wrong, right, side="left")
    up_to = torch.searchsorted(wrong, right, side="right")
    return (below + up_to).double().sum().item() / 2 / (len(right) * len(wrong))


def pair_scores(similarities: Tensor) -> dict[str, float]:
    """Compute the text, image and group score of Winoground (Thrush et al. 2022). Equal similarities are not right.

    Args:
        similarities: (N, 2, 2): of each pair the similarity of image i and caption j, which belong together for i = j.

    Returns:
        `text_score`: for both images the right caption is more similar; `image_score`: for both captions the right
        image; `group_score`: both.

    Raises:
        ValueError: The shape does not fit, or a similarity is not finite.
    """
    if similarities.ndim != 3 or similarities.shape[1:] != (2, 2) or len(similarities) == 0:
        raise ValueError(f"similarities have shape {tuple(similarities.shape)}, but (N, 2, 2) with N > 0 is needed.")
    if not similarities.isfinite().all():
        raise ValueError("similarities hold values that are NaN or infinite: look for the inputs that they come from.")
    (a, b), (c, d) = similarities.permute(1, 2, 0)
    text, image = (a > b) & (d > c), (a > c) & (d > b)
    found = {"text_score": text, "image_score": image, "group_score": text & image}
    return {name: is_right.double().mean().item() for name, is_right in found.items()}
