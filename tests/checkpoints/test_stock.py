"""transformers' own CLIP repositories: those of every age read as they are, and ours written for stock classes."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoProcessor, CLIPConfig, CLIPModel, CLIPTokenizer, Dinov2Config, pipeline

import hf_clip
from conversion.convert import main
from hf_clip import (
    HfClipConfig,
    HfClipImageProcessor,
    HfClipModel,
    HfClipProcessor,
    HfClipTextModel,
    HfClipTextModelWithProjection,
    HfClipTokenizer,
    HfClipVisionModelWithProjection,
    HfClipViTModel,
    convert,
)

from ..small import random_images, texts
from ..warm_python import run_warm
from ..without_hf_clip import BLOCK_HF_CLIP

TEXTS = ["a cat", "it’s “red”", "two dogs", "ﬁne ＡＢＣ"]
TEXT_CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projection_dim": 24,
    "hidden_act": "quick_gelu",
}
VISION_CONFIG = TEXT_CONFIG | {"image_size": 32, "patch_size": 8}
LEGACY_IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
"""What configurations said before transformers 4.31; none of them is what it is called."""

LAYOUTS = ("2021", "2022", "2023", "today")


def build_stock(ids: dict[str, int]) -> CLIPModel:
    """With all 49,408 ids, at which alone the old ids are known to be wrong; every parameter random."""
    torch.manual_seed(3)
    config = CLIPConfig(text_config=TEXT_CONFIG | ids, vision_config=VISION_CONFIG, projection_dim=24)
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.1)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.normal_(std=0.1)
    return model


def stored_tensors(model: CLIPModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """As old versions saved them, with counters of positions."""
    state = {name: tensor.to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    return state


def write_weights(folder: Path, model: CLIPModel, layout: str) -> None:
    """2021: a pickle in float16.   2022: a pickle in shards.   2023: safetensors.   today: safetensors in shards."""
    if layout == "2021":
        torch.save(stored_tensors(model, torch.float16), folder / "pytorch_model.bin")
    elif layout == "2022":
        state = stored_tensors(model, torch.float32)
        names = sorted(state)
        parts = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
        for file, part in parts.items():
            torch.save({name: state[name].clone() for name in part}, folder / file)
        index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    elif layout == "2023":
        save_file(stored_tensors(model, torch.float32), folder / "model.safetensors", {"format": "pt"})
    else:
        model.save_pretrained(folder, max_shard_size="8MB")
        assert (folder / "model.safetensors.index.json").is_file()


def write_description(folder: Path, config: CLIPConfig, layout: str) -> None:
    """config.json of that time. In 2022 the real values stood in `text_config_dict`, beside a wrong `text_config`."""
    if layout == "today":
        return  # save_pretrained has written it
    text, vision = TEXT_CONFIG | LEGACY_IDS, dict(VISION_CONFIG)
    values: dict[str, Any] = {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": 24,
        "logit_scale_init_value": 2.6592,
        "torch_dtype": "float16" if layout == "2021" else "float32",
        "transformers_version": None,
        "text_config": text | {"model_type": "clip_text_model", "torchscript": False, "num_beams": 1},
        "vision_config": vision | {"model_type": "clip_vision_model", "torchscript": False, "num_beams": 1},
        "text_config_dict": None,
        "vision_config_dict": None,
    }
    if layout == "2022":
        values |= {"text_config_dict": text, "vision_config_dict": vision}
        values["text_config"] = values["text_config"] | {"hidden_size": 512, "num_hidden_layers": 12}
        values["vision_config"] = values["vision_config"] | {"hidden_size": 768, "num_hidden_layers": 12}
    (folder / "config.json").write_text(json.dumps(values))


def write_preparation(folder: Path, tokenizer: HfClipTokenizer, layout: str) -> None:
    """Tokenizer and image processor: the oldest have no tokenizer.json, and sizes that are plain numbers."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [" ".join(merge) for merge in model["merges"]]
    pairs = [tuple(merge) for merge in model["merges"]]
    CLIPTokenizer(vocab=model["vocab"], merges=pairs, model_max_length=77).save_pretrained(folder)
    if layout == "2021":
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        described = special | {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(described))
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
    is_old = layout in ("2021", "2022")
    values = {
        "crop_size": 32 if is_old else {"height": 32, "width": 32},
        "size": 32 if is_old else {"shortest_edge": 32},
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
    }
    values |= {"feature_extractor_type": "CLIPFeatureExtractor"} if is_old else {"do_convert_rgb": True}
    values |= {} if is_old else {"image_processor_type": "CLIPImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(values))


@pytest.fixture(scope="module")
def stock_models() -> dict[str, CLIPModel]:
    """The stock models of these repositories. Tests must not change them."""
    current = build_stock({"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407})
    old = build_stock(LEGACY_IDS)
    halved = build_stock(LEGACY_IDS).half().float()
    return {"2021": halved, "2022": old, "2023": old, "today": current}


@pytest.fixture(scope="module")
def stock_folders(
    stock_models: dict[str, CLIPModel], tokenizer: HfClipTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Repositories of all ages. Tests must not write there."""
    folders = {}
    for layout in LAYOUTS:
        folders[layout] = folder = tmp_path_factory.mktemp(f"stock-{layout}-")
        write_weights(folder, stock_models[layout], layout)
        write_description(folder, stock_models[layout].config, layout)
        write_preparation(folder, tokenizer, layout)
    return folders


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def stock_folder(stock_folders: dict[str, Path], layout: str) -> Path:
    return stock_folders[layout]


@pytest.fixture
def stock(stock_models: dict[str, CLIPModel], layout: str) -> CLIPModel:
    return stock_models[layout]


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What transformers says at its usual verbosity."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger, before = logging.getLogger("transformers"), transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)
    transformers.logging.set_verbosity(before)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() / expected.norm() < 1e-5


# --- stock repositories, read in place --------------------------------------------------------------------------------


@torch.no_grad()
def test_stock_repositories_of_every_age_work_as_they_are(
    stock_folder: Path, stock: CLIPModel, tokenizer: HfClipTokenizer, messages: list[str]
):
    model, info = HfClipModel.from_pretrained(stock_folder, dtype=torch.float32, output_loading_info=True)
    HfClipConfig.from_pretrained(stock_folder)
    assert messages == []  # neither of another model's configuration nor of tensors without a place
    assert not any(info[kind] for kind in ("missing_keys", "mismatched_keys"))
    assert model.config.model_type == "hf_clip"
    assert model.config.text_config.eos_token_id == 49407
    ids = tokenizer(TEXTS, return_tensors="pt")
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found, expected = model(**ids, pixel_values=pixels), stock(**ids, pixel_values=pixels)
    for name in ("image_embeds", "text_embeds", "logits_per_image", "logits_per_text"):
        assert_close(found[name], expected[name])
    assert_close(model.encode_text(ids["input_ids"]), stock.get_text_features(**ids).pooler_output)
    assert_close(model.encode_image(pixels), stock.get_image_features(pixels).pooler_output)


def test_other_models_configurations_are_still_warned_of(stock_folders: dict[str, Path], messages: list[str]):
    """So the silence above is that of a logger that is heard."""
    Dinov2Config.from_pretrained(stock_folders["today"])
    assert any("You are using a model of type" in message for message in messages)


@torch.no_grad()
def test_every_class_reads_its_part(stock_folder: Path, stock: CLIPModel, messages: list[str]):
    options = {"dtype": torch.float32}
    ids = torch.tensor([[49406, 320, 2368, 49407, 49407]])
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    text, image = stock.get_text_features(ids), stock.get_image_features(pixels)
    tower = HfClipTextModel.from_pretrained(stock_folder, **options).eval()
    assert_close(tower(ids).last_hidden_state, text.last_hidden_state)
    tower = HfClipViTModel.from_pretrained(stock_folder, **options).eval()
    assert_close(tower(pixels).last_hidden_state, image.last_hidden_state)
    projected = HfClipTextModelWithProjection.from_pretrained(stock_folder, **options).eval()
    assert_close(projected(ids).text_embeds, text.pooler_output)
    projected = HfClipVisionModelWithProjection.from_pretrained(stock_folder, **options).eval()
    assert_close(projected(pixels).image_embeds, image.pooler_output)
    assert messages == []


def test_processor_of_a_stock_repository_is_ours(
    stock_folder: Path, tokenizer: HfClipTokenizer, photographs: dict[str, Image.Image]
):
    processor = HfClipProcessor.from_pretrained(stock_folder)
    assert type(processor.tokenizer) is HfClipTokenizer
    assert type(processor.image_processor) is HfClipImageProcessor
    found = processor(text=TEXTS, images=photographs["coffee"], return_tensors="pt")
    expected = HfClipImageProcessor.for_image_size(32)(photographs["coffee"], return_tensors="pt")
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    for name, tensor in tokenizer(TEXTS, return_tensors="pt").items():
        assert torch.equal(found[name], tensor), name
    assert processor.tokenizer.model_max_length == 77
    assert HfClipTokenizer.from_pretrained(stock_folder)(TEXTS).input_ids == tokenizer(TEXTS).input_ids


@torch.no_grad()
def test_clip_load_reads_a_stock_repository(stock_folder: Path, stock: CLIPModel, photographs: dict[str, Image.Image]):
    model, preprocess = hf_clip.load(stock_folder, device="cpu")
    image = preprocess(photographs["chelsea"])[None]
    assert_close(model.encode_image(image), stock.get_image_features(image).pooler_output)
    ids = hf_clip.tokenize(TEXTS)
    assert_close(model.encode_text(ids), stock.get_text_features(ids).pooler_output)


def test_stock_repositories_convert_bit_for_bit(stock_folder: Path, layout: str, tmp_path: Path):
    convert(stock_folder, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    stored: dict[str, Tensor] = {}
    for path in [*stock_folder.glob("*.bin"), *stock_folder.glob("*.safetensors")]:
        stored |= load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    stored = {name: tensor for name, tensor in stored.items() if not name.endswith("position_ids")}
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        assert found[name].dtype == tensor.dtype == (torch.float16 if layout == "2021" else torch.float32)
        assert torch.equal(found[name], tensor), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("hf_clip", "float32")
    assert config["text_config"]["eos_token_id"] == 49407


def test_damaged_stock_repositories_are_refused(stock_folders: dict[str, Path], tmp_path: Path):
    def copy(layout: str, *names: str) -> Path:
        folder = tmp_path / f"{layout}-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for path in stock_folders[layout].iterdir():
            if path.name not in names:
                (folder / path.name).write_bytes(path.read_bytes())
        return folder

    shard = copy("2022", "pytorch_model-00002-of-00002.bin")
    with pytest.raises(FileNotFoundError, match=r"lacks pytorch_model-00002-of-00002\.bin, which its pytorch_model"):
        convert(shard, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"has no weights: none of model\.safetensors, pytorch_model\.bin"):
        convert(copy("2023", "model.safetensors"), tmp_path / "out")
    narrow = copy("2023", "config.json")
    values = json.loads((stock_folders["2023"] / "config.json").read_text())
    values["vision_config"]["patch_size"] = 16
    (narrow / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"of shape \(\d+.* where its configuration needs"):
        convert(narrow, tmp_path / "out")
    state = load_file(narrow / "model.safetensors")
    save_file(state | {"adapter.weight": torch.ones(1)}, narrow / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensors that its configuration has no place for: adapter\.weight"):
        convert(narrow, tmp_path / "out")
    del state["logit_scale"]
    save_file(state, narrow / "model.safetensors")
    with pytest.raises(ValueError, match="lacks tensors of the model: logit_scale"):
        convert(narrow, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- ours, written for stock classes ----------------------------------------------------------------------------------

STOCK_PROCESS = (
    BLOCK_HF_CLIP
    + """
import json, torch
from PIL import Image
from transformers import (
    AutoModel, AutoProcessor, AutoTokenizer, CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTextModelWithProjection,
    CLIPVisionModel, CLIPVisionModelWithProjection, pipeline,
)

given, (folder, *others) = torch.load(sys.argv[1]), sys.argv[2:]
photograph, found = Image.open(given["image"]), {}
with torch.no_grad():
    for kind in (CLIPModel, AutoModel):
        model, info = kind.from_pretrained(folder, output_loading_info=True)
        assert type(model) is CLIPModel and not any(info.values()), info
        outputs = model.eval()(input_ids=given["input_ids"], pixel_values=given["pixel_values"])
        found[kind.__name__] = outputs.logits_per_image
    found["text_features"] = model.get_text_features(given["input_ids"]).pooler_output
    found["image_features"] = model.get_image_features(given["pixel_values"]).pooler_output
    text = {"input_ids": given["input_ids"]}
    pixels = {"pixel_values": given["pixel_values"]}
    parts = [
        (CLIPTextModel, text, "last_hidden_state"), (CLIPVisionModel, pixels, "last_hidden_state"),
        (CLIPTextModelWithProjection, text, "text_embeds"), (CLIPVisionModelWithProjection, pixels, "image_embeds"),
    ]
    for kind, inputs, name in parts:
        found[kind.__name__] = kind.from_pretrained(folder).eval()(**inputs)[name]
for kind in (AutoProcessor, CLIPProcessor):
    processor = kind.from_pretrained(folder)
    assert type(processor) is CLIPProcessor
    inputs = processor(text=given["texts"], images=photograph, padding=True, return_tensors="pt")
    found[kind.__name__] = dict(inputs)
found["tokens"] = AutoTokenizer.from_pretrained(folder)(given["texts"]).input_ids
classify = pipeline("zero-shot-image-classification", model=folder)
found["scores"] = classify(photograph, candidate_labels=given["texts"])
found["others"] = [CLIPModel.from_pretrained(other).state_dict() for other in others]
found["state"] = model.state_dict()
torch.save(found, sys.argv[1])
"""
)


@pytest.fixture(scope="module")
def written(
    archives: dict[str, Path], repositories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The reduced ViT for stock classes: from OpenAI's archive, from our folder, and from what was so written."""
    folder = tmp_path_factory.mktemp("written")
    convert(archives["vit"], folder / "archive", layout="transformers")
    convert(repositories["vit"], folder / "folder", layout="transformers")
    convert(folder / "archive", folder / "again", layout="transformers")
    return {name: folder / name for name in ("archive", "folder", "again")}


@pytest.fixture(scope="module")
def in_stock_process(
    written: dict[str, Path], photographs: dict[str, Image.Image], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What a process that has never heard of hf_clip makes of it, and was told of no remote code."""
    folder = tmp_path_factory.mktemp("process")
    photographs["chelsea"].save(folder / "image.png")
    given = {
        "image": str(folder / "image.png"),
        "texts": TEXTS,
        "input_ids": texts(),
        "pixel_values": random_images("vit"),
    }
    torch.save(given, folder / "exchange.pt")
    done = run_warm(
        STOCK_PROCESS,
        folder / "exchange.pt",
        *written.values(),
        cwd=folder,
        environment={"HF_HOME": str(folder / "cache"), "HF_MODULES_CACHE": str(folder / "modules")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (folder / "modules").exists()  # no code was taken from anywhere
    return given | torch.load(folder / "exchange.pt")


@torch.no_grad()
def test_stock_classes_load_it_without_this_package(in_stock_process: dict[str, Any], repositories: dict[str, Path]):
    model = HfClipModel.from_pretrained(repositories["vit"]).eval()
    ids, pixels = in_stock_process["input_ids"], in_stock_process["pixel_values"]
    logits = model(input_ids=ids, pixel_values=pixels).logits_per_image
    expected = {
        "CLIPModel": logits,
        "AutoModel": logits,
        "text_features": model.encode_text(ids),
        "image_features": model.encode_image(pixels),
        "CLIPTextModel": model.text_model(ids).last_hidden_state,
        "CLIPVisionModel": model.vision_model(pixels).last_hidden_state,
        "CLIPTextModelWithProjection": model.encode_text(ids),
        "CLIPVisionModelWithProjection": model.encode_image(pixels),
    }
    for name, tensor in expected.items():
        assert_close(in_stock_process[name], tensor)
    for state in (in_stock_process["state"], *in_stock_process["others"]):
        own = model.state_dict()
        assert state.keys() == own.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in own.items())


def test_stock_processors_prepare_the_same_inputs(in_stock_process: dict[str, Any], repositories: dict[str, Path]):
    """Typographic quotes, ligatures and full-width letters included: tokenizer.json repairs them."""
    image = Image.open(in_stock_process["image"])
    expected = AutoProcessor.from_pretrained(repositories["vit"])(text=TEXTS, images=image, return_tensors="pt")
    for kind in ("AutoProcessor", "CLIPProcessor"):
        found = in_stock_process[kind]
        assert found.keys() >= {"input_ids", "attention_mask", "pixel_values"}
        for name in ("input_ids", "attention_mask", "pixel_values"):
            assert torch.equal(found[name], expected[name]), (kind, name)
    lengths = expected["attention_mask"].sum(dim=1).tolist()
    assert in_stock_process["tokens"] == [
        ids[:length] for ids, length in zip(expected["input_ids"].tolist(), lengths, strict=True)
    ]


def test_stock_pipeline_gives_our_scores(in_stock_process: dict[str, Any], repositories: dict[str, Path]):
    classify = pipeline("zero-shot-image-classification", model=str(repositories["vit"]))
    expected = classify(Image.open(in_stock_process["image"]), candidate_labels=TEXTS)
    found = in_stock_process["scores"]
    assert [entry["label"] for entry in found] == [entry["label"] for entry in expected]
    assert [e["score"] for e in found] == pytest.approx([e["score"] for e in expected], abs=1e-6)


def test_stock_folder_says_what_stock_folders_say(written: dict[str, Path]):
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in written.values()]
    assert contents[0] == contents[1] == contents[2]  # whatever it was written from
    config = json.loads(contents[0]["config.json"])
    assert (config["model_type"], config["architectures"]) == ("clip", ["CLIPModel"])
    assert not any(b"hf_clip" in content or b"HfClip" in content for name, content in contents[0].items())
    expected = {"config.json", "merges.txt", "model.safetensors", "preprocessor_config.json", "tokenizer.json"}
    assert contents[0].keys() == expected | {"tokenizer_config.json", "vocab.json"}


def test_way_to_stock_and_back_is_exact(written: dict[str, Path], repositories: dict[str, Path], tmp_path: Path):
    convert(written["archive"], tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    del config["vision_config"]["initializer_range"]  # a field that stock ViTs have beside ours
    assert config == json.loads((repositories["vit"] / "config.json").read_text())
    for path in repositories["vit"].iterdir():
        found = (tmp_path / "back" / path.name).read_bytes()
        assert path.name == "config.json" or found == path.read_bytes(), path.name


def test_squash_is_said_in_stock_words(
    repositories: dict[str, Path], photographs: dict[str, Image.Image], tmp_path: Path
):
    from transformers import AutoImageProcessor

    folder = saved_with(repositories["vit"], tmp_path / "squash", fit="squash")
    convert(folder, tmp_path / "out", layout="transformers")
    stock = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert not isinstance(stock, HfClipImageProcessor)
    own = HfClipImageProcessor.from_pretrained(folder)
    found, expected = (p(photographs["coffee"], return_tensors="pt").pixel_values for p in (stock, own))
    assert torch.equal(found, expected)


def saved_with(repository: Path, folder: Path, *, sigmoid: bool = False, fit: str = "crop") -> Path:
    """A copy of a model with other settings."""
    config = HfClipConfig.from_pretrained(repository)
    config.contrastive_loss = "sigmoid" if sigmoid else "softmax"
    HfClipModel.from_pretrained(repository, config=config).save_pretrained(folder)
    processor = HfClipProcessor.from_pretrained(repository)
    processor.image_processor.fit = fit
    processor.save_pretrained(folder)
    return folder


def test_what_stock_classes_cannot_express_is_refused(
    repositories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    cases = {
        "its image tower is a ResNet": repositories["resnet"],
        "it was trained with the sigmoid loss": saved_with(repositories["vit"], tmp_path / "sigmoid", sigmoid=True),
        'fit="pad" cannot be said to transformers\' CLIPImageProcessor': saved_with(
            repositories["vit"], tmp_path / "pad", fit="pad"
        ),
    }
    before = sorted(path.name for path in tmp_path.iterdir())
    for message, folder in cases.items():
        assert main([str(folder), str(tmp_path / "out"), "--format", "transformers"]) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")
        assert message in line
        assert sorted(path.name for path in tmp_path.iterdir()) == before
