"""Handwritten digits in coloured ink on coloured paper, with captions: an open vocabulary from real images.

scikit-learn's 1,797 digits (8×8 pixels, from UCI's Optical Recognition of Handwritten Digits) are turned,
scaled and shifted a little and inked in one of eight colours on paper of another: 560 different captions.

What is never trained: the images of the test split, a fifth of the digit–ink pairs whatever the paper, and a
tenth of the remaining digit–ink–paper combinations.
"""

import itertools
import random
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PillowImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 220),
    "yellow": (240, 220, 40),
    "purple": (140, 40, 170),
    "orange": (245, 140, 20),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
PHRASES = [
    "a photo of {a_ink} {digit} on {paper} paper",
    "{a_ink} {digit} on {paper} paper",
    "{a_ink} {digit} written on a sheet of {paper} paper",
    "the digit {digit} in {ink} ink on {paper} paper",
    "{paper} paper with {a_ink} {digit} on it",
]


@dataclass(frozen=True)
class Combination:
    """What an image shows."""

    digit: int
    ink: str
    paper: str

    def caption(self, phrase: str = PHRASES[0]) -> str:
        article = "an" if self.ink[0] in "aeio" else "a"
        return phrase.format(a_ink=f"{article} {self.ink}", ink=self.ink, digit=DIGITS[self.digit], paper=self.paper)


COMBINATIONS = [
    Combination(digit, ink, paper) for digit in range(10) for ink, paper in itertools.permutations(COLOURS, 2)
]


def untrained_combinations(seed: int) -> set[Combination]:
    """The combinations kept out of training: 16 of 80 digit–ink pairs, and a tenth of what remains.

    Every digit and every colour is trained in other company.
    """
    generator = random.Random(seed)
    # Two inks are withheld from each of six digits and one from each of four, every ink from two digits.
    inks = list(COLOURS)
    generator.shuffle(inks)
    digits = generator.sample(range(10), 10)
    pairs = {(digits[n % 10], inks[n % 8]) for n in range(16)}
    withheld = {combination for combination in COMBINATIONS if (combination.digit, combination.ink) in pairs}
    rest = [combination for combination in COMBINATIONS if combination not in withheld]
    return withheld | set(generator.sample(rest, len(rest) // 10))


def load_split_digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images (N, 8, 8) from 0 to 1 and labels (N,), four fifths to train on and one fifth held out."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float() / 16
    labels = torch.from_numpy(digits.target)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    return (images[train], labels[train]), (images[test], labels[test])


def draw(strokes: Tensor, combinations: list[Combination], image_size: int, generator: torch.Generator) -> np.ndarray:
    """Ink digits on paper: strokes (N, 8, 8) → images (N, image_size, image_size, 3), uint8.

    Each is turned by up to 0.1 radians and scaled and shifted by up to 6 %.
    """
    count = len(strokes)
    angle, scale, shift_x, shift_y = (torch.rand(4, count, generator=generator) * 2 - 1) * torch.tensor(
        [[0.1], [0.06], [0.06], [0.06]]
    )
    cos, sin = torch.cos(angle) * (1 + scale), torch.sin(angle) * (1 + scale)
    affine = torch.stack([cos, -sin, shift_x * 2, sin, cos, shift_y * 2], dim=1).view(count, 2, 3)
    grid = torch.nn.functional.affine_grid(affine, [count, 1, image_size, image_size], align_corners=False)
    ink = torch.nn.functional.grid_sample(strokes[:, None], grid, align_corners=False)  # (N, 1, size, size)
    colours = torch.tensor([[COLOURS[c.ink], COLOURS[c.paper]] for c in combinations]).float()  # (N, 2, 3)
    foreground, background = colours[:, 0, :, None, None], colours[:, 1, :, None, None]
    drawn = background + ink * (foreground - background)  # (N, 3, size, size)
    return drawn.round().byte().permute(0, 2, 3, 1).numpy()


def encode_png(image: np.ndarray) -> bytes:
    buffer = BytesIO()
    PillowImage.fromarray(image).save(buffer, format="png", compress_level=1)
    return buffer.getvalue()


def make_split(
    digits: tuple[Tensor, Tensor],
    allowed: list[Combination],
    size: int,
    image_size: int,
    seed: int,
    phrases: list[str],
) -> Dataset:
    """`size` images with captions: each digit image in turn, in a random one of the allowed combinations."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    images, labels = digits
    order = torch.cat([torch.randperm(len(labels), generator=generator) for _ in range(-(-size // len(labels)))])[:size]
    by_digit = {digit: [c for c in allowed if c.digit == digit] for digit in range(10)}
    order = torch.tensor([index for index in order.tolist() if by_digit[int(labels[index])]])
    shown = [choose.choice(by_digit[int(labels[index])]) for index in order]
    drawn = draw(images[order], shown, image_size, generator)
    rows = {
        "image": [{"bytes": encode_png(image), "path": None} for image in drawn],
        "caption": [combination.caption(choose.choice(phrases)) for combination in shown],
        "target": [COMBINATIONS.index(combination) for combination in shown],
    }
    features = Features({"image": Image(), "caption": Value("string"), "target": Value("int32")})
    return Dataset.from_dict(rows, features=features)


def make_dataset(image_size: int, train_size: int, seed: int = 0) -> DatasetDict:
    """Splits `train`, `held_out_images` (trained combinations) and `unseen_combinations` (held-out images too)."""
    untrained = untrained_combinations(seed)
    trained = [combination for combination in COMBINATIONS if combination not in untrained]
    train, test = load_split_digits(seed)
    first = PHRASES[:1]
    return DatasetDict(
        train=make_split(train, trained, train_size, image_size, seed + 1, PHRASES),
        held_out_images=make_split(test, trained, 2 * len(test[1]), image_size, seed + 2, first),
        unseen_combinations=make_split(
            test, sorted(untrained, key=COMBINATIONS.index), 2 * len(test[1]), image_size, seed + 3, first
        ),
    )
