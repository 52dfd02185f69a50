"""The image processor against OpenAI's transform, spelled out step by step with Pillow and torch."""

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor

from hf_clip import HfClipConfig, HfClipImageProcessor
from hf_clip.model import resize
from hf_clip.model.resize import Layout, cut_centre, scale_and_cut, shorter_side_to
from hf_clip.model.resize_tensors import scale_levels_exactly

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def openai_transform(image: Image.Image, size: int) -> torch.Tensor:
    """What torchvision does for Resize(size, BICUBIC), CenterCrop(size), RGB, ToTensor, Normalize; torchvision itself
    cannot be had everywhere. Each line follows its documented rule.
    """
    width, height = image.size
    short, long = sorted((width, height))
    if short != size:
        new_long = int(size * long / short)
        shape = (size, new_long) if width <= height else (new_long, size)
        image = image.resize(shape, Image.Resampling.BICUBIC)
    top, left = round((image.height - size) / 2.0), round((image.width - size) / 2.0)
    image = image.crop((left, top, left + size, top + size)).convert("RGB")
    values = torch.from_numpy(np.array(image, np.uint8, copy=True)).permute(2, 0, 1).contiguous()
    values = values.to(torch.float32).div(255)
    mean, std = torch.tensor(MEAN).view(-1, 1, 1), torch.tensor(STD).view(-1, 1, 1)
    return values.sub_(mean).div_(std)


@pytest.mark.parametrize("size", [224, 288, 336])
def test_photographs_are_bit_identical_to_the_original_transform(photographs: dict[str, Image.Image], size: int):
    processor = HfClipImageProcessor.for_image_size(size)
    images = list(photographs.values())
    found = processor(images, return_tensors="pt").pixel_values
    assert found.dtype == torch.float32
    for row, image in zip(found, images, strict=True):
        assert torch.equal(row, openai_transform(image, size))


@pytest.mark.parametrize("shape", [(224, 224), (224, 500), (225, 224), (333, 1000), (30, 20), (1, 7), (639, 481)])
def test_any_size_of_image_is_bit_identical(shape: tuple[int, int]):
    pixels = np.random.default_rng(0).integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    found = HfClipImageProcessor()(image, return_tensors="pt").pixel_values[0]
    assert torch.equal(found, openai_transform(image, 224))


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """The image in a Pillow mode, those included to which Pillow doesn't convert from RGB by itself."""
    if mode == "P with transparency":
        palette = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
        palette.info["transparency"] = 3
        return palette
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 200)
    return image.convert("RGBA").convert(mode) if mode == "RGBa" else image.convert(mode)


MODES = ["1", "L", "LA", "P", "P with transparency", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"]
MODES += ["I", "I;16", "F"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(300, 451), (100, 60), (224, 224)])
def test_every_mode_of_image_is_bit_identical(photographs: dict[str, Image.Image], mode: str, size: tuple[int, int]):
    """Resized in its own mode and made RGB at the end, as the original does it."""
    image = in_mode(photographs["coffee"].resize(size), mode)
    assert image.mode == mode.split(" ")[0]
    expected = openai_transform(image, 224)
    assert torch.equal(HfClipImageProcessor()(image, return_tensors="pt").pixel_values[0], expected)


def test_transform_spelled_out_here_has_the_original_steps(photographs: dict[str, Image.Image]):
    """A guard on the yardstick: constants as published, and values in the range that they imply."""
    values = openai_transform(photographs["astronaut"], 224)
    assert values.shape == (3, 224, 224)
    assert values.min() >= -max(m / s for m, s in zip(MEAN, STD, strict=True))
    assert values.max() <= max((1 - m) / s for m, s in zip(MEAN, STD, strict=True))


def test_arrays_are_taken_as_images(photographs: dict[str, Image.Image]):
    image = photographs["chelsea"]
    expected = HfClipImageProcessor()(image, return_tensors="pt").pixel_values
    array = np.asarray(image)
    for images in (array, array.transpose(2, 0, 1), torch.from_numpy(array.transpose(2, 0, 1).copy())):
        assert torch.equal(HfClipImageProcessor()(images, return_tensors="pt").pixel_values, expected)


def test_grey_arrays_are_taken_as_images(photographs: dict[str, Image.Image]):
    grey = np.asarray(photographs["camera"])
    expected = HfClipImageProcessor()(photographs["camera"], return_tensors="pt").pixel_values
    for images in (grey, grey[None], grey[..., None]):
        assert torch.equal(HfClipImageProcessor()([images], return_tensors="pt").pixel_values, expected)


