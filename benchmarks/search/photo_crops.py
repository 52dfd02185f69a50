"""Crops of the photographs that ship with scikit-image, with what they show: an index of real textures and things."""

import random

import numpy as np
from PIL import Image
from skimage import data as photographs

from .made_models import IMAGE_SIZE

NAMES = {
    "an astronaut": "astronaut",
    "a brick wall": "brick",
    "a man with a camera": "camera",
    "cells": "cell",
    "a cat": "chelsea",
    "a clock": "clock",
    "a cup of coffee": "coffee",
    "coins": "coins",
    "grass": "grass",
    "gravel": "gravel",
    "galaxies": "hubble_deep_field",
    "stained tissue": "immunohistochemistry",
    "the moon": "moon",
    "a printed page": "page",
    "a retina": "retina",
    "a rocket": "rocket",
    "handwriting": "text",
    "a motorcycle": "stereo_motorcycle",
}
"""What a photograph shows, and its function in `skimage.data`."""

GROUPS = {
    "a texture": ("a brick wall", "grass", "gravel"),
    "something under a microscope": ("cells", "stained tissue", "a retina"),
    "writing": ("a printed page", "handwriting"),
    "the sky": ("galaxies", "the moon"),
    "a person": ("an astronaut", "a man with a camera"),
}
FLIPS = ("", " upside down")
TINTS = {"": (255, 255, 255), " in red light": (255, 90, 90), " in blue light": (90, 120, 255)}
PHRASES = ("a photo of {}", "{}", "a close-up of {}")


def load_photograph(name: str) -> Image.Image:
    found = getattr(photographs, NAMES[name])()
    return Image.fromarray(np.asarray(found[0] if isinstance(found, tuple) else found)).convert("RGB")


def make_crop(photo: Image.Image, held_out: bool, flip: str, tint: str, choose: random.Random) -> Image.Image:
    """A square of the left part of a photograph, or, if it is held out, of the right part."""
    width, height = photo.size
    side = round(choose.uniform(0.35, 0.5) * min(width, height))
    split = round(0.5 * width)
    left = choose.randint(split, max(split, width - side)) if held_out else choose.randint(0, max(0, split - side // 2))
    left = min(left, width - side)
    top = choose.randint(0, height - side)
    crop = photo.crop((left, top, left + side, top + side)).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    turned = crop.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if flip else crop
    return Image.fromarray((np.asarray(turned) * (np.array(TINTS[tint]) / 255)).astype(np.uint8))


def caption(name: str, flip: str, tint: str, choose: random.Random) -> str:
    group = [text for text, names in GROUPS.items() if name in names]
    shown = choose.choice(group) if group and choose.random() < 0.2 else name
    said = shown + (flip if choose.random() < 0.8 else "") + (tint if choose.random() < 0.8 else "")
    return choose.choice(PHRASES).format(said)
