"""Configurations: field names and meanings of stock CLIP, validation when built, saving and loading."""

import json
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, CLIPConfig, CLIPTextConfig, CLIPVisionConfig

from hf_clip import (
    VARIANTS,
    HfClipConfig,
    HfClipImageProcessor,
    HfClipModel,
    HfClipProcessor,
    HfClipResNetConfig,
    HfClipTextConfig,
    HfClipTextModel,
    HfClipTokenizer,
    HfClipViTConfig,
)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_configuration_has_the_dimensions_of_the_table(name: str):
    row, config = VARIANTS[name], HfClipConfig.from_variant(name)
    vision, text = config.vision_config, config.text_config
    assert config.projection_dim == vision.projection_dim == text.projection_dim == row.embed_dim
    assert (vision.image_size, vision.num_attention_heads) == (row.image_size, row.vision_heads)
    assert (text.hidden_size, text.num_attention_heads) == (row.text_width, row.text_heads)
    assert (text.vocab_size, text.max_position_embeddings, text.eos_token_id) == (49408, 77, 49407)
    if row.patch_size is None:
        assert (tuple(vision.depths), vision.stem_width) == (row.vision_layers, row.vision_width)
        assert vision.hidden_size == 32 * row.vision_width
    else:
        assert (vision.num_hidden_layers, vision.hidden_size) == (row.vision_layers, row.vision_width)
        assert vision.patch_size == row.patch_size


@pytest.mark.parametrize("name", ["RN50", "ViT-B/32"])
def test_saved_configuration_loads_equal_through_autoconfig(name: str, tmp_path: Path):
    config = HfClipConfig.from_variant(name, logit_scale_init_value=4.0)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is HfClipConfig
    assert type(loaded.vision_config) is type(config.vision_config)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    assert loaded.logit_scale_init_value == 4.0


@pytest.mark.parametrize("kind", [HfClipTextConfig, HfClipViTConfig, HfClipResNetConfig])
def test_tower_configuration_is_read_from_a_whole_models_file(kind: type, tmp_path: Path):
    HfClipConfig.from_variant("RN50x4" if kind is HfClipResNetConfig else "ViT-B/16").save_pretrained(tmp_path)
    tower = kind.from_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())[kind.base_config_key]
    assert tower.hidden_size == saved["hidden_size"]
    assert tower.num_attention_heads == saved["num_attention_heads"]


def test_stock_clip_configuration_describes_the_same_model():
    stock = CLIPConfig(
        text_config={"hidden_size": 384, "num_attention_heads": 6, "eos_token_id": 49407},
        vision_config={"patch_size": 16, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 999},
        projection_dim=320,
    )
    ours = HfClipConfig(**stock.to_dict())
    assert type(ours.vision_config) is HfClipViTConfig
    for part in ("text_config", "vision_config"):
        theirs = getattr(stock, part).to_dict()
        mine = getattr(ours, part).to_dict()
        shared = (mine.keys() & theirs.keys()) - {"model_type", "projection_dim", "bos_token_id", "pad_token_id"}
        assert len(shared) > 8
        assert {name: mine[name] for name in shared} == {name: theirs[name] for name in shared}
    assert ours.projection_dim == 320
    assert ours.logit_scale_init_value == stock.logit_scale_init_value


def test_stock_tower_objects_are_taken_over():
    ours = HfClipConfig(text_config=CLIPTextConfig(hidden_size=256), vision_config=CLIPVisionConfig(patch_size=8))
    assert type(ours.text_config) is HfClipTextConfig
    assert ours.text_config.hidden_size == 256
    assert ours.vision_config.patch_size == 8


def test_defaults_are_those_of_stock_clip():
    for ours, stock in [(HfClipTextConfig(), CLIPTextConfig()), (HfClipViTConfig(), CLIPVisionConfig())]:
        named = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act"}
        named |= {"layer_norm_eps", "attention_dropout", "projection_dim", "initializer_factor"}
        assert {name: getattr(ours, name) for name in named} == {name: getattr(stock, name) for name in named}


def test_end_of_text_id_of_old_stock_repositories_is_repaired():
    old = {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1, "vocab_size": 49408}
    text = HfClipConfig(text_config=old).text_config
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (49406, 49407, 49407)


def test_end_of_text_id_two_is_kept_where_the_vocabulary_is_another():
    assert HfClipTextConfig(vocab_size=600, bos_token_id=1, eos_token_id=2, pad_token_id=2).eos_token_id == 2


@pytest.mark.parametrize("vocab_size", [600, 49409])
def test_end_of_text_id_two_of_a_stock_configuration_is_the_rule_of_the_highest_id(vocab_size: int, tmp_path: Path):
    text = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    whole, tower = CLIPConfig(text_config=text), CLIPTextConfig(**text)
    whole.save_pretrained(tmp_path / "whole")
    tower.save_pretrained(tmp_path / "tower")
    found = [HfClipConfig(text_config=tower).text_config, HfClipConfig(**whole.to_dict()).text_config]
    found += [HfClipTextConfig(**tower.to_dict()), HfClipConfig.from_pretrained(tmp_path / "whole").text_config]
    found += [HfClipTextConfig.from_pretrained(tmp_path / name) for name in ("whole", "tower")]
    found[0].save_pretrained(tmp_path / "ours")
    found.append(HfClipTextConfig.from_pretrained(tmp_path / "ours"))
    for config in found:
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


