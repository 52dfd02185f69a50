"""Negative texts of the losses: against matrices checked by hand and the plain losses. test_losses.py has processes."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from hf_clip.training.losses import global_contrastive_loss

from ..largest_tensor import HeldMemory
from .loss_scenarios import small_tiles
from .plain_loss import differentiate, plain_loss
from .test_tiles import IDS, KINDS, embeds_of, in_float64, options_of, relative_error, tiled_loss

PAIRS, NEGATIVES, WIDTH = 400, 150, 512


def with_negatives(options: dict[str, Any], negatives: Tensor) -> dict[str, Any]:
    """The same options with negative texts, of which some are captions where there are ids."""
    more: dict[str, Any] = {"local_negative_text_embeds": negatives}
    if "local_text_ids" in options:
        generator = torch.Generator().manual_seed(2)
        drawn = torch.randint(0, IDS["local_text_ids"], (len(negatives),), generator=generator)
        more["local_negative_text_ids"] = drawn
    return options | more


def doubled(options: dict[str, Any]) -> dict[str, Any]:
    embeds = options["local_negative_text_embeds"].double()
    return in_float64(options) | {"local_negative_text_embeds": embeds}


@pytest.mark.parametrize("has_ids", [False, True], ids=["all negatives", "duplicates"])
@pytest.mark.parametrize(("kind", "label_smoothing"), KINDS)
@pytest.mark.parametrize("cosine", [0.3, 0.9])
def test_float32_is_within_1e_6_of_the_plain_loss_in_float64(
    cosine: float, kind: str, label_smoothing: float, has_ids: bool
):
    """With all gradients. A negative is nearly as similar to an image as its own caption, as hard ones are."""
    images, texts = embeds_of(PAIRS, WIDTH, cosine)
    negatives = embeds_of(PAIRS, WIDTH, 0.95 * cosine)[1].flip(1)[:NEGATIVES] + 0.5 * texts[:NEGATIVES]
    options = with_negatives(options_of(kind, label_smoothing, has_ids), negatives / negatives.norm(dim=1)[:, None])
    scale = torch.tensor(1 / 0.07).log()
    expected = differentiate(plain_loss, images.double(), texts.double(), scale.double(), **doubled(options))
    with small_tiles(96, 70):
        found = differentiate(tiled_loss, images, texts, scale, **options)
    assert found.pop("accuracy").item() == pytest.approx(expected.pop("accuracy").item())
    assert {name: relative_error(found[name], value) for name, value in expected.items()} == pytest.approx(
        dict.fromkeys(expected, 0.0), abs=1e-6
    )


@pytest.mark.parametrize("has_ids", [False, True], ids=["all negatives", "duplicates"])
@pytest.mark.parametrize(("kind", "label_smoothing"), KINDS)
def test_float64_equals_the_plain_loss(kind: str, label_smoothing: float, has_ids: bool):
    images, texts, scale = [value.double() for value in (*embeds_of(PAIRS, 8, 0.3), torch.tensor(2.0))]
    options = doubled(with_negatives(options_of(kind, label_smoothing, has_ids), images.flip(0)[:NEGATIVES]))
    expected = differentiate(plain_loss, images, texts, scale, **options)
    with small_tiles(7, 60):
        found = differentiate(tiled_loss, images, texts, scale, **options)
    assert all(relative_error(found[name], value) < 1e-13 for name, value in expected.items())


SCALE = torch.tensor(2.0, dtype=torch.float64)


def random_embeds(count: int, seed: int) -> Tensor:
    drawn = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(drawn, dim=-1)


def test_images_choose_among_the_negatives_too_and_texts_choose_as_before():
    images, texts, negatives = random_embeds(5, 0), random_embeds(5, 1), random_embeds(3, 2)
    logits, own = images @ texts.T * math.exp(2), torch.arange(5)
    rows = torch.cat([logits, images @ negatives.T * math.exp(2)], dim=1)
    expected = (cross_entropy(rows, own) + cross_entropy(logits.T, own)) / 2
    found = global_contrastive_loss(images, texts, SCALE, local_negative_text_embeds=negatives)
    without = global_contrastive_loss(images, texts, SCALE)
    assert found.global_loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert found.global_loss > without.global_loss


def test_sigmoid_asks_for_each_image_and_negative():
    images, texts, negatives = random_embeds(5, 0), random_embeds(5, 1), random_embeds(3, 2)
    bias = torch.tensor(-3.0, dtype=torch.float64)
    more = -logsigmoid(-(images @ negatives.T * math.exp(2) - 3)).sum() / 5
    options: dict[str, Any] = {"logit_bias": bias, "kind": "sigmoid"}
    without = global_contrastive_loss(images, texts, SCALE, **options)
    found = global_contrastive_loss(images, texts, SCALE, local_negative_text_embeds=negatives, **options)
    assert found.global_loss.item() == pytest.approx((without.global_loss + more).item(), rel=1e-12)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_no_image_is_pushed_from_its_own_caption(kind: str):
    """Pairs 0 and 2 have one image. The negatives are caption 0, caption 1, and nobody's."""
    images, texts = random_embeds(3, 0), random_embeds(3, 1)
    images[2] = images[0]
    negatives = torch.stack([texts[0], texts[1], random_embeds(1, 2)[0]])
    ids = {"local_image_ids": torch.tensor([7, 8, 7]), "local_text_ids": torch.tensor([1, 2, 3])}
    options: dict[str, Any] = {"kind": kind, **ids}
    options |= {"logit_bias": torch.tensor(-3.0, dtype=torch.float64)} if kind == "sigmoid" else {}

    def loss_of(*chosen: int) -> float:
        negative_ids = torch.tensor([1, 2, 9])[list(chosen)]
        more = {"local_negative_text_embeds": negatives[list(chosen)], "local_negative_text_ids": negative_ids}
        return global_contrastive_loss(images, texts, SCALE, **options, **more).global_loss.item()

    # Caption 0 is wrong for image 1 alone, and caption 1 for images 0 and 2.
    without = loss_of()
    if kind == "sigmoid":
        logits = images @ negatives.T * math.exp(2) - 3
        terms = -logsigmoid(-logits) / 3
        assert loss_of(0) - without == pytest.approx(terms[1, 0].item(), rel=1e-9)
        assert loss_of(1) - without == pytest.approx((terms[0, 1] + terms[2, 1]).item(), rel=1e-9)
    else:
        logits = images @ torch.cat([texts, negatives]).T * math.exp(2)
        # Candidates of the rows: pairs 0 and 2 are no negatives of each other.
        rows = {0: [0, 1, 4, 5], 1: [1, 0, 2, 3, 5], 2: [2, 1, 4, 5]}
        expected = sum(cross_entropy(logits[i, places], torch.tensor(0)) for i, places in rows.items()) / 6
        columns = {0: [0, 1], 1: [1, 0, 2], 2: [2, 1]}
        expected += sum(cross_entropy(logits.T[i, places], torch.tensor(0)) for i, places in columns.items()) / 6
        assert loss_of(0, 1, 2) == pytest.approx(float(expected), rel=1e-9)
    assert loss_of(2) > without


