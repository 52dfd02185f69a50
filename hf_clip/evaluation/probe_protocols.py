"""Linear probes as three programs fit them: which features, which solver, and how the regularisation is chosen.

- `paper` (Radford et al. 2021, appendix A.3): features before the projection, scikit-learn's logistic regression by
  L-BFGS with at most 1,000 iterations. λ is searched from 1e-6 to 1e6 on the validation split, and the probe is fitted
  again to train and validation.
- `openai`: the example of the original repository. Projected features, the same solver, C = 0.316.
- `clip_benchmark`: projected and normalised features, AdamW with learning rate 0.1 that falls along a cosine over 10
  epochs of batches of 64. The weight decay is searched from 1e-6 to 1e2; without a validation split it is 0.

scikit-learn's C is 1 / λ, where λ/2 times the squared weights is added to the sum of the losses.

Dimensions: I images, K classes, W width of the features, of the tower or the embedding.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from .device import check_computes
from .split_features import ProbeFeatures, SplitFeatures

MOST_ITERATIONS = 1000

MOST_SEED = 2**32 - 1
"""What torch and scikit-learn take both."""

OPENAI_C = 0.316

COARSE = 16
"""Steps of the grid between two of the search's seven starting points, which are 2 decades of λ apart."""


@dataclass(frozen=True)
class LinearHead:
    """A linear classifier.   weight: (K, W)   bias: (K,). Classes that no image was of have a bias of -inf."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """(I, W) → (I, K)."""
        return features @ self.weight.T + self.bias


def parametric_search(score: Callable[[int], float], count: int, coarse: int = COARSE) -> tuple[int, dict[int, float]]:
    """Find the best place of a grid with few trials: every `coarse`-th place, then halves of the interval at the peak.

    Among equal scores the first place is taken.

    Args:
        score: A function from a place to a score, higher for better.
        count: Number of places.
        coarse: Distance of the starting points, a power of two.

    Returns:
        The best place, and the scores of all places that were tried, in the order of the trials.
    """
    scores = {place: score(place) for place in range(0, count, coarse)}
    peak = max(scores, key=lambda place: (scores[place], -place))
    while coarse > 1:
        coarse //= 2
        places = [place for place in (peak - coarse, peak, peak + coarse) if 0 <= place < count]
        for place in places:
            if place not in scores:
                scores[place] = score(place)
        peak = max(places, key=lambda place: (scores[place], -place))
    return peak, scores


def fit_logistic_regression(features: Tensor, labels: Tensor, classes: int, c: float) -> LinearHead:
    """Fit scikit-learn's logistic regression by L-BFGS.

    Args:
        features: (I, W), float32.
        labels: (I,) places of the classes; or (I, K) bool, for which each class has a regression of its own.
        classes: The number of classes K.
        c: The inverse of the strength of regularisation.

    Returns:
        The classifier.
    """
    if labels.ndim == 2:
        heads = [_one_against_the_rest(features, labels[:, place].long(), c) for place in range(classes)]
        return LinearHead(torch.cat([head.weight for head in heads]), torch.cat([head.bias for head in heads]))
    fitted = _sklearn_regression(features, labels, c)
    weight, bias = torch.zeros(classes, features.shape[1]), torch.full((classes,), -torch.inf)
    places = torch.from_numpy(fitted.classes_)
    coefficients, intercepts = torch.from_numpy(fitted.coef_).float(), torch.from_numpy(fitted.intercept_).float()
    if len(places) == 2:  # scikit-learn has one row, for the second of two classes
        coefficients = torch.cat([torch.zeros_like(coefficients), coefficients])
        intercepts = torch.cat([torch.zeros_like(intercepts), intercepts])
    weight[places], bias[places] = coefficients, intercepts
    return LinearHead(weight, bias)


def _sklearn_regression(features: Tensor, labels: Tensor, c: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the protocol ends at 1,000 iterations
        return LogisticRegression(C=c, max_iter=MOST_ITERATIONS).fit(features.numpy(), labels.numpy())


def _one_against_the_rest(features: Tensor, is_class: Tensor, c: float) -> LinearHead:
    if len(is_class.unique()) < 2:  # all images are of the class, or none is
        return LinearHead(torch.zeros(1, features.shape[1]), torch.tensor([torch.inf if is_class[0] else -torch.inf]))
    head = fit_logistic_regression(features, is_class, 2, c)
    return LinearHead(head.weight[1:], head.bias[1:])


@dataclass(frozen=True)
class AdamWSettings:
    """CLIP_benchmark's defaults, but for its mixed precision: weights and features stay float32."""

    learning_rate: float = 0.1
    epochs: int = 10
    batch_size: int = 64
    seed: int = 0
    device: str = "cpu"