def test_batches_nestings_and_files_are_taken(photographs: dict[str, Image.Image], tmp_path: Path):
    image = photographs["chelsea"]
    image.save(tmp_path / "chelsea.png")
    expected = HfClipImageProcessor()([image, image], return_tensors="pt").pixel_values
    array, path = np.asarray(image), str(tmp_path / "chelsea.png")
    for images in (np.stack([array, array]), [[image], [array]], (path, path)):
        assert torch.equal(HfClipImageProcessor()(images, return_tensors="pt").pixel_values, expected)


def test_steps_can_be_switched_off_in_a_call(photographs: dict[str, Image.Image]):
    image = photographs["astronaut"]
    processor = HfClipImageProcessor()
    raw = processor(image, do_normalize=False, do_rescale=False, return_tensors="pt").pixel_values
    assert torch.equal(raw, raw.round())
    assert raw.max() > 200
    whole = processor(image, do_resize=False, do_center_crop=False, return_tensors="pt").pixel_values
    assert whole.shape == (1, 3, image.height, image.width)
    rectangle = processor(image, size={"height": 64, "width": 96}, do_center_crop=False, return_tensors="pt")
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
    image = photographs["coffee"]
    found, expected = (p(image, return_tensors="pt").pixel_values for p in (loaded, processor))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((20, 20, 3), np.int64), r"images\[0\] is an array of int64, but images are needed"),
        (np.full((20, 20, 3), 200.0), r"images\[0\] holds floats from 0 to 200, but from 0 to 1 is needed"),
        (np.full((20, 20, 3), -1.5), r"images\[0\] holds floats from -1.5 to 0, .* normalised already"),
        ([np.zeros((9, 9)), np.full((9, 9), np.nan)], r"images\[1\] has values that are not finite"),
        (np.zeros((20, 20, 4), np.uint8), r"images\[0\] is an array of shape \(20, 20, 4\)"),
        (np.zeros((0, 20, 3), np.uint8), r"images\[0\] is an array of shape \(0, 20, 3\)"),
        ([], "empty list of images"),
        ([None], r"images\[0\] is of type NoneType, but images are needed"),
    ],
)
def test_what_is_no_image_is_refused(images: object, message: str):
    with pytest.raises(ValueError, match=message):
        HfClipImageProcessor()(images, return_tensors="pt")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fit": "stretch"}, "fit is 'stretch', but must be one of 'crop', 'pad', 'squash'"),
        ({"fit": "pad", "do_center_crop": False}, "fit='pad' needs do_resize=True and do_center_crop=True"),
        ({"backend": "torchvision"}, "backend is 'torchvision', but must be one of 'pil', 'torch'"),
        ({"backend": "torch", "resample": 1}, "resizes with resample 3 .bicubic. or 2, not 1"),
        ({"num_threads": 0}, "num_threads is 0"),
        ({"device": "cuda"}, "device='cuda' needs backend=\"torch\""),
        ({"do_pad": True, "pad_size": {"height": 9, "width": 9}}, "do_pad=True is not known here"),
        ({"input_data_format": "HWC"}, "input_data_format are None and 'HWC'"),
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
def test_margin_of_a_small_image_keeps_its_colours(photographs: dict[str, Image.Image], mode: str):
    small = photographs["chelsea"].resize((100, 60)).convert(mode)
    found = HfClipImageProcessor()(small, do_resize=False, do_normalize=False, return_tensors="pt").pixel_values[0]
    inner = found[:, 82:142, 62:162].permute(1, 2, 0).numpy()
    assert np.array_equal(np.round(inner * 255).astype(np.uint8), np.asarray(small.convert("RGB")))


SHAPES = [(1, 1), (1, 1000), (1000, 1), (3, 3000), (2500, 3), (7, 300), (5000, 40), (90, 4500), (641, 479), (224, 9000)]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "CMYK", "P", "1", "F", "I;16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_extreme_shapes_are_bit_identical(mode: str, shape: tuple[int, int]):
    """Parts of very long lines are computed here, with Pillow's arithmetic, where Pillow would compute them all."""
    pixels = np.random.default_rng(0).integers(0, 256, (shape[1], shape[0], 4), dtype=np.uint8)
    base = Image.fromarray(pixels)
    image = in_mode(base.convert("RGB") if mode in ("CMYK", "P") else base, mode)
    found = HfClipImageProcessor()(image, return_tensors="pt").pixel_values[0]
    assert torch.equal(found, openai_transform(image, 224))


