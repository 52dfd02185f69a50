"""open_clip's layout: read in place by every class, written, and its training checkpoints converted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig

import hf_clip
from conversion.convert import main
from conversion.reference import load_open_clip_module
from hf_clip import (
    VARIANTS,
    HfClipConfig,
    HfClipForImageClassification,
    HfClipImageProcessor,
    HfClipModel,
    HfClipProcessor,
    HfClipResNetModel,
    HfClipTextModel,
    HfClipTextModelWithProjection,
    HfClipVisionModelWithProjection,
    HfClipViTModel,
    convert,
)
from hf_clip.checkpoints.errors import CheckpointError
from hf_clip.checkpoints.keys import original_names
from hf_clip.checkpoints.open_clip import config_from_open_clip, open_clip_config

from ..small import DIMENSIONS, random_images, texts


def load_open_clip_model() -> Any:
    return load_open_clip_module("model") or pytest.skip("needs open_clip: pip install --no-deps open_clip_torch")


def model_cfg(tower: str, **more: object) -> dict:
    """open_clip's description of the reduced models."""
    given = DIMENSIONS[tower]
    return {
        "embed_dim": given["embed_dim"],
        "vision_cfg": {
            "image_size": given["image_resolution"],
            "layers": given["vision_layers"],
            "width": given["vision_width"],
            "patch_size": given["vision_patch_size"],
        },
        "text_cfg": {
            "context_length": given["context_length"],
            "vocab_size": given["vocab_size"],
            "width": given["transformer_width"],
            "heads": given["transformer_heads"],
            "layers": given["transformer_layers"],
        },
    } | more


def weights_of(reference: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in reference.state_dict().items() if not name.endswith("attn_mask")}


def write_repository(folder: Path, values: dict, weights: dict[str, torch.Tensor], pickled: bool = False) -> Path:
    """As `push_to_hf_hub` of open_clip writes it, timm's own config.json included."""
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(values))
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_small_patch16_clip", "num_classes": 48}))
    if pickled:
        torch.save(weights, folder / "open_clip_pytorch_model.bin")
    else:
        save_file(weights, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def foreign(tower: str, reference: nn.Module, tmp_path: Path) -> Path:
    values = {
        "model_cfg": model_cfg(tower, quick_gelu=True),
        "preprocess_cfg": {
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.3, 0.4],
            "interpolation": "bilinear",
            "resize_mode": "squash",
        },
    }
    return write_repository(tmp_path / "foreign", values, weights_of(reference))


@torch.no_grad()
def assert_same_features(model: HfClipModel, reference: nn.Module, tower: str) -> None:
    torch.testing.assert_close(
        model.encode_image(random_images(tower)), reference.encode_image(random_images(tower)), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(model.encode_text(texts()), reference.encode_text(texts()), rtol=1e-5, atol=1e-6)


def test_model_is_read_in_place(foreign: Path, tower: str, reference: nn.Module, tmp_path: Path):
    model = HfClipModel.from_pretrained(foreign)
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config.name_or_path == str(foreign)
    assert_same_features(model, reference, tower)
    stored, own = weights_of(reference), original_names(model.state_dict(), model.config)
    assert own.keys() == stored.keys()
    assert all(torch.equal(own[name], stored[name]) for name in stored)
    model.save_pretrained(tmp_path / "saved")  # in our own layout
    again = HfClipModel.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_every_class_reads_its_part(foreign: Path, tower: str):
    whole = HfClipModel.from_pretrained(foreign)
    vision_class = HfClipViTModel if tower == "vit" else HfClipResNetModel
    parts = {
        HfClipTextModel: whole.text_model,
        vision_class: whole.vision_model,
        HfClipTextModelWithProjection: whole,
        HfClipVisionModelWithProjection: whole,
    }
    for kind, source in parts.items():
        part, info = kind.from_pretrained(foreign, output_loading_info=True)
        assert not any(info.values()), (kind, info)
        expected = source.state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in part.state_dict().items())
    classifier, info = HfClipForImageClassification.from_pretrained(foreign, num_labels=3, output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert classifier.classifier.out_features == 3


def test_arguments_of_from_pretrained_hold(foreign: Path):
    model = HfClipModel.from_pretrained(foreign, dtype=torch.bfloat16, attn_implementation="eager", device_map="cpu")
    assert model.dtype == torch.bfloat16
    assert model.config.text_config._attn_implementation == "eager"
    assert HfClipConfig.from_pretrained(foreign).model_type == "hf_clip"
    assert HfClipModel.from_pretrained(foreign, dtype="auto").dtype == torch.float32
    config = HfClipConfig.from_pretrained(foreign)
    config.text_config.attention_dropout = 0.25
    changed = HfClipModel.from_pretrained(foreign, config=config)
    assert changed.config.text_config.attention_dropout == 0.25
    assert torch.equal(changed.text_projection.weight.bfloat16(), model.text_projection.weight)


def test_margins_of_another_colour_are_refused(foreign: Path, repository: Path, tmp_path: Path):
    """open_clip pads with black, fit="pad" with the mean colour."""
    path = foreign / "open_clip_config.json"
    values = json.loads(path.read_text())
    values["preprocess_cfg"]["resize_mode"] = "longest"
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="resize_mode 'longest'; known are"):
        HfClipProcessor.from_pretrained(foreign)
    processor = HfClipImageProcessor.for_image_size(32, fit="pad")
    with pytest.raises(ValueError, match="open_clip's margins are black"):
        open_clip_config(HfClipConfig.from_pretrained(repository), processor)


