"""The image processor against OpenAI's transform, spelled out step by step with Pillow and torch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from hf_clip import HfClipConfig, HfClipImageProcessor

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def openai_transform(picture: Image.Image, size: int) -> torch.Tensor:
    """What torchvision does for Resize(size, BICUBIC), CenterCrop(size), RGB, ToTensor, Normalize; torchvision itself
    cannot be had everywhere. Each line follows its documented rule.
    """
    width, height = picture.size
    short, long = sorted((width, height))
    if short != size:
        new_long = int(size * long / short)
        shape = (size, new_long) if width <= height else (new_long, size)
        picture = picture.resize(shape, Image.Resampling.BICUBIC)
    top, left = round((picture.height - size) / 2.0), round((picture.width - size) / 2.0)
    picture = picture.crop((left, top, left + size, top + size)).convert("RGB")
    values = torch.from_numpy(np.array(picture, np.uint8, copy=True)).permute(2, 0, 1).contiguous()
    values = values.to(torch.float32).div(255)
    mean, std = torch.tensor(MEAN).view(-1, 1, 1), torch.tensor(STD).view(-1, 1, 1)
    return values.sub_(mean).div_(std)


@pytest.mark.parametrize("size", [224, 288, 336])
def test_photographs_are_bit_identical_to_the_original_transform(photographs: dict[str, Image.Image], size: int):
    processor = HfClipImageProcessor.for_image_size(size)
    pictures = list(photographs.values())
    found = processor(pictures, return_tensors="pt").pixel_values
    assert found.dtype == torch.float32
    for row, picture in zip(found, pictures, strict=True):
        assert torch.equal(row, openai_transform(picture, size))


@pytest.mark.parametrize("shape", [(224, 224), (224, 500), (225, 224), (333, 1000), (30, 20), (1, 7), (639, 481)])
def test_any_size_of_picture_is_bit_identical(shape: tuple[int, int]):
    pixels = np.random.default_rng(0).integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    found = HfClipImageProcessor()(picture, return_tensors="pt").pixel_values[0]
    assert torch.equal(found, openai_transform(picture, 224))


def in_mode(picture: Image.Image, mode: str) -> Image.Image:
    """The picture in a Pillow mode, those included to which Pillow doesn't convert from RGB by itself."""
    if mode == "P with transparency":
        palette = picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
        palette.info["transparency"] = 3
        return palette
    if mode == "I;16":
        return Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 200)
    return picture.convert("RGBA").convert(mode) if mode == "RGBa" else picture.convert(mode)


MODES = ["1", "L", "LA", "P", "P with transparency", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
MODES += ["I", "I;16", "F"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(300, 451), (100, 60), (224, 224)])
def test_every_mode_of_picture_is_bit_identical(photographs: dict[str, Image.Image], mode: str, size: tuple[int, int]):
    """Resized in its own mode and made RGB at the end, as the original does it."""
    picture = in_mode(photographs["coffee"].resize(size), mode)
    assert picture.mode == mode.split(" ")[0]
    expected = openai_transform(picture, 224)
    assert torch.equal(HfClipImageProcessor()(picture, return_tensors="pt").pixel_values[0], expected)


def test_transform_spelled_out_here_has_the_original_steps(photographs: dict[str, Image.Image]):
    """A guard on the yardstick: constants as published, and values in the range that they imply."""
    values = openai_transform(photographs["astronaut"], 224)
    assert values.shape == (3, 224, 224)
    assert values.min() >= -max(m / s for m, s in zip(MEAN, STD, strict=True))
    assert values.max() <= max((1 - m) / s for m, s in zip(MEAN, STD, strict=True))


def test_arrays_are_taken_as_pictures(photographs: dict[str, Image.Image]):
    picture = photographs["chelsea"]
    expected = HfClipImageProcessor()(picture, return_tensors="pt").pixel_values
    array = np.asarray(picture)
    for given in (array, array.transpose(2, 0, 1), torch.from_numpy(array.transpose(2, 0, 1).copy())):
        assert torch.equal(HfClipImageProcessor()(given, return_tensors="pt").pixel_values, expected)


