"""Text-to-image: our text towers in place of transformers' own, in pipelines of `diffusers` with random weights."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, CLIPTextModel, CLIPTokenizer

from hf_clip import (
    HfClipImageProcessor,
    HfClipTextModel,
    HfClipTextModelWithProjection,
    HfClipTokenizer,
    HfClipVisionModelWithProjection,
    convert,
)

from ..small import texts
from .stock import stock_text_model, stock_text_model_with_projection

diffusers = pytest.importorskip("diffusers", reason="text-to-image pipelines need the package diffusers")

PROMPTS = ["it’s a cat", "two dogs on a lawn, oil on canvas"]
WIDTH = 128  # of the text tower


@pytest.fixture
def ours(repositories: dict[str, Path]) -> HfClipTextModel:
    return HfClipTextModel.from_pretrained(repositories["vit"]).eval()


@pytest.fixture(scope="module")
def parts(repositories: dict[str, Path]) -> dict[str, Any]:
    """A pipeline without its text encoder."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
    return {
        "unet": unet,
        "vae": vae,
        "tokenizer": AutoProcessor.from_pretrained(repositories["vit"]).tokenizer,
        "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
    }


def build(parts: dict[str, Any], text_encoder: Any, **more: Any) -> Any:
    empty = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return diffusers.StableDiffusionPipeline(**copy.deepcopy(parts), text_encoder=text_encoder, **(empty | more))


def draw(pipeline: Any, prompt: str) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt, num_inference_steps=2, output_type="np", generator=generator).images


def embed(pipeline: Any, prompts: list[str]) -> tuple[Tensor, ...]:
    """The embeddings of the prompts and of a negative prompt."""
    with torch.no_grad():
        return pipeline.encode_prompt(prompts, "cpu", 1, True, negative_prompt=["blurred"] * len(prompts))


@torch.no_grad()
def test_last_and_penultimate_layer_equal_stock(ours: HfClipTextModel):
    """Index -2 is what pipelines take with `clip_skip=1`, normed in Stable Diffusion 2 and raw in XL."""
    found = ours(texts(), output_hidden_states=True)
    stock = stock_text_model(ours)
    expected = stock(texts(), output_hidden_states=True)
    assert len(found.hidden_states) == len(expected.hidden_states)
    assert_equal(found.last_hidden_state, expected.last_hidden_state)
    assert_equal(found.hidden_states[-2], expected.hidden_states[-2])
    assert_equal(ours.final_layer_norm(found.hidden_states[-2]), stock.final_layer_norm(expected.hidden_states[-2]))
    assert_equal(found[0], found.last_hidden_state)  # by position, as pipelines read it
    assert_equal(found[-1][-2], found.hidden_states[-2])


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_stable_diffusion_draws_the_same_images(parts: dict[str, Any], ours: HfClipTextModel):
    mine, theirs = build(parts, ours), build(parts, stock_text_model(ours))
    for found, expected in zip(embed(mine, PROMPTS), embed(theirs, PROMPTS), strict=True):
        assert found.shape == (2, 20, WIDTH)  # padded to the tokenizer's length
        assert_equal(found, expected)
    images = [draw(mine, prompt) for prompt in PROMPTS]
    for prompt, image in zip(PROMPTS, images, strict=True):
        np.testing.assert_allclose(image, draw(theirs, prompt), atol=1e-5)
    assert abs(images[0] - images[1]).max() > 1e-4  # so prompts do matter to that random network


def test_stable_diffusion_measures_and_cuts_a_long_prompt(parts: dict[str, Any], ours: HfClipTextModel):
    """It tokenizes the prompt a second time, without truncation, to say what it leaves out."""
    pipeline = build(parts, ours)
    kept = pipeline.tokenizer.model_max_length - 2
    assert_equal(embed(pipeline, ["cat " * 100])[0], embed(pipeline, ["cat " * kept])[0])


def test_stable_diffusion_xl_takes_pooled_and_penultimate(parts: dict[str, Any], repositories: dict[str, Path]):
    first = HfClipTextModel.from_pretrained(repositories["vit"]).eval()
    second = HfClipTextModelWithProjection.from_pretrained(repositories["vit"]).eval()
    results = []
    for encoders in [(first, second), (stock_text_model(first), stock_text_model_with_projection(second))]:
        pipeline = diffusers.StableDiffusionXLPipeline(
            vae=None,
            unet=None,
            scheduler=parts["scheduler"],
            tokenizer=parts["tokenizer"],
            tokenizer_2=parts["tokenizer"],
            text_encoder=encoders[0],
            text_encoder_2=encoders[1],
            add_watermarker=False,
        )
        with torch.no_grad():
            results.append(pipeline.encode_prompt(PROMPTS, device="cpu", negative_prompt=["blurred"] * 2))
    shapes = [tuple(tensor.shape) for tensor in results[0]]
    assert shapes == [(2, 20, 2 * WIDTH), (2, 20, 2 * WIDTH), (2, 48), (2, 48)]
    for found, expected in zip(*results, strict=True):
        assert_equal(found, expected)


