"""One model in every layout: the same bits, read by those it was written for, and refused where it would be wrong."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from conversion.convert import main
from conversion.reference import (
    build_reference,
    halve,
    load_reference_module,
    reference_dimensions,
    write_archive,
)
from hf_clip import (
    VARIANTS,
    HfClipConfig,
    HfClipImageProcessor,
    HfClipModel,
    HfClipProcessor,
    HfClipTextModel,
    HfClipTokenizer,
    convert,
)
from hf_clip.checkpoints import write as writing
from hf_clip.checkpoints.keys import original_names
from hf_clip.checkpoints.read import StoredModel
from hf_clip.checkpoints.remote_code import TRAVELLING, add_remote_code
from hf_clip.checkpoints.write import LAYOUTS, check_clip_l, write

from ..closeness import assert_same_features
from ..small import DIMENSIONS, IMAGE_SIZES, random_images, texts

SMALL_CLIP_L = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "max_position_embeddings": 20,
    "vocab_size": 1000,
    "hidden_act": "quick_gelu",
}
"""The reduced models' text tower."""


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of both kinds with tensors of two dtypes, as the published files have them."""
    folder = tmp_path_factory.mktemp("halved")
    for tower, dimensions in DIMENSIONS.items():
        reference = build_reference(dimensions, seed=4)
        halve(reference)
        write_archive(reference, folder / f"{tower}.pt", IMAGE_SIZES[tower])
        convert(folder / f"{tower}.pt", folder / tower)
    return {tower: folder / tower for tower in DIMENSIONS}


@pytest.fixture
def small_clip_l(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "CLIP_L", SMALL_CLIP_L)


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def files_under(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.usefixtures("small_clip_l")
def test_every_format_holds_the_same_bits(name: str, halved: dict[str, Path], tower: str, tmp_path: Path):
    if (name, tower) == ("transformers", "resnet"):
        pytest.skip("transformers' CLIPModel has no ResNets")
    out, stored = tmp_path / "out", load_file(halved[tower] / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} >= {torch.float16, torch.float32}
    convert(halved[tower], out, layout=name)
    text_tower = {name: tensor for name, tensor in stored.items() if name.startswith("text_model.")}
    originals = original_names(stored, HfClipConfig.from_pretrained(halved[tower]))
    file, expected = {
        "hf_clip": ("model.safetensors", stored),
        "transformers": ("model.safetensors", stored),
        "open_clip": ("open_clip_model.safetensors", originals),
        "openai": ("model.pt", originals),
        "diffusers": ("text_encoder/model.safetensors", text_tower),
        "comfyui": (
            "clip_l.safetensors",
            text_tower | {"text_projection.weight": stored["text_projection.weight"]},
        ),
    }[name]
    assert_same_tensors(load_file(out / file) if name != "openai" else torch.load(out / file), expected)


@pytest.mark.parametrize("name", ["transformers", "open_clip", "openai"])
def test_way_there_and_back_is_exact(name: str, halved: dict[str, Path], tower: str, tmp_path: Path):
    if (name, tower) == ("transformers", "resnet"):
        pytest.skip("transformers' CLIPModel has no ResNets")
    convert(halved[tower], tmp_path / "there", layout=name)
    source = tmp_path / "there" / "model.pt" if name == "openai" else tmp_path / "there"
    convert(source, tmp_path / "back")
    for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (halved[tower] / file).read_bytes(), file


def test_unknown_format_is_refused(halved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(
        ValueError, match="format is 'onnx', but must be one of hf_clip, transformers, open_clip, openai, diffusers"
    ):
        convert(halved["vit"], tmp_path / "out", layout="onnx")
    assert main([str(halved["vit"]), str(tmp_path / "out"), "--format", "onnx"]) == 1
    assert "'onnx' is not one of 'hf_clip', 'transformers', 'open_clip', 'openai'" in capsys.readouterr().err
    assert files_under(tmp_path) == set()


# --- OpenAI's own code ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_original_code_builds_what_was_written(halved: dict[str, Path], tower: str, tmp_path: Path):
    convert(halved[tower], tmp_path / "out", layout="openai")
    assert files_under(tmp_path / "out") == {"model.pt"}
    theirs = load_reference_module("model").build_model(torch.load(tmp_path / "out" / "model.pt")).float()
    model = HfClipModel.from_pretrained(halved[tower]).eval()
    for found, expected in (
        (model.encode_image(random_images(tower)), theirs.encode_image(random_images(tower))),
        (model.encode_text(texts()), theirs.encode_text(texts())),
    ):
        assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("name", VARIANTS)
def test_original_code_takes_all_nine(name: str, tmp_path: Path):
    """Names and shapes at full size, without a byte of weights."""
    config = HfClipConfig.from_variant(name)
    with torch.device("meta"):
        tensors = dict(HfClipModel(config).state_dict())
        expected = load_reference_module("model").CLIP(**reference_dimensions(VARIANTS[name])).state_dict()
    write(StoredModel(config, tensors), None, tmp_path, "openai")  # type: ignore[arg-type]
    state = torch.load(tmp_path / "model.pt")
    assert {key: tensor.shape for key, tensor in state.items()} == {k: t.shape for k, t in expected.items()}
    with torch.device("meta"):
        theirs = load_reference_module("model").build_model(state)
    assert (theirs.visual.input_resolution, theirs.context_length) == (VARIANTS[name].image_size, 77)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_all_nine_go_to_the_original_and_back_at_full_size(name: str, tmp_path: Path):
    reference = build_reference(reference_dimensions(VARIANTS[name]), seed=0)
    halve(reference)
    stored = {key: t for key, t in reference.state_dict().items() if not key.endswith("attn_mask")}
    write_archive(reference, tmp_path / "file.pt", VARIANTS[name].image_size)
    convert(tmp_path / "file.pt", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "openai", layout="openai")
    assert_same_tensors(torch.load(tmp_path / "openai" / "model.pt", mmap=True), stored)
    theirs = load_reference_module("model").build_model(torch.load(tmp_path / "openai" / "model.pt"))
    assert_same_tensors(dict(theirs.state_dict()), dict(reference.state_dict()))
    convert(tmp_path / "openai" / "model.pt", tmp_path / "back")
    for file in ("model.safetensors", "config.json", "tokenizer.json", "processor_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (tmp_path / "ours" / file).read_bytes(), file


def write_altered(folder: Path, *, towers: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A small ViT CLIP of ours with other settings."""
    text = {
        "vocab_size": 1000,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 20,
        "bos_token_id": 998,
        "eos_token_id": 999,
        "pad_token_id": 999,
    }
    vision = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 16}
    given = towers or {}
    config = HfClipConfig(
        text_config=text | given.get("text", {}), vision_config=vision | given.get("vision", {}), **changes
    )
    HfClipModel(config).save_pretrained(folder)
    tokenizer = HfClipTokenizer.train_from_iterator(["a cat", "a dog"], vocab_size=1000, model_max_length=20)
    HfClipProcessor(HfClipImageProcessor.for_image_size(32), tokenizer).save_pretrained(folder)
    return folder


