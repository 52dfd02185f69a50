"""How well predicted numbers follow the true ones.

Dimensions: I images.
"""

from torch import Tensor


def _check(predicted: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    if predicted.ndim != 1 or predicted.shape != true.shape or len(true) < 2:
        raise ValueError(
            f"predicted and true numbers have shapes {tuple(predicted.shape)} and {tuple(true.shape)}, but (images,) "
            f"with at least two images is needed for both."
        )
    predicted, true = predicted.double(), true.double()
    if not (predicted.isfinite().all() and true.isfinite().all()):
        raise ValueError("Predicted or true numbers hold NaN or infinity: look for the inputs that they come from.")
    return predicted, true


def pearson(predicted: Tensor, true: Tensor) -> float:
    """Compute Pearson's correlation.

    Args:
        predicted: (I,) numbers.
        true: (I,) numbers.

    Returns:
        From -1 to 1, whatever unit the numbers have. 0 if one of the two is constant, since it then says nothing of
        the other.

    Raises:
        ValueError: The shapes differ, there are fewer than two numbers, or some are not finite.
    """
    predicted, true = _check(predicted, true)
    if any(values.max() == values.min() for values in (predicted, true)):
        return 0.0
    predicted, true = (_deviations(values) for values in (predicted, true))
    return float((predicted @ true).clamp(-1, 1))


def _deviations(values: Tensor) -> Tensor:
    """Subtract the mean of numbers (I,) that are not all equal, and scale them to length one."""
    values = values / values.abs().max()  # neither sums nor squares leave the range of float64
    values = values - values.mean()
    values = values / values.abs().max()
    return values / values.norm()


def average_ranks(values: Tensor) -> Tensor:
    """Rank numbers from 1; equal ones get the mean of their ranks: (I,) → (I,), float64."""
    _, group, counts = values.unique(sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()  # rank of the last number of each group
    return (last - (counts.double() - 1) / 2)[group]


def spearman(predicted: Tensor, true: Tensor) -> float:
    """Compute Spearman's rank correlation: Pearson's of the ranks, in which equal numbers get their mean rank.

    Args:
        predicted: (I,) numbers.
        true: (I,) numbers.

    Returns:
        From -1 to 1. 0 if one of the two is constant.

    Raises:
        ValueError: The shapes differ, there are fewer than two numbers, or some are not finite.

    Example::

        spearman(torch.tensor([0.1, 0.2, 0.9]), torch.tensor([1.0, 3.0, 2.0]))  # 0.5
    """
    predicted, true = _check(predicted, true)
    return pearson(average_ranks(predicted), average_ranks(true))


def mean_absolute_error(predicted: Tensor, true: Tensor) -> float:
    """Compute the mean distance of the predicted and the true numbers.

    Args:
        predicted: (I,) numbers.
        true: (I,) numbers.

    Returns:
        The distance, in the unit of the numbers.

    Raises:
        ValueError: The shapes differ, there are fewer than two numbers, or some are not finite.
    """
    predicted, true = _check(predicted, true)
    return float((predicted - true).abs().mean())


__all__ = ["average_ranks", "mean_absolute_error", "pearson", "spearman"]
