"""Correlations, by hand and against scipy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hf_clip.evaluation.correlation import average_ranks, mean_absolute_error, pearson, spearman


def test_equal_numbers_get_their_mean_rank():
    assert average_ranks(torch.tensor([5.0, 1.0, 5.0, 3.0, 5.0])).tolist() == [4, 1, 4, 2, 4]


def test_figures_of_a_hand():
    predicted, true = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 3.0, 2.0, 10.0])
    # Deviations (-3, -1, 1, 3) / 2 and (-3, -1, -2, 6): 13 / sqrt(5 * 50). Ranks 1 3 2 4: 1 - 6 * 2 / (4 * 15).
    assert pearson(predicted, true) == pytest.approx(13 / 250**0.5)
    assert spearman(predicted, true) == pytest.approx(0.8)
    assert spearman(-predicted, true) == pytest.approx(-0.8)
    assert mean_absolute_error(predicted, true) == pytest.approx((0 + 1 + 1 + 6) / 4)


def test_constant_says_nothing():
    varied, constant = torch.tensor([1.0, 2.0, 4.0]), torch.full((3,), 0.1)
    assert pearson(varied, constant) == spearman(constant, varied) == 0.0


@pytest.mark.parametrize("unit", [1e-308, 1e-200, 1e-13, 1e13, 1e200, 1e307])
def test_unit_of_the_numbers_does_not_matter(unit: float):
    predicted, true = torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), torch.tensor([1.0, 3.0, 2.0, 10.0]).double()
    assert pearson(predicted, unit * true) == pytest.approx(13 / 250**0.5)
    assert pearson(unit * predicted, -unit * true) == pytest.approx(-13 / 250**0.5)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=3, max_size=30))
def test_equals_scipy_with_ties(pairs: list[tuple[int, int]]):
    first, second = torch.tensor(pairs).double().T
    if first.unique().numel() > 1 and second.unique().numel() > 1:
        assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-9)
        assert pearson(first, second) == pytest.approx(stats.pearsonr(first, second).statistic, abs=1e-9)


@pytest.mark.parametrize(
    ("predicted", "true", "message"),
    [
        ([1.0, 2.0], [1.0], r"shapes \(2,\) and \(1,\), but \(images,\) with at least two images is needed"),
        ([1.0], [1.0], "at least two"),
        ([1.0, float("nan")], [1.0, 2.0], "hold NaN or infinity"),
    ],
)
def test_what_cannot_be_compared(predicted: list[float], true: list[float], message: str):
    with pytest.raises(ValueError, match=message):
        spearman(torch.tensor(predicted), torch.tensor(true))