def test_processor_follows_preprocess_cfg(foreign: Path, tower: str, photographs: dict[str, Image.Image]):
    processor = HfClipProcessor.from_pretrained(foreign)
    size = DIMENSIONS[tower]["image_resolution"]
    expected = HfClipImageProcessor.for_image_size(
        size, fit="squash", resample=2, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]
    )
    image = photographs["chelsea"]
    found = processor(text=["it’s a cat"], images=image, return_tensors="pt")
    assert torch.equal(found["pixel_values"], expected(image, return_tensors="pt")["pixel_values"])
    assert processor.tokenizer.model_max_length == 20
    assert len(processor.tokenizer) == 1000
    alone = HfClipImageProcessor.from_pretrained(foreign)
    assert alone.to_dict() == processor.image_processor.to_dict()


def test_tokenizer_of_the_repository_is_taken(foreign: Path, repositories: dict[str, Path], tokenizer):
    own = HfClipProcessor.from_pretrained(repositories["vit"]).tokenizer
    own.add_tokens(["<|added|>"])
    own.save_pretrained(foreign)
    assert "<|added|>" in HfClipProcessor.from_pretrained(foreign).tokenizer.get_vocab()


def test_clip_load_reads_it(foreign: Path, tower: str, reference: nn.Module, photographs: dict[str, Image.Image]):
    model, preprocess = hf_clip.load(foreign, device="cpu")
    image = preprocess(photographs["chelsea"])[None]
    assert image.shape[-1] == DIMENSIONS[tower]["image_resolution"]
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(image), reference.encode_image(image), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pickled", [False, True])
def test_activation_is_what_the_configuration_says(tmp_path: Path, references: dict[str, nn.Module], pickled: bool):
    """Against open_clip's own class, whose activation is GELU unless told otherwise."""
    open_clip = load_open_clip_model()
    weights = weights_of(references["vit"])
    for quick in (True, False):
        theirs = open_clip.CLIP(**model_cfg("vit", quick_gelu=quick)).eval()
        theirs.load_state_dict(weights)
        folder = write_repository(
            tmp_path / str(quick), {"model_cfg": model_cfg("vit", quick_gelu=quick)}, weights, pickled
        )
        assert_same_features(HfClipModel.from_pretrained(folder), theirs, "vit")


def test_custom_text_names_and_logit_bias_are_read(tmp_path: Path, references: dict[str, nn.Module]):
    weights = weights_of(references["vit"]) | {"logit_bias": torch.tensor(-7.5)}
    text = ("transformer.", "token_embedding", "positional_embedding", "ln_final", "text_projection")
    nested = {f"text.{name}" if name.startswith(text) else name: tensor for name, tensor in weights.items()}
    values = {"model_cfg": model_cfg("vit", quick_gelu=True, custom_text=True, init_logit_bias=-10)}
    model = HfClipModel.from_pretrained(write_repository(tmp_path / "custom", values, nested))
    assert model.config.contrastive_loss == "sigmoid"
    assert model.logit_bias.item() == -7.5
    assert_same_features(model, references["vit"], "vit")


