"""How fast images become the model's input, beside transformers' own processor on Pillow and hf-processors-rs.

Photographs of 640x480 pixels, decoded or as the bytes of a JPEG, one at a time on one thread, and lists of 32 on one
thread and on all. The pixels are compared first: the default backend's with those of transformers, torch's with
Pillow's. hf_clip resizes with hf-processors-rs too where it is installed; one row says how fast it is without. Then a
JPEG of twelve megapixels from file to input, decoded exactly and with draft=True, and how far the latter is from the
former. Where there is a GPU, lists of tensors are processed there too.
"""

from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil

from hf_clip import HfClipImageProcessor
from hf_clip.model.rust_resize import ThreadsOfParent

from .measuring import OURS, Check, Contender, Table, compare
from .settings import Settings

OPTIONS = ()
NEEDS_CEILING = False
IS_ON_CPU = False
LIST_LENGTH = 32
ROUNDS, QUICK_ROUNDS = 20, 4

QUICK = f"{OURS}, backend='torch'"
ALONE = f"{OURS}, without hf-processors-rs"
PEER = "transformers CLIPImageProcessorPil"
RUST = "hf-processors-rs"


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


class Processors:
    """Ours and the peers, each called for `pixel_values`.

    Attributes:
        rust: The peer in Rust, or None where it is not installed.
    """

    def __init__(self) -> None:
        self.ours, self.stock, self.rust = HfClipImageProcessor(), CLIPImageProcessorPil(), None
        try:
            from hf_processors_rs import AutoImageProcessor
        except ModuleNotFoundError:
            return
        self.rust = AutoImageProcessor.from_dict(self.stock.to_dict(), backend="pil")

    def alone(self, images: Any, **settings: Any) -> dict:
        """Ours, as where hf-processors-rs is not installed."""
        before, ThreadsOfParent.are_lost = ThreadsOfParent.are_lost, True
        try:
            return self.ours(images, return_tensors="pt", **settings)
        finally:
            ThreadsOfParent.are_lost = before

    def works(self, images: Any, threads: int) -> dict[str, Callable[[], dict]]:
        """Who takes part with this number of threads."""
        found: dict[str, Callable[[], dict]] = {
            OURS: lambda: self.ours(images, num_threads=threads, return_tensors="pt")
        }
        if (rust := self.rust) is not None:
            found[ALONE] = lambda: self.alone(images, num_threads=threads)
            found[RUST] = lambda: rust.preprocess(images, return_tensors="pt", num_threads=threads)
        return found

    def missing(self) -> list[str]:
        return [] if self.rust else [f"{RUST} is left out: it is not installed (pip install {RUST})"]


def one_image(processors: Processors, image: Image.Image, settings: Settings, rounds: int) -> Table:
    """One photograph at a time, on one thread."""
    ours, stock = processors.ours, processors.stock
    expected = stock(image, return_tensors="pt")["pixel_values"]
    quick = np.abs(grey_levels(ours, image, backend="torch") - grey_levels(ours, image))
    shape = "portrait" if image.height > image.width else "landscape"
    table = Table(f"{shape} of {image.width}x{image.height} pixels, alone, one thread", "images", ours=(OURS, QUICK))
    table.notes.append(f"backend='torch': {(quick > 0).mean():.2%} of the values differ, by one grey level")
    table.left_out += processors.missing()
    works = processors.works(image, 1) | {
        QUICK: lambda: ours(image, backend="torch", num_threads=1, return_tensors="pt"),
        PEER: lambda: stock(image, return_tensors="pt"),
    }
    contenders = [Contender(n, work, 1, check=within(int(n == QUICK), expected, ours)) for n, work in works.items()]
    return compare(table, contenders, rounds=rounds, seconds=settings.seconds)


def lists(processors: Processors, image: Image.Image, threads: int, settings: Settings, rounds: int) -> Table:
    """Many photographs in one call."""
    ours, stock, images = processors.ours, processors.stock, [image] * LIST_LENGTH
    expected = stock(images, return_tensors="pt")["pixel_values"]
    table = Table(f"lists of {LIST_LENGTH}, 640x480 pixels, {_told(threads)}", "images", ours=(OURS, QUICK))
    table.left_out += processors.missing()
    works = processors.works(images, threads) | {
        QUICK: lambda: ours(images, backend="torch", num_threads=threads, return_tensors="pt"),
        PEER: lambda: stock(images, return_tensors="pt"),
    }
    contenders = [
        Contender(n, work, LIST_LENGTH, check=within(int(n == QUICK), expected, ours)) for n, work in works.items()
    ]
    return compare(table, contenders, rounds=rounds, seconds=settings.seconds)


def jpegs(
    processors: Processors, image: Image.Image, count: int, threads: int, settings: Settings, rounds: int
) -> Table:
    """Photographs from the bytes of JPEGs."""
    file = BytesIO()
    image.save(file, "JPEG", quality=90)
    data = [file.getvalue()] * count
    expected = processors.stock([Image.open(file)] * count, return_tensors="pt")["pixel_values"]
    what = f"lists of {count} JPEGs" if count > 1 else "a JPEG"
    table = Table(f"{what} of 640x480 pixels, from bytes, {_told(threads)}", "images")
    table.left_out += processors.missing()
    check = within(0, expected, processors.ours)
    works = processors.works(data if count > 1 else data[0], threads)
    contenders = [Contender(name, work, count, check=check) for name, work in works.items()]
    return compare(table, contenders, rounds=rounds, seconds=settings.seconds)


def _told(threads: int) -> str:
    return "one thread" if threads == 1 else f"{threads} threads"


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
    processors = Processors()
    ours, landscape = processors.ours, photograph((640, 480))
    if "cpu" in settings.devices:
        torch.set_num_threads(1)
        try:
            for image in (landscape, landscape.transpose(Image.Transpose.ROTATE_90)):
                yield one_image(processors, image, settings, rounds)
            yield jpegs(processors, landscape, 1, 1, settings, rounds)
            yield lists(processors, landscape, 1, settings, rounds)
            yield jpegs(processors, landscape, LIST_LENGTH, 1, settings, rounds)
        finally:
            torch.set_num_threads(settings.threads)
        if settings.threads > 1:
            yield lists(processors, landscape, settings.threads, settings, rounds)
            yield jpegs(processors, landscape, LIST_LENGTH, settings.threads, settings, rounds)
        yield draft(ours, rounds, settings.seconds)
    for device in settings.devices:
        if device != "cpu":
            yield on_device(ours, landscape, device, settings, rounds)
