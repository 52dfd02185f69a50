"""The table of tensor names: read in both directions, strict about leftovers, and able to name the model."""

import pytest
import torch
from torch import Tensor

from conversion.reference import load_reference_module, reference_dimensions
from hf_clip import VARIANTS, HfClipConfig, HfClipResNetConfig, HfClipViTConfig
from hf_clip.checkpoints.errors import CheckpointError
from hf_clip.checkpoints.keys import (
    RESNET_ROWS,
    TEXT_ROWS,
    VIT_ROWS,
    config_from_shapes,
    convert_names,
    expected_shapes,
    identify_variant,
    original_names,
    original_names_of,
)


@pytest.fixture
def state(reference: torch.nn.Module) -> dict[str, Tensor]:
    return dict(reference.state_dict())


def meta_state(name: str) -> dict[str, Tensor]:
    """The reference's tensors for a published model, without their values."""
    with torch.device("meta"):
        return load_reference_module("model").CLIP(**reference_dimensions(VARIANTS[name])).state_dict()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_published_model_is_recognised_by_its_shapes(name: str):
    config = config_from_shapes(meta_state(name))
    assert identify_variant(config) is VARIANTS[name]
    assert convert_names(meta_state(name), config).keys() == expected_shapes(config).keys()


def test_names_survive_the_way_there_and_back(state: dict[str, Tensor]):
    config = config_from_shapes(state)
    back = original_names(convert_names(state, config), config)
    assert back.keys() == state.keys()
    for name, tensor in state.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor), name


def test_ours_survive_the_way_back_and_there(model, state: dict[str, Tensor]):
    config = config_from_shapes(state)
    ours = dict(model.state_dict())
    again = convert_names(original_names(ours, config), config)
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_no_two_rows_name_the_same_tensor():
    for rows in (TEXT_ROWS + VIT_ROWS, TEXT_ROWS + RESNET_ROWS):
        originals = [row.original for row in rows]
        ours = [name for row in rows for name in row.ours]
        assert len(set(originals)) == len(originals)
        assert len(set(ours)) == len(ours)


def test_custom_shape_becomes_a_custom_configuration(state: dict[str, Tensor], tower: str):
    config = config_from_shapes(state)
    assert identify_variant(config) is None
    vision = config.vision_config
    if tower == "vit":
        assert isinstance(vision, HfClipViTConfig)
        assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (128, 3, 2)
        assert (vision.image_size, vision.patch_size) == (48, 16)
    else:
        assert isinstance(vision, HfClipResNetConfig)
        assert (vision.depths, vision.stem_width, vision.num_attention_heads) == ([1, 2, 1, 1], 8, 4)
        assert vision.image_size == 96
    text = config.text_config
    assert (text.vocab_size, text.eos_token_id, text.max_position_embeddings) == (1000, 999, 20)
    assert config.projection_dim == 48


def test_unknown_tensors_are_named(state: dict[str, Tensor]):
    config = config_from_shapes(state)
    extra = state | {"visual.surprise": torch.ones(1), "ema_decay": torch.ones(1)}
    with pytest.raises(CheckpointError, match=r"no CLIP of this kind has: ema_decay, visual\.surprise\."):
        convert_names(extra, config)


@pytest.mark.parametrize(
    "missing", ["ln_final.bias", "transformer.resblocks.1.attn.in_proj_weight", "visual.conv1.weight"]
)
def test_missing_tensors_are_named_as_the_file_would_name_them(state: dict[str, Tensor], missing: str):
    config = config_from_shapes(state)
    del state[missing]
    with pytest.raises(CheckpointError, match=f"lacks tensors of the model: {missing}"):
        convert_names(state, config)


def test_many_missing_tensors_are_counted(state: dict[str, Tensor]):
    config = config_from_shapes(state)
    kept = {name: tensor for name, tensor in state.items() if ".resblocks.2." not in name}
    with pytest.raises(CheckpointError, match=r"and \d+ more"):
        convert_names(kept, config)


def test_wrong_shape_is_named_with_the_right_one(state: dict[str, Tensor]):
    config = config_from_shapes(state)
    state["ln_final.bias"] = torch.zeros(7)
    with pytest.raises(
        CheckpointError, match=r"text_model.final_layer_norm.bias of shape \(7,\) where \(128,\) is needed"
    ):
        convert_names(state, config)


