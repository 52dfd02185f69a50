"""The contrastive losses: against matrices checked by hand, and several processes against one."""

import math
import multiprocessing
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, normalize
from transformers import AutoModel

from hf_clip import HfClipConfig
from hf_clip.data.content import content_id
from hf_clip.model.modeling_hf_clip import contrastive_loss, sigmoid_loss
from hf_clip.training.losses import (
    INITIAL_SIGMOID_LOGIT_BIAS,
    INITIAL_SIGMOID_LOGIT_SCALE,
    global_contrastive_loss,
)

from ..small import random_images, texts
from .loss_scenarios import SCENARIOS, run_micro_batches, run_process, run_scenario

Records = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory, repositories: dict[str, Path]) -> Records:
    """What two and three processes found, by their number; whole models run in two."""
    found: Records = {}
    multiprocessing.get_context("forkserver").set_forkserver_preload([run_process.__module__])  # imported once for all
    for processes in (2, 3):
        folder = tmp_path_factory.mktemp(f"processes-{processes}")
        models = repositories if processes == 2 else {}
        mp.start_processes(run_process, (processes, folder, models), nprocs=processes, start_method="forkserver")
        found[processes] = [torch.load(folder / f"{process}.pt") for process in range(processes)]
    return found


def check_equal(found: dict[str, Any], loss: Tensor, gradients: dict[str, Tensor]) -> None:
    """A relative error of at most 1e-5 for the loss and each parameter's gradient.

    Some gradients are zero but for rounding (attention doesn't depend on the keys' bias): those are measured against
    the largest gradient.
    """
    assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert set(found["gradients"]) == set(gradients)
    largest = max(gradient.norm().item() for gradient in gradients.values())
    for name, expected in gradients.items():
        error = (found["gradients"][name] - expected).norm().item()
        assert error <= 1e-5 * max(expected.norm().item(), 1e-3 * largest), name


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_equal_one_on_the_whole_batch(processes: int, name: str, records: Records):
    scenario = SCENARIOS[name]
    one = run_scenario(scenario, [sum(scenario.counts[processes])], 0, wrap=False)
    assert all(gradient.abs().max() > 1e-6 for gradient in one["gradients"].values())
    for record in records[processes]:
        check_equal(record[name], one["loss"], one["gradients"])
        assert record[name]["accuracy"].item() == pytest.approx(one["accuracy"].item())


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_two_processes_train_a_model_as_its_own_loss_does(tower: str, kind: str, repository: Path, records: Records):
    model = AutoModel.from_pretrained(repository, contrastive_loss=kind).eval()
    loss = model(input_ids=texts(), pixel_values=random_images(tower), return_loss=True).loss
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ("logit_bias" in gradients) == (kind == "sigmoid")
    for record in records[2]:
        check_equal(record[f"{tower}, {kind}"], loss, gradients)


def test_micro_batches_of_two_processes_give_the_gradients_of_the_whole_batch(
    tower: str, repository: Path, records: Records
):
    """Of every parameter, by real DDP. Each gradient is exchanged once in a step."""
    one = run_micro_batches(repository, tower, 0, wrap=False)
    for record in records[2]:
        found = record[f"{tower}, micro-batches"]
        check_equal(found, one["loss"], one["gradients"])
        assert found["exchanged"] == [sum(gradient.numel() for gradient in one["gradients"].values())] * 2


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_no_process_holds_all_logits(kind: str, records: Records):
    for record in records[2]:  # of 100 pairs each
        assert 100 * 200 <= record["largest"][kind] <= 101 * 200


def test_no_process_of_a_ring_holds_all_features(records: Records):
    for record in records[2]:  # of 100 pairs each, 64 wide
        assert record["largest in a ring"] == 100 * 64


@pytest.mark.parametrize("processes", [2, 3])
def test_all_processes_refuse_what_one_of_them_was_given(processes: int, records: Records):
    last = processes - 1
    expected = [
        f"Process {last} has 3 image embeddings, but 2 text embeddings: row i of both must be one pair",
        f"Process {last} has 3 pairs, but 1 local_text_ids: pass one for each pair",
        f"local_image_ids were given on some processes and not on others (0 and {last} differ)",
        "The global batch has 1 pair(s), but a contrastive loss compares each pair with others: at least 2",
        "Of local_text_ids and local_negative_text_ids one was given without the other, but an image's own caption",
    ]
    for record in records[processes]:
        assert len(record["refusals"]) == len(expected)
        for message, start in zip(record["refusals"], expected, strict=True):
            assert message.startswith(start)