@torch.enable_grad()
def fit_adamw(
    features: Tensor, labels: Tensor, classes: int, weight_decay: float, settings: AdamWSettings
) -> LinearHead:
    """Fit a linear layer with AdamW and a learning rate that falls along a cosine.

    Args:
        features: (I, W), float32.
        labels: (I,) places of the classes.
        classes: The number of classes K.
        weight_decay: AdamW's weight decay.
        settings: What else decides the result.

    Returns:
        The classifier, on the CPU.
    """
    order = torch.Generator().manual_seed(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        layer = torch.nn.Linear(features.shape[1], classes)
    layer = layer.to(settings.device)
    features, labels = features.to(settings.device), labels.to(settings.device)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=settings.learning_rate, weight_decay=weight_decay)
    step, steps = 0, settings.epochs * math.ceil(len(labels) / settings.batch_size)
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(labels), generator=order).to(settings.device).split(settings.batch_size):
            optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            cross_entropy(layer(features[rows]), labels[rows]).backward()
            optimizer.step()
            step += 1
    return LinearHead(layer.weight.detach().cpu(), layer.bias.detach().cpu())


@dataclass(frozen=True)
class Protocol:
    """How a linear probe is fitted.

    Attributes:
        name: Its name.
        solver: The solver, for a result.
        features_of: Returns the features (I, W) that a split is fitted by.
        features_are: Says which those are.
        fit: A function from features, labels, the number of classes and the strength of regularisation to a classifier.
        strength: What the strength is called.
        strengths: Those that are searched, the first of which is taken among equally good ones. Empty: none is.
        unsearched: The strength without a search.
        holds_out: Whether a part of train is held out where there is no validation split.
        is_few_shot_validation: Whether few-shot probes see as few validation images as training images.
        has_multi_label: Whether an image may have several classes.
    """

    name: str
    solver: str
    features_of: Callable[[SplitFeatures], Tensor]
    features_are: Callable[[ProbeFeatures], str]
    fit: Callable[[Tensor, Tensor, int, float], LinearHead]
    strength: str
    strengths: tuple[float, ...] = ()
    unsearched: float = 0.0
    holds_out: bool = False
    is_few_shot_validation: bool = True
    has_multi_label: bool = True


def _before_projection(split: SplitFeatures) -> Tensor:
    return split.projected if split.pooled is None else split.pooled


def _before_projection_are(features: ProbeFeatures) -> str:
    if features.train.pooled is not None:
        return "features before the projection"
    return "output of the attention pool" if features.tower == "resnet" else "features as they are"


def _grid(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(float(value) for value in np.logspace(first, last, count))


def _by_lambda(features: Tensor, labels: Tensor, classes: int, strength: float) -> LinearHead:
    return fit_logistic_regression(features, labels, classes, 1 / strength)


def _paper(seed: int, device: str) -> Protocol:
    return Protocol(
        name="paper",
        solver=f"L-BFGS, at most {MOST_ITERATIONS} iterations",
        features_of=_before_projection,
        features_are=_before_projection_are,
        fit=_by_lambda,
        strength="λ",
        strengths=_grid(6, -6, 97),
        holds_out=True,
    )


def _openai(seed: int, device: str) -> Protocol:
    return Protocol(
        name="openai",
        solver=f"L-BFGS, at most {MOST_ITERATIONS} iterations",
        features_of=lambda split: split.projected,
        features_are=lambda features: "projected features",
        fit=fit_logistic_regression,
        strength="C",
        unsearched=OPENAI_C,
    )


def _clip_benchmark(seed: int, device: str) -> Protocol:
    settings = AdamWSettings(seed=seed, device=device)
    return Protocol(
        name="clip_benchmark",
        solver=f"AdamW, learning rate {settings.learning_rate}, {settings.epochs} epochs of batches of "
        f"{settings.batch_size}, seed {seed}",
        features_of=lambda split: normalize(split.projected, dim=-1),
        features_are=lambda features: "projected and normalised features",
        fit=lambda x, y, classes, decay: fit_adamw(x, y, classes, decay, settings),
        strength="weight decay",
        strengths=_grid(-6, 2, 97),
        is_few_shot_validation=False,
        has_multi_label=False,
    )


PROTOCOLS = {"paper": _paper, "openai": _openai, "clip_benchmark": _clip_benchmark}


def find_protocol(name: str, *, seed: int = 0, device: str = "cpu") -> Protocol:
    """Return a protocol.

    Args:
        name: "paper", "openai" or "clip_benchmark".
        seed: Seed of the solver, if it has one.
        device: Where AdamW computes.

    Raises:
        ValueError: There is no such protocol or device, or the seed is out of range.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol is {name!r}, but one of {', '.join(PROTOCOLS)} is needed.")
    check_computes(device)
    if not 0 <= seed <= MOST_SEED:
        raise ValueError(f"The seed is {seed}, but a whole number from 0 to {MOST_SEED:,} is needed.")
    return PROTOCOLS[name](seed, device)