def test_a_repository_with_both_descriptions_is_read_as_transformers_would(repository: Path, tmp_path: Path):
    """As laion's repositories are: config.json of transformers beside open_clip's."""
    shutil.copytree(repository, tmp_path / "both")
    (tmp_path / "both" / "open_clip_config.json").write_text("not even JSON")
    HfClipModel.from_pretrained(tmp_path / "both")
    HfClipProcessor.from_pretrained(tmp_path / "both")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["vision_cfg"].update(timm_model_name="vit_base"), "vision_cfg has timm_model_name='vit_base'"),
        (lambda m: m["vision_cfg"].update(pool_type="avg"), "vision_cfg has pool_type='avg'"),
        (lambda m: m["text_cfg"].update(hf_model_name="roberta-base"), "text_cfg has hf_model_name='roberta-base'"),
        (lambda m: m["text_cfg"].update(no_causal_mask=True), "text_cfg has no_causal_mask=True"),
        (lambda m: m["vision_cfg"].update(act_kwargs={"approximate": "tanh"}), "vision_cfg has act_kwargs="),
        (lambda m: m["text_cfg"].update(tokenizer_kwargs={"clean": "lower"}), "text_cfg has tokenizer_kwargs="),
        (lambda m: m.update(multimodal_cfg={"width": 1}), "model_cfg has multimodal_cfg="),
        (lambda m: m["vision_cfg"].update(image_size=[32, 48]), r"image_size is \[32, 48\]"),
        (lambda m: m.pop("embed_dim"), "it has no 'embed_dim'"),
    ],
)
def test_other_architectures_are_refused(
    tmp_path: Path, references: dict[str, nn.Module], change: Callable[[dict], object], message: str
):
    values = model_cfg("vit")
    change(values)
    folder = write_repository(tmp_path / "other", {"model_cfg": values}, weights_of(references["vit"]))
    with pytest.raises(ValueError, match=message):
        HfClipModel.from_pretrained(folder)


def test_missing_weights_are_named(foreign: Path):
    (foreign / "open_clip_model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"has open_clip_config\.json, but none of its weights: open_clip_model"
    ):
        HfClipModel.from_pretrained(foreign)


def test_other_faults_keep_transformers_messages(tmp_path: Path):
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        HfClipModel.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="no-such-folder"):
        HfClipModel.from_pretrained("./no-such-folder")


@pytest.mark.parametrize("name", VARIANTS)
def test_descriptions_of_the_nine_are_inverted(name: str):
    config = HfClipConfig.from_variant(name)
    written = open_clip_config(config, HfClipImageProcessor.for_image_size(config.vision_config.image_size))
    assert written["model_cfg"]["quick_gelu"] is True
    assert config_from_open_clip(json.loads(json.dumps(written))).to_diff_dict() == config.to_diff_dict() | {
        "dtype": "float32"
    }


def test_what_is_written_open_clip_loads(tower: str, repository: Path, reference: nn.Module, tmp_path: Path):
    open_clip = load_open_clip_model()
    convert(repository, tmp_path / "written", layout="open_clip")
    values = json.loads((tmp_path / "written" / "open_clip_config.json").read_text())["model_cfg"]
    assert values["text_cfg"]["hf_tokenizer_name"]  # not OpenAI's vocabulary
    theirs = open_clip.CLIP(**values).eval()
    theirs.load_state_dict(load_file(tmp_path / "written" / "open_clip_model.safetensors"), strict=True)
    assert_same_features(theirs, reference, tower)
    stored, written = weights_of(reference), load_file(tmp_path / "written" / "open_clip_model.safetensors")
    assert stored.keys() == written.keys()
    assert_same_features(HfClipModel.from_pretrained(tmp_path / "written"), reference, tower)


# --- training checkpoints -------------------------------------------------------------------------------------------


def training_checkpoint(path: Path, weights: dict, prefix: str = "module.", **more: object) -> Path:
    state = {prefix + name: tensor for name, tensor in weights.items()}
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    torch.save({"epoch": 7, "name": "run", "state_dict": state, "optimizer": optimizer} | more, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_training_checkpoints_convert(tmp_path: Path, references: dict[str, nn.Module], tower: str, prefix: str):
    path = training_checkpoint(tmp_path / "epoch_7.pt", weights_of(references[tower]), prefix)
    convert(path, tmp_path / "out", activation="quick_gelu")
    assert_same_features(HfClipModel.from_pretrained(tmp_path / "out"), references[tower], tower)


def test_activation_of_a_training_checkpoint_is_asked_for(
    tmp_path: Path, references: dict[str, nn.Module], capsys: pytest.CaptureFixture
):
    path = training_checkpoint(tmp_path / "epoch_7.pt", weights_of(references["vit"]))
    assert main([str(path), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "doesn't say which activation" in error
    assert "--config" in error
    assert not (tmp_path / "out").exists()
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg("vit")}))
    assert main([str(path), str(tmp_path / "out"), "--config", str(tmp_path / "open_clip_config.json")]) == 0
    assert AutoConfig.from_pretrained(tmp_path / "out").vision_config.hidden_act == "gelu"
    assert main([str(path), str(tmp_path / "quick"), "--activation", "quick_gelu"]) == 0
    assert AutoConfig.from_pretrained(tmp_path / "quick").text_config.hidden_act == "quick_gelu"


