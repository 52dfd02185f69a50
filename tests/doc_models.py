"""What the pages' examples name: small stand-ins for OpenAI's ViT-B/32 and for the demo's models, and some images.

A stand-in knows by heart the few images and texts of the examples, so what an example prints is as right as it would
be with the real weights; only the figures are others.
"""

import os
import random
import shutil
from pathlib import Path

import torch
from datasets import load_from_disk
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from demo.digits import COMBINATIONS
from demo.model import write_fresh_model
from hf_clip import (
    HfClipConfig,
    HfClipImageProcessor,
    HfClipModel,
    HfClipProcessor,
    HfClipTextConfig,
    HfClipTokenizer,
    HfClipViTConfig,
    convert,
)

CAPTIONS = ("a photo of {}", "This is a photo of {}.", "a photo of {}.")
NAMES = {"cats.jpg": "a cat", "dog.jpg": "a dog"}
STEPS = {"openai": 24, "digits": 60}
MEASURED_ROWS = {"held_out_images": 440, "unseen_combinations": 160}
"""Rows of the splits that pages measure on. One page calibrates on those behind the first 400; the correction of hubs
averages 128."""


def learn_by_heart(model: HfClipModel, batches: list[dict[str, Tensor]], learning_rate: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    for inputs in batches:
        model(**inputs, return_loss=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def write_openai(folder: Path, tokenizer: HfClipTokenizer, images: dict[str, Image.Image]) -> None:
    """`clip-vit-b32`, and the same as a stock repository, `openai/clip-vit-base-patch32`."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1}
    text, vision = HfClipTextConfig(**tower), HfClipViTConfig(image_size=224, patch_size=32, **tower)
    torch.manual_seed(0)
    model = HfClipModel(HfClipConfig(text_config=text, vision_config=vision, projection_dim=32))
    processor = HfClipProcessor(HfClipImageProcessor.for_image_size(224), tokenizer)
    batches = [
        processor(
            text=[caption.format(label) for label in NAMES.values()], images=list(images.values()), return_tensors="pt"
        )
        for caption in CAPTIONS
    ]
    learn_by_heart(model, batches * (STEPS["openai"] // len(batches)), learning_rate=5e-4)
    model.save_pretrained(folder / "clip-vit-b32")
    processor.save_pretrained(folder / "clip-vit-b32")
    convert(folder / "clip-vit-b32", folder / "openai" / "clip-vit-base-patch32", layout="transformers")


def write_first_rows(folder: Path, count: int) -> None:
    """Replace a table by its first rows: pages that measure on it are to be quick."""
    rows = load_from_disk(folder).select(range(count))
    rows.save_to_disk(folder.with_name("few"))
    shutil.rmtree(folder)
    folder.with_name("few").rename(folder)


def write_demo(folder: Path, data: Path) -> None:
    """`demo-output`, with a ViT that knows the first held-out image of each digit and a ResNet that knows nothing.

    The ViT learns digits alone: its captions' colours are drawn anew for each step.
    """
    out = folder / "demo-output"
    shutil.copytree(data, out / "data", copy_function=os.link)
    for split, count in MEASURED_ROWS.items():
        write_first_rows(out / "data" / split, count)
    captions = [combination.caption() for combination in COMBINATIONS]
    for tower in ("vit", "resnet"):
        write_fresh_model(out / f"clip-digits-{tower}", tower, captions, seed=0)
    place = out / "clip-digits-vit"
    model, processor = AutoModel.from_pretrained(place), AutoProcessor.from_pretrained(place)
    rows = load_from_disk(out / "data")["held_out_images"].select(range(64))
    images = {COMBINATIONS[row["target"]].digit: row["image"] for row in reversed(list(rows))}
    pixels = processor(images=list(images.values()), return_tensors="pt")
    of_digit = {digit: [c.caption() for c in COMBINATIONS if c.digit == digit] for digit in images}
    choose = random.Random(0)
    texts = [[choose.choice(of_digit[digit]) for digit in images] for _ in range(STEPS["digits"])]
    learn_by_heart(
        model, [{**pixels, **processor(text=text, return_tensors="pt")} for text in texts], learning_rate=2e-3
    )
    model.save_pretrained(place)
    Image.new("RGB", (60, 40), "orange").save(out / "demo-vit.png")


def write_stand_ins(
    folder: Path, tokenizer: HfClipTokenizer, photographs: dict[str, Image.Image], digits: Path
) -> None:
    images = dict(zip(NAMES, (photographs["chelsea"], photographs["astronaut"]), strict=True))
    (folder / "photos" / "more").mkdir(parents=True)
    for name, place in zip(NAMES, (folder / "photos", folder / "photos" / "more"), strict=True):
        images[name].save(folder / name)
        images[name].save(place / name)
    (folder / "notes.txt").write_text("no image")
    write_openai(folder, tokenizer, images)
    write_demo(folder, digits / "pairs")
