"""The penalty towards the pretrained weights: its gradient against autograd's and a hand's, and its part in a run."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_clip import HfClipModel
from hf_clip.training.penalty import PenaltyTowardsStart
from hf_clip.training.trainable import lock_

from ..finetuning import largest_difference, records, train, weights
from .steps import weights_of


def test_gradient_is_that_of_the_penalty_in_the_loss(model: HfClipModel):
    lock_(model, "image,text")
    model.double()
    penalty = PenaltyTowardsStart(model, 0.5)
    start = weights_of(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained.keys() == penalty.start.keys() >= {"visual_projection.weight", "text_projection.weight"}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter))
            parameter.grad = torch.randn_like(parameter)
    of_loss = {name: parameter.grad.clone() for name, parameter in trained.items()}
    expected = 0.5 * sum((parameter - start[name]).square().sum() for name, parameter in trained.items())
    gradients = torch.autograd.grad(expected, list(trained.values()))
    penalty.add_gradients_(model)
    for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, of_loss[name] + gradient, rtol=1e-12, atol=1e-12)
    assert penalty.value(model) == pytest.approx(expected.item(), rel=1e-12)
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


def test_gradient_is_scaled_as_the_others_and_stands_where_the_loss_has_none():
    model = nn.Linear(1, 1, bias=False)
    penalty = PenaltyTowardsStart(model, 0.25)
    start = copy.deepcopy(model.weight.data)
    model.weight.data += 3
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))  # which makes its scale
    penalty.add_gradients_(model, scaler)
    assert model.weight.grad == pytest.approx(2 * 0.25 * 3 * 8)
    assert torch.equal(penalty.start["weight"], start)


def test_run_stays_nearer_to_its_start(digits: Path, tmp_path: Path):
    """Plain SGD at rate 0.1: since 2 · 5 · 0.1 = 1, the second step's penalty takes back all of the first step."""
    chosen = {"optim": "SGD", "learning_rate": "0.1", "weight_decay": 0.0, "lr_scheduler_type": "constant"}
    chosen |= {"lock": "image,text", "max_steps": 2, "logging_steps": 1, "augmentation": "none"}
    start = weights(digits / "vit")
    free = weights(train(digits, tmp_path / "free", **chosen))
    out = train(digits, tmp_path / "held", l2_to_pretrained=5.0, **chosen)
    held = weights(out)
    moved = {name for name in start if not torch.equal(held[name], start[name])}
    assert moved == {"visual_projection.weight", "text_projection.weight", "logit_scale"}
    assert largest_difference(held, start) < largest_difference(free, start)
    squares = sum((held[name] - start[name]).double().square().sum().item() for name in moved)
    assert records(out)[-1]["l2_to_pretrained"] == pytest.approx(5.0 * squares, rel=1e-4)
    assert json.loads((out / "training_config.json").read_text())["l2_to_pretrained"] == 5.0
