"""What may happen to a training image, and what may not."""

import numpy as np
import pytest
import torch
from PIL import Image

from hf_clip import HfClipImageProcessor
from hf_clip.training.data.augment import Augmentation, AugmentedPixels


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def processor(**settings: object) -> HfClipImageProcessor:
    return HfClipImageProcessor.for_image_size(32, **settings)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", Augmentation(1.0, 0.0, 0.0)),
        ("crop=0.8", Augmentation(0.8, 0.0, 0.0)),
        ("crop=1, flip=0.5,jitter=0.2", Augmentation(1.0, 0.5, 0.2)),
        ("flip=0.5", Augmentation(0.9, 0.5, 0.0)),
    ],
)
def test_augmentation_is_read_from_text(text: str, expected: Augmentation):
    assert Augmentation.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("crop", "cannot be read at 'crop': write \"none\", or each of crop, flip, jitter at most once"),
        ("rotate=3", "cannot be read at 'rotate=3'"),
        ("crop=0.5,crop=0.6", "cannot be read at 'crop=0.6'"),
        ("crop=much", "cannot be read at 'crop=much'"),
        ("", "cannot be read at ''"),
        ("crop=0", "crop is 0.0, but must be above 0 and at most 1"),
        ("crop=1.5", "crop is 1.5"),
        ("flip=2", "flip is 2.0, but must be a probability"),
        ("jitter=1", "jitter is 1.0, but must be at least 0 and below 1"),
        ("jitter=nan", "jitter is nan"),
    ],
)
def test_impossible_augmentation_is_refused(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        Augmentation.parse(text)


@pytest.mark.parametrize("size", [(100, 80), (80, 100), (64, 64), (123, 100)])
def test_part_lies_within_the_image_and_keeps_area_and_aspect(size: tuple[int, int]):
    parts = [Augmentation(crop=0.6).part(size, (3 / 4, 4 / 3), rng(seed)) for seed in range(300)]
    boxes = np.array(parts)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2] <= size[0]).all()
    assert (boxes[:, 3] <= size[1]).all()
    areas = width * height / (size[0] * size[1])
    assert areas.min() >= 0.6 - 0.02  # sides are whole pixels
    assert areas.min() < 0.65
    assert areas.max() > 0.9
    aspects = width / height
    assert aspects.min() >= 3 / 4 - 0.02
    assert aspects.max() <= 4 / 3 + 0.02
    assert len(set(parts)) > 250


def test_part_of_a_long_image_is_as_long_as_the_aspects_allow_at_a_random_place():
    parts = [Augmentation().part((400, 30), (3 / 4, 4 / 3), rng(seed)) for seed in range(50)]
    assert {(right - left, bottom - top) for left, top, right, bottom in parts} == {(40, 30)}
    assert len({left for left, *_ in parts}) > 30
    assert Augmentation().part((1, 1), (3 / 4, 4 / 3), rng()) == (0, 0, 1, 1)
    assert Augmentation().part((1, 500), (3 / 4, 4 / 3), rng())[2:] != (0, 0)


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_no_augmentation_is_the_image_processor_on_tensors(fit: str, photographs: dict[str, Image.Image]):
    plain = processor(fit=fit)
    pixels = AugmentedPixels(plain, Augmentation.parse("none"))
    for image in photographs.values():
        expected = plain(image.convert("RGB"), backend="torch", return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pixels(image, rng()), expected)


def test_part_is_scaled_to_the_models_size(photographs: dict[str, Image.Image]):
    image = photographs["coffee"]
    augmentation = Augmentation(crop=0.5)
    left, top, right, bottom = augmentation.part(image.size, (3 / 4, 4 / 3), rng(3))
    expected = processor(fit="squash")(image.crop((left, top, right, bottom)), backend="torch", return_tensors="pt")
    assert torch.equal(AugmentedPixels(processor(), augmentation)(image, rng(3)), expected["pixel_values"][0])


@pytest.mark.parametrize("fit", ["pad", "squash"])
def test_image_that_is_shown_whole_keeps_its_aspect(fit: str, photographs: dict[str, Image.Image]):
    wide = photographs["coffee"].resize((200, 50))
    augmentation = Augmentation(crop=0.8)
    left, top, right, bottom = augmentation.part(wide.size, (3, 16 / 3), rng(1))
    expected = processor(fit=fit)(wide.crop((left, top, right, bottom)), backend="torch", return_tensors="pt")
    pixels = AugmentedPixels(processor(fit=fit), augmentation)(wide, rng(1))
    assert torch.equal(pixels, expected["pixel_values"][0])