def test_towers_change_places_in_saved_pipelines(parts: dict[str, Any], ours: HfClipTextModel, tmp_path: Path):
    """A stock pipeline's folder opens with our tower, ours with the stock one, and ours as it was saved."""
    mine, theirs = build(parts, ours), build(parts, stock_text_model(ours))
    mine.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "stock")
    load = diffusers.StableDiffusionPipeline.from_pretrained
    expected = draw(theirs, PROMPTS[0])

    tower = HfClipTextModel.from_pretrained(tmp_path / "stock", subfolder="text_encoder").eval()
    np.testing.assert_allclose(draw(load(tmp_path / "stock", text_encoder=tower), PROMPTS[0]), expected, atol=1e-5)
    tower = CLIPTextModel.from_pretrained(tmp_path / "ours", subfolder="text_encoder").eval()
    np.testing.assert_allclose(draw(load(tmp_path / "ours", text_encoder=tower), PROMPTS[0]), expected, atol=1e-5)

    again = load(tmp_path / "ours")
    assert (type(again.text_encoder), type(again.tokenizer)) == (HfClipTextModel, HfClipTokenizer)
    np.testing.assert_allclose(draw(again, PROMPTS[0]), expected, atol=1e-5)


def test_converted_text_tower_takes_its_place_in_a_pipelines_folder(
    parts: dict[str, Any], repository: Path, tmp_path: Path
):
    """`--format diffusers`, from CLIPs of both kinds; the pipeline finds nothing but stock classes."""
    tower = HfClipTextModel.from_pretrained(repository).eval()
    build(parts, stock_text_model(tower)).save_pretrained(tmp_path / "pipeline")
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(tmp_path / "pipeline" / name)
    index = tmp_path / "pipeline" / "model_index.json"
    values = json.loads(index.read_text()) | {"tokenizer": ["transformers", "CLIPTokenizer"]}
    index.write_text(json.dumps(values))
    convert(repository, tmp_path / "converted", layout="diffusers")
    shutil.copytree(tmp_path / "converted", tmp_path / "pipeline", dirs_exist_ok=True)
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert (type(loaded.text_encoder), type(loaded.tokenizer)) == (CLIPTextModel, CLIPTokenizer)
    expected = draw(build(parts, tower), PROMPTS[1])
    np.testing.assert_allclose(draw(loaded, PROMPTS[1]), expected, atol=1e-5)


def test_textual_inversion_adds_a_word(parts: dict[str, Any], ours: HfClipTextModel):
    vector = torch.full((1, WIDTH), 0.5)
    pipelines = [build(parts, ours), build(parts, stock_text_model(ours))]
    for pipeline in pipelines:
        pipeline.load_textual_inversion({"<mine>": vector}, token="<mine>")
        ids = pipeline.tokenizer("a <mine>").input_ids
        assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight[ids[-2]], vector[0])
    mine, theirs = (embed(pipeline, ["an image of <mine>"]) for pipeline in pipelines)
    assert_equal(mine[0], theirs[0])


def test_lora_of_a_text_encoder_loads(parts: dict[str, Any], ours: HfClipTextModel):
    """As older files name the modules, below `text_model`, and as newer ones do."""
    pytest.importorskip("peft", reason="diffusers loads LoRA weights through the package peft")
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"encoder.layers.{layer}.self_attn.{name}.lora_{side}.weight": torch.randn(shape, generator=generator) / 8
        for layer in range(3)
        for name in ("q_proj", "v_proj")
        for side, shape in (("A", (4, WIDTH)), ("B", (WIDTH, 4)))
    }
    plain = embed(build(parts, ours), PROMPTS)[0]
    results = []
    for prefix in ("text_encoder.", "text_encoder.text_model."):
        for encoder in (copy.deepcopy(ours), stock_text_model(ours)):
            pipeline = build(parts, encoder)
            pipeline.load_lora_weights({prefix + name: tensor for name, tensor in weights.items()})
            results.append(embed(pipeline, PROMPTS)[0])
    assert (results[0] - plain).abs().max() > 0.1
    for found in results[1:]:
        assert_equal(found, results[0])


def test_image_encoder_of_a_pipeline(
    parts: dict[str, Any], ours: HfClipTextModel, repository: Path, photographs: dict[str, Image.Image], tmp_path: Path
):
    """Images as prompts (IP-Adapter) are encoded by an image tower with its projection, a ResNet too."""
    tower = HfClipVisionModelWithProjection.from_pretrained(repository).eval()
    processor = AutoProcessor.from_pretrained(repository).image_processor
    pipeline = build(parts, ours, image_encoder=tower, feature_extractor=processor)
    with torch.no_grad():
        found, _ = pipeline.encode_image(photographs["coffee"], "cpu", 1)
        expected = tower(processor(photographs["coffee"], return_tensors="pt").pixel_values).image_embeds
    assert_equal(found, expected)
    pipeline.save_pretrained(tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path)
    assert type(again.image_encoder) is HfClipVisionModelWithProjection
    assert type(again.feature_extractor) is HfClipImageProcessor
