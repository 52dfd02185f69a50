"""Figures of classes, calibration and pairs: by hand, against scikit-learn, and against brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import roc_auc_score
from torch import Tensor

from hf_clip.evaluation.class_metrics import (
    best_wrong_first,
    confusion_matrix,
    expected_calibration_error,
    pair_scores,
    reliability,
    roc_auc,
)
from hf_clip.evaluation.metrics import top_k_accuracy

SEEDS = st.integers(0, 2**31)
CHEAP = settings(max_examples=25, deadline=None)


def random(seed: int, *shape: int) -> Tensor:
    """Numbers from 0 to 1 with many equal ones."""
    return torch.randint(0, 8, shape, generator=torch.Generator().manual_seed(seed)) / 8


def test_confusion_matrix_checked_by_hand():
    labels, predictions = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 0, 0])
    assert confusion_matrix(labels, predictions, 3).tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 0]]


@CHEAP
@given(SEEDS)
def test_confusion_matrix_agrees_with_scikit_learn(seed: int):
    labels, predictions = torch.randint(0, 5, (2, 40), generator=torch.Generator().manual_seed(seed))
    expected = sklearn_confusion(labels, predictions, labels=range(5))
    assert confusion_matrix(labels, predictions, 5).tolist() == expected.tolist()


def test_label_outside_of_the_matrix_is_an_error():
    with pytest.raises(ValueError, match=r"predictions are from 0 to 3, but there are 3 classes: 0 to 2 is needed\."):
        confusion_matrix(torch.tensor([0, 1]), torch.tensor([0, 3]), 3)


@CHEAP
@given(SEEDS)
def test_choice_is_right_where_accuracy_counts_it(seed: int):
    logits = random(seed, 30, 4)
    labels = torch.randint(0, 4, (30,), generator=torch.Generator().manual_seed(seed))
    chosen = best_wrong_first(logits, labels)
    assert (chosen == labels).double().mean().item() == pytest.approx(top_k_accuracy(logits, labels, [1])[1])
    assert (logits.gather(1, chosen[:, None])[:, 0] == logits.amax(1)).all()


def test_calibration_checked_by_hand():
    """Four images at 0.85 of which three are right, two at 0.25 of which none is: (0.1·4 + 0.25·2) / 6."""
    confidences = torch.tensor([0.85] * 4 + [0.25] * 2)
    is_right = torch.tensor([True, True, True, False, False, False])
    assert expected_calibration_error(confidences, is_right, bins=10) == pytest.approx((0.1 * 4 + 0.25 * 2) / 6)
    found = reliability(confidences, is_right, bins=10)
    assert found.counts.tolist() == [0, 0, 2, 0, 0, 0, 0, 0, 4, 0]
    assert found.accuracy[[2, 8]].tolist() == [0, 0.75]


@CHEAP
@given(SEEDS, st.integers(1, 20))
def test_calibration_agrees_with_brute_force(seed: int, bins: int):
    generator = torch.Generator().manual_seed(seed)
    confidences, is_right = torch.rand(50, generator=generator), torch.rand(50, generator=generator) < 0.5
    total = 0.0
    for place in range(bins):
        inside = [n for n, value in enumerate(confidences.tolist()) if place / bins < value <= (place + 1) / bins]
        if inside:
            distance = confidences[inside].double().mean() - is_right[inside].double().mean()
            total += abs(distance.item()) * len(inside) / 50
    assert expected_calibration_error(confidences, is_right, bins) == pytest.approx(total, abs=1e-6)


def test_confidence_that_is_no_probability_is_an_error():
    with pytest.raises(ValueError, match=r"confidences hold values that are not from 0 to 1; they must be prob"):
        reliability(torch.tensor([1.5]), torch.tensor([True]))


@CHEAP
@given(SEEDS)
def test_roc_auc_agrees_with_scikit_learn(seed: int):
    scores, is_right = random(seed, 40), random(seed + 1, 40) > 0.4
    is_right[:2] = torch.tensor([True, False])
    assert roc_auc(scores, is_right) == pytest.approx(roc_auc_score(is_right, scores))


def test_roc_auc_needs_both_kinds():
    with pytest.raises(ValueError, match=r"2 of 2 images are right, but the curve needs right and wrong ones\."):
        roc_auc(torch.tensor([0.1, 0.2]), torch.tensor([True, True]))


def test_pair_scores_checked_by_hand():
    """Both right; only the text's choice; only the image's choice; all equal."""
    pairs = [[[0.9, 0.1], [0.2, 0.8]], [[0.3, 0.1], [0.6, 0.8]], [[0.3, 0.6], [0.1, 0.8]], [[0.5, 0.5], [0.5, 0.5]]]
    assert pair_scores(torch.tensor(pairs)) == {"text_score": 0.5, "image_score": 0.5, "group_score": 0.25}