def test_nested_dictionaries_of_2022_repositories_are_read():
    config = HfClipConfig(text_config_dict={"hidden_size": 768, "num_attention_heads": 12}, vision_config_dict=None)
    assert config.text_config.hidden_size == 768


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (
            HfClipTextConfig,
            {"hidden_size": 100, "num_attention_heads": 3},
            "hidden_size is 100 and num_attention_heads is 3",
        ),
        (HfClipTextConfig, {"eos_token_id": 60000}, "eos_token_id is 60000"),
        (HfClipTextConfig, {"eos_token_id": -1}, "or None for the highest of a text"),
        (HfClipTextConfig, {"vocab_size": 0}, "vocab_size is 0, but it must be a positive number"),
        (HfClipConfig, {"contrastive_loss": "triplet"}, "contrastive_loss is 'triplet', but must be 'softmax' or"),
        (HfClipTextConfig, {"vocab_size": "many"}, "'vocab_size' expected int, got str"),
        (HfClipViTConfig, {"image_size": 16}, "patch_size 32 exceeds image_size 16"),
        (HfClipResNetConfig, {"depths": [3, 4]}, r"depths is \[3, 4\], but a CLIP ResNet has four stages"),
        (HfClipResNetConfig, {"stem_width": 63}, "stem_width is 63, but the stem starts with half of it"),
        (HfClipResNetConfig, {"image_size": 16}, "image_size is 16, but the tower divides it by 32"),
        (HfClipConfig, {"projection_dim": -1}, "projection_dim is -1"),
    ],
)
def test_impossible_configuration_says_what_is_wrong(kind: type, fields: dict, message: str):
    with pytest.raises(StrictDataclassError, match=message):
        kind(**fields)


@pytest.mark.parametrize("name", ["RN50", "ViT-B/32"])
def test_tower_of_the_other_kind_is_refused(name: str, tmp_path: Path):
    """Its weights would be left unread, and the model would be random."""
    HfClipConfig.from_variant(name).save_pretrained(tmp_path)
    wrong, right = (HfClipResNetConfig, "hf_clip_vit") if "ViT" in name else (HfClipViTConfig, "hf_clip_resnet")
    with pytest.raises(ValueError, match=f"This is the configuration of a '{right}', but {wrong.__name__} describes"):
        wrong.from_pretrained(tmp_path)


@pytest.mark.parametrize("fields", [{"hidden_size": 99}, {"num_hidden_layers": 9}])
def test_derived_field_of_a_resnet_cannot_be_chosen(fields: dict):
    (name,) = fields
    with pytest.raises(ValueError, match=f"{name} is {fields[name]}, but stem_width 64 and depths .* make it"):
        HfClipResNetConfig(**fields)
    assert HfClipResNetConfig(hidden_size=2048, num_hidden_layers=4).hidden_size == 2048


@pytest.mark.parametrize("fields", [{"matryoshka_dims": [33]}, {"contrastive_loss": "mean"}, {"projection_dim": "8"}])
def test_field_that_replaces_a_stored_one_is_checked_too(fields: dict, tmp_path: Path):
    HfClipConfig(projection_dim=32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"The configuration of .* is refused: .*{next(iter(fields))}"):
        HfClipConfig.from_pretrained(tmp_path, **fields)
    kept, unused = HfClipConfig.from_pretrained(tmp_path, matryoshka_dims=[8, 32], absent=1, return_unused_kwargs=True)
    assert kept.matryoshka_dims == [32, 8]
    assert unused == {"absent": 1}


def test_given_tower_configuration_is_left_as_it_was():
    text = HfClipTextConfig(projection_dim=96)
    first, second = HfClipConfig(text_config=text, projection_dim=64), HfClipConfig(text_config=text, projection_dim=32)
    assert (text.projection_dim, first.text_config.projection_dim, second.text_config.projection_dim) == (96, 64, 32)


def test_tower_of_a_wrong_type_is_refused():
    with pytest.raises(ValueError, match="text_config is a list, but a dictionary or a configuration is needed"):
        HfClipConfig(text_config=[])


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors", "missing.ckpt"])
@pytest.mark.parametrize(
    "kind", [HfClipModel, HfClipTextModel, HfClipConfig, HfClipProcessor, HfClipTokenizer, HfClipImageProcessor]
)
def test_checkpoint_file_names_the_command_that_converts_it(kind: type, name: str, tmp_path: Path):
    if name != "missing.ckpt":
        (tmp_path / name).write_bytes(b"weights")
    command = f"hf-clip convert {tmp_path / name} FOLDER"
    for given in (tmp_path / name, str(tmp_path / name)):
        with pytest.raises(ValueError, match=f"is a checkpoint file, but .* by `{command}`, and pass that folder"):
            kind.from_pretrained(given)


@pytest.mark.parametrize("kind", [HfClipModel, HfClipProcessor, HfClipTokenizer, HfClipConfig])
def test_name_of_openai_names_the_command_that_converts_it(kind: type):
    with pytest.raises(
        ValueError, match="ViT-B/32 is .* by `hf-clip convert ViT-B/32 clip-vit-b32/`, and pass that fo"
    ):
        kind.from_pretrained("ViT-B/32")


def test_weights_of_a_folder_name_the_folder(repositories: dict[str, Path]):
    folder = repositories["vit"]
    with pytest.raises(ValueError, match=f"takes the folder that describes it too: pass {folder}"):
        HfClipModel.from_pretrained(folder / "model.safetensors")
    assert HfClipConfig.from_pretrained(folder / "config.json").projection_dim == 48
