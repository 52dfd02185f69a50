"""The loss by tiles against the plain one: equal, in linear memory, on one process. test_losses.py has several."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_clip.training.losses import global_contrastive_loss

from ..largest_tensor import HeldMemory
from .loss_scenarios import small_tiles
from .plain_loss import differentiate, plain_loss

PAIRS, WIDTH = 400, 512
IDS = {"local_image_ids": 500, "local_text_ids": 300}
"""How many different images and captions they are drawn from."""


def tiled_loss(*embeds: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    result = global_contrastive_loss(*embeds, **options)
    return result.local_loss_to_backpropagate, result.global_accuracy


def embeds_of(pairs: int, width: int, cosine: float) -> tuple[Tensor, Tensor]:
    """Images and texts of length one. A pair's cosine is about the given one, all others' are about zero."""
    generator = torch.Generator().manual_seed(0)
    images, noise = (normalize(torch.randn(pairs, width, generator=generator), dim=-1) for _ in range(2))
    return images, normalize(cosine * images + math.sqrt(1 - cosine**2) * noise, dim=-1)


def options_of(kind: str, label_smoothing: float, has_ids: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"kind": kind, "label_smoothing": label_smoothing}
    options |= {"logit_bias": torch.tensor(-10.0)} if kind == "sigmoid" else {}
    generator = torch.Generator().manual_seed(1)
    return options | {n: torch.randint(0, count, (PAIRS,), generator=generator) for n, count in IDS.items() if has_ids}


def in_float64(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if name == "logit_bias" else value for name, value in options.items()}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


KINDS = [("softmax", 0.0), ("softmax", 0.1), ("sigmoid", 0.0)]


@pytest.mark.parametrize("has_ids", [False, True], ids=["all negatives", "duplicates"])
@pytest.mark.parametrize(("kind", "label_smoothing"), KINDS)
@pytest.mark.parametrize(("cosine", "scale"), [(0.0, 1 / 0.07), (0.3, 1 / 0.07), (0.3, 40.0), (0.9, 1 / 0.07)])
def test_float32_is_within_1e_6_of_the_plain_loss_in_float64(
    cosine: float, scale: float, kind: str, label_smoothing: float, has_ids: bool
):
    """At the start of training, in its midst, and where the loss is nearly zero. Tiles at the edges are smaller."""
    embeds = (*embeds_of(PAIRS, WIDTH, cosine), torch.tensor(scale).log())
    options = options_of(kind, label_smoothing, has_ids)
    expected = differentiate(plain_loss, *(value.double() for value in embeds), **in_float64(options))
    with small_tiles(96, 130):
        found = differentiate(tiled_loss, *embeds, **options)
    assert found.pop("accuracy").item() == pytest.approx(expected.pop("accuracy").item())
    assert {name: relative_error(found[name], value) for name, value in expected.items()} == pytest.approx(
        dict.fromkeys(expected, 0.0), abs=1e-6
    )


@pytest.mark.parametrize("has_ids", [False, True], ids=["all negatives", "duplicates"])
@pytest.mark.parametrize(("kind", "label_smoothing"), KINDS)
def test_float64_equals_the_plain_loss(kind: str, label_smoothing: float, has_ids: bool):
    embeds = [value.double() for value in (*embeds_of(PAIRS, 8, 0.3), torch.tensor(2.0))]
    options = in_float64(options_of(kind, label_smoothing, has_ids))
    expected = differentiate(plain_loss, *embeds, **options)
    with small_tiles(7, 60):
        found = differentiate(tiled_loss, *embeds, **options)
    assert all(relative_error(found[name], value) < 1e-13 for name, value in expected.items())


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_logits_that_differ_by_more_than_float32_can_hold(kind: str):
    """A row's logits go from -400 to 400, and its largest come last."""
    images = torch.linspace(0.1, 2, 40)[:, None]
    texts = torch.linspace(-2, 2, 40)[:, None]
    bias = {"logit_bias": torch.tensor(0.0)} if kind == "sigmoid" else {}
    with small_tiles(8, 8):
        found = differentiate(tiled_loss, images, texts, torch.tensor(math.log(100)), kind=kind, **bias)
    doubles = (images.double(), texts.double(), torch.tensor(math.log(100)).double())
    expected = differentiate(plain_loss, *doubles, kind=kind, **in_float64(bias))
    assert all(relative_error(found[name], value) < 1e-5 for name, value in expected.items())


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_memory_grows_with_the_batch_and_not_with_its_square(kind: str):
    held = {}
    for pairs in (500, 1000):
        ids = {"local_image_ids": torch.arange(pairs) // 2, "local_text_ids": torch.arange(pairs)}
        bias = {"logit_bias": torch.tensor(0.0)} if kind == "sigmoid" else {}
        embeds = embeds_of(pairs, 4, 0.3)
        with small_tiles(64, 64), HeldMemory() as memory:
            differentiate(tiled_loss, *embeds, torch.tensor(1.0), kind=kind, **ids, **bias)
        held[pairs] = memory.most
    assert held[1000] <= 2 * held[500]
    assert held[1000] < 1000 * 1000 * 4 / 10


def test_collapsed_model_is_never_right():
    """All features are equal. The logits of other tiles, and of smaller ones, are then equal to the last bit."""
    collapsed = embeds_of(1, 512, 0.0)[0].expand(301, -1).contiguous()
    for tile in ((1024, 1024), (64, 50), (7, 300)):
        with small_tiles(*tile):
            assert global_contrastive_loss(collapsed, collapsed, torch.tensor(2.6)).global_accuracy == 0


def test_backward_twice_gives_the_gradient_twice():
    images, texts = (embeds.requires_grad_() for embeds in embeds_of(20, 4, 0.3))
    loss = global_contrastive_loss(images, texts, torch.tensor(2.0)).local_loss_to_backpropagate
    loss.backward(retain_graph=True)
    once = images.grad.clone()
    (3 * loss).backward()
    assert torch.allclose(images.grad, 4 * once, rtol=1e-6)


def test_autocast_around_backward_changes_nothing():
    gradients = []
    for enabled in (False, True):
        images, texts = (embeds.requires_grad_() for embeds in embeds_of(20, 4, 0.3))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            global_contrastive_loss(images, texts, torch.tensor(2.0)).local_loss_to_backpropagate.backward()
        gradients.append(torch.cat([images.grad, texts.grad]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("locked", ["images", "texts", "both"])
def test_what_is_locked_has_no_gradient_and_the_rest_keeps_its_own(locked: str):
    leaves = [value.requires_grad_() for value in (*embeds_of(20, 4, 0.3), torch.tensor(2.0))]
    global_contrastive_loss(*leaves).local_loss_to_backpropagate.backward()
    expected = [leaf.grad.clone() for leaf in leaves]
    for leaf, name in zip(leaves, ("images", "texts", "scale"), strict=True):
        leaf.grad = None
        leaf.requires_grad_(name != locked and (locked != "both" or name == "scale"))
    global_contrastive_loss(*leaves).local_loss_to_backpropagate.backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        assert leaf.grad is None or torch.equal(leaf.grad, gradient)


def test_second_derivative_is_refused():
    images, texts = (embeds.requires_grad_() for embeds in embeds_of(5, 4, 0.3))
    loss = global_contrastive_loss(images, texts, torch.tensor(2.0)).local_loss_to_backpropagate
    with pytest.raises(NotImplementedError, match="with create_graph=True, but it has no second derivative: leave"):
        torch.autograd.grad(loss, images, create_graph=True)