@settings(max_examples=300, deadline=None)
@given(
    size=st.tuples(st.integers(1, 700), st.integers(1, 700)) | st.tuples(st.integers(1, 30), st.integers(1, 4000)),
    is_turned=st.booleans(),
    side=st.sampled_from([7, 16, 50, 224]),
    cut=st.tuples(st.integers(1, 260), st.integers(1, 260)),
    resample=st.sampled_from(list(Image.Resampling)),
    mode=st.sampled_from(["L", "RGB", "RGBA", "LA", "I", "F", "HSV", "P"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_scaling_a_part_gives_the_bits_of_scaling_everything(size, is_turned, side, cut, resample, mode, seed):
    width, height = size[::-1] if is_turned else size
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = Image.fromarray(noise).convert("RGB").convert(mode) if mode in ("HSV", "P") else Image.fromarray(noise)
    image = image if image.mode == mode else image.convert(mode)
    new_size = shorter_side_to(image.size, side)
    layout = Layout(new_size, cut_centre(new_size, cut))
    found, expected = scale_and_cut(image, layout, resample), image.resize(new_size, resample).crop(layout.box)
    assert (found.mode, found.size) == (expected.mode, expected.size)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("size", [(8, 800), (8, 801), (7, 701), (40, 4001), (40, 3999), (30, 90), (60, 300), (300, 60)])
@pytest.mark.parametrize("new_size", [(7, 700), (16, 400), (40, 80), (29, 4002), (9, 5)])
def test_passes_come_in_the_order_of_pillow(size: tuple[int, int], new_size: tuple[int, int]):
    """Release 12.2 began to take the columns first, for the very tall alone, release 13.0 for more."""
    noise = np.random.default_rng(1).integers(0, 256, size[::-1], dtype=np.uint8)
    image, tall, wide = Image.fromarray(noise), (size[0], new_size[1]), (new_size[0], size[1])
    between = tall if resize.height_comes_first(size, new_size) else wide
    steps = image.resize(between, Image.Resampling.BICUBIC).resize(new_size, Image.Resampling.BICUBIC)
    assert steps.tobytes() == image.resize(new_size, Image.Resampling.BICUBIC).tobytes()


@pytest.mark.parametrize(
    ("release", "first"),
    [((10, 0), (0, 0, 0)), ((12, 1), (0, 0, 0)), ((12, 2), (1, 0, 0)), ((12, 3), (1, 0, 0)), ((13, 0), (1, 1, 0))],
)
def test_order_of_the_passes_by_release(release: tuple[int, int], first: tuple, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resize, "PILLOW_RELEASE", release)
    sizes = [((8, 801), (7, 700)), ((8, 800), (7, 700)), ((400, 300), (298, 224))]
    assert tuple(resize.height_comes_first(*pair) for pair in sizes) == first


def test_unknown_release_of_pillow_scales_everything(monkeypatch: pytest.MonkeyPatch, photographs: dict):
    """The order of Pillow's passes, on which bits depend, has changed before."""
    monkeypatch.setattr(resize, "PILLOW_RELEASE", (99, 0))
    monkeypatch.setattr(resize, "_scale_along", None)
    found = HfClipImageProcessor()(photographs["chelsea"], return_tensors="pt").pixel_values[0]
    assert torch.equal(found, openai_transform(photographs["chelsea"], 224))


def test_very_long_image_takes_little_memory():
    """Scaled as a whole, this one would have 224 × 448,000 pixels."""
    import tracemalloc

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 120_000, 3), dtype=np.uint8))
    tracemalloc.start()
    found = HfClipImageProcessor()(image, return_tensors="pt").pixel_values
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.shape == (1, 3, 224, 224)
    assert peak < 20e6


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(photographs: dict[str, Image.Image], threads: int):
    images = list(photographs.values()) * 2
    found = HfClipImageProcessor()(images, num_threads=threads, return_tensors="pt").pixel_values
    for row, image in zip(found, images, strict=True):
        assert torch.equal(row, openai_transform(image, 224))