# One process.

IMAGES = torch.eye(3, dtype=torch.float64)
TEXTS = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.8, 0.1], [0.0, 0.3, 0.7]], dtype=torch.float64)
LOG_SCALE = torch.tensor(-math.log(0.07), dtype=torch.float64)
LOGITS = [[0.9 / 0.07, 0.1 / 0.07, 0.0], [0.1 / 0.07, 0.8 / 0.07, 0.3 / 0.07], [0.0, 0.1 / 0.07, 0.7 / 0.07]]
"""A worked example with temperature 0.07; the vectors are not of length one."""


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def test_worked_example_in_float64():
    assert [round(value, 4) for value in LOGITS[0] + LOGITS[1]] == [12.8571, 1.4286, 0.0, 1.4286, 11.4286, 4.2857]
    columns = [list(column) for column in zip(*LOGITS, strict=True)]
    by_hand = -sum(math.log(softmax(lines[i])[i]) for lines in (LOGITS, columns) for i in range(3)) / 6
    result = global_contrastive_loss(IMAGES, TEXTS, LOG_SCALE)
    assert result.global_loss.dtype == torch.float64
    assert result.global_loss.item() == pytest.approx(by_hand, rel=1e-12)
    assert result.local_loss_to_backpropagate.item() == pytest.approx(by_hand, rel=1e-12)
    assert result.global_accuracy.item() == 1


def test_gradient_is_softmax_minus_target():
    """The images are unit vectors: a text's gradient is the scale times its column of the logits' gradient."""
    columns = [list(column) for column in zip(*LOGITS, strict=True)]
    by_hand = torch.tensor(
        [[softmax(LOGITS[i])[j] + softmax(columns[j])[i] - 2 * (i == j) for j in range(3)] for i in range(3)],
        dtype=torch.float64,
    )
    embeds = TEXTS.clone().requires_grad_()
    scale = LOG_SCALE.clone().requires_grad_()
    global_contrastive_loss(IMAGES, embeds, scale).local_loss_to_backpropagate.backward()
    assert torch.allclose(embeds.grad, by_hand.T / (6 * 0.07), rtol=1e-12, atol=1e-15)
    assert scale.grad.item() == pytest.approx((by_hand / 6 * torch.tensor(LOGITS, dtype=torch.float64)).sum().item())


def test_worked_example_of_the_sigmoid_loss_in_float64():
    bias = torch.tensor(-10.0, dtype=torch.float64, requires_grad=True)
    result = global_contrastive_loss(IMAGES, TEXTS, LOG_SCALE, logit_bias=bias, kind="sigmoid")
    signed = [(LOGITS[i][j] - 10) * (1 if i == j else -1) for i in range(3) for j in range(3)]
    assert result.global_loss.item() == pytest.approx(sum(math.log1p(math.exp(-z)) for z in signed) / 3, rel=1e-12)
    result.local_loss_to_backpropagate.backward()
    sigmoids = [1 / (1 + math.exp(10 - LOGITS[i][j])) - (i == j) for i in range(3) for j in range(3)]
    assert bias.grad.item() == pytest.approx(sum(sigmoids) / 3, rel=1e-12)


def test_sigmoid_training_begins_as_published():
    assert math.exp(INITIAL_SIGMOID_LOGIT_SCALE) == pytest.approx(10)
    assert HfClipConfig().logit_bias_init_value == INITIAL_SIGMOID_LOGIT_BIAS == -10


