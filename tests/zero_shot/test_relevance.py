"""Maps of relevance: what they are made of, and that they show a text where it is."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize
from transformers.modeling_utils import AttentionInterface

from demo.digits import COLOURS
from hf_clip import HfClipModel, HfClipProcessor, encode_texts
from hf_clip.model.optimized import OptimizedModelError
from hf_clip.zero_shot.relevance import relevance_map
from hf_clip.zero_shot.seen_square import settings_of_square

TEXTS = [f"a photo of {colour} paper" for colour in COLOURS]


def paper(colour: str, size: int, seed: int) -> np.ndarray:
    """A sheet of paper with a little noise."""
    noise = np.random.default_rng(seed).normal(0, 6, (size, size, 3))
    return np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module", params=["vit", "resnet"])
def knows_colours(request: pytest.FixtureRequest, digits: Path) -> tuple[Any, Any]:
    """A small model that has learned the colour of a sheet of paper."""
    model = HfClipModel.from_pretrained(digits / request.param).train()
    processor = HfClipProcessor.from_pretrained(digits / request.param)
    size = model.config.vision_config.image_size
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    torch.manual_seed(0)
    for step in range(60):
        images = [Image.fromarray(paper(colour, size, 8 * step + n)) for n, colour in enumerate(COLOURS)]
        inputs = processor(text=TEXTS, images=images, return_tensors="pt", padding=True)
        model(**inputs, return_loss=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), processor


def maps_of_patches(model: Any, processor: Any, image: Any, texts: list[str], *, image_size: int) -> Tensor:
    """What a user may try first: similarities of a ViT's last hidden states with texts, (T, Y, X)."""
    pixels = processor.image_processor([image], return_tensors="pt", **settings_of_square(image_size))["pixel_values"]
    tower = model.vision_model
    with torch.no_grad():
        hidden_states = tower(pixels, interpolate_pos_encoding=True).last_hidden_state[0, 1:]
        places = normalize(model.visual_projection(tower.post_layernorm(hidden_states)), dim=-1)
    side = int(len(places) ** 0.5)
    return (encode_texts(model, processor, texts) @ places.T).unflatten(1, (side, side))


def share_on_its_own_side(model: Any, processor: Any, maps_of: Callable[..., Tensor]) -> float:
    """Two sheets of paper side by side: at how many places the text wins whose sheet it is."""
    size = model.config.vision_config.image_size
    right = places = 0
    for number, (first, second) in enumerate(combinations(COLOURS, 2)):
        sheets = [paper(colour, 2 * size, number) for colour in (first, second)]
        image = np.concatenate([sheets[0][:, :size], sheets[1][:, size:]], axis=1)
        maps = maps_of(
            model,
            processor,
            Image.fromarray(image),
            [f"a photo of {colour} paper" for colour in (first, second)],
            image_size=2 * size,
        )
        half = maps.shape[2] // 2
        left_wins = maps[0] > maps[1]
        right += int(left_wins[:, :half].sum() + (~left_wins[:, half:]).sum())
        places += left_wins.numel()
    return right / places


def test_text_is_shown_where_it_is(knows_colours: tuple[Any, Any]):
    model, processor = knows_colours
    shown = share_on_its_own_side(model, processor, relevance_map)
    assert shown > 0.9  # 0.5 is chance
    if hasattr(model.vision_model, "encoder"):  # the features of patches show it where it is not (FG-CLIP #21)
        assert share_on_its_own_side(model, processor, maps_of_patches) < 0.45


def test_patch_is_what_attention_to_it_alone_would_gather(digits: Path):
    """For a ViT: the image's feature if the last layer had nothing but that patch's value."""
    model, processor = (
        HfClipModel.from_pretrained(digits / "vit").eval(),
        HfClipProcessor.from_pretrained(digits / "vit"),
    )
    size, tower = model.config.vision_config.image_size, model.vision_model
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))
    maps = relevance_map(model, processor, image, ["a photo of red paper"])[0]
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    gathered = []
    last = tower.encoder.layers[-1].self_attn
    last.register_forward_hook(lambda module, inputs, output: gathered.append(output[0][:, 0]))
    text = encode_texts(model, processor, "a photo of red paper")[0]
    for place in (0, 5, maps.numel() - 1):

        def only_there(module: Any, query: Any, key: Any, value: Any, *args: Any, place: int = place, **kwargs: Any):
            chosen = value[:, :, 1 + place : 2 + place]
            return chosen.expand_as(query).transpose(1, 2), None

        AttentionInterface.register("only_there", only_there)
        whole = last.config
        last.config = type(whole)(**whole.to_dict())
        last.config._attn_implementation = "only_there"
        with torch.no_grad():
            model.encode_image(pixels)
        last.config = whole
        with torch.no_grad():
            feature = normalize(model.visual_projection(tower.post_layernorm(gathered[-1])), dim=-1)[0]
        assert (feature @ text).item() == pytest.approx(float(maps.flatten()[place]), abs=1e-5)


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_shapes(digits: Path, tower: str):
    model, processor = (
        HfClipModel.from_pretrained(digits / tower).eval(),
        HfClipProcessor.from_pretrained(digits / tower),
    )
    cell = {"vit": 4, "resnet": 32}[tower]
    size = model.config.vision_config.image_size
    image = Image.new("RGB", (70, 50), "red")
    assert relevance_map(model, processor, image, ["a", "b"]).shape == (2, size // cell, size // cell)
    assert relevance_map(model, processor, image, "a", image_size=3 * cell).shape == (1, 3, 3)
    assert not relevance_map(model, processor, image, "a").requires_grad


def test_what_is_refused(digits: Path):
    model, processor = (
        HfClipModel.from_pretrained(digits / "vit").eval(),
        HfClipProcessor.from_pretrained(digits / "vit"),
    )
    image = Image.new("RGB", (20, 20))
    with pytest.raises(ValueError, match="image_size is 18, but must be a multiple of 4"):
        relevance_map(model, processor, image, "a", image_size=18)
    with pytest.raises(ValueError, match="There are no texts"):
        relevance_map(model, processor, image, [])
    model.optimize_for_inference()
    with pytest.raises(OptimizedModelError, match="load it again"):
        relevance_map(model, processor, image, "a")
