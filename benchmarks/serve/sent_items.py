"""The texts and images that are sent: each time others, of many lengths and sizes, and the same in every run."""

import base64
import json
import random
from io import BytesIO

from PIL import Image

MODEL_NAME = "model"
KINDS = ("text", "image")

TEXTS, IMAGES = 64, 16
"""How many there are of each."""

WORDS = (
    "a the on in with of red green small old wooden dog cat horse child woman street beach mountain kitchen table "
    "bicycle train umbrella sunset winter photograph drawing three several sleeping running holding beside under "
    "skateboarder marketplace lighthouse windswept"
)
SHORTEST, MORE, LONGEST = 2, 8, 15
"""Words of a text: at least, how many more on average, and at most. infinity cuts texts after 20 tokens."""

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket")
SIZES = ((512, 512), (640, 480), (480, 640), (800, 600))
"""Of the JPEGs, as pages on the web have them."""
QUALITIES = (75, 85, 90)


def make_texts() -> list[str]:
    """Texts of 2 to 15 words, of which half have at most eight."""
    chance = random.Random(26)
    lengths = [min(LONGEST, SHORTEST + int(chance.expovariate(1 / MORE))) for _ in range(TEXTS)]
    return [" ".join(chance.choices(WORDS.split(), k=length)) for length in lengths]


def make_images() -> list[bytes]:
    """Photographs that ship with scikit-image, as JPEGs of several sizes."""
    from skimage import data

    found = []
    for number in range(IMAGES):
        image = Image.fromarray(getattr(data, PHOTOGRAPHS[number % len(PHOTOGRAPHS)])())
        size = SIZES[(number + number // len(PHOTOGRAPHS)) % len(SIZES)]  # each photograph has each size once
        file = BytesIO()
        image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=QUALITIES[number % len(QUALITIES)])
        found.append(file.getvalue())
    return found


def make_bodies(kind: str) -> list[bytes]:
    """A request for each text or image, which both servers understand."""
    texts = make_texts() if kind == "text" else []
    images = (
        [f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}" for jpeg in make_images()] if not texts else []
    )
    body = {"model": MODEL_NAME, "modality": kind, "encoding_format": "base64", "truncate": True}
    return [json.dumps(body | {"input": [item]}).encode() for item in texts or images]