def embeds_of(pairs: int, width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(normalize(torch.randn(pairs, width, generator=generator), dim=-1) for _ in range(2))


def test_agrees_with_the_models_losses():
    images, texts = embeds_of(7)
    scale = torch.tensor(2.0)
    logits = texts @ images.T * scale.exp()
    found = global_contrastive_loss(images, texts, scale).global_loss
    assert torch.allclose(found, contrastive_loss(logits), rtol=1e-6)
    found = global_contrastive_loss(images, texts, scale, logit_bias=torch.tensor(-3.0), kind="sigmoid").global_loss
    assert torch.allclose(found, sigmoid_loss(logits - 3), rtol=1e-6)


def test_label_smoothing_is_the_cross_entropys():
    images, texts = embeds_of(7)
    logits = images @ texts.T * math.exp(2)
    own = torch.arange(7)
    expected = (cross_entropy(logits, own, label_smoothing=0.2) + cross_entropy(logits.T, own, label_smoothing=0.2)) / 2
    found = global_contrastive_loss(images, texts, torch.tensor(2.0), label_smoothing=0.2).global_loss
    assert torch.allclose(found, expected, rtol=1e-6)


DUPLICATE_IDS = {"local_image_ids": torch.tensor([5, 6, 5, 7]), "local_text_ids": torch.tensor([1, 2, 3, 2])}
NEGATIVES = [[1, 3], [0, 2], [1, 3], [0, 2]]
"""Images 0 and 2 are equal, and so are captions 1 and 3."""


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_duplicates_are_no_negatives_of_the_softmax(label_smoothing: float):
    images, texts = embeds_of(4)
    logits, expected = images @ texts.T * math.exp(2), torch.zeros(())
    for lines in (logits, logits.T):
        for i, negatives in enumerate(NEGATIVES):
            candidates = lines[i, [i, *negatives]]  # one positive, two negatives: smoothing is over these three
            expected += cross_entropy(candidates, torch.tensor(0), label_smoothing=label_smoothing) / 8
    found = global_contrastive_loss(
        images, texts, torch.tensor(2.0), label_smoothing=label_smoothing, **DUPLICATE_IDS
    ).global_loss
    assert torch.allclose(found, expected, rtol=1e-6)


def test_duplicates_are_no_negatives_of_the_sigmoid_loss():
    images, texts = embeds_of(4)
    logits = images @ texts.T * math.exp(2) - 3
    negative = sum(-logsigmoid(-logits[i, negatives]).sum() for i, negatives in enumerate(NEGATIVES))
    expected = (negative - logsigmoid(logits.diagonal()).sum()) / 4
    found = global_contrastive_loss(
        images, texts, torch.tensor(2.0), logit_bias=torch.tensor(-3.0), kind="sigmoid", **DUPLICATE_IDS
    ).global_loss
    assert torch.allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_batch_of_one_image_only_has_finite_gradients(kind: str):
    images, texts = (embeds.requires_grad_() for embeds in embeds_of(3))
    bias = torch.tensor(-3.0) if kind == "sigmoid" else None
    result = global_contrastive_loss(
        images,
        texts,
        torch.tensor(2.0),
        logit_bias=bias,
        kind=kind,
        label_smoothing=0.1 if kind == "softmax" else 0.0,
        local_image_ids=torch.zeros(3, dtype=torch.int64),
    )
    result.local_loss_to_backpropagate.backward()
    assert torch.isfinite(images.grad).all()
    assert torch.isfinite(texts.grad).all()
    assert result.global_accuracy == 1
    assert (result.global_loss == 0) == (kind == "softmax")


def test_accuracy_counts_both_directions_and_no_ties():
    """Logits [[1, 0, 0], [1, 1, 0], [0, 0, 1]]: image 1 and text 0 have an equal; the others are right."""
    texts = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    scale = torch.tensor(0.0)
    assert global_contrastive_loss(torch.eye(3), texts, scale).global_accuracy.item() == pytest.approx(4 / 6)
    ids = torch.tensor([4, 4, 5])
    found = global_contrastive_loss(torch.eye(3), texts, scale, local_text_ids=ids)
    assert found.global_accuracy.item() == 1
    assert global_contrastive_loss(torch.ones(3, 3), torch.ones(3, 3), scale).global_accuracy.item() == 0


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_autocast_and_half_precision_change_nothing_but_the_embeddings(kind: str):
    images, texts = (embeds.bfloat16() for embeds in embeds_of(7))
    bias = torch.tensor(-3.0) if kind == "sigmoid" else None
    scale = torch.tensor(4.0)
    gradients = []
    for dtype, autocast in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        leaf = images.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = global_contrastive_loss(leaf, texts.to(dtype), scale, logit_bias=bias, kind=kind)
        result.local_loss_to_backpropagate.backward()
        assert result.global_loss.dtype == torch.float32
        gradients.append((result.global_loss, leaf.grad.bfloat16()))
    for (one, first), (other, second) in pairwise(gradients):
        assert torch.equal(one, other)
        assert torch.equal(first, second)


def test_evaluation_needs_no_graph():
    with torch.no_grad():
        result = global_contrastive_loss(*embeds_of(3), torch.tensor(1.0))
    assert not result.local_loss_to_backpropagate.requires_grad
    trained = global_contrastive_loss(*embeds_of(3), torch.tensor(1.0, requires_grad=True))
    assert trained.local_loss_to_backpropagate.requires_grad
    assert not trained.global_loss.requires_grad


def test_content_is_named_the_same_everywhere():
    assert content_id("a photo of a cat") == content_id(b"a photo of a cat") == 3911221920095594919
    assert content_id("a photo of a cat") != content_id("a photo of a cat ")
    assert content_id("\ud800") == content_id(b"\xed\xa0\x80")  # half of a surrogate pair, as broken files have it
    numbers = [content_id(str(number)) for number in range(1000)]
    assert len(set(numbers)) == 1000
    assert torch.tensor(numbers).min() >= 0  # and so they fit int64


VECTORS = torch.ones(3, 4)


@pytest.mark.parametrize(
    ("embeds", "options", "message"),
    [
        ((VECTORS[:1], VECTORS[:1]), {}, "The global batch has 1 pair(s), but a contrastive loss compares each pair"),
        ((VECTORS[:0], VECTORS[:0]), {}, "The global batch has 0 pair(s)"),
        ((VECTORS, VECTORS[:2]), {}, "Process 0 has 3 image embeddings, but 2 text embeddings: row i of both must be"),
        ((VECTORS, VECTORS[:, :2]), {}, "have shapes (3, 4) and (3, 2), but (pairs, width) with one width are needed"),
        ((VECTORS[0], VECTORS[0]), {}, "have shapes (4,) and (4,), but (pairs, width)"),
        ((VECTORS, VECTORS), {"kind": "triplet"}, "kind is 'triplet', but must be 'softmax' or 'sigmoid'"),
        ((VECTORS, VECTORS), {"kind": "sigmoid"}, "needs a logit_bias, and the model has none: load it with"),
        (
            (VECTORS, VECTORS),
            {"logit_bias": torch.tensor(0.0)},
            "cancels out of the softmax loss and would never learn",
        ),
        ((VECTORS, VECTORS), {"label_smoothing": 1.0}, "label_smoothing is 1.0, but must be at least 0 and below 1"),
        (
            (VECTORS, VECTORS),
            {"label_smoothing": 0.1, "kind": "sigmoid", "logit_bias": torch.tensor(0.0)},
            "label_smoothing is 0.1, but the sigmoid loss has none",
        ),
        ((VECTORS, VECTORS), {"local_text_ids": torch.arange(2)}, "has 3 pairs, but 2 local_text_ids"),
        (
            (VECTORS, VECTORS),
            {"local_image_ids": torch.ones(3)},
            "local_image_ids are torch.float32 of shape (3,), but",
        ),
        ((VECTORS, VECTORS), {"local_text_ids": torch.ones(3, 1).long()}, "int64 of shape (3, 1), but int64 of shape"),
        (
            (VECTORS, VECTORS),
            {"local_negative_text_embeds": VECTORS[:, :2]},
            "local_negative_text_embeds have shape (3, 2), but (negative texts, 4) is needed",
        ),
        (
            (VECTORS, VECTORS),
            {"local_negative_text_embeds": VECTORS, "local_negative_text_ids": torch.ones(3)},
            "int64 of shape (negative texts,) is needed: torch.tensor([content_id(...) for each negative text])",
        ),
        (
            (VECTORS, VECTORS),
            {"local_text_ids": torch.arange(3), "local_negative_text_ids": torch.arange(2)},
            "Process 0 has 0 negative texts, but 2 local_negative_text_ids: pass one for each of them.",
        ),
        (
            (VECTORS, VECTORS),
            {"local_negative_text_embeds": VECTORS, "local_negative_text_ids": torch.arange(3)},
            "Of local_text_ids and local_negative_text_ids one was given without the other",
        ),
    ],
)
def test_refusals(embeds: tuple[Tensor, Tensor], options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        global_contrastive_loss(*embeds, torch.tensor(1.0), **options)