def test_grey_arrays_are_taken_as_pictures(photographs: dict[str, Image.Image]):
    grey = np.asarray(photographs["camera"])
    expected = HfClipImageProcessor()(photographs["camera"], return_tensors="pt").pixel_values
    for given in (grey, grey[None], grey[..., None]):
        assert torch.equal(HfClipImageProcessor()([given], return_tensors="pt").pixel_values, expected)


def test_batches_nestings_and_files_are_taken(photographs: dict[str, Image.Image], tmp_path: Path):
    picture = photographs["chelsea"]
    picture.save(tmp_path / "chelsea.png")
    expected = HfClipImageProcessor()([picture, picture], return_tensors="pt").pixel_values
    array, path = np.asarray(picture), str(tmp_path / "chelsea.png")
    for given in (np.stack([array, array]), [[picture], [array]], (path, path)):
        assert torch.equal(HfClipImageProcessor()(given, return_tensors="pt").pixel_values, expected)


def test_steps_can_be_switched_off_in_a_call(photographs: dict[str, Image.Image]):
    picture = photographs["astronaut"]
    processor = HfClipImageProcessor()
    raw = processor(picture, do_normalize=False, do_rescale=False, return_tensors="pt").pixel_values
    assert torch.equal(raw, raw.round())
    assert raw.max() > 200
    whole = processor(picture, do_resize=False, do_center_crop=False, return_tensors="pt").pixel_values
    assert whole.shape == (1, 3, picture.height, picture.width)
    rectangle = processor(picture, size={"height": 64, "width": 96}, do_center_crop=False, return_tensors="pt")
    assert rectangle.pixel_values.shape == (1, 3, 64, 96)


def test_lists_come_back_without_return_tensors(photographs: dict[str, Image.Image]):
    found = HfClipImageProcessor()([photographs["astronaut"], photographs["coffee"]])
    assert len(found["pixel_values"]) == 2
    assert found["pixel_values"][0].shape == (3, 224, 224)


@pytest.mark.parametrize("size", [224, 336])
def test_saved_processor_loads_through_the_auto_class(size: int, tmp_path: Path, photographs: dict[str, Image.Image]):
    processor = HfClipImageProcessor.for_image_size(size)
    processor.save_pretrained(tmp_path)
    HfClipConfig().save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is HfClipImageProcessor
    picture = photographs["coffee"]
    found, expected = (p(picture, return_tensors="pt").pixel_values for p in (loaded, processor))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((20, 20, 3), np.float32), r"images\[0\] is an array of float32, but pictures are needed"),
        (np.zeros((20, 20, 4), np.uint8), r"images\[0\] is an array of shape \(20, 20, 4\)"),
        (np.zeros((0, 20, 3), np.uint8), r"images\[0\] is an array of shape \(0, 20, 3\)"),
        ([], "empty list of images"),
        ([None], r"images\[0\] is of type NoneType, but pictures are needed"),
    ],
)
def test_what_is_no_picture_is_refused(given: object, message: str):
    with pytest.raises(ValueError, match=message):
        HfClipImageProcessor()(given, return_tensors="pt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"longest_edge": 100}}, r'size is .*longest_edge.*, but {"shortest_edge": n} or'),
        ({"crop_size": {"shortest_edge": 100}}, "crop_size is .*shortest_edge"),
        ({"image_mean": [0.5, 0.5]}, "need one number, or one per channel"),
        ({"resample": "bicubic"}, "resample is 'bicubic', but one of PIL.Image.Resampling is needed"),
        ({"resample": 9}, "resample is 9"),
    ],
)
def test_settings_that_no_step_knows_are_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        HfClipImageProcessor()(Image.new("RGB", (50, 40)), return_tensors="pt", **settings)


@pytest.mark.parametrize("mode", ["RGB", "P", "L"])
def test_margin_of_a_small_picture_keeps_its_colours(photographs: dict[str, Image.Image], mode: str):
    small = photographs["chelsea"].resize((100, 60)).convert(mode)
    found = HfClipImageProcessor()(small, do_resize=False, do_normalize=False, return_tensors="pt").pixel_values[0]
    inner = found[:, 82:142, 62:162].permute(1, 2, 0).numpy()
    assert np.array_equal(np.round(inner * 255).astype(np.uint8), np.asarray(small.convert("RGB")))
