"""Adapters: where they stand, what stays, merging, and the two ways to save."""

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

from hf_clip import HfClipModel
from hf_clip.training.lora import adapter_of, add_lora_, merge_lora_
from hf_clip.training.optim import create_optimizer
from hf_clip.training.trainable import lock_

from ..model.test_modeling import enable_checkpointing
from ..small import random_images, texts
from .steps import changed, take_steps, weights_of

LAYER = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]


def base_name(name: str) -> str:
    return name.replace(".base_layer.", ".")


@torch.no_grad()
def logits(model: HfClipModel, tower: str) -> torch.Tensor:
    return model.eval()(pixel_values=random_images(tower), input_ids=texts()).logits_per_image


def train(model: HfClipModel, tower: str) -> None:
    take_steps(model, tower, create_optimizer(model, rates=1e-2), steps=3)


def test_adapters_stand_on_every_matrix_between_features(model: HfClipModel, tower: str):
    adapted = add_lora_(model, 2)
    text = {f"text_model.encoder.layers.{index}.{name}" for index in range(3) for name in LAYER}
    if tower == "vit":
        image = {f"vision_model.encoder.layers.{index}.{name}" for index in range(3) for name in LAYER}
    else:
        blocks = ["layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer4.0"]
        image = {f"vision_model.{name}" for name in ("conv1", "conv2", "conv3")}
        image |= {f"vision_model.{block}.{name}" for block in blocks for name in ("conv1", "conv2", "conv3")}
        image |= {f"vision_model.{block}.downsample.0" for block in blocks if block != "layer2.1"}
        image |= {f"vision_model.attnpool.{name}" for name in ("q_proj", "k_proj", "v_proj")}
    assert set(adapted) == text | image | {"text_projection", "visual_projection"}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors = {f"{name}.lora_{factor}.default.weight" for name in adapted for factor in "AB"}
    assert trained == factors | {"logit_scale"}


def test_adapters_change_nothing_at_first_and_then_nothing_but_themselves(model: HfClipModel, tower: str):
    expected = logits(model, tower)
    before = weights_of(model)
    add_lora_(model, 2)
    torch.testing.assert_close(logits(model, tower), expected, rtol=1e-5, atol=1e-5)
    train(model, tower)
    after = {base_name(name): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == (name != "logit_scale"), name
    assert not torch.allclose(logits(model, tower), expected, rtol=1e-2)


@pytest.mark.parametrize(
    ("spec", "prefixes"),
    [
        ("image", ("text_model", "text_projection")),
        ("image,text", ("text_projection", "visual_projection")),
        (
            "text,image:1",
            ("vision_model.encoder.layers.2.", "vision_model.layer4.", "vision_model.attnpool", "visual_"),
        ),
    ],
)
def test_a_lock_says_where_adapters_stand(model: HfClipModel, spec: str, prefixes: tuple[str, ...]):
    lock_(model, spec)
    adapted = add_lora_(model, 2)
    assert adapted
    assert all(name.startswith(prefixes) for name in adapted)
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)


def test_chosen_targets_alone_are_adapted(model: HfClipModel):
    adapted = add_lora_(model, 2, targets=np.array(["q_proj", "mlp.fc2"]))
    assert {name.rpartition(".")[2] for name in adapted} == {"q_proj", "fc2"}


def test_merged_model_is_a_plain_one_that_computes_the_same(model: HfClipModel, tower: str, tmp_path: Path):
    names = model.state_dict().keys()
    add_lora_(model, 4, alpha=8)
    train(model, tower)
    expected, adapted = logits(model, tower), weights_of(model)
    merged = merge_lora_(copy.deepcopy(model))
    assert not changed(adapted, model)  # the copy was merged, and the original can go on
    assert type(merged) is HfClipModel
    assert merged.state_dict().keys() == names
    torch.testing.assert_close(logits(merged, tower), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert not changed(weights_of(merged), AutoModel.from_pretrained(tmp_path))


def test_gradients_are_the_same_with_checkpointing(model: HfClipModel, tower: str):
    add_lora_(model, 2)
    train(model, tower)  # else the first factors have no gradients
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            enable_checkpointing(model, use_reentrant=False)
        model.train().zero_grad()
        model(pixel_values=random_images(tower), input_ids=texts(), return_loss=True).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "The LoRA rank is 0, but must be at least 1"),
        ({"rank": 100_000}, "The LoRA rank is 100000, but no matrix here has a rank above [0-9]+: take less"),
        ({"rank": 2, "alpha": 0}, "The LoRA alpha is 0, but must be above 0: at 0 the factors would have no effect"),
        ({"rank": 2, "dropout": 1.0}, "The LoRA dropout is 1.0, but must be at least 0 and below 1"),
        ({"rank": 2, "targets": []}, "LoRA was given no targets to adapt; name some, or leave them out"),
        ({"rank": 2, "targets": "query"}, "no matrix 'query' to adapt; there are .*fc1, fc2.*q_proj"),
        ({"rank": 2, "targets": ["query"]}, "no matrix 'query' to adapt; there are .*fc1, fc2.*q_proj"),
    ],
)
def test_wrong_settings_are_refused(model: HfClipModel, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        add_lora_(model, **settings)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_come_once_and_are_merged_once(model: HfClipModel):
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge_lora_(model)
    with pytest.raises(ValueError, match="no adapters to save"):
        adapter_of(model)
    add_lora_(model, 2)
    with pytest.raises(ValueError, match="has adapters already; merge them"):
        add_lora_(model, 2)
    add_lora_(merge_lora_(model).requires_grad_(True), 2)


def test_nothing_left_to_adapt_is_refused(model: HfClipModel):
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="LoRA has nothing to adapt: every matrix is locked"):
        add_lora_(model, 2)


def test_missing_package_is_named_with_the_way_to_install_it(model: HfClipModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(
        ImportError, match=r'LoRA needs peft, which this Python does not have: pip install "hf-clip\[lora\]"'
    ):
        add_lora_(model, 2)
