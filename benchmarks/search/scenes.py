"""Scenes of one or two coloured shapes on a textured ground, with captions that say more or less of what is seen.

Unlike the demo's digits, captions differ in how much they say, as those of real images do: "a star", "a red star",
"a red star and a blue ring on stripes".
"""

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "cross", "ring", "star", "bar", "arrow", "moon", "heart")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 215, 50),
    "purple": (150, 50, 180),
    "white": (245, 245, 245),
}
GROUNDS = ("plain", "stripes", "dots", "checks")
GROUND_TEXTS = {
    "plain": "a plain ground",
    "stripes": "a striped ground",
    "dots": "a dotted ground",
    "checks": "a chequered ground",
}
SIZE, SCALE = 24, 4
"""Pixels of an image, and how many times larger it is drawn."""


@dataclass(frozen=True)
class Thing:
    """A shape of one colour."""

    shape: str
    colour: str

    def text(self) -> str:
        return f"{_article(self.colour)} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What an image shows: one or two things, in no order, and the ground."""

    things: frozenset[Thing]
    ground: str

    def caption(self, choose: random.Random) -> str:
        """One of the captions that are true of the scene."""
        things = sorted(self.things, key=lambda thing: (thing.shape, thing.colour))
        choose.shuffle(things)
        if choose.random() < 0.25:
            things = things[:1]
        texts = [
            f"{_article(thing.shape)} {thing.shape}" if choose.random() < 0.3 else thing.text() for thing in things
        ]
        said = " and ".join(texts)
        return f"{said} on {GROUND_TEXTS[self.ground]}" if choose.random() < 0.5 else said


def _article(word: str) -> str:
    return "an" if word[0] in "aeio" else "a"


def random_scene(choose: random.Random, things: list[Thing], grounds: list[str]) -> Scene:
    """A scene of some of these things."""
    return Scene(frozenset(choose.sample(things, choose.choice((1, 1, 2)))), choose.choice(grounds))


def _draw_shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float, fill: tuple[int, int, int]) -> None:
    """Draw a shape with its centre at x, y, and reaching r from there."""

    def points(*pairs: tuple[float, float]) -> list[tuple[float, float]]:
        return [(x + r * a, y + r * b) for a, b in pairs]

    box = (x - r, y - r, x + r, y + r)
    if shape == "circle":
        pen.ellipse(box, fill)
    elif shape == "square":
        pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill)
    elif shape == "triangle":
        pen.polygon(points((0, -1), (1, 0.85), (-1, 0.85)), fill)
    elif shape == "cross":
        pen.rectangle((x - r, y - 0.3 * r, x + r, y + 0.3 * r), fill)
        pen.rectangle((x - 0.3 * r, y - r, x + 0.3 * r, y + r), fill)
    elif shape == "ring":
        pen.ellipse(box, outline=fill, width=round(0.4 * r))
    elif shape == "star":
        angles = np.pi * (np.arange(10) / 5 - 0.5)
        radii = np.where(np.arange(10) % 2, 0.42, 1.1)
        pen.polygon(points(*zip(radii * np.cos(angles), radii * np.sin(angles), strict=True)), fill)
    elif shape == "bar":
        pen.rectangle((x - r, y - 0.28 * r, x + r, y + 0.28 * r), fill)
    elif shape == "arrow":
        pen.polygon(points((-1, -0.25), (0.1, -0.25), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.25), (-1, 0.25)), fill)
    elif shape == "moon":
        pen.chord(box, 90, 270, fill)
    else:
        pen.ellipse((x - r, y - 0.9 * r, x + 0.08 * r, y + 0.2 * r), fill)
        pen.ellipse((x - 0.08 * r, y - 0.9 * r, x + r, y + 0.2 * r), fill)
        pen.polygon(points((-0.93, -0.1), (0.93, -0.1), (0, 1)), fill)


def draw_scene(scene: Scene, choose: random.Random) -> Image.Image:
    """Draw a scene, its things side by side in either order."""
    side = SIZE * SCALE
    dark = choose.randint(70, 110)
    first = (dark,) * 3
    second = (dark + 60,) * 3
    image = Image.new("RGB", (side, side), first)
    pen = ImageDraw.Draw(image)
    step = side // 8
    for row in range(8):
        for column in range(8):
            place = (column * step, row * step, (column + 1) * step - 1, (row + 1) * step - 1)
            if (scene.ground == "stripes" and row % 2) or (scene.ground == "checks" and (row + column) % 2):
                pen.rectangle(place, second)
            elif scene.ground == "dots" and row % 2 and column % 2:
                pen.ellipse((place[0] - 3, place[1] - 3, place[2] + 3, place[3] + 3), second)
    things = sorted(scene.things, key=lambda thing: (thing.shape, thing.colour))
    choose.shuffle(things)
    for number, thing in enumerate(things):
        r = side * (choose.uniform(0.19, 0.24) if len(things) == 2 else choose.uniform(0.22, 0.34))
        x = side * (0.5 if len(things) == 1 else 0.26 + 0.48 * number) + choose.uniform(-0.04, 0.04) * side
        y = side * (0.5 + choose.uniform(-0.18, 0.18))
        red, green, blue = (min(255, max(0, level + choose.randint(-12, 12))) for level in COLOURS[thing.colour])
        _draw_shape(pen, thing.shape, x, y, r, (red, green, blue))
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


THINGS = [Thing(shape, colour) for shape in SHAPES for colour in COLOURS]
