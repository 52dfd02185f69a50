"""Ranks of both directions in blocks: equal to the plain way, in little memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_clip.evaluation.metrics import ranks_of_first_right
from hf_clip.evaluation.ranking import hub_bias, rank_both_ways

from ..largest_tensor import HeldMemory


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([(1, 1), (3, 5), (100, 100)]), st.booleans())
def test_ranks_agree_with_the_whole_matrix(seed: int, sizes: tuple[int, int], is_corrected: bool):
    """Whole numbers: blocks of another shape give the same sums, and many similarities are equal."""
    generator = torch.Generator().manual_seed(seed)
    images, texts = (torch.randint(-2, 3, (count, 3), generator=generator).float() for count in (7, 16))
    image_ids, text_ids = torch.arange(7), torch.cat([torch.arange(7), torch.randint(0, 7, (9,), generator=generator)])
    biases = [torch.randint(-2, 3, (count,), generator=generator).float() for count in (7, 16)]
    given_biases = {"image_bias": biases[0], "text_bias": biases[1]} if is_corrected else {}
    found = rank_both_ways(images, texts, image_ids, text_ids, sizes=sizes, **given_biases)
    ones = torch.ones(16, 1), torch.ones(7, 1)
    zero = 1.0 if is_corrected else 0.0
    with_bias = [
        ((images, torch.ones(7, 1)), (texts, -zero * biases[1][:, None]), image_ids, text_ids),
        ((texts, ones[0]), (images, -zero * biases[0][:, None]), text_ids, image_ids),
    ]
    for ranks, (queries, gallery, query_ids, gallery_ids) in zip(found, with_bias, strict=True):
        plain = ranks_of_first_right(torch.cat(queries, 1), torch.cat(gallery, 1), query_ids, gallery_ids)
        assert ranks.tolist() == plain.tolist()


def test_equal_similarities_count_against_the_model():
    ids = torch.arange(5)
    for ranks in rank_both_ways(torch.ones(5, 2), torch.ones(5, 2), ids, ids, sizes=(2, 3)):
        assert ranks.tolist() == [4] * 5


def test_memory_grows_with_one_block_and_not_with_the_matrix():
    images, texts = torch.randn(3000, 8), torch.randn(6000, 8)
    with HeldMemory() as memory:
        rank_both_ways(images, texts, torch.arange(3000), torch.arange(6000) % 3000, sizes=(200, 500))
    assert memory.most < 2**21  # a block has 0.4 MB, the matrix 72 MB


def test_text_without_an_image_is_an_error():
    with pytest.raises(ValueError, match=r"1 of 3 texts belong to nothing on the other side, the first is text 1 with"):
        rank_both_ways(torch.eye(2), torch.eye(3)[:, :2], torch.tensor([0, 1]), torch.tensor([0, 7, 1]))


def test_hub_bias_agrees_with_the_whole_matrix():
    generator = torch.Generator().manual_seed(0)
    gallery, references = torch.randn(11, 4, generator=generator), torch.randn(30, 4, generator=generator)
    expected = 0.75 * (gallery @ references.T).topk(5, dim=1).values.mean(1)
    torch.testing.assert_close(hub_bias(gallery, references, alpha=0.75, k=5, chunk=3), expected)


def test_hub_is_found_less_often_with_the_correction():
    """Row 2 is near all queries; each query's own row is a little farther away."""
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.9]])
    queries, ids = torch.tensor([[0.7, 0.3], [0.3, 0.7]]), torch.tensor([0, 1])
    bias = hub_bias(gallery, queries, alpha=1.0, k=2)
    everything = torch.cat([ids, torch.tensor([0])])
    plain = rank_both_ways(queries, gallery, ids, everything)[0]
    corrected = rank_both_ways(queries, gallery, ids, torch.tensor([0, 1, 0]), text_bias=bias)[0]
    assert plain.tolist() == [0, 1]
    assert corrected.tolist() == [0, 0]


def test_correction_needs_as_many_references_as_it_averages():
    with pytest.raises(
        ValueError, match=r"takes the mean of 128 similarities, but there are 2 reference queries: take"
    ):
        hub_bias(torch.eye(2), torch.eye(2), k=128)