def test_float_arrays_are_images_from_0_to_1(photographs: dict[str, Image.Image]):
    image = photographs["chelsea"]
    expected = HfClipImageProcessor()(image, return_tensors="pt").pixel_values
    floats = np.asarray(image).astype(np.float32) / 255
    for given_floats in (floats, floats.astype(np.float64), floats.transpose(2, 0, 1), torch.from_numpy(floats)):
        assert torch.equal(HfClipImageProcessor()(given_floats, return_tensors="pt").pixel_values, expected)
        unscaled = HfClipImageProcessor()(given_floats, do_rescale=False, return_tensors="pt").pixel_values
        assert torch.equal(unscaled, expected)


def test_layout_of_channels_can_be_said(photographs: dict[str, Image.Image]):
    array = np.asarray(photographs["chelsea"].resize((3, 50)))  # (50, 3, 3) reads both ways
    last = HfClipImageProcessor()(array, input_data_format="channels_last", return_tensors="pt").pixel_values
    first = array.transpose(2, 0, 1)
    assert torch.equal(
        HfClipImageProcessor()(first, input_data_format="channels_first", return_tensors="pt").pixel_values, last
    )
    for backend in ("pil", "torch"):
        out = HfClipImageProcessor()(array, backend=backend, data_format="channels_last", return_tensors="np")
        assert out.pixel_values.shape == (1, 224, 224, 3)


def grey_levels(processor: HfClipImageProcessor, images: object, **settings: object) -> torch.Tensor:
    found = processor(images, do_normalize=False, return_tensors="pt", **settings).pixel_values
    return found * 255


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize("name", ["chelsea", "astronaut", "rocket", "portrait", "camera"])
def test_torch_is_within_one_grey_level(photographs: dict[str, Image.Image], name: str, fit: str):
    processor, image = HfClipImageProcessor(fit=fit), photographs[name]
    expected = grey_levels(processor, image)
    tensor = torch.from_numpy(np.array(image))
    tensor = tensor[None] if tensor.ndim == 2 else tensor.permute(2, 0, 1)
    for images in (image, tensor, tensor[None], tensor.contiguous(), [tensor, tensor]):
        error = (grey_levels(processor, images, backend="torch") - expected).abs()
        assert error.max() < 1.001
        assert (error > 0.5).float().mean() < 0.02


