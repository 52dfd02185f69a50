"""Locks and frozen BatchNorm: what stays must stay bit for bit, through real optimizer steps."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel

from hf_clip import HfClipModel
from hf_clip.training.optim import create_optimizer
from hf_clip.training.trainable import (
    FrozenBatchNorm2d,
    freeze_batch_norm_,
    level_of,
    lock_,
    parse_lock,
    part_of,
    synchronize_batch_norm_,
)

from ..closeness import assert_same_gradients
from ..model.test_modeling import enable_checkpointing
from ..small import random_images, texts
from .steps import changed, take_steps, weights_of

TOP = {"vit": ("vision_model.post_layernorm",), "resnet": ("vision_model.attnpool",)}
BLOCK = {"vit": "vision_model.encoder.layers.{}.", "resnet": "vision_model.layer{}."}
LAST = {"vit": (1, 2), "resnet": (3, 4)}


def trained(model: HfClipModel) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def starting(model: HfClipModel, *prefixes: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


@pytest.mark.parametrize(
    ("spec", "lock"),
    [
        (None, {}),
        ("", {}),
        ("image", {"image": None}),
        ("image:2", {"image": 2}),
        (" text:0 , image ", {"text": 0, "image": None}),
    ],
)
def test_lock_is_read(spec: str | None, lock: dict):
    assert parse_lock(spec) == lock


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("imgae", "'imgae' cannot be locked, but 'image', 'text' or both, as in 'image,text:4'. Did you mean 'image'"),
        ("image,image:2", "names 'image' twice"),
        ("image:", "'image:' needs the number of blocks that stay unlocked behind its colon, as in 'image:2'"),
        ("text:-1", "'text:-1' needs the number of blocks"),
    ],
)
def test_wrong_lock_says_what_is_right(spec: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_lock(spec)


def test_lock_beyond_the_tower_is_refused_before_anything_is_locked(model: HfClipModel, tower: str):
    blocks = {"vit": "3 layers", "resnet": "4 stages"}[tower]
    with pytest.raises(ValueError, match=f"'image:5' leaves 5 blocks unlocked, but that tower has {blocks}"):
        lock_(model, "text,image:5")
    assert trained(model) == starting(model, "")


def test_locked_image_tower_keeps_its_projection_too(model: HfClipModel):
    lock_(model, "image")
    assert trained(model) == starting(model, "text_model", "text_projection", "logit_scale")


def test_last_blocks_and_what_follows_them_stay_unlocked(model: HfClipModel, tower: str):
    lock_(model, "image:2,text:1")
    image = [BLOCK[tower].format(index) for index in LAST[tower]]
    text = ["text_model.encoder.layers.2.", "text_model.final_layer_norm", "text_projection"]
    assert trained(model) == starting(model, *image, *TOP[tower], "visual_projection", *text, "logit_scale")


def test_no_block_unlocked_leaves_the_top(model: HfClipModel, tower: str):
    lock_(model, "image:0,text")
    assert trained(model) == starting(model, *TOP[tower], "visual_projection", "logit_scale")


def test_both_towers_locked_leave_projections_and_temperature(model: HfClipModel):
    lock_(model, "image,text")
    assert trained(model) == starting(model, "visual_projection", "text_projection", "logit_scale")


def test_a_second_lock_unlocks_nothing(model: HfClipModel):
    lock_(model, "image")
    lock_(model, "text")
    assert trained(model) == {"logit_scale"}


@pytest.mark.parametrize("spec", ["image", "text", "image:2", "text:1", "image:0,text", "image,text"])
def test_locked_tensors_stay_bit_equal_and_all_others_move(model: HfClipModel, tower: str, spec: str):
    lock_(model, spec)
    before, moving = weights_of(model), trained(model)
    take_steps(model, tower, create_optimizer(model, rates=1e-3))
    found = changed(before, model)
    statistics = {name for name, _ in model.named_buffers()}
    unused = {name for name in moving if name.endswith(("k_proj.bias", "token_embedding.weight"))}
    assert moving - unused <= found
    assert found <= moving | statistics
    of_locked_norms = {
        f"{name}.{buffer}"
        for name, norm in model.named_modules()
        if isinstance(norm, nn.BatchNorm2d) and f"{name}.weight" not in moving
        for buffer, _ in norm.named_buffers()
    }
    assert not found & of_locked_norms
    assert statistics - of_locked_norms <= found


def test_batch_norms_of_a_locked_part_alone_are_frozen(repositories: dict[str, Path]):
    model = AutoModel.from_pretrained(repositories["resnet"])
    lock_(model, "image:2")
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    frozen = {name for name, module in model.named_modules() if isinstance(module, FrozenBatchNorm2d)}
    assert norms - frozen == {name for name in norms if ".layer3." in name or ".layer4." in name}
    assert {"vision_model.bn1", "vision_model.layer2.1.bn3", "vision_model.layer1.0.downsample.1"} <= frozen


def test_frozen_batch_norm_stays_while_everything_else_trains(model: HfClipModel, tower: str):
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert freeze_batch_norm_(model) == len(norms) == {"vit": 0, "resnet": 22}[tower]
    before = weights_of(model)
    take_steps(model, tower, create_optimizer(model, rates=1e-3))
    kept = {name for name in before if name.rpartition(".")[0] in norms}
    assert not changed(before, model) & kept
    assert {"visual_projection.weight", "logit_scale"} <= changed(before, model)


def test_frozen_batch_norm_makes_an_image_independent_of_its_batch(repositories: dict[str, Path]):
    model = AutoModel.from_pretrained(repositories["resnet"]).train()
    images = random_images("resnet", 6)
    assert not torch.allclose(model.encode_image(images)[:2], model.encode_image(images[:2]), rtol=1e-3)
    freeze_batch_norm_(model)
    expected = model.eval().encode_image(images)
    model.train()
    torch.testing.assert_close(model.encode_image(images), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.encode_image(images[:2]), expected[:2], rtol=1e-4, atol=1e-4)


def test_frozen_batch_norm_survives_copies_and_pickles(repositories: dict[str, Path]):
    model = AutoModel.from_pretrained(repositories["resnet"])
    freeze_batch_norm_(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        norm = copied.train().vision_model.layer1[0].bn1
        assert type(norm) is FrozenBatchNorm2d
        assert not norm.training
        assert copied.vision_model.training


def test_frozen_batch_norm_saves_an_ordinary_model(repositories: dict[str, Path], tmp_path: Path):
    model = AutoModel.from_pretrained(repositories["resnet"])
    freeze_batch_norm_(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded.vision_model.bn1) is nn.BatchNorm2d
    assert not changed(weights_of(model), loaded)


@pytest.mark.parametrize("spec", ["image:2", "image", None])
def test_gradients_are_the_same_with_checkpointing(model: HfClipModel, tower: str, spec: str | None):
    lock_(model, spec)
    freeze_batch_norm_(model)
    model.train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            enable_checkpointing(model, use_reentrant=False)
        model.zero_grad()
        model(pixel_values=random_images(tower), input_ids=texts(), return_loss=True).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == trained(model)
    assert_same_gradients(checkpointed, plain)


def test_locks_hold_under_ddp(model: HfClipModel, tower: str, one_process: None):
    lock_(model, "image:1")
    freeze_batch_norm_(model)
    before = weights_of(model)
    optimizer = create_optimizer(model, rates=1e-3)
    wrapped = DistributedDataParallel(model).train()
    wrapped(pixel_values=random_images(tower), input_ids=texts(), return_loss=True).loss.backward()
    optimizer.step()
    assert changed(before, model) <= trained(model)
    assert "visual_projection.weight" in changed(before, model)


def test_synchronising_takes_what_is_not_frozen_and_keeps_names(repositories: dict[str, Path]):
    model = AutoModel.from_pretrained(repositories["resnet"])
    lock_(model, "image:1")
    before = weights_of(model)
    synchronize_batch_norm_(model, "cuda")
    kinds = {name: type(m) for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    assert kinds["vision_model.layer4.0.bn1"] is kinds["vision_model.layer4.0.downsample.1"] is nn.SyncBatchNorm
    assert {kind for name, kind in kinds.items() if ".layer4." not in name} == {FrozenBatchNorm2d}
    assert model.state_dict().keys() == before.keys()
    assert not changed(before, model)
    lock_(model, "image:0")
    assert {type(m) for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)} == {FrozenBatchNorm2d}


def test_nothing_to_synchronise_is_refused(repositories: dict[str, Path]):
    models = {tower: AutoModel.from_pretrained(folder) for tower, folder in repositories.items()}
    with pytest.raises(ValueError, match="no BatchNorm to synchronise: this image tower has none"):
        synchronize_batch_norm_(models["vit"], "cuda")
    with pytest.raises(ValueError, match="synchronised between GPUs, but this runs on a CPU"):
        synchronize_batch_norm_(models["resnet"], "cpu")
    freeze_batch_norm_(models["resnet"])
    with pytest.raises(ValueError, match="no BatchNorm to synchronise: all of them are frozen"):
        synchronize_batch_norm_(models["resnet"], "cuda")


def test_every_parameter_has_a_part_and_a_level(model: HfClipModel, tower: str):
    blocks = {"image": {"vit": 3, "resnet": 4}[tower], "text": 3}
    levels: dict[str, set[int]] = {"image": set(), "text": set()}
    for name, _ in model.named_parameters():
        if (part := part_of(name)) in levels:
            levels[part].add(level_of(name, blocks[part]))
    assert levels == {part: set(range(count + 2)) for part, count in blocks.items()}
    with pytest.raises(ValueError, match="'module.logit_scale' belongs to no part of a CLIP"):
        part_of("module.logit_scale")
