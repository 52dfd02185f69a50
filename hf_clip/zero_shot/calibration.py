"""Fit the scale, bias and thresholds that turn cosine similarities into scores, on images whose labels are known.

Dimensions: I images, K labels, U background labels, M = K + U columns.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

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
