"""The metrics: on matrices that a person can check, and against scikit-learn where it has the same one."""

from typing import Any

import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score, top_k_accuracy_score
from torch import Tensor

from hf_clip.evaluation.metrics import (
    average_precision,
    eleven_point_average_precision,
    mean_average_precision,
    mean_average_precision_at_k,
    mean_per_class_accuracy,
    median_rank,
    ranks_of_first_right,
    recall_at_k,
    top_k_accuracy,
)

from ..largest_tensor import LargestTensor

LOGITS = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
LABELS = torch.tensor([0, 1, 2, 2])
"""The labels are first, second, third and first."""


def test_top_k_accuracy_checked_by_hand():
    assert top_k_accuracy(LOGITS, LABELS, ks=(1, 2, 3, 5)) == {1: 0.5, 2: 0.75, 3: 1.0, 5: 1.0}


def test_equal_logits_are_not_right():
    logits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert top_k_accuracy(logits, torch.tensor([0, 0]), ks=(1, 2, 3)) == {1: 0.0, 2: 0.5, 3: 1.0}


def test_mean_per_class_accuracy_checked_by_hand():
    """Class 0: its one example is right. Class 1: its one is wrong. Class 2: one of two. A fourth has no examples."""
    assert mean_per_class_accuracy(LOGITS, LABELS) == pytest.approx((1 + 0 + 0.5) / 3)
    without_examples = torch.cat([LOGITS, torch.zeros(4, 1)], dim=1)
    assert mean_per_class_accuracy(without_examples, LABELS) == pytest.approx((1 + 0 + 0.5) / 3)


def test_classification_agrees_with_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(200, 7, generator=generator), torch.randint(0, 7, (200,), generator=generator)
    for k, accuracy in top_k_accuracy(logits, labels, ks=(1, 3, 6)).items():
        assert accuracy == pytest.approx(top_k_accuracy_score(labels, logits, k=k))
    assert mean_per_class_accuracy(logits, labels) == pytest.approx(balanced_accuracy_score(labels, logits.argmax(1)))


# Right, wrong, right, wrong: precision 1 at recall 1/2, and 2/3 at recall 1.
SCORES = torch.tensor([0.9, 0.8, 0.7, 0.6])
IS_RIGHT = torch.tensor([True, False, True, False])


def test_average_precision_checked_by_hand():
    assert average_precision(SCORES, IS_RIGHT) == pytest.approx((1 + 2 / 3) / 2)
    # Recalls 0 to 0.5 have precision 1, which is six of eleven; 0.6 to 1 have 2/3.
    assert eleven_point_average_precision(SCORES, IS_RIGHT) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)


def test_precision_is_interpolated_from_higher_recalls():
    """Wrong, right, right: precisions 0, 1/2, 2/3. At every recall there is a higher one with 2/3."""
    scores, is_right = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([False, True, True])
    assert eleven_point_average_precision(scores, is_right) == pytest.approx(2 / 3)
    assert average_precision(scores, is_right) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_every_tenth_of_the_recall_is_reached_where_it_is_reached():
    """Ten right ones with a wrong one after each: recall i/10 has precision i/(2i - 1), falling; 0 has the first's."""
    scores = torch.arange(20, 0, -1).float()
    is_right = torch.tensor([True, False] * 10)
    expected = (1 + sum(i / (2 * i - 1) for i in range(1, 11))) / 11
    assert eleven_point_average_precision(scores, is_right) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0]])
def test_precision_of_equal_scores_depends_on_no_order(order: list[int]):
    """All pass together: precision 1/2 at recall 1."""
    scores, is_right = torch.ones(4), IS_RIGHT[order]
    assert average_precision(scores, is_right) == 0.5
    assert eleven_point_average_precision(scores, is_right) == 0.5


def test_average_precision_agrees_with_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 30, (100, 5), generator=generator) / 30  # with ties
    is_right = torch.rand(100, 5, generator=generator) < scores / 2
    assert mean_average_precision(scores, is_right) == pytest.approx(average_precision_score(is_right, scores))