GELU = {"hidden_act": "gelu"}
REFUSALS = {
    "openai, gelu": (
        "openai",
        {"towers": {"text": GELU, "vision": GELU}},
        "QuickGELU and the softmax loss, but this model has gelu and the softmax loss",
    ),
    "openai, sigmoid": (
        "openai",
        {"contrastive_loss": "sigmoid"},
        "but this model has quick_gelu and the sigmoid loss",
    ),
    "openai, heads of a ViT": (
        "openai",
        {"towers": {"vision": {"num_attention_heads": 4}}},
        "takes heads for 64 wide, but hf_clip_vit has 4 heads in 128",
    ),
    "openai, heads of texts": (
        "openai",
        {"towers": {"text": {"num_attention_heads": 1}}},
        "takes heads for 64 wide, but hf_clip_text has 1 heads in 128",
    ),
    "openai, end of text": (
        "openai",
        {"towers": {"text": {"eos_token_id": 500}}},
        "OpenAI's code takes a text's feature at its largest id, but this model's end of text is 500 of 1000 ids",
    ),
    "open_clip, end of text": (
        "open_clip",
        {"towers": {"text": {"eos_token_id": 500}}},
        "open_clip takes a text's feature at its largest id, but this model's end of text is 500 of 1000 ids",
    ),
    "open_clip, two activations": (
        "open_clip",
        {"towers": {"text": GELU}},
        "open_clip has quick_gelu or gelu, one for both towers, but this model has gelu, quick_gelu",
    ),
    "comfyui": (
        "comfyui",
        {},
        "ComfyUI's clip_l is the text tower of ViT-L/14 and RN50x16, but this model's has hidden_size 128 instead of "
        "768",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_would_be_wrong_elsewhere_is_refused_and_nothing_written(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    name, changes, message = REFUSALS[case]
    source = write_altered(tmp_path / "source", **changes)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    before = files_under(tmp_path)
    for arguments in (["out"], ["full", "--overwrite"]):
        out, *flags = arguments
        assert main([str(source), str(tmp_path / out), "--format", name, *flags]) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        assert message in line
        assert files_under(tmp_path) == before


# --- diffusers and ComfyUI --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_text_tower_of_either_kind_for_diffusers(repository: Path, model: HfClipModel, tmp_path: Path):
    convert(repository, tmp_path / "out", layout="diffusers")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"text_encoder", "tokenizer"}
    stock, info = CLIPTextModel.from_pretrained(tmp_path / "out" / "text_encoder", output_loading_info=True)
    assert not any(info.values())
    found = stock.eval()(texts(), output_hidden_states=True)
    expected = model.text_model(texts(), output_hidden_states=True)
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.hidden_states[-2], expected.hidden_states[-2], rtol=1e-5, atol=1e-5)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert type(tokenizer) is CLIPTokenizer
    prompts = ["a red cat", "two dogs"]
    found = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    own = HfClipTokenizer.from_pretrained(repository)
    assert torch.equal(found, own(prompts, padding="max_length", return_tensors="pt").input_ids)
    assert found.shape == (2, 20)


@torch.no_grad()
def test_what_was_written_for_diffusers_is_read_here_too(repository: Path, model: HfClipModel, tmp_path: Path):
    """As text encoders and tokenizers of pipelines are, tokenizers of vocab.json and merges.txt alone included."""
    convert(repository, tmp_path / "out", layout="diffusers")
    tower = HfClipTextModel.from_pretrained(tmp_path / "out", subfolder="text_encoder").eval()
    assert_same_features(tower(texts()).last_hidden_state, model.text_model(texts()).last_hidden_state)
    expected = HfClipTokenizer.from_pretrained(repository)(["it’s red"]).input_ids
    assert HfClipTokenizer.from_pretrained(tmp_path / "out", subfolder="tokenizer")(["it’s red"]).input_ids == expected
    (tmp_path / "out" / "tokenizer" / "tokenizer.json").unlink()
    found = HfClipTokenizer.from_pretrained(tmp_path / "out", subfolder="tokenizer")
    assert found(["it’s red"]).input_ids == expected
    assert found.model_max_length == 20
    vocab = tmp_path / "out" / "tokenizer" / "vocab.json"
    vocab.write_text(json.dumps({token: 999 - number for token, number in json.loads(vocab.read_text()).items()}))
    with pytest.raises(ValueError, match=r"vocab\.json of .* numbers its tokens otherwise than CLIP's tokenizer does"):
        HfClipTokenizer.from_pretrained(tmp_path / "out", subfolder="tokenizer")


@pytest.mark.usefixtures("small_clip_l")
@torch.no_grad()
def test_comfyui_gets_one_file_under_the_names_it_looks_for(repository: Path, model: HfClipModel, tmp_path: Path):
    convert(repository, tmp_path / "out", layout="comfyui")
    assert files_under(tmp_path / "out") == {"clip_l.safetensors"}
    tensors = load_file(tmp_path / "out" / "clip_l.safetensors")
    assert "text_model.encoder.layers.2.mlp.fc1.weight" in tensors
    values = model.config.text_config.to_dict()
    del values["model_type"]
    stock = CLIPTextModelWithProjection(CLIPTextModel.config_class(**values)).eval()
    stock.load_state_dict(tensors, strict=True)
    torch.testing.assert_close(stock(texts()).text_embeds, model.encode_text(texts()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_three_of_the_nine_have_the_text_tower_of_clip_l(name: str):
    config = HfClipConfig.from_variant(name).text_config
    if name in ("RN50x16", "ViT-L/14", "ViT-L/14@336px"):
        check_clip_l(config)
    else:
        with pytest.raises(ValueError, match=r"has hidden_size \d+ instead of 768.*; use --format diffusers"):
            check_clip_l(config)


# --- the code that travels --------------------------------------------------------------------------------------------


def test_flag_puts_the_code_beside_the_model(halved: dict[str, Path], tmp_path: Path):
    assert main([str(halved["vit"]), str(tmp_path / "out"), "--remote-code"]) == 0
    expected = tmp_path / "expected"
    shutil.copytree(halved["vit"], expected)
    add_remote_code(expected)
    assert files_under(tmp_path / "out") == files_under(expected)
    for path in expected.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_flag_is_refused_where_no_code_is_needed(
    halved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    arguments = [str(halved["vit"]), str(tmp_path / "out"), "--remote-code", "--format", "transformers"]
    assert main(arguments) == 1
    assert "--remote-code is for this package's own layout; --format transformers needs no code" in (
        capsys.readouterr().err
    )
    assert files_under(tmp_path) == set()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.usefixtures("small_clip_l")
def test_code_is_not_taken_along(name: str, halved: dict[str, Path], tmp_path: Path):
    convert(halved["vit"], tmp_path / "published", remote_code=True)
    assert (tmp_path / "published" / f"{TRAVELLING[0]}.py").is_file()
    convert(tmp_path / "published", tmp_path / "out", layout=name)
    convert(halved["vit"], tmp_path / "plain", layout=name)
    assert files_under(tmp_path / "out") == files_under(tmp_path / "plain")
    for path in (tmp_path / "plain").rglob("*"):
        found = tmp_path / "out" / path.relative_to(tmp_path / "plain")
        assert path.is_dir() or found.read_bytes() == path.read_bytes(), path.name


def test_code_is_not_taken_along_with_added_tokens_either(halved: dict[str, Path], tmp_path: Path):
    """Whose tokenizer is written as it was read."""
    shutil.copytree(halved["vit"], tmp_path / "published")
    tokenizer = HfClipTokenizer.from_pretrained(halved["vit"])
    tokenizer.add_tokens(["<|mine|>"])
    tokenizer.save_pretrained(tmp_path / "published")
    add_remote_code(tmp_path / "published")
    for name in ("hf_clip", "transformers", "diffusers"):
        convert(tmp_path / "published", tmp_path / name, layout=name)
        for path in (tmp_path / name).rglob("*"):
            assert path.suffix != ".py"
            assert path.suffix != ".json" or "auto_map" not in path.read_text(encoding="utf-8"), path
    assert "<|mine|>" in HfClipTokenizer.from_pretrained(tmp_path / "hf_clip").get_vocab()


@pytest.mark.parametrize(
    "names", [("hf_clip", "transformers"), ("transformers", "open_clip"), ("open_clip", "hf_clip")]
)
def test_two_layouts_in_one_folder_are_refused(
    names: tuple[str, str], halved: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    """`--overwrite` leaves files of other names alone, and some of them would go on to describe the old model."""
    out, (first, second) = tmp_path / "out", names
    convert(halved["vit"], out, layout=first)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main([str(halved["vit"]), str(out), "--format", second, "--overwrite"]) == 1
    assert "of a model in another layout, which would be read with the new one's files" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_that_describe_nothing_go_beside_any_model(halved: dict[str, Path], tmp_path: Path):
    convert(halved["vit"], tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "out", layout="openai", overwrite=True)
    assert files_under(tmp_path / "out") == files_under(halved["vit"]) | {"model.pt"}