def test_moving_averages_are_chosen_by_the_user(tmp_path: Path, references: dict[str, nn.Module]):
    weights = weights_of(references["vit"])
    averages = {f"module.{name}": tensor * 0.5 for name, tensor in weights.items()}
    averages["n_averaged"] = torch.tensor(3)
    path = training_checkpoint(tmp_path / "epoch_7.pt", weights, state_dict_ema=averages)
    with pytest.raises(CheckpointError, match="choose with --weights model or --weights ema"):
        convert(path, tmp_path / "out", activation="gelu")
    convert(path, tmp_path / "model", activation="gelu", weights="model")
    convert(path, tmp_path / "ema", activation="gelu", weights="ema")
    stored = {kind: load_file(tmp_path / kind / "model.safetensors") for kind in ("model", "ema")}
    assert all(torch.equal(stored["ema"][name], tensor * 0.5) for name, tensor in stored["model"].items())
    plain = training_checkpoint(tmp_path / "plain.pt", weights)
    with pytest.raises(CheckpointError, match="holds no moving averages"):
        convert(plain, tmp_path / "out", activation="gelu", weights="ema")


def test_wrong_configuration_is_refused(tmp_path: Path, references: dict[str, nn.Module]):
    path = training_checkpoint(tmp_path / "epoch_7.pt", weights_of(references["vit"]))
    values = model_cfg("vit")
    values["text_cfg"]["width"] = 64
    (tmp_path / "wrong.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="where .* is needed"):
        convert(path, tmp_path / "out", config=tmp_path / "wrong.json")
    (tmp_path / "other.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"other\.json cannot be read as the configuration of a CLIP"):
        convert(path, tmp_path / "out", config=tmp_path / "other.json")
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*absent\.json"):
        convert(path, tmp_path / "out", config=tmp_path / "absent.json")


def test_flags_for_files_are_refused_for_repositories(foreign: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="tells everything itself: leave out --activation, --weights"):
        convert(foreign, tmp_path / "out", activation="gelu", weights="ema")


def test_state_dict_files_are_read_with_a_note(
    tmp_path: Path, references: dict[str, nn.Module], capsys: pytest.CaptureFixture
):
    torch.save(weights_of(references["vit"]), tmp_path / "state.pt")
    convert(tmp_path / "state.pt", tmp_path / "out")
    assert "OpenAI's quick_gelu is assumed" in capsys.readouterr().err


def test_activation_of_an_archive_is_not_up_to_the_user(archives: dict[str, Path], tmp_path: Path):
    with pytest.raises(CheckpointError, match="is an archive of OpenAI's, whose transformers have quick_gelu"):
        convert(archives["vit"], tmp_path / "out", activation="gelu")


def test_shards_outside_of_the_folder_are_refused(repositories: dict[str, Path], tmp_path: Path):
    folder = tmp_path / "sharded"
    HfClipModel.from_pretrained(repositories["vit"]).save_pretrained(folder, max_shard_size="1MB")
    HfClipProcessor.from_pretrained(repositories["vit"]).save_pretrained(folder)
    index = folder / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    convert(folder, tmp_path / "good")
    name = next(iter(values["weight_map"]))
    for bad in ("../secret.safetensors", "/etc/passwd", "..\\secret.safetensors", 3):
        index.write_text(json.dumps({"weight_map": values["weight_map"] | {name: bad}}))
        with pytest.raises(ValueError, match=r"is refused: it names the file"):
            convert(folder, tmp_path / "bad")


def test_a_path_that_is_not_there_is_no_repository(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="There is no checkpoint file or folder"):
        convert(tmp_path / "nothing" / "here", tmp_path / "out")
