"""How fast images become the model's input, beside transformers' own processor on Pillow.

Photographs of 640x480 pixels, one at a time on one thread, and lists of 32 on one thread and on all. The pixels are
compared first: the default backend's grey levels with those of transformers, torch's with Pillow's. Then a JPEG of
twelve megapixels from file to input, decoded exactly and with draft=True, and how far the latter is from the former.
Where there is a GPU, lists of tensors are processed there too.
"""

from collections.abc import Callable, Iterator
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

from hf_clip import HfClipImageProcessor

from .measuring import OURS, Check, Contender, Table, compare
from .settings import Settings

OPTIONS = ()
NEEDS_CEILING = False
IS_ON_CPU = False
LIST_LENGTH = 32
ROUNDS, QUICK_ROUNDS = 20, 4

QUICK = f"{OURS}, backend='torch'"
PEER = "transformers CLIPImageProcessorPil"


def photograph(size: tuple[int, int]) -> Image.Image:
    """A real image that ships with scikit-image, at another size."""
    from skimage import data

    return Image.fromarray(data.chelsea()).resize(size, Image.Resampling.LANCZOS)


def grey_levels(processor: Callable[..., dict], image: object, **settings: object) -> np.ndarray:
    pixels = processor(image, do_normalize=False, return_tensors="np", **settings)["pixel_values"][0]
    return np.round(pixels * 255).astype(int)


def within(levels: int, expected: Tensor, processor: HfClipImageProcessor) -> Check:
    """A check of pixel_values, which may be off by so many grey levels."""
    level = 1 / 255 / np.asarray(processor.image_std, dtype=np.float32).reshape(-1, 1, 1)

    def check(found: dict) -> str | None:
        pixels = np.asarray(found["pixel_values"].cpu())
        off = np.abs(pixels - expected.numpy()).max(axis=(0, 2, 3), keepdims=True)[0] / level
        largest = float(off.max())
        return None if largest < levels + 0.01 else f"its pixels are {largest:.1f} grey levels off"

    return check


def one_image(
    ours: HfClipImageProcessor, stock: CLIPImageProcessorPil, image: Image.Image, rounds: int, seconds: float
) -> Table:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    expected = stock(image, return_tensors="pt")["pixel_values"]
    quick = np.abs(grey_levels(ours, image, backend="torch") - grey_levels(ours, image))
    shape = "portrait" if image.height > image.width else "landscape"
    table = Table(f"{shape} of {image.width}x{image.height} pixels, alone, one thread", "images", ours=(OURS, QUICK))
    table.notes.append(
        f"backend='torch': gets a uint8 tensor, the others a Pillow image; {(quick > 0).mean():.2%} of the values "
        f"differ, by one grey level"
    )
    contenders = [
        Contender(OURS, lambda: ours(image, return_tensors="pt"), 1, check=within(0, expected, ours)),
        Contender(
            QUICK, lambda: ours(pixels, backend="torch", return_tensors="pt"), 1, check=within(1, expected, ours)
        ),
        Contender(PEER, lambda: stock(image, return_tensors="pt"), 1, check=within(0, expected, ours)),
    ]
    return compare(table, contenders, rounds=rounds, seconds=seconds)


def lists(
    ours: HfClipImageProcessor, stock: CLIPImageProcessorPil, image: Image.Image, settings: Settings, rounds: int
) -> Table:
    images, threads = [image] * LIST_LENGTH, settings.threads
    check = within(0, stock(images, return_tensors="pt")["pixel_values"], ours)
    several, one = f"{OURS}, {threads} threads", f"{OURS}, one thread"
    calls: dict[str, Callable[[], object]] = {one: lambda: ours(images, num_threads=1, return_tensors="pt")}
    if threads > 1:
        calls = {several: lambda: ours(images, num_threads=threads, return_tensors="pt")} | calls
    calls[PEER] = lambda: stock(images, return_tensors="pt")
    contenders = [Contender(name, call, LIST_LENGTH, check=check) for name, call in calls.items()]
    table = Table(f"lists of {LIST_LENGTH}, 640x480 pixels", "images", ours=tuple(calls)[:-1])
    return compare(table, contenders, rounds=rounds, seconds=settings.seconds)


def draft(ours: HfClipImageProcessor, rounds: int, seconds: float) -> Table:
    file = BytesIO()
    photograph((4000, 3000)).save(file, "JPEG", quality=90)
    data = file.getvalue()
    error = np.abs(grey_levels(ours, data, draft=True) - grey_levels(ours, data))
    table = Table("a JPEG of 12 megapixels, from its bytes", "images", ours=(f"{OURS}, draft",))
    table.notes.append(f"draft: grey levels are {error.mean():.2f} off on average, {error.max()} at most")
    contenders = [
        Contender(f"{OURS}, draft", lambda: ours(data, draft=True, return_tensors="pt"), 1),
        Contender(f"{OURS}, exact", lambda: ours(data, return_tensors="pt"), 1),
    ]
    return compare(table, contenders, rounds=rounds, seconds=seconds)


def on_device(ours: HfClipImageProcessor, image: Image.Image, device: str, settings: Settings, rounds: int) -> Table:
    """A batch of uint8 tensors, from the memory of the CPU and from the device's own, beside Pillow on the CPU."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).expand(LIST_LENGTH, -1, -1, -1).contiguous()
    there, images = pixels.to(device), [image] * LIST_LENGTH
    expected = ours(images, return_tensors="pt")["pixel_values"]
    settings_of_ours = {"backend": "torch", "device": device, "return_tensors": "pt"}
    calls: dict[str, Callable[[], dict]] = {
        f"{OURS}, on the device": lambda: ours(there, **settings_of_ours),
        f"{OURS}, copied there": lambda: ours(pixels, **settings_of_ours),
        "Pillow, on the CPU": lambda: ours(images, return_tensors="pt").to(device),
    }
    contenders = [Contender(name, call, LIST_LENGTH, check=within(1, expected, ours)) for name, call in calls.items()]
    table = Table(f"tensors in batches of {LIST_LENGTH}, {device}", "images", ours=tuple(calls)[:1], device=device)
    return compare(table, contenders, rounds=rounds, seconds=settings.seconds)


def run(settings: Settings) -> Iterator[Table]:
    rounds = settings.rounds or settings.choose(ROUNDS, QUICK_ROUNDS)
    ours, stock = HfClipImageProcessor(), CLIPImageProcessorPil()
    landscape = photograph((640, 480))
    if "cpu" in settings.devices:
        torch.set_num_threads(1)
        try:
            for image in (landscape, landscape.transpose(Image.Transpose.ROTATE_90)):
                yield one_image(ours, stock, image, rounds, settings.seconds)
        finally:
            torch.set_num_threads(settings.threads)
        yield lists(ours, stock, landscape, settings, rounds)
        yield draft(ours, rounds, settings.seconds)
    for device in settings.devices:
        if device != "cpu":
            yield on_device(ours, landscape, device, settings, rounds)