@pytest.mark.parametrize("filter_name", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(640, 480), (300, 900), (50, 40), (3, 700), (224, 300)])
def test_other_devices_give_the_bits_of_pillow(filter_name: str, size: tuple[int, int]):
    """Where torch has no kernel for uint8, as on a GPU, Pillow's sums are done as whole numbers in float64."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    new_size = shorter_side_to(size, 224)
    layout = Layout(new_size, cut_centre(new_size, (224, 224)))
    levels = torch.from_numpy(noise).permute(2, 0, 1)[None].repeat(2, 1, 1, 1)
    found = scale_levels_exactly(levels, layout, filter_name)
    assert torch.equal(found[0], found[1])
    resample = {"bicubic": 3, "bilinear": 2}[filter_name]
    expected = torch.from_numpy(np.array(scale_and_cut(Image.fromarray(noise), layout, resample))).permute(2, 0, 1)
    assert torch.equal(found[0], expected.float())


@pytest.mark.parametrize("shape", [(3, 40, 4000), (3, 4000, 40), (1, 30, 50)])
def test_torch_on_long_and_grey_images(shape: tuple[int, int, int]):
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    expected = grey_levels(HfClipImageProcessor(), pixels)
    assert (grey_levels(HfClipImageProcessor(), pixels, backend="torch") - expected).abs().max() < 1.001


def test_gradients_reach_float_tensors(photographs: dict[str, Image.Image]):
    image = torch.from_numpy(np.array(photographs["chelsea"])).permute(2, 0, 1).float() / 255
    processor = HfClipImageProcessor(backend="torch")
    found = processor(image, return_tensors="pt").pixel_values
    expected = HfClipImageProcessor()(image, return_tensors="pt").pixel_values
    assert (found - expected).abs().max() < 1.6 / 255 / 0.26  # not rounded, so up to half a level more
    leaf = (image * 0.6 + 0.2)[None].repeat(2, 1, 1, 1).requires_grad_()  # far from where levels are clipped
    found = processor(leaf, return_tensors="pt").pixel_values
    weights = torch.randn_like(found)
    (found * weights).sum().backward()
    assert leaf.grad is not None
    direction = leaf.grad / leaf.grad.norm()
    with torch.no_grad():
        ahead, behind = (processor(leaf + step * direction).pixel_values for step in (0.5, -0.5))
        change = ((ahead - behind).double() * weights).sum()
    assert torch.isclose(leaf.grad.norm().double(), change, rtol=1e-3)


def test_torch_refuses_what_is_no_image():
    processor = HfClipImageProcessor(backend="torch")
    good, bad = torch.zeros(3, 9, 9), torch.full((3, 9, 9), float("nan"))
    with pytest.raises(ValueError, match=r"images\[1\] has values that are not finite"):
        processor([good, bad])
    with pytest.raises(ValueError, match=r"images\[1\] holds floats from 7 to 7"):
        processor(torch.stack([good, good + 7]))
    with pytest.raises(ValueError, match=r"images\[0\] is a tensor of torch.int64"):
        processor(torch.zeros(3, 9, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"images\[1\] is an array of shape \(4, 9, 9\)"):
        processor([good, torch.zeros(4, 9, 9)])
    with pytest.raises(ValueError, match="empty list"):
        processor([])


def test_pad_shows_the_whole_image_in_its_shape(photographs: dict[str, Image.Image]):
    processor = HfClipImageProcessor(fit="pad")
    wide = photographs["chelsea"].resize((448, 100))
    found = processor(wide, return_tensors="pt").pixel_values[0]
    inner = torch.from_numpy(np.array(wide.resize((224, 50), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    raw = processor(wide, do_normalize=False, do_rescale=False, return_tensors="pt").pixel_values[0]
    assert torch.equal(raw[:, 87:137], inner.float())
    assert found[:, :87].abs().max() < 0.01  # the mean colour
    assert found[:, 137:].abs().max() < 0.01
    tall = processor(wide.transpose(Image.Transpose.ROTATE_90), return_tensors="pt").pixel_values[0]
    assert tall[:, :, :87].abs().max() < 0.01
    assert processor(Image.new("RGB", (5000, 1)), return_tensors="pt").pixel_values.shape == (1, 3, 224, 224)


def test_squash_takes_the_whole_image(photographs: dict[str, Image.Image]):
    wide = photographs["chelsea"].resize((448, 100))
    raw = HfClipImageProcessor(fit="squash")(wide, do_normalize=False, do_rescale=False, return_tensors="pt")
    expected = torch.from_numpy(np.array(wide.resize((224, 224), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    assert torch.equal(raw.pixel_values[0], expected.float())


def test_fit_is_saved_and_how_to_compute_is_not(tmp_path: Path):
    HfClipImageProcessor(fit="pad", backend="torch", num_threads=3, draft=True).save_pretrained(tmp_path)
    loaded = HfClipImageProcessor.from_pretrained(tmp_path)
    assert (loaded.fit, loaded.backend, loaded.num_threads, loaded.draft) == ("pad", "pil", None, False)
    assert HfClipImageProcessor.from_pretrained(tmp_path, backend="torch").backend == "torch"


def test_small_reductions_on_a_cpu_have_pillows_bits():
    """Where torch's own arithmetic for uint8 would be two levels off now and then."""
    noise = np.random.default_rng(0).choice([0, 255], (300, 400, 3)).astype(np.uint8)
    expected = grey_levels(HfClipImageProcessor(), noise)
    assert (grey_levels(HfClipImageProcessor(), noise, backend="torch") - expected).abs().max() < 1e-4


def test_arrays_in_any_order_of_memory(photographs: dict[str, Image.Image]):
    array = np.array(photographs["chelsea"])
    expected = grey_levels(HfClipImageProcessor(), np.ascontiguousarray(array[:, ::-1, ::-1]))
    for backend in ("pil", "torch"):
        for images in (array[:, ::-1, ::-1], array[None, :, ::-1, ::-1]):
            error = grey_levels(HfClipImageProcessor(), images, backend=backend) - expected
            assert error.abs().max() < 1.001
    bfloat = torch.from_numpy(array).bfloat16() / 255
    assert (grey_levels(HfClipImageProcessor(), bfloat) - grey_levels(HfClipImageProcessor(), array)).abs().max() < 3


def test_threads_leave_the_filters_of_warnings_alone(photographs: dict[str, Image.Image]):
    file, exif, before = BytesIO(), Image.Exif(), list(warnings.filters)
    exif[0x0112] = 6
    photographs["chelsea"].save(file, "JPEG", exif=exif)
    HfClipImageProcessor()([file.getvalue()] * 32, num_threads=4)
    assert warnings.filters == before