def test_counters_of_batches_may_be_missing(references: dict):
    state = {k: v for k, v in references["resnet"].state_dict().items() if not k.endswith("num_batches_tracked")}
    converted = convert_names(state, config_from_shapes(state))
    assert not any(name.endswith("num_batches_tracked") for name in converted)


def test_backward_is_strict_too(model, state: dict[str, Tensor]):
    config, ours = config_from_shapes(state), dict(model.state_dict())
    with pytest.raises(CheckpointError, match="tensors that no original has: head.weight"):
        original_names(ours | {"head.weight": torch.ones(1)}, config)
    del ours["text_model.encoder.layers.0.self_attn.k_proj.bias"]
    with pytest.raises(CheckpointError, match=r"lacks tensors of the model: text_model.*k_proj\.bias"):
        original_names(ours, config)
    with pytest.raises(CheckpointError, match="lacks what becomes the original's"):
        original_names({"logit_scale": torch.ones(())}, config)


def test_original_names_of_our_tensors():
    config = HfClipConfig.from_variant("RN50")
    names = ["visual_projection.bias", "vision_model.layer3.5.bn2.running_var", "text_projection.weight"]
    found = original_names_of(names, config)
    assert found == {"visual.attnpool.c_proj.bias", "visual.layer3.5.bn2.running_var", "text_projection"}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"encoder.weight": torch.zeros(2, 2)}, "another model: .* has a tensor .*, this file has encoder.weight"),
        ({}, "this file has none at all"),
    ],
)
def test_checkpoint_of_another_model_is_recognised(state: dict[str, Tensor], message: str):
    with pytest.raises(CheckpointError, match=message):
        config_from_shapes(state)


def test_converted_checkpoint_is_recognised(model):
    with pytest.raises(CheckpointError, match="has been converted already"):
        config_from_shapes(model.state_dict())


@pytest.mark.parametrize("tensor", [torch.tensor(1.0), torch.zeros(1), torch.zeros(0)])
def test_tensor_that_cannot_be_split_is_named(state: dict[str, Tensor], tensor: Tensor):
    config, name = config_from_shapes(state), "transformer.resblocks.0.attn.in_proj_bias"
    with pytest.raises(CheckpointError, match=f"has {name} of shape"):
        convert_names(state | {name: tensor}, config)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("ln_final.weight", torch.zeros(100), "text tower of width 100, but CLIP's widths are multiples of 64"),
        ("ln_final.weight", torch.tensor(1.0), "shapes that no CLIP has"),
        ("token_embedding.weight", torch.zeros(0, 128), "vocab_size is 0"),
    ],
)
def test_impossible_shapes_are_refused(state: dict[str, Tensor], name: str, tensor: Tensor, message: str):
    with pytest.raises(CheckpointError, match=message):
        config_from_shapes(state | {name: tensor})


def test_positions_must_form_a_square(state: dict[str, Tensor], tower: str):
    name = {"vit": "visual.positional_embedding", "resnet": "visual.attnpool.positional_embedding"}[tower]
    with pytest.raises(CheckpointError, match="7 positions in .*, but a square grid is needed"):
        config_from_shapes(state | {name: torch.zeros(8, 128)})
    with pytest.raises(CheckpointError, match="but a square grid is needed"):
        config_from_shapes(state | {name: torch.zeros(0, 128)})


def test_layers_without_tensors_are_refused_before_a_model_of_them_is_built(state: dict[str, Tensor]):
    many = {f"transformer.resblocks.{n}.x": torch.zeros(1) for n in range(5000)}
    with pytest.raises(CheckpointError, match=r"names 50\d\d layers, but its 5\d\d\d tensors are too few"):
        config_from_shapes(state | many)


def test_width_that_no_model_can_have_is_one_line(state: dict[str, Tensor]):
    with pytest.raises(
        CheckpointError, match="shapes that no CLIP has .*hidden_size is 1.1e\\+12, but at most 1,048,576 can be built"
    ):
        config_from_shapes(state | {"ln_final.weight": torch.zeros(1).expand(2**40)})


def test_long_names_are_shown_in_short(state: dict[str, Tensor]):
    config = config_from_shapes(state)
    with pytest.raises(CheckpointError) as caught:
        convert_names(state | {f"{n}" * 1000: torch.ones(1) for n in range(10)}, config)
    assert len(str(caught.value)) < 1000
