"""The average of two models' weights, against arithmetic done by hand."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from hf_clip import HfClipModel
from hf_clip.checkpoints.wise_ft import MOST, interpolate_weights, parse_alphas, show_alpha
from hf_clip.training.averaging import copy_weights
from hf_clip.training.optim import create_optimizer
from hf_clip.training.surgery import switch_to_sigmoid_
from hf_clip.training.trainable import lock_

from ..training.steps import changed, take_steps


@pytest.mark.parametrize(
    ("spec", "alphas"),
    [
        (0.5, [0.5]),
        ("1", [1.0]),
        ("0.3, 0.5", [0.3, 0.5]),
        ("0:1:0.1", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]),
        ("0.25:0.75:0.25", [0.25, 0.5, 0.75]),
    ],
)
def test_alphas_are_read(spec: str | float, alphas: list[float]):
    assert parse_alphas(spec) == alphas


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("half", "'half' is no α to average with: write '0.5', '0.3,0.5' or a range '0:1:0.1'"),
        ("0:1", "'0:1' is no α"),
        ("", "'' is no α"),
        ("0:1:0.3", "'0:1:0.3' does not lead from its first number to its second in steps of its third"),
        ("1:0:0.1", "does not lead"),
        ("0:1:0", "does not lead"),
        ("1.5", "α is 1.5, but must be between 0 .pretrained. and 1 .fine-tuned."),
        ("nan", "α is nan"),
        ("1.00000001", "α is 1.00000001, but must be"),
        ("0:inf:0.1", "'0:inf:0.1' does not lead from its first number"),
        ("0:nan:0.1", "'0:nan:0.1' does not lead"),
        ("0:1:nan", "'0:1:nan' does not lead"),
        ("0:1:1e-9", "'0:1:1e-9' has more than 1001 values of α, and each is a model to measure: take a larger step"),
        ("0:1:1e-320", "has more than 1001 values"),
    ],
)
def test_wrong_alpha_says_what_is_right(spec: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_alphas(spec)


def test_alphas_that_differ_are_written_differently():
    assert len(parse_alphas("0:1:0.001")) == MOST
    alphas = [*parse_alphas("-0,0.12345671,0.12345672,0.3"), *parse_alphas("0:1:0.1")[3:4], 1]
    assert [show_alpha(alpha) for alpha in alphas] == ["0", "0.12345671", "0.12345672", "0.3", "0.3", "1"]


@pytest.fixture
def ends(model: HfClipModel, tower: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A model's weights before and after two real steps."""
    pretrained = copy_weights(model)
    take_steps(model, tower, create_optimizer(model, rates=1e-2))
    return pretrained, copy_weights(model)


def test_ends_are_either_model_bit_for_bit(ends: tuple[dict[str, Tensor], dict[str, Tensor]]):
    for alpha, expected in zip((0, 1.0), ends, strict=True):
        mixed = interpolate_weights(*ends, alpha)
        assert mixed.keys() == expected.keys()
        assert all(torch.equal(mixed[name], expected[name]) for name in expected)
        assert all(mixed[name].data_ptr() != expected[name].data_ptr() for name in expected)


def test_alpha_counts_the_fine_tuned_model(ends: tuple[dict[str, Tensor], dict[str, Tensor]], tower: str):
    pretrained, finetuned = ends
    mixed = interpolate_weights(pretrained, finetuned, 0.25)
    for name, tensor in mixed.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, 0.75 * pretrained[name] + 0.25 * finetuned[name])
        else:
            assert torch.equal(tensor, finetuned[name])
    if tower == "resnet":
        name = "vision_model.layer2.1.bn2.running_var"
        assert not torch.equal(mixed[name], pretrained[name])
        assert (mixed[name] > 0).all()
        counter = "vision_model.bn1.num_batches_tracked"
        assert mixed[counter] == pretrained[counter] + 2


def test_half_precision_is_averaged_in_float32():
    start, end = {"w": torch.tensor([1.0]).bfloat16()}, {"w": torch.tensor([1.0078125]).bfloat16()}  # neighbours
    mixed = interpolate_weights(start, end, 0.75)["w"]
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, end["w"])  # the nearer one


def test_averaged_model_loads_and_locked_weights_stay(model: HfClipModel, tower: str, tmp_path: Path):
    lock_(model, "image")
    pretrained = copy_weights(model)
    take_steps(model, tower, create_optimizer(model, rates=1e-2))
    model.load_state_dict(interpolate_weights(pretrained, copy_weights(model), 0.5))
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    moved = changed(pretrained, loaded)
    assert moved
    assert not any(name.startswith("vision") and "num_batches" not in name for name in moved)


def test_models_that_differ_in_more_than_numbers_are_refused(model: HfClipModel):
    pretrained = copy_weights(model)
    shorter = pretrained | {"text_projection.weight": torch.zeros(2, 3)}
    with pytest.raises(
        ValueError, match=r"text_projection.weight is \(48, 128\) before fine-tuning and \(2, 3\) after"
    ):
        interpolate_weights(pretrained, shorter, 0.5)
    switch_to_sigmoid_(model)
    with pytest.raises(ValueError, match="only the fine-tuned model has logit_bias. Merge adapters, and give both"):
        interpolate_weights(pretrained, copy_weights(model), 0.5)
    with pytest.raises(ValueError, match="only the pretrained model has logit_bias"):
        interpolate_weights(copy_weights(model), pretrained, 0.5)