def test_the_processor_that_was_given_is_left_alone():
    given = processor()
    AugmentedPixels(given, Augmentation(jitter=0.5))
    assert (given.backend, given.fit, given.do_normalize) == ("pil", "crop", True)


def test_flip_mirrors_as_often_as_it_says(photographs: dict[str, Image.Image]):
    image = photographs["chelsea"].resize((40, 40))
    plain = AugmentedPixels(processor(), Augmentation.parse("none"))(image, rng())
    pixels = AugmentedPixels(processor(), Augmentation(crop=1, flip=0.3))
    drawn = [pixels(image, rng(seed)) for seed in range(200)]
    flipped = [torch.equal(one, plain.flip(-1)) for one in drawn]
    assert all(is_flipped or torch.equal(one, plain) for one, is_flipped in zip(drawn, flipped, strict=True))
    assert 40 <= sum(flipped) <= 80
    assert not any(torch.equal(AugmentedPixels(processor(), Augmentation(crop=1))(image, rng(s)), plain.flip(-1))
                   for s in range(20))  # fmt: skip


def test_colours_stay_within_range_and_are_shifted_a_little():
    half = torch.full((3, 8, 8), 0.5)
    values = [Augmentation(jitter=0.2).shift_colours(half, rng(seed))[0, 0, 0].item() for seed in range(100)]
    assert 0.4 <= min(values) < 0.42
    assert 0.58 < max(values) <= 0.6
    noise = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    for seed in range(20):
        shifted = Augmentation(jitter=0.9).shift_colours(noise, rng(seed))
        assert shifted.min() >= 0
        assert shifted.max() <= 1


def test_grey_stays_grey_and_colours_fade_towards_it():
    grey = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1)
    shifted = Augmentation(jitter=0.5).shift_colours(grey, rng(1))
    assert torch.allclose(shifted[0], shifted[1])
    assert torch.allclose(shifted[0], shifted[2])
    red = torch.tensor([0.6, 0.3, 0.3]).reshape(3, 1, 1).expand(-1, 4, 4)
    spreads = [
        float((s := Augmentation(jitter=0.5).shift_colours(red, rng(n)))[0, 0, 0] - s[1, 0, 0]) for n in range(30)
    ]
    assert min(spreads) < 0.2 < 0.4 < max(spreads)


def test_jittered_image_is_normalised(photographs: dict[str, Image.Image]):
    image = photographs["coffee"]
    plain = AugmentedPixels(processor(), Augmentation(crop=0.9))(image, rng(2))
    jittered = AugmentedPixels(processor(), Augmentation(crop=0.9, jitter=1e-6))(image, rng(2))
    assert torch.allclose(plain, jittered, atol=1e-4)


def test_what_is_drawn_depends_on_the_generator_alone(photographs: dict[str, Image.Image]):
    pixels = AugmentedPixels(processor(), Augmentation(0.5, 0.5, 0.3))
    first = pixels(photographs["coffee"], rng(7))
    torch.manual_seed(1)
    pixels(photographs["rocket"], rng(8))
    assert torch.equal(pixels(photographs["coffee"], rng(7)), first)
    assert not torch.equal(pixels(photographs["coffee"], rng(8)), first)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA", "I;16"])
def test_images_of_every_mode_become_three_channels(mode: str, photographs: dict[str, Image.Image]):
    grey = photographs["camera"].resize((50, 40))
    image = grey.convert("I").convert("I;16") if mode == "I;16" else grey.convert(mode)
    assert AugmentedPixels(processor(), Augmentation())(image, rng()).shape == (3, 32, 32)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (3, 500), (2, 3)])
def test_tiny_and_thin_images(size: tuple[int, int]):
    expected = processor()(Image.new("RGB", (32, 32), "orange"), return_tensors="pt")["pixel_values"][0]
    for text in ("none", "crop=0.5"):
        pixels = AugmentedPixels(processor(), Augmentation.parse(text))(Image.new("RGB", size, "orange"), rng())
        assert torch.allclose(pixels, expected, atol=0.02)  # one grey level


def test_draft_leaves_twice_the_models_pixels_in_the_smallest_part():
    assert AugmentedPixels(processor(), Augmentation(crop=1)).draft == 32
    assert AugmentedPixels(processor(), Augmentation(crop=0.25)).draft == 64
