"""Whether maps show things where they are, on scenes of digits that the demo's models never saw.

    make demo
    python -m benchmarks.looking_inside demo-output/clip-digits-vit demo-output/clip-digits-resnet
    python -m benchmarks.looking_inside demo-output/clip-digits-vit demo-output/clip-digits-resnet --picture maps.png

A scene is a square of four sheets of paper, twice as wide and high as the images that the models were trained on. With
four digits, the map of each one's caption should be highest in its quarter. With one digit and three empty sheets of
the same colour, attention should go to the digit. Chance is 25 %.

Dimensions: T texts, D embedding, Y × X cells.
"""

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from demo.digits import COLOURS, Combination, draw, load_split_digits
from hf_clip import HfClipModel, HfClipProcessor, encode_texts
from hf_clip.zero_shot.attention_rollout import attention_rollout
from hf_clip.zero_shot.features import image_processor_of
from hf_clip.zero_shot.heat_overlay import overlay
from hf_clip.zero_shot.relevance import relevance_map
from hf_clip.zero_shot.seen_square import settings_of_square

from .ratio_chart import import_pyplot

SCENES = 100
SHOWN_SIDE = 256
SHOWN_SEEDS = (1, 2)


@dataclass(frozen=True)
class Scene:
    """Four sheets of paper; `captions` has a text for each quarter, which is empty where the quarter is."""

    image: Image.Image
    captions: tuple[str, ...]


def make_scenes(size: int, digits: int, count: int = SCENES, seed: int = 0) -> Iterator[Scene]:
    """Yield scenes of held-out handwriting, of 1 or 4 digits, whose sheets are `size` pixels wide."""
    _, (strokes, labels) = load_split_digits(0)
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for number in range(count):
        captions = [""] * 4
        pixels = np.empty((2 * size, 2 * size, 3), np.uint8)
        papers = choose.sample(list(COLOURS), 4)
        pixels[:] = COLOURS[papers[0]]
        for place in choose.sample(range(4), digits):
            paper = papers[place] if digits > 1 else papers[0]
            ink = choose.choice([colour for colour in COLOURS if colour != paper])
            digit = (4 * number + place) % len(strokes)
            shown = Combination(int(labels[digit]), ink, paper)
            row, column = (side * size for side in divmod(place, 2))
            drawn = draw(strokes[digit : digit + 1], [shown], size, generator)[0]
            pixels[row : row + size, column : column + size] = drawn
            captions[place] = shown.caption()
        yield Scene(Image.fromarray(pixels), tuple(captions))


def best_quarter(heat: Tensor) -> int:
    """Which quarter of a map (Y, X) has most heat: upper left, upper right, lower left, lower right."""
    rows, columns = heat.shape[0] // 2, heat.shape[1] // 2
    return int(heat.unflatten(0, (2, rows)).unflatten(2, (2, columns)).sum(dim=(1, 3)).argmax())


@torch.no_grad()
def map_of_patches(model: Any, processor: Any, image: Any, texts: Sequence[str], image_size: int) -> Tensor:
    """The map that is not to be used, (T, Y, X): similarities of the features of a ViT's patches."""
    sizes = settings_of_square(image_size)
    pixels = image_processor_of(processor)([image], return_tensors="pt", **sizes)["pixel_values"]
    tower = model.vision_model
    states = tower(pixels, interpolate_pos_encoding=True).last_hidden_state[:, 1:]
    places = normalize(model.visual_projection(tower.post_layernorm(states))[0], dim=-1)  # (Y · X, D)
    side = image_size // model.config.vision_config.patch_size
    return (encode_texts(model, processor, texts) @ places.T).unflatten(1, (side, side))


def measure(folder: Path) -> None:
    """Print the shares of quarters that are found."""
    model, processor = HfClipModel.from_pretrained(folder).eval(), HfClipProcessor.from_pretrained(folder)
    size = model.config.vision_config.image_size
    ways: dict[str, Any] = {"relevance_map": relevance_map}
    if hasattr(model.vision_model, "encoder"):
        ways["features of the patches"] = map_of_patches
    for name, way in ways.items():
        found = [
            best_quarter(heat) == place
            for scene in make_scenes(size, 4)
            for place, heat in enumerate(way(model, processor, scene.image, scene.captions, image_size=2 * size))
        ]
        print(f"{folder.name}: four digits, {name}: {np.mean(found):.1%} of {len(found)} texts")
    found, shares = [], []
    for scene in make_scenes(size, 1):
        heat = attention_rollout(model, processor, scene.image, image_size=2 * size)
        place = next(number for number, caption in enumerate(scene.captions) if caption)
        found.append(best_quarter(heat) == place)
        rows, columns = (side // 2 for side in heat.shape)
        row, column = divmod(place, 2)
        shares.append(float(heat[row * rows :, column * columns :][:rows, :columns].sum()))
    print(
        f"{folder.name}: one digit, attention_rollout: {np.mean(found):.1%} of {len(found)} images; the digit's "
        f"quarter has {np.mean(shares):.1%} of the attention"
    )


def draw_picture(path: Path, vit: Path, resnet: Path) -> None:
    """Draw a scene of four digits with the maps of two captions, and one of one digit with both kinds of map."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(2, 3, figsize=(8, 5.8), layout="constrained")
    model, processor = HfClipModel.from_pretrained(resnet).eval(), HfClipProcessor.from_pretrained(resnet)
    size = model.config.vision_config.image_size
    scene = next(make_scenes(size, 4, seed=SHOWN_SEEDS[0]))
    maps = relevance_map(model, processor, scene.image, scene.captions, image_size=4 * size)
    shown = [("four digits", enlarged(scene))]
    shown += [(f'"{text}"', laid_over(scene, heat)) for text, heat in zip(scene.captions[:2], maps, strict=False)]
    model, processor = HfClipModel.from_pretrained(vit).eval(), HfClipProcessor.from_pretrained(vit)
    size = model.config.vision_config.image_size
    scene = next(make_scenes(size, 1, seed=SHOWN_SEEDS[1]))
    text = next(filter(None, scene.captions))
    shown += [
        ("one digit", enlarged(scene)),
        (f'"{text}"', laid_over(scene, relevance_map(model, processor, scene.image, text, image_size=2 * size)[0])),
        ("attention rollout", laid_over(scene, attention_rollout(model, processor, scene.image, image_size=2 * size))),
    ]
    for axis, (title, image) in zip(axes.flat, shown, strict=True):
        axis.imshow(image)
        axis.set_title(title, fontsize=8.5)
        axis.axis("off")
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def laid_over(scene: Scene, heat: Tensor) -> Image.Image:
    """A scene in grey under a map, whose lower half is not shown."""
    return overlay(enlarged(scene), heat, low=float(heat.median()), grey=True)


def enlarged(scene: Scene) -> Image.Image:
    """A scene's image at a size to look at."""
    return scene.image.resize((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.NEAREST)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.looking_inside",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("vit", type=Path, help="the demo's model with a Vision Transformer")
    parser.add_argument("resnet", type=Path, help="the demo's model with a ResNet")
    parser.add_argument("--picture", type=Path, help="draw maps of both models into this file and measure nothing")
    options = parser.parse_args(arguments)
    if options.picture:
        draw_picture(options.picture, options.vit, options.resnet)
        return 0
    for folder in (options.vit, options.resnet):
        measure(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
