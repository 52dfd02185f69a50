"""Rates, groups, optimizers by name, and the clamp."""

import importlib.util
import math

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from hf_clip import HfClipModel
from hf_clip.training.lora import add_lora_
from hf_clip.training.optim import (
    EIGHT_BIT,
    clamp_logit_scale_,
    create_optimizer,
    find_optimizer,
    learning_rates,
    parameter_groups,
    parse_optimizer,
    parse_rates,
)
from hf_clip.training.surgery import switch_to_sigmoid_
from hf_clip.training.trainable import PARTS, freeze_batch_norm_, lock_

from .steps import changed, take_steps, weights_of


def table(model: HfClipModel, groups: list[dict]) -> dict[str, tuple[float, float]]:
    """Each trained parameter's rate and weight decay; every one must stand in exactly one group."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rows = [(names[id(p)], (group["lr"], group["weight_decay"])) for group in groups for p in group["params"]]
    assert len(rows) == len(dict(rows)) == sum(p.requires_grad for p in model.parameters())
    return dict(rows)


@pytest.mark.parametrize(
    ("spec", "rates"),
    [
        (1e-5, (1e-5, 1e-5, 1e-5, 1e-5)),
        ("1e-5", (1e-5, 1e-5, 1e-5, 1e-5)),
        ("image=1e-6,text=1e-5,temperature=1e-3,projections=1e-4", (1e-6, 1e-5, 1e-4, 1e-3)),
        ("1e-5, temperature = 0", (1e-5, 1e-5, 1e-5, 0.0)),
        ("text=2e-5,1e-5", (1e-5, 2e-5, 1e-5, 1e-5)),
    ],
)
def test_rates_are_read(spec: str | float, rates: tuple[float, ...]):
    assert parse_rates(spec) == dict(zip(PARTS, rates, strict=True))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("image=1e-6", "say nothing for text, projections, temperature; name them, or put a rate for all"),
        ("", "say nothing for image, text, projections, temperature"),
        ("1e-5,tempreature=1", "no part 'tempreature' to give a learning rate; there are image.*Did you mean 'temper"),
        ("1e-5,2e-5", "give 'the base' twice"),
        ("1e-5,text=1,text=2", "give 'text' twice"),
        ("fast", "'fast' is no number; write one as in '1e-5'"),
        ("1e-5,text=", "'text=' is no number"),
        ("-1e-5", "'-1e-5' must be finite and not negative"),
        ("nan", "'nan' must be finite"),
        ("0", "are all zero; at least one must be positive"),
    ],
)
def test_wrong_rates_say_what_is_right(spec: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_rates(spec)


SHARED_TABLE = {
    "logit_scale": (8.0, 0.0),
    "text_projection.weight": (4.0, 0.2),
    "visual_projection.weight": (4.0, 0.2),
    "text_model.embeddings.token_embedding.weight": (2 / 16, 0.2),
    "text_model.embeddings.position_embedding.weight": (2 / 16, 0.0),
    "text_model.encoder.layers.0.mlp.fc1.weight": (2 / 8, 0.2),
    "text_model.encoder.layers.0.mlp.fc1.bias": (2 / 8, 0.0),
    "text_model.encoder.layers.2.self_attn.q_proj.weight": (2 / 2, 0.2),
    "text_model.encoder.layers.2.layer_norm1.weight": (2 / 2, 0.0),
    "text_model.final_layer_norm.weight": (2.0, 0.0),
}
TABLES = {
    "vit": {
        "vision_model.embeddings.class_embedding": (1 / 16, 0.0),
        "vision_model.embeddings.patch_embedding.weight": (1 / 16, 0.2),
        "vision_model.embeddings.position_embedding.weight": (1 / 16, 0.0),
        "vision_model.pre_layrnorm.weight": (1 / 16, 0.0),
        "vision_model.encoder.layers.0.self_attn.out_proj.weight": (1 / 8, 0.2),
        "vision_model.encoder.layers.2.mlp.fc2.weight": (1 / 2, 0.2),
        "vision_model.post_layernorm.bias": (1.0, 0.0),
    },
    "resnet": {
        "vision_model.conv1.weight": (1 / 32, 0.2),
        "vision_model.bn3.weight": (1 / 32, 0.0),
        "vision_model.layer1.0.conv2.weight": (1 / 16, 0.2),
        "vision_model.layer2.1.bn3.bias": (1 / 8, 0.0),
        "vision_model.layer4.0.downsample.0.weight": (1 / 2, 0.2),
        "vision_model.layer4.0.downsample.1.weight": (1 / 2, 0.0),
        "vision_model.attnpool.positional_embedding": (1.0, 0.0),
        "vision_model.attnpool.q_proj.weight": (1.0, 0.2),
        "vision_model.attnpool.q_proj.bias": (1.0, 0.0),
        "visual_projection.bias": (4.0, 0.0),
    },
}


def test_every_parameter_has_the_rate_and_decay_of_its_place(model: HfClipModel, tower: str):
    rates = parse_rates("image=1,text=2,projections=4,temperature=8")
    rows = table(model, parameter_groups(model, rates, weight_decay=0.2, layer_decay=0.5))
    for name, expected in (SHARED_TABLE | TABLES[tower]).items():
        assert rows[name] == expected, name
    spared = {name for name, (_, decay) in rows.items() if decay == 0}
    vectors = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
    assert spared == vectors | {name for name in rows if "position" in name}


def test_one_rate_gives_two_groups_and_one_for_the_temperature(model: HfClipModel):
    groups = parameter_groups(model, parse_rates(1e-5))
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-5, 0.2), (1e-5, 0.0), (1e-5, 0.0)]
    assert groups[0]["parts"] == ["image", "text", "projections"]
    assert groups[2]["parts"] == ["temperature"]
    assert all(parameter.ndim == 0 for parameter in groups[2]["params"])


def test_rates_of_parts_follow_the_schedule(model: HfClipModel):
    lock_(model, "image")
    optimizer = create_optimizer(model, rates="1e-5,temperature=1e-3", layer_decay=0.8)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    assert learning_rates(optimizer) == pytest.approx({"text": 1e-5, "projections": 1e-5, "temperature": 1e-3})
    optimizer.step()
    schedule.step()
    assert learning_rates(optimizer) == pytest.approx({"text": 5e-6, "projections": 5e-6, "temperature": 5e-4})


def test_adapters_take_the_level_of_what_they_adapt(model: HfClipModel):
    add_lora_(model, 2)
    rows = table(model, parameter_groups(model, parse_rates(1.0), layer_decay=0.5))
    assert rows["text_model.encoder.layers.0.mlp.fc1.lora_A.default.weight"] == (1 / 8, 0.2)
    assert rows["visual_projection.lora_B.default.weight"] == (1.0, 0.2)
    assert rows["logit_scale"] == (1.0, 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_decay": 0.0}, "layer_decay is 0.0, but must be above 0 and at most 1"),
        ({"layer_decay": 1.1}, "layer_decay is 1.1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1, but must be finite and not negative"),
    ],
)
def test_wrong_decay_is_refused(model: HfClipModel, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        parameter_groups(model, parse_rates(1e-5), **settings)


def test_nothing_left_to_train_is_refused(model: HfClipModel):
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="There is nothing to train: every parameter is locked"):
        create_optimizer(model)


def test_a_rate_for_what_is_locked_is_refused(model: HfClipModel):
    lock_(model, "image")
    with pytest.raises(ValueError, match="'1e-5, image=1e-6' name 'image', but all of it is locked; leave it out"):
        create_optimizer(model, rates="1e-5, image=1e-6")
    assert "image" not in learning_rates(create_optimizer(model, rates="1e-5,image=0,text=1e-6"))


def test_a_rate_of_zero_keeps_a_part_as_it_is(model: HfClipModel, tower: str):
    freeze_batch_norm_(model)
    before = weights_of(model)
    take_steps(model, tower, create_optimizer(model, rates="1e-3,image=0,temperature=0"))
    moved = changed(before, model)
    assert moved
    assert not any(name.startswith(("vision_model", "logit_scale")) for name in moved)


def test_adam_is_the_papers_for_the_kind_of_tower_and_fused(model: HfClipModel, tower: str):
    expected = {"vit": ((0.9, 0.98), 1e-6), "resnet": ((0.9, 0.999), 1e-8)}[tower]
    for name in ("AdamW", "Adam"):
        optimizer = create_optimizer(model, name)
        assert type(optimizer) is getattr(torch.optim, name)
        assert all((group["betas"], group["eps"]) == expected for group in optimizer.param_groups)
        assert all(group["fused"] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0, 0.0]


def test_options_are_passed_on_and_those_in_the_name_win(model: HfClipModel):
    group = create_optimizer(
        model, "AdamW betas=0.9,0.95 amsgrad=true fused=false", eps=1e-7, betas=(0, 0)
    ).param_groups[0]
    assert (group["betas"], group["eps"], group["amsgrad"], group["fused"]) == ((0.9, 0.95), 1e-7, True, False)
    group = create_optimizer(model, "SGD momentum=0.9 nesterov=true").param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.9, True)
    assert not create_optimizer(model, "AdamW foreach=true").param_groups[0]["fused"]
    assert create_optimizer(model, "NAdam").param_groups[0]["betas"] == (0.9, 0.999)


def test_options_are_read():
    assert parse_optimizer("AdamW") == ("AdamW", {})
    assert parse_optimizer("  X a=1 b=1e-3 c=true d=None e=0.9,0.95 f=word ") == (
        "X",
        {"a": 1, "b": 1e-3, "c": True, "d": None, "e": (0.9, 0.95), "f": "word"},
    )


@pytest.mark.parametrize("name", ["Adafactor", "Adagrad", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD", "ASGD"])
@pytest.mark.parametrize("tower", ["vit"])
def test_other_optimizers_of_torch_train(model: HfClipModel, tower: str, name: str):
    before = weights_of(model)
    take_steps(model, tower, create_optimizer(model, name, rates=1e-3), steps=1)
    assert {"visual_projection.weight", "text_projection.weight", "logit_scale"} <= changed(before, model)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ("adamw", "no optimizer 'adamw'. Did you mean AdamW"),
        ("AdamW8bits", "no optimizer 'AdamW8bits'. Did you mean AdamW8bit"),
        ("", "no optimizer ''. There are .*AdamW.*SGD.*AdamW8bit"),
        ("zzzz", "no optimizer 'zzzz'. There are .*Adafactor"),
        ("LBFGS", "LBFGS computes the loss several times for one step. Take another, such as AdamW"),
        ("SparseAdam", "takes sparse gradients alone"),
        ("Muon", "takes matrices alone, and a CLIP also has gains, biases and convolutions"),
        ("SGD momentum", "'momentum' in the optimizer 'SGD momentum' is no option; write them as in 'SGD momentum=0.9"),
        ("SGD beta=0.9", "SGD has no option 'beta'; its options are momentum, dampening, nesterov"),
        ("AdamW lr=1", "'lr' is no option of the optimizer's here: learning rates and weight decay are given apart"),
        ("AdamW betas=2,3", "'AdamW betas=2,3' cannot be made: Invalid beta parameter"),
        ("AdamW betas=0.9", "'AdamW betas=0.9' cannot be made"),
        ("Rprop", "Rprop has no weight decay, but weight_decay is 0.2; pass 0"),
    ],
)
def test_wrong_optimizer_says_what_is_right(model: HfClipModel, optimizer: str, message: str):
    with pytest.raises(ValueError, match=message):
        create_optimizer(model, optimizer)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
@pytest.mark.parametrize("name", EIGHT_BIT)
def test_missing_package_is_named_with_the_way_to_install_it(name: str):
    with pytest.raises(ValueError, match=f"{name} needs the package bitsandbytes.*: pip install bitsandbytes"):
        find_optimizer(name)


def test_eight_bit_optimizer_leaves_embeddings_in_32_bits(model: HfClipModel, monkeypatch: pytest.MonkeyPatch):
    """A stand-in with bitsandbytes' interface takes the place of the package, which the tests do not ask for."""
    import sys
    from types import ModuleType

    overrides = []

    class GlobalOptimManager:
        @classmethod
        def get_instance(cls) -> "GlobalOptimManager":
            return cls()

        def register_module_override(self, module: nn.Module, name: str, config: dict) -> None:
            overrides.append((module, name, config))

    class AdamW8bit(torch.optim.AdamW):
        pass

    package, module = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.optim")
    module.AdamW8bit, module.GlobalOptimManager = AdamW8bit, GlobalOptimManager  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    optimizer = create_optimizer(model, "AdamW8bit")
    assert type(optimizer) is AdamW8bit
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    assert overrides == [(embedding, "weight", {"optim_bits": 32}) for embedding in embeddings]


