"""Images that workers decode and the device finishes: equal to what workers make of them."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ProcessorMixin

from hf_clip import HfClipImageProcessor
from hf_clip.training.data import image_preparation
from hf_clip.training.data.augment import Augmentation
from hf_clip.training.data.collator import PairCollator
from hf_clip.training.data.image_batch import DecodedImages, ImageBatch, ScaledImages
from hf_clip.training.data.image_preparation import ImagePreparation
from hf_clip.training.data.load_pairs import load_pairs
from hf_clip.training.data.loader import build_loader

from ..sources import STRONG, captions, write_table

SIDE = 32
SHAPES = [(640, 480), (480, 640), (33, 31), (32, 32), (20, 25), (1, 90), (700, 40), (31, 500)]


def processor(**settings: object) -> HfClipImageProcessor:
    return HfClipImageProcessor.for_image_size(SIDE, **settings)


def images(photographs: dict[str, Image.Image], shapes: list[tuple[int, int]] = SHAPES) -> list[Image.Image]:
    """Photographs and, of every second size, noise, which meets all roundings."""
    rng, found = np.random.default_rng(0), []
    for number, (width, height) in enumerate(shapes):
        noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        found.append(noise if number % 2 else photographs["coffee"].convert("RGB").resize((width, height)))
    return found


def finished(
    given: HfClipImageProcessor, augmentation: Augmentation | None, some: list[Image.Image], on_device: bool
) -> torch.Tensor:
    prepare = ImagePreparation(given, augmentation, on_device=on_device)
    batch = prepare.batch([prepare(image, np.random.default_rng(place)) for place, image in enumerate(some)])
    assert isinstance(batch, DecodedImages if on_device else ScaledImages)
    return batch.to("cpu")


def levels(pixels: torch.Tensor, given: HfClipImageProcessor) -> torch.Tensor:
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (given.image_mean, given.image_std))
    return (pixels * std + mean) * 255


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS])
@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize("on_device", [False, True], ids=["worker", "device"])
def test_plain_images_are_the_processors_in_every_bit(
    on_device: bool, fit: str, resample: int, photographs: dict[str, Image.Image]
):
    given = processor(fit=fit, resample=resample)
    some = images(photographs)
    grey = some[0].convert("L").resize((90, 60))
    some += [grey, grey.convert("P"), grey.convert("1"), some[1].convert("CMYK"), some[2].convert("RGBA")]
    some[-1].putalpha(some[2].convert("L"))
    expected = given(some, return_tensors="pt")["pixel_values"]
    assert torch.equal(finished(given, None, some, on_device), expected)


def test_other_orders_of_the_axes_are_exact_too(photographs: dict[str, Image.Image], monkeypatch: pytest.MonkeyPatch):
    """Tall images, whose height Pillow may resize first, and a batch that is scaled in several groups."""
    from hf_clip.training.data import device_scaling

    monkeypatch.setattr(device_scaling, "PIXELS_AT_ONCE", 3 * 2 * 300 * 2000)
    given = processor()
    some = images(photographs, [(40, 2000), (300, 1000), (2000, 40), (300, 200), (200, 300), (300, 300), (40, 45)])
    assert torch.equal(finished(given, None, some, True), given(some, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
@pytest.mark.parametrize("text", ["crop=0.5,flip=0.5", "none", "crop=0.6,flip=0.5,jitter=0.3"])
def test_augmented_images_differ_from_the_workers_by_one_level(
    text: str, fit: str, photographs: dict[str, Image.Image]
):
    given, augmentation = processor(fit=fit), Augmentation.parse(text)
    worker, device = (finished(given, augmentation, images(photographs), on_device) for on_device in (False, True))
    # Jitter multiplies a level by up to 1.3 three times.
    off = (levels(worker, given) - levels(device, given)).abs()
    assert off.max() < (1.3**3 if augmentation.jitter else 1) + 0.01
    assert off.mean() < 0.1


def test_image_that_is_too_large_to_be_sent_is_scaled_by_the_worker(
    photographs: dict[str, Image.Image], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(image_preparation, "MOST_SENT", 100 * 100)
    some = images(photographs, [(640, 480), (60, 50)])
    for augmentation in (None, STRONG):
        prepare = ImagePreparation(processor(), augmentation, on_device=True)
        large, small = (prepare(image, np.random.default_rng(1)) for image in some)
        assert large.pixels.shape == (SIDE, SIDE, 3)
        assert small.pixels[..., 0].numel() > 30 * 30
    expected = processor()(some, return_tensors="pt")["pixel_values"]
    assert torch.equal(finished(processor(), None, some, True), expected)


@pytest.mark.parametrize("on_device", [False, True], ids=["worker", "device"])
@pytest.mark.parametrize("augmentation", [None, STRONG], ids=["plain", "augmented"])
def test_parts_of_a_batch_are_what_the_batch_is(
    augmentation: Augmentation | None, on_device: bool, photographs: dict[str, Image.Image]
):
    prepare = ImagePreparation(processor(), augmentation, on_device=on_device)
    some = images(photographs, [(60, 50), (50, 64), (33, 70), (90, 40), (40, 40)])
    batch = prepare.batch([prepare(image, np.random.default_rng(place)) for place, image in enumerate(some)])
    parts: tuple[ImageBatch, ...] = batch.split(2)
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.to("cpu") for part in parts]), batch.to("cpu"))
    assert torch.equal(batch.to("cpu"), batch.to("cpu"))
    empty = prepare.batch([])
    assert (len(empty), tuple(empty.to("cpu").shape)) == (0, (0, 3, SIDE, SIDE))


def test_loader_hands_decoded_images_through_its_workers(
    tmp_path: object, processor: ProcessorMixin, photographs: dict[str, Image.Image]
):
    files = []
    for image in images(photographs, [(60, 50), (50, 64), (33, 70), (90, 40)]):
        image.save(buffer := BytesIO(), "PNG")
        files.append(buffer.getvalue())
    source = str(write_table(tmp_path / "table.parquet", {"image": files, "caption": captions(4)}))  # type: ignore[operator]
    found = []
    for workers, finish in ((0, True), (1, False)):
        collator = PairCollator(processor, Augmentation(), on_device=True)
        loader = build_loader(load_pairs(source), collator, 4, num_workers=workers, finish_images=finish)
        (batch,) = loader.epoch()
        found.append(batch["pixel_values"])
    whole, unfinished = found
    assert isinstance(unfinished, DecodedImages)
    assert unfinished.levels.dtype == torch.uint8
    assert torch.equal(unfinished.to("cpu"), whole)
