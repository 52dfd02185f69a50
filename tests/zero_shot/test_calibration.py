"""Calibration against optima that are known, and thresholds against exhaustive search."""

import itertools
import math

import pytest
import torch

from hf_clip.zero_shot.calibration import fit_sigmoid, fit_softmax_scale, fit_thresholds


def one_hot(classes: torch.Tensor, count: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(classes, count).bool()


@pytest.mark.parametrize("scale", [3.0, 40.0, 100.0])
def test_scale_that_made_the_labels_is_found(scale: float):
    generator = torch.Generator().manual_seed(0)
    cosines = torch.rand(20_000, 5, generator=generator) * 0.3
    classes = torch.multinomial((cosines * scale).softmax(-1), 1, generator=generator)[:, 0]
    assert fit_softmax_scale(cosines, one_hot(classes, 5)) == pytest.approx(scale, rel=0.1)


def test_scale_stays_finite_where_every_image_is_right():
    cosines = torch.eye(4) * 0.1
    scale = fit_softmax_scale(cosines, torch.eye(4).bool())
    # At the optimum the right label has the probability that the smoothed target gives it.
    probability = math.exp(0.1 * scale) / (math.exp(0.1 * scale) + 3)
    assert probability == pytest.approx(1 - 1 / 6 + 1 / 6 / 4, abs=1e-4)


def test_image_of_nothing_counts_for_all_background_columns():
    """Two background columns act as one class: the loss is that of the sum of their probabilities."""
    cosines = torch.tensor([[0.3, 0.1, 0.1], [0.1, 0.3, 0.0], [0.2, 0.1, 0.25], [0.3, 0.2, 0.2], [0.3, 0.29, 0.31]])
    is_right = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 1, 1], [1, 0, 0], [0, 1, 1]]).bool()
    found = fit_softmax_scale(cosines, is_right)

    def loss(scale: float) -> float:
        logs = (cosines.double() * scale).log_softmax(-1)
        right = torch.tensor([torch.logsumexp(row[mask], 0) for row, mask in zip(logs, is_right, strict=True)])
        return -((1 - 1 / 7) * right + logs.mean(-1) / 7).mean().item()

    assert all(loss(found) <= loss(found * factor) + 1e-9 for factor in (0.5, 0.9, 0.99, 1.01, 1.1, 2))


def test_platt_scaling_finds_the_logistic_curve_that_made_the_labels():
    generator = torch.Generator().manual_seed(0)
    cosines = torch.rand(20_000, 3, generator=generator) * 0.3
    is_right = torch.rand(cosines.shape, generator=generator) < (cosines * 60 - 12).sigmoid()
    scale, bias = fit_sigmoid(cosines, is_right)
    assert scale == pytest.approx(60, rel=0.05)
    assert bias == pytest.approx(-12, rel=0.05)


def test_platt_scaling_stays_finite_where_labels_are_told_apart():
    cosines = torch.tensor([[0.1], [0.12], [0.3], [0.33]])
    scale, bias = fit_sigmoid(cosines, cosines > 0.2)
    assert 0 < scale < 1000
    probabilities = (cosines.double() * scale + bias).sigmoid()
    assert ((probabilities > 0.5) == (cosines > 0.2)).all()


def f1(given: torch.Tensor, is_right: torch.Tensor) -> float:
    return 2 * (given & is_right).sum().item() / max((given.sum() + is_right.sum()).item(), 1)


@pytest.mark.parametrize("seed", range(20))
def test_thresholds_are_the_best_there_are(seed: int):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 8, (12, 4), generator=generator) / 10  # with ties
    is_right = torch.rand(scores.shape, generator=generator) < scores
    found = fit_thresholds(scores, is_right)
    for label in range(4):
        column, right = scores[:, label], is_right[:, label]
        if not right.any():
            assert (column < found[label]).all()
            continue
        cuts = [-1.0, *sorted(set(column.tolist())), 2.0]
        best = max(f1(column >= (a + b) / 2, right) for a, b in itertools.pairwise(cuts))
        assert f1(column >= found[label], right) == pytest.approx(best)