def test_logit_scale_is_clamped_from_above_alone(model: HfClipModel):
    for value, expected in [(6.0, math.log(100)), (-3.0, -3.0), (math.log(100), math.log(100))]:
        model.logit_scale.data.fill_(value)
        clamp_logit_scale_(model)
        assert model.logit_scale.item() == pytest.approx(expected)
        assert model.logit_scale.requires_grad


def test_a_sigmoid_models_scale_is_left_alone(model: HfClipModel):
    switch_to_sigmoid_(model)
    model.logit_scale.data.fill_(6.0)
    clamp_logit_scale_(model)
    assert model.logit_scale.item() == 6.0


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_distributed_logit_scale_is_clamped(model: HfClipModel, one_process: None, shape: tuple[int, ...]):
    placement = Shard(0) if shape else Replicate()
    local = torch.full(shape, 6.0)
    model.logit_scale = nn.Parameter(DTensor.from_local(local, init_device_mesh("cpu", (1,)), [placement]))
    clamp_logit_scale_(model)
    assert model.logit_scale.to_local().item() == pytest.approx(math.log(100))


def test_optimizer_goes_on_from_its_saved_state(model: HfClipModel, tower: str):
    freeze_batch_norm_(model)
    optimizer = create_optimizer(model, rates=1e-3)
    take_steps(model, tower, optimizer, steps=1)
    weights, state = weights_of(model), optimizer.state_dict()
    saved = {"state": {k: {n: v.clone() for n, v in s.items()} for k, s in state["state"].items()}}
    saved["param_groups"] = [dict(group) for group in state["param_groups"]]
    take_steps(model, tower, optimizer, steps=1)
    expected = weights_of(model)
    model.load_state_dict(weights)
    resumed = create_optimizer(model, rates=1e-3)
    resumed.load_state_dict(saved)
    take_steps(model, tower, resumed, steps=1)
    assert not changed(expected, model)
    assert learning_rates(resumed) == learning_rates(optimizer)