def test_mean_average_precision_leaves_out_what_is_not_counted():
    scores, is_right = torch.stack([SCORES, SCORES], dim=1), torch.stack([IS_RIGHT, ~IS_RIGHT], dim=1)
    second = (1 / 2 + 2 / 4) / 2
    assert mean_average_precision(scores, is_right) == pytest.approx(((1 + 2 / 3) / 2 + second) / 2)
    is_counted = torch.tensor([[True, False], [False, True], [True, True], [True, True]])
    # The first class loses its first wrong example, the second a wrong one too: right, wrong, right.
    assert mean_average_precision(scores, is_right, is_counted=is_counted) == pytest.approx((1 + (1 + 2 / 3) / 2) / 2)
    eleven = mean_average_precision(scores, is_right, eleven_point=True, is_counted=is_counted)
    assert eleven == pytest.approx((1 + (6 + 5 * 2 / 3) / 11) / 2)


# Similarities are the queries themselves, since the gallery is the identity.
GALLERY = torch.eye(4)
GALLERY_IDS = torch.tensor([7, 7, 8, 9])
QUERIES = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.1, 0.3, 0.4, 0.2], [0.4, 0.3, 0.1, 0.2], [0.1, 0.2, 0.3, 0.4]])
QUERY_IDS = torch.tensor([7, 7, 8, 9])
"""The first right row is first, second, fourth and first."""


@pytest.mark.parametrize("chunk", [1, 3, 4, 1024])
def test_retrieval_checked_by_hand(chunk: int):
    arguments = (QUERIES, GALLERY, QUERY_IDS, GALLERY_IDS)
    assert ranks_of_first_right(*arguments, chunk=chunk).tolist() == [0, 1, 3, 0]
    assert recall_at_k(*arguments, ks=(1, 2, 3, 4, 10), chunk=chunk) == {1: 0.5, 2: 0.75, 3: 0.75, 4: 1.0, 10: 1.0}
    assert median_rank(*arguments, chunk=chunk) == 1.5
    # Query 0 has its right rows at 1 and 4, query 1 at 2 and 4, query 2 at 4, query 3 at 1.
    precisions = {1: [1, 0, 0, 1], 2: [1 / 2, 1 / 4, 0, 1], 4: [(1 + 1 / 2) / 2, (1 / 2 + 1 / 2) / 2, 1 / 4, 1]}
    for k, by_hand in precisions.items():
        found = mean_average_precision_at_k(*arguments, k=k, chunk=chunk)
        assert found == pytest.approx(sum(by_hand) / 4)


def test_several_captions_and_a_caption_of_several_images():
    """Images 1 and 2; captions of image 1, of 1, of 2. A second copy of image 2 shares its caption."""
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 0.9]])
    captions = torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.3, 0.7]])
    image_ids, caption_ids = torch.tensor([1, 2, 2]), torch.tensor([1, 1, 2])
    # Image 1 finds its second caption first; both images 2 find image 1's first caption before their own.
    assert recall_at_k(images, captions, image_ids, caption_ids, ks=(1, 2)) == {1: pytest.approx(1 / 3), 2: 1.0}
    # Caption 0 finds images 2 first, twice; the other two are right at once.
    assert ranks_of_first_right(captions, images, caption_ids, image_ids).tolist() == [2, 0, 0]


def test_equal_similarities_are_not_found():
    collapsed, ids = torch.ones(5, 3), torch.arange(5)
    assert recall_at_k(collapsed, collapsed, ids, ids, ks=(1, 4, 5)) == {1: 0.0, 4: 0.0, 5: 1.0}
    assert mean_average_precision_at_k(collapsed, collapsed, ids, ids, k=4) == 0
    assert mean_average_precision_at_k(collapsed, collapsed, ids, ids, k=5) == pytest.approx(1 / 5)


def test_retrieval_agrees_with_scikit_learn():
    """A query's right rows among all rows are what a class's right examples are among all examples."""
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(20, 8, generator=generator), torch.randn(50, 8, generator=generator)
    query_ids, gallery_ids = torch.arange(20) % 10, torch.arange(50) % 10
    is_right = query_ids[:, None] == gallery_ids[None]
    scores = queries @ gallery.T
    expected = [average_precision_score(right, row) for right, row in zip(is_right, scores, strict=True)]
    found = mean_average_precision_at_k(queries, gallery, query_ids, gallery_ids, k=50, chunk=7)
    assert found == pytest.approx(sum(expected) / 20, rel=1e-6)
    # Where each query has one right row, recall@k is top-k accuracy with the gallery as the classes.
    labels = torch.randint(0, 50, (20,), generator=generator)
    recalls = recall_at_k(queries, gallery, labels, torch.arange(50), chunk=7)
    for k, recall in recalls.items():
        assert recall == pytest.approx(top_k_accuracy_score(labels, scores, k=k, labels=range(50)))


