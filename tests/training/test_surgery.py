"""Other image sizes, longer texts, the other loss: what must stay the same, and what the saved folder does."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

from hf_clip import HfClipConfig, HfClipImageProcessor, HfClipModel, HfClipProcessor, HfClipTokenizer
from hf_clip.training.optim import create_optimizer
from hf_clip.training.surgery import set_image_size_, set_text_length_, stretch_positions, switch_to_sigmoid_

from ..closeness import assert_same_features
from ..small import IMAGE_SIZES, random_images, texts
from .steps import changed, take_steps, weights_of

TABLE = {
    "vit": "vision_model.embeddings.position_embedding.weight",
    "resnet": "vision_model.attnpool.positional_embedding",
}
POSITIONS = "text_model.embeddings.position_embedding.weight"
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL_VIT = {"model_type": "hf_clip_vit", "image_size": 16, "patch_size": 8} | TEXT


@pytest.fixture
def processor(repository: Path) -> HfClipProcessor:
    return AutoProcessor.from_pretrained(repository)


@pytest.fixture
def long_table() -> tuple[HfClipModel, HfClipProcessor]:
    """A small model with 30 positions for texts."""
    tokenizer = HfClipTokenizer.train_from_iterator(["one two three"], 600, model_max_length=30)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = TEXT | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 30}
    torch.manual_seed(0)
    model = HfClipModel(HfClipConfig(text_config=text, vision_config=SMALL_VIT, projection_dim=16)).eval()
    return model, HfClipProcessor(HfClipImageProcessor.for_image_size(16), tokenizer)


def save_and_load(model: HfClipModel, processor: HfClipProcessor, folder: Path) -> tuple[HfClipModel, HfClipProcessor]:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def test_same_image_size_changes_nothing(model: HfClipModel, processor: HfClipProcessor, tower: str):
    before, settings, config = weights_of(model), processor.image_processor.to_dict(), model.config.to_dict()
    set_image_size_(model, processor, IMAGE_SIZES[tower])
    assert not changed(before, model)
    assert processor.image_processor.to_dict() == settings
    assert model.config.to_dict() == config


@torch.no_grad()
def test_larger_images_give_the_features_of_a_resampled_table(
    model: HfClipModel, processor: HfClipProcessor, tower: str
):
    size = IMAGE_SIZES[tower] * 2
    images = torch.randn(2, 3, size, size)
    expected = model.encode_image(images, interpolate_pos_encoding=True)
    before = weights_of(model)
    set_image_size_(model, processor, size)
    torch.testing.assert_close(model.encode_image(images), expected, rtol=1e-5, atol=1e-5)
    assert [name for name, tensor in model.state_dict().items() if tensor.shape != before[name].shape] == [TABLE[tower]]
    for name, tensor in model.state_dict().items():
        assert name == TABLE[tower] or torch.equal(tensor, before[name])
    with pytest.raises(ValueError, match=f"position table fits only {size}x{size}"):
        model.encode_image(random_images(tower))


def test_saved_folder_works_at_the_new_size(
    model: HfClipModel, processor: HfClipProcessor, tower: str, tmp_path: Path, photographs: dict[str, Image.Image]
):
    size = IMAGE_SIZES[tower] + 32
    set_image_size_(model, processor, size)
    loaded, loaded_processor = save_and_load(model, processor, tmp_path)
    assert not changed(weights_of(model), loaded)
    assert loaded.config.vision_config.image_size == size
    pixels = loaded_processor(images=photographs["chelsea"], return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, size, size)
    expected = HfClipImageProcessor.for_image_size(size)(photographs["chelsea"], return_tensors="pt").pixel_values
    assert torch.equal(pixels, expected)
    scores = pipeline("zero-shot-image-classification", model=str(tmp_path))(
        photographs["chelsea"], candidate_labels=["a cat", "a dog"]
    )
    assert sum(entry["score"] for entry in scores) == pytest.approx(1)


def test_other_settings_of_the_image_processor_stay(model: HfClipModel, processor: HfClipProcessor, tower: str):
    old, new = IMAGE_SIZES[tower], IMAGE_SIZES[tower] * 2
    image_processor = HfClipImageProcessor.for_image_size(old, image_mean=[0.1, 0.2, 0.3], fit="pad")
    image_processor.size = type(image_processor.size)(shortest_edge=old + 8)
    set_image_size_(model, image_processor, new)
    assert image_processor.size.shortest_edge == new + 16
    assert (image_processor.crop_size.height, image_processor.crop_size.width) == (new, new)
    assert (list(image_processor.image_mean), image_processor.fit) == ([0.1, 0.2, 0.3], "pad")


def test_resized_model_trains(model: HfClipModel, processor: HfClipProcessor, tower: str):
    set_image_size_(model, processor, IMAGE_SIZES[tower] * 2)
    set_image_size_(model, processor, IMAGE_SIZES[tower])
    before = weights_of(model)
    take_steps(model, tower, create_optimizer(model, rates=1e-3), steps=1)
    assert TABLE[tower] in changed(before, model)


@pytest.mark.parametrize("size", [0, -32, 8, 100])
def test_image_size_that_does_not_divide_is_refused(
    model: HfClipModel, processor: HfClipProcessor, tower: str, size: int
):
    unit = {"vit": 16, "resnet": 32}[tower]
    before = weights_of(model)
    near = f"{100 // unit * unit} or {100 // unit * unit + unit}" if size == 100 else str(unit)
    with pytest.raises(ValueError, match=f"image_size is {size}, but .* divides images by {unit}: take {near}"):
        set_image_size_(model, processor, size)
    assert not changed(before, model)


def test_positions_from_77_to_248_are_long_clips():
    table = torch.randn(77, 8, generator=torch.Generator().manual_seed(0))
    stretched = stretch_positions(table, 248)
    assert stretched.shape == (248, 8)
    assert torch.equal(stretched[:20], table[:20])
    assert torch.equal(stretched[20::4], table[20:])  # every old row stands four times as far out
    for quarter in (1, 2, 3):
        between = (1 - quarter / 4) * table[20:-1] + quarter / 4 * table[21:]
        torch.testing.assert_close(stretched[20 + quarter : 245 : 4], between)
        behind = table[-1] + quarter / 4 * (table[-1] - table[-2])
        torch.testing.assert_close(stretched[244 + quarter], behind)


@torch.no_grad()
def test_short_texts_keep_their_features_exactly(long_table: tuple[HfClipModel, HfClipProcessor]):
    model, processor = long_table
    before, bos, eos = weights_of(model), model.config.text_config.bos_token_id, model.config.text_config.eos_token_id
    torch.manual_seed(1)
    short = torch.cat([torch.full((3, 1), bos), torch.randint(1, 500, (3, 18)), torch.full((3, 1), eos)], dim=1)
    long = torch.cat([short[:, :-1], torch.randint(1, 500, (3, 10)), torch.full((3, 1), eos)], dim=1)
    expected, expected_of_long = model.encode_text(short), model.encode_text(long)
    set_text_length_(model, processor, 70)
    assert_same_features(model.encode_text(short), expected)
    assert not torch.allclose(model.encode_text(long), expected_of_long, rtol=1e-4)
    assert torch.equal(model.state_dict()[POSITIONS][:20], before[POSITIONS][:20])
    for name, tensor in model.state_dict().items():
        assert name == POSITIONS or torch.equal(tensor, before[name])


def test_saved_folder_takes_longer_texts(long_table: tuple[HfClipModel, HfClipProcessor], tmp_path: Path):
    model, processor = long_table
    with pytest.raises(ValueError, match="input_ids hold 52 tokens per text, but this model's position table has 30"):
        model.encode_text(processor(text="one " * 50, return_tensors="pt").input_ids)
    set_text_length_(model, processor, 70)
    loaded, loaded_processor = save_and_load(model, processor, tmp_path)
    assert loaded.config.text_config.max_position_embeddings == loaded_processor.tokenizer.model_max_length == 70
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 70
    ids = loaded_processor(text=["one " * 50, "two"], return_tensors="pt").input_ids
    assert ids.shape == (2, 52)
    assert_same_features(loaded.encode_text(ids), model.encode_text(ids))
    cut = loaded_processor(text="one " * 100, truncation=True).input_ids
    assert len(cut) == 70
    for one in (processor, loaded_processor):
        with pytest.raises(
            ValueError, match="input_ids hold 102 tokens per text, but this model's position table has 70"
        ):
            model.encode_text(one(text="one " * 100, return_tensors="pt").input_ids)
    scores = pipeline("zero-shot-image-classification", model=str(tmp_path))(
        Image.new("RGB", (20, 20)), candidate_labels=["one " * 50, "two"], hypothesis_template="{}"
    )
    assert sum(entry["score"] for entry in scores) == pytest.approx(1)


def test_text_length_is_only_ever_raised(long_table: tuple[HfClipModel, HfClipProcessor]):
    model, processor = long_table
    before = weights_of(model)
    with pytest.raises(ValueError, match="max_text_length is 29, but this model takes 30 tokens already"):
        set_text_length_(model, processor, 29)
    set_text_length_(model, processor, 30)
    assert not changed(before, model)
    assert processor.tokenizer.model_max_length == 30


def test_too_short_a_table_is_not_stretched(model: HfClipModel, processor: HfClipProcessor):
    with pytest.raises(
        ValueError, match="has 20 rows, of which the first 20 are kept: too few are left to interpolate"
    ):
        set_text_length_(model, processor, 77)
    assert processor.tokenizer.model_max_length == 20


def test_switched_model_takes_the_sigmoid_by_itself(
    model: HfClipModel, processor: HfClipProcessor, tower: str, tmp_path: Path, photographs: dict[str, Image.Image]
):
    before = weights_of(model)
    switch_to_sigmoid_(model)
    assert model.logit_scale.item() == pytest.approx(math.log(10))
    assert model.logit_bias.item() == -10
    assert {name: p.requires_grad for name, p in model.named_parameters() if "logit" in name} == {
        "logit_scale": True,
        "logit_bias": True,
    }
    assert {name for name in model.state_dict() if name not in before} == {"logit_bias"}
    outputs = model(pixel_values=random_images(tower), input_ids=texts(), return_loss=True)
    cosines = outputs.text_embeds @ outputs.image_embeds.T
    torch.testing.assert_close(outputs.logits_per_text, cosines * 10 - 10, rtol=1e-4, atol=1e-4)
    signs = 2 * torch.eye(4) - 1
    expected = -log_sigmoid(signs * outputs.logits_per_text).sum() / 4
    torch.testing.assert_close(outputs.loss, expected)

    take_steps(model, tower, create_optimizer(model, rates=1e-2), steps=1)
    assert model.logit_bias.item() != -10
    loaded, _ = save_and_load(model, processor, tmp_path)
    assert loaded.config.contrastive_loss == "sigmoid"
    assert not changed(weights_of(model), loaded)
    scores = pipeline("zero-shot-image-classification", model=str(tmp_path))(
        photographs["chelsea"], candidate_labels=["a cat", "a dog"]
    )
    assert sum(entry["score"] for entry in scores) < 0.5  # each by itself, and nearly none of them true


def log_sigmoid(values: torch.Tensor) -> torch.Tensor:
    return torch.log(torch.sigmoid(values))


def test_switching_twice_keeps_what_was_learned(model: HfClipModel):
    switch_to_sigmoid_(model)
    model.logit_bias.data.fill_(-3)
    model.logit_scale.data.fill_(4)
    switch_to_sigmoid_(model)
    assert (model.logit_bias.item(), model.logit_scale.item()) == (-3, 4)
