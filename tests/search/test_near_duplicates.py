"""Near duplicates are those that comparing all pairs one by one finds, whichever way a tile of pairs is compared."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_clip.search import near_duplicates
from hf_clip.search.near_duplicates import Groups, fold, group_duplicates

COUNT, WIDTH = 200, 32


def groups_one_by_one(embeddings: Tensor, hashes: np.ndarray, similarity: float, bits: int) -> list[list[int]]:
    """The definition: two images are joined if both their embeddings and their hashes are near."""
    vectors = embeddings.double().numpy()
    group = list(range(len(vectors)))
    for one in range(len(vectors)):
        for other in range(one):
            differing = bin((int(hashes[one]) ^ int(hashes[other])) & (2**64 - 1)).count("1")
            if differing <= bits and vectors[one] @ vectors[other] >= similarity and group[one] != group[other]:
                low, high = sorted((group[one], group[other]))
                group = [low if leader == high else leader for leader in group]
    found = [[place for place, leader in enumerate(group) if leader == first] for first in range(len(group))]
    return [places for places in found if len(places) > 1]


def make(kind: str) -> tuple[Tensor, np.ndarray]:
    """Embeddings (I, D) float16 and hashes (I,): a fifth of the images are copies, which are near in both."""
    random = np.random.default_rng(3)
    hashes = random.integers(-(2**63), 2**63, COUNT, dtype=np.int64)
    vectors = torch.from_numpy(random.standard_normal((COUNT, WIDTH)))
    for copy in random.permutation(COUNT)[: COUNT // 5]:
        of = int(random.integers(COUNT))
        vectors[copy] = vectors[of] + 0.03 * torch.from_numpy(random.standard_normal(WIDTH))
        hashes[copy] = hashes[of] ^ (np.int64(1) << random.integers(63))
    if kind == "plain images":  # whose hashes are equal, and whose embeddings are not
        hashes[random.random(COUNT) < 0.6] = 0
    if kind == "one image":
        vectors, hashes = vectors[:1].expand(COUNT, -1), hashes[:1].repeat(COUNT)
    if kind == "a chain":  # of which only neighbours are near
        angles = torch.arange(COUNT) * 0.2
        vectors = torch.zeros(COUNT, WIDTH).index_copy(
            1, torch.tensor([0, 1]), torch.stack([angles.cos(), angles.sin()], 1)
        )
        hashes = np.zeros(COUNT, dtype=np.int64)
    return normalize(vectors, dim=1).half(), hashes


@pytest.mark.parametrize("kind", ["copies", "plain images", "one image", "a chain"])
@pytest.mark.parametrize("bits", [0, 10, 64])
@pytest.mark.parametrize("many", [0.0, 0.02, 1.0])
def test_groups_are_those_of_comparing_one_by_one(kind: str, bits: int, many: float, monkeypatch: pytest.MonkeyPatch):
    """In tiles that do not divide the images, and that are compared one by one, as a product, or as they are full."""
    for name, value in (("TILE_ROWS", 24), ("TILE_COLUMNS", 36), ("STRIP_ROWS", 7), ("PAIRS_AT_ONCE", 50)):
        monkeypatch.setattr(near_duplicates, name, value)
    monkeypatch.setattr(near_duplicates, "MOST_SINGLES", many)
    embeddings, hashes = make(kind)
    found = group_duplicates(embeddings, hashes, 0.95, bits)
    if (kind, bits) == ("copies", 10):
        assert 25 < sum(map(len, found)) < 90
    assert found == expected_groups(kind, bits)


EXPECTED: dict[tuple[str, int], list[list[int]]] = {}


def expected_groups(kind: str, bits: int) -> list[list[int]]:
    if (kind, bits) not in EXPECTED:
        EXPECTED[kind, bits] = groups_one_by_one(*make(kind), 0.95, bits)
    return EXPECTED[kind, bits]


def test_memory_does_not_grow_with_pairs(monkeypatch: pytest.MonkeyPatch):
    """No tile is larger than a tile, although all images are one."""
    sizes: list[int] = []
    pairs_in = near_duplicates._pairs_in

    def counting(tile: np.ndarray, *where: int) -> np.ndarray:
        found = pairs_in(tile, *where)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(near_duplicates, "_pairs_in", counting)
    monkeypatch.setattr(near_duplicates, "TILE_ROWS", 10)
    monkeypatch.setattr(near_duplicates, "TILE_COLUMNS", 20)
    embeddings, hashes = make("one image")
    assert group_duplicates(embeddings, hashes) == [list(range(COUNT))]
    assert max(sizes) <= 10 * 20
    assert sum(sizes) <= 2 * 10 * COUNT, "pairs within a group are not looked at again"


def test_groups_join_whatever_the_order():
    random = np.random.default_rng(0)
    pairs = np.array([[0, 9], [9, 4], [2, 3], [7, 7], [4, 5], [3, 8]])
    for _ in range(20):
        groups = Groups(10)
        for part in np.array_split(random.permutation(pairs), 3):
            groups.join(part)
        assert groups.lists() == [[0, 4, 5, 9], [2, 3, 8]]
    assert Groups(0).lists() == []
    assert Groups(3).lists() == []


def test_no_image_and_one_image():
    for count in (0, 1):
        assert group_duplicates(torch.zeros(count, 4), np.zeros(count, dtype=np.int64)) == []
    assert fold(torch.tensor([5]), torch.ones(1, 4), np.zeros(1, dtype=np.int64)) == [(0, [])]