@pytest.mark.parametrize("metric", [recall_at_k, median_rank, mean_average_precision_at_k])
def test_all_similarities_never_exist_at_once(metric: Any):
    embeds, ids = torch.randn(300, 2), torch.arange(300)
    options = {"k": 5} if metric is mean_average_precision_at_k else {}
    with LargestTensor() as largest:
        metric(embeds, embeds, ids, ids, chunk=10, **options)
    assert largest.elements == 10 * 300


def test_half_precision_is_compared_in_float32():
    """The right row is better by less than bfloat16 can tell at that size."""
    query = torch.tensor([[1.0, 1.0, 2**-9]]).bfloat16()
    gallery = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]).bfloat16()
    assert recall_at_k(query, gallery, torch.tensor([1]), torch.tensor([0, 1]), ks=(1,)) == {1: 1.0}


def with_nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[1] = torch.nan
    return tensor


RETRIEVAL = {"query_embeds": QUERIES, "gallery_embeds": GALLERY, "query_ids": QUERY_IDS, "gallery_ids": GALLERY_IDS}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_embeds": with_nan(QUERIES)}, "query_embeds hold values that are NaN or infinite, which have no place"),
        ({"gallery_embeds": GALLERY / 0}, "gallery_embeds hold values that are NaN or infinite"),
        (
            {"query_ids": torch.tensor([7, 5, 6, 9])},
            "2 of 4 queries have no right row in the gallery, the first is query 1 with id 5",
        ),
        ({"query_ids": QUERY_IDS[:3]}, r"query_ids have shape \(3,\), but \(4,\) is needed: one for each"),
        ({"gallery_ids": GALLERY_IDS[:, None]}, r"gallery_ids have shape \(4, 1\), but \(4,\) is needed"),
        ({"gallery_embeds": GALLERY[:, :3]}, r"have shape \(4, 4\) and the gallery \(4, 3\), but"),
        ({"query_embeds": QUERIES[:0]}, "and at least one of each"),
        ({"chunk": 0}, "chunk is 0, but at least one query must be looked at"),
        ({"ks": (0, 1)}, r"The cut-offs are \(0, 1\), but at least one is needed, and each must be 1 or more"),
        ({"ks": ()}, r"The cut-offs are \(\), but at least one is needed"),
    ],
)
def test_recall_refuses(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        recall_at_k(**(RETRIEVAL | changes))


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (with_nan(LOGITS), LABELS, "logits hold NaN values, which have no place in a ranking"),
        (LOGITS, LABELS + 1, "labels are torch.int64 from 1 to 3, but the logits have 3 classes: whole"),
        (LOGITS, LABELS - 1, "labels are torch.int64 from -1 to 1"),
        (LOGITS, LABELS.float(), "labels are torch.float32 from 0.0 to 2.0"),
        (LOGITS, LABELS[:3], r"logits have shape \(4, 3\) and labels \(3,\), but \(examples, classes\) and"),
        (LOGITS[:0], LABELS[:0], "with at least one example are needed"),
    ],
)
def test_accuracy_refuses(logits: Tensor, labels: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        top_k_accuracy(logits, labels, ks=(1,))
    with pytest.raises(ValueError, match=message):
        mean_per_class_accuracy(logits, labels)


def test_logits_may_be_infinite():
    """The logarithm of a probability of zero is."""
    assert top_k_accuracy(torch.tensor([[-torch.inf, 0.0]]), torch.tensor([1]), ks=(1,)) == {1: 1.0}


@pytest.mark.parametrize(
    ("scores", "is_right", "message"),
    [
        (with_nan(SCORES), IS_RIGHT, "scores hold NaN values"),
        (SCORES, IS_RIGHT & False, "None of 4 examples is right, so that there is no precision to average"),
        (
            SCORES,
            IS_RIGHT.long(),
            r"is_right is torch.int64 of shape \(4,\), but \(examples,\) for both and torch.bool",
        ),
        (SCORES, IS_RIGHT[:3], r"scores have shape \(4,\) and is_right is torch.bool of shape \(3,\)"),
    ],
)
@pytest.mark.parametrize("metric", [average_precision, eleven_point_average_precision])
def test_average_precision_refuses(metric: Any, scores: Tensor, is_right: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        metric(scores, is_right)


def test_mean_average_precision_refuses_other_shapes():
    with pytest.raises(
        ValueError, match=r"scores have shape \(4,\), is_right \(4,\) and is_counted \(4,\), but \(examples"
    ):
        mean_average_precision(SCORES, IS_RIGHT)
