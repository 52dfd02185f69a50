"""Overlays: even colours, the pixels that the model saw, and heat where the map has it."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_clip import HfClipImageProcessor
from hf_clip.zero_shot.heat_overlay import heat_colours, overlay
from hf_clip.zero_shot.seen_square import seen_region

HOT_LEFT = np.array([[1.0, 0.0], [1.0, 0.0]])


def lightness_and_colour(colours: np.ndarray) -> np.ndarray:
    """sRGB → CIELAB, whose distances are those that people see, by another way than the package's."""
    from skimage.color import rgb2lab

    return rgb2lab(colours[None] / 255)[0]


def test_colours_are_even():
    """No step is much greater than another, and each is lighter than the one before."""
    lab = lightness_and_colour(heat_colours()[::8])
    steps = np.linalg.norm(np.diff(lab, axis=0), axis=1)
    assert steps.max() < 2 * steps.min()
    assert (np.diff(lab[:, 0]) > 0).all()
    assert lab[-1, 0] > 90
    assert lab[0, 0] < 30


def test_region_of_each_fit():
    cropped = HfClipImageProcessor.for_image_size(224)
    assert seen_region(cropped, (640, 480)) == pytest.approx((80, 0, 560, 480), abs=2)
    assert seen_region(cropped, (480, 640)) == pytest.approx((0, 80, 480, 560), abs=2)
    assert seen_region(cropped, (64, 48), image_size=448) == pytest.approx((8, 0, 56, 48), abs=0.2)
    squashed = HfClipImageProcessor.for_image_size(224, fit="squash")
    assert seen_region(squashed, (640, 480)) == (0, 0, 640, 480)
    padded = HfClipImageProcessor.for_image_size(224, fit="pad")
    assert seen_region(padded, (640, 480)) == pytest.approx((0, -80, 640, 560), abs=2)
    larger = HfClipImageProcessor.for_image_size(224, size={"shortest_edge": 256})  # as many models do
    assert seen_region(larger, (256, 256)) == (16, 16, 240, 240)
    assert seen_region(larger, (256, 256), image_size=64) == (0, 0, 256, 256)


def test_region_is_what_the_processor_cuts_out():
    """A single bright line is moved through the image; the processor sees it only within the region."""
    processor = HfClipImageProcessor.for_image_size(32)
    left, _, right, _ = seen_region(processor, (97, 41))
    for column in (round(left) - 4, round(left) + 2, round(right) - 3, round(right) + 3):
        image = np.zeros((41, 97, 3), np.uint8)
        image[:, column] = 255
        pixels = processor(Image.fromarray(image), return_tensors="np", do_normalize=False)["pixel_values"]
        assert (pixels.max() > 0.2) == (left <= column < right), column


def test_hot_is_coloured_and_cold_is_left():
    image = Image.new("RGB", (80, 60), (0, 128, 255))
    shown = np.asarray(overlay(image, torch.tensor(HOT_LEFT), strength=1)).astype(int)
    assert shown.shape == (60, 80, 3)
    assert (shown[:, 75:] == (0, 128, 255)).all()
    assert (shown[:, :5] == heat_colours()[-1]).all()
    middle = np.abs(shown - np.asarray(image)).sum(2).mean(0)
    assert (np.diff(middle) <= 1).all()  # it fades evenly from hot to cold


def test_map_covers_the_square_that_the_model_saw():
    processor = HfClipImageProcessor.for_image_size(32)
    image = Image.new("RGB", (100, 60), (200, 100, 100))
    shown = np.asarray(overlay(image, HOT_LEFT, processor=processor, strength=1)).astype(int)
    unseen = np.concatenate([shown[:, :18], shown[:, 82:]], axis=1)
    assert (unseen[..., 0] == unseen[..., 1]).all()  # grey
    assert unseen.max() < 50  # dark
    assert (shown[:, 22:30] == heat_colours()[-1]).all()
    assert (shown[:, 74:78] == (200, 100, 100)).all()


def test_margins_carry_no_heat():
    """With fit="pad" the map's upper and lower rows lie beyond a wide image."""
    processor = HfClipImageProcessor.for_image_size(32, fit="pad")
    heat = np.zeros((4, 4))
    heat[0] = 1
    image = Image.new("RGB", (80, 40), (200, 100, 100))
    shown = np.asarray(overlay(image, heat, processor=processor)).astype(int)
    assert (shown[12:] == (200, 100, 100)).all()
    heat[1] = 1
    assert (np.asarray(overlay(image, heat, processor=processor, strength=1))[:5] == heat_colours()[-1]).all()


def test_range_is_the_callers():
    image = Image.new("RGB", (20, 20), (0, 128, 255))
    weak, strong = (np.asarray(overlay(image, HOT_LEFT * 0.3, high=high)) for high in (3.0, None))
    assert np.abs(weak.astype(int) - (0, 128, 255)).sum() < np.abs(strong.astype(int) - (0, 128, 255)).sum() / 2
    assert (np.asarray(overlay(image, HOT_LEFT * 0 + 5)) == (0, 128, 255)).all()  # even heat is no heat
    assert (np.asarray(overlay(image, HOT_LEFT, low=2.0, high=3.0)) == (0, 128, 255)).all()


def test_array_and_grey_image():
    shown = overlay(np.full((10, 30), 90, np.uint8), HOT_LEFT)
    assert (shown.size, shown.mode) == ((30, 10), "RGB")


def test_image_in_grey():
    image = Image.new("RGB", (80, 60), (0, 128, 255))
    shown = np.asarray(overlay(image, HOT_LEFT, strength=1, grey=True))
    assert (shown[:, 75:] == np.asarray(image.convert("L"))[0, 0]).all()
    assert (shown[:, :5] == heat_colours()[-1]).all()


@pytest.mark.parametrize(
    ("heat", "settings", "message"),
    [
        (np.zeros((2, 3, 4)), {}, r"heat has the shape \(2, 3, 4\), but one map"),
        (np.zeros((0, 4)), {}, "heat has the shape"),
        (np.array([[np.nan, 1]]), {}, "heat holds NaN or infinity"),
        (HOT_LEFT, {"strength": 1.5}, "strength is 1.5, but a number from 0 to 1"),
    ],
)
def test_what_is_refused(heat: np.ndarray, settings: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        overlay(Image.new("RGB", (4, 4)), heat, **settings)
