"""What a training run can be told, and which tensors its optimizer decays."""

import math

import pytest
import torch

from hf_clip import HfClipModel
from hf_clip.training.config import TrainingConfig
from hf_clip.training.optim import MAX_LOGIT_SCALE, build_optimizer, is_decayed


def config(**fields: object) -> TrainingConfig:
    return TrainingConfig(**({"model": "m", "dataset": "d", "output_dir": "o"} | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 1}, "batch_size is 1, but a pair is learned against others"),
        ({"max_steps": 0}, "max_steps is 0, but it must be positive"),
        ({"learning_rate": -1e-4}, "learning_rate is -0.0001"),
        ({"logging_steps": 0}, "logging_steps is 0"),
        ({"image_column": "caption"}, "image_column and caption_column are both 'caption'"),
        ({"max_steps": 10, "warmup_steps": 11}, "warmup_steps is 11, but must be between 0 and max_steps, 10"),
    ],
)
def test_impossible_settings_are_refused(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_largest_logit_scale_is_a_hundred():
    assert math.exp(MAX_LOGIT_SCALE) == pytest.approx(100)


def test_every_parameter_is_optimised_once_and_matrices_alone_decay(model: HfClipModel):
    optimizer = build_optimizer(model, config(weight_decay=0.3))
    groups = [group["params"] for group in optimizer.param_groups]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert sorted(map(id, groups[0] + groups[1])) == sorted(map(id, model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    spared = {names[id(parameter)] for parameter in groups[1]}
    assert "logit_scale" in spared
    assert all(name in spared for name in names.values() if "norm" in name or "bias" in name or "position" in name)
    assert not any(
        name.endswith(("_proj.weight", "fc1.weight", "conv1.weight", "projection.weight")) for name in spared
    )


def test_frozen_parameters_are_left_out(model: HfClipModel):
    model.text_model.requires_grad_(False)
    optimizer = build_optimizer(model, config())
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert not trained & {id(parameter) for parameter in model.text_model.parameters()}
    assert id(model.logit_scale) in trained


def test_vectors_and_positions_are_not_decayed():
    assert is_decayed("text_projection.weight", torch.nn.Parameter(torch.zeros(2, 2)))
    assert not is_decayed("layer_norm1.weight", torch.nn.Parameter(torch.zeros(2)))
    assert not is_decayed("embeddings.position_embedding.weight", torch.nn.Parameter(torch.zeros(2, 2)))