def test_accuracy_is_of_the_pairs():
    """A negative that is as similar as the own caption makes the loss larger, and no pair wrong."""
    images = torch.eye(3, dtype=torch.float64)
    found = global_contrastive_loss(images, images, SCALE, local_negative_text_embeds=images)
    assert found.global_accuracy == 1


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_what_is_locked_has_no_gradient(kind: str):
    bias = {"logit_bias": torch.tensor(0.0, dtype=torch.float64), "kind": kind} if kind == "sigmoid" else {}

    def gradients(*trained: str) -> dict[str, Tensor]:
        leaves = {"images": random_embeds(4, 0), "texts": random_embeds(4, 1), "negatives": random_embeds(3, 2)}
        leaves["scale"] = SCALE.clone()
        for name in trained:
            leaves[name].requires_grad_()
        loss = global_contrastive_loss(
            leaves["images"], leaves["texts"], leaves["scale"], local_negative_text_embeds=leaves["negatives"], **bias
        )
        loss.local_loss_to_backpropagate.backward()
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    everything = gradients("images", "texts", "negatives", "scale")
    for trained in (("images", "scale"), ("texts", "negatives"), ("scale",), ("negatives",)):
        found = gradients(*trained)
        assert found.keys() == {*trained}
        assert all(torch.equal(found[name], everything[name]) for name in trained)


def test_memory_grows_with_the_negatives_and_not_with_their_product():
    held = {}
    for count in (500, 1000):
        ids = {"local_image_ids": torch.arange(count) // 2, "local_text_ids": torch.arange(count)}
        ids["local_negative_text_ids"] = torch.arange(count) * 2
        embeds = embeds_of(count, 4, 0.3)
        more: dict[str, Any] = {"local_negative_text_embeds": embeds[1].flip(0), **ids}
        with small_tiles(64, 64), HeldMemory() as memory:
            differentiate(tiled_loss, *embeds, torch.tensor(1.0), **more)
        held[count] = memory.most
    assert held[1000] <= 2 * held[500]
    assert held[1000] < 1000 * 1000 * 4 / 10
