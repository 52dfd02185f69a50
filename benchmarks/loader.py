"""How fast a loader turns JPEGs of 640x480 pixels into batches for training, beside a DataLoader with stock parts.

A worker is a process with one thread, so that a table of one worker says what a core does. Plain: what the image
processor does; the pixels of a batch are compared first. Augmented: a random part of 90 to 100 % of the area, scaled to
224x224; the peer does in Pillow and numpy what torchvision's RandomResizedCrop, ToTensor and Normalize do.

Ours also reads a table, tokenizes captions, and hashes images and captions. The peer has images alone, their files in
memory. Our main process normalises the batch. With `--augment_on device` workers decode, which is measured by itself:
what is left is for a GPU, and has a table of its own where there is one.

A turn begins with new workers, whose first batches are not counted.
"""

import itertools
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil

from hf_clip import HfClipImageProcessor, HfClipProcessor, HfClipTokenizer
from hf_clip.checkpoints.vocabulary import find_vocabulary
from hf_clip.training.data.augment import ASPECTS, Augmentation
from hf_clip.training.data.collator import PairCollator
from hf_clip.training.data.load_pairs import load_pairs
from hf_clip.training.data.loader import build_loader
from hf_clip.training.data.pairs import Pairs

from .measuring import LEAST_ROUNDS, OURS, Contender, Row, Table, compare, say
from .settings import Settings
from .tokenizer import make_captions

OPTIONS = ("batch",)
NEEDS_CEILING = False
IS_ON_CPU = False
SIZE = (640, 480)
ROWS, QUICK_ROWS = 1024, 128
BATCH = 32
BATCHES, QUICK_BATCHES = 12, 2
"""Of each worker, in a turn."""
ROUNDS, QUICK_ROUNDS = 5, 3
ON_DEVICE = f"{OURS}, --augment_on device"
ON_A_GPU = 256
PEER = "DataLoader with CLIPImageProcessorPil"
AUGMENTATION = Augmentation(crop=0.9)

Batches = Iterator[Any]
Start = Callable[[int], Batches]
"""How many workers → batches without end."""


def photographs() -> list[bytes]:
    """JPEGs of real photographs, which ship with scikit-image."""
    from skimage import data

    files = []
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        file = BytesIO()
        Image.fromarray(getattr(data, name)()).resize(SIZE, Image.Resampling.LANCZOS).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def write_pairs(folder: Path, rows: int) -> Pairs:
    """A table of photographs with captions, opened."""
    files = itertools.islice(itertools.cycle(photographs()), rows)
    table = datasets.Dataset.from_dict({"image": list(files), "caption": make_captions(rows, None)})
    datasets.disable_progress_bars()
    table.save_to_disk(str(folder / "pairs"))
    pairs = load_pairs(str(folder / "pairs"))
    assert isinstance(pairs, Pairs)
    return pairs


class Photographs(torch.utils.data.Dataset):
    """The peer's data set: the files of a table's images."""

    def __init__(self, rows: int):
        self.files, self.rows = photographs(), rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Image.Image:
        return Image.open(BytesIO(self.files[index % len(self.files)])).convert("RGB")


class RandomPart:
    """Images → (B, 3, 224, 224), as torchvision's transforms for training make them of Pillow's images."""

    def __init__(self, stock: CLIPImageProcessorPil):
        self.mean, self.std = (np.asarray(n, np.float32).reshape(3, 1, 1) for n in (stock.image_mean, stock.image_std))
        self.side = stock.crop_size["height"]

    def one(self, image: Image.Image) -> Tensor:
        width, height = image.size
        while True:
            area = width * height * random.uniform(AUGMENTATION.crop, 1)
            aspect = math.exp(random.uniform(*map(math.log, ASPECTS)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w <= width and h <= height:
                break
        left, top = random.randint(0, width - w), random.randint(0, height - h)
        part = image.crop((left, top, left + w, top + h)).resize((self.side, self.side), Image.Resampling.BICUBIC)
        levels = np.asarray(part).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
        return torch.from_numpy((levels - self.mean) / self.std)

    def __call__(self, images: list[Image.Image]) -> Tensor:
        return torch.stack([self.one(image) for image in images])


def pixels_of(stock: CLIPImageProcessorPil, images: list[Image.Image]) -> Tensor:
    return stock(images, return_tensors="pt")["pixel_values"]


def start_peer(collate: Callable[[list[Image.Image]], Tensor], rows: int, batch: int, workers: int) -> Batches:
    order: list[int] = torch.randperm(rows).tolist()
    loader: DataLoader = DataLoader(
        Photographs(rows), batch, sampler=order, num_workers=workers, collate_fn=collate, persistent_workers=True
    )
    return itertools.chain.from_iterable(itertools.repeat(loader))


def start_ours(pairs: Pairs, collator: PairCollator, batch: int, finish: bool, workers: int) -> Batches:
    loader = build_loader(pairs, collator, batch, num_workers=workers, finish_images=finish)
    return (tensors for _, tensors in loader.batches())


def seconds_of_a_batch(start: Start, workers: int, batches: int) -> float:
    """Seconds from one batch to the next, where nothing but the loader takes any.

    Args:
        start: of a loader.
        workers: processes that prepare batches.
        batches: of each worker that are counted.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a pool of threads would wait for work on the cores of the workers
    try:
        found = start(workers)
        for _ in range(2 * workers):
            next(found)
        begin = time.perf_counter()
        for _ in range(batches * workers):
            next(found)
        return (time.perf_counter() - begin) / (batches * workers)
    finally:
        torch.set_num_threads(threads)


def measure(table: Table, starts: dict[str, Start], workers: int, batch: int, settings: Settings) -> Table:
    """Fill a table: every loader has a turn in each round."""
    rounds, batches = settings.rounds or settings.choose(ROUNDS, QUICK_ROUNDS), settings.choose(BATCHES, QUICK_BATCHES)
    times: dict[str, list[float]] = {name: [] for name in starts}
    begin = time.perf_counter()
    for turn in range(rounds):
        if turn >= LEAST_ROUNDS and time.perf_counter() - begin > settings.seconds:
            break
        for name in random.Random(turn).sample(list(starts), len(starts)):
            say(f"{table.title}: round {turn + 1}, {name}")
            times[name].append(seconds_of_a_batch(starts[name], workers, batches))
    say("")
    table.rows = [Row(name, "", batch, seconds) for name, seconds in times.items()]
    return table


def find_difference(pairs: Pairs, collator: PairCollator, stock: CLIPImageProcessorPil) -> str | None:
    """What is wrong with plain pixels, which are to be the stock processor's."""
    batch = next(build_loader(pairs, collator, 4, training=False).epoch())
    expected = pixels_of(stock, [Photographs(4)[index] for index in range(4)])
    off = (batch["pixel_values"] - expected).abs().max().item()
    return None if off < 1e-6 else f"{OURS} is left out: its pixels are {off:.1e} off"


def on_gpu(pairs: Pairs, ours: HfClipProcessor, device: str, settings: Settings) -> Table:
    """What a GPU does of the work, beside what it does anyway: from the memory of the CPU to pixel values."""
    contenders = []
    for name, on_device in ((ON_DEVICE, True), (OURS, False)):
        collator = PairCollator(ours, AUGMENTATION, on_device=on_device)
        batch = next(build_loader(pairs, collator, ON_A_GPU, finish_images=False).epoch())
        images = batch["pixel_values"] if device == "cpu" else batch["pixel_values"].pin_memory()
        contenders.append(Contender(name, partial(images.to, device, non_blocking=True), len(images)))
    title = f"batches of {ON_A_GPU}, finished on {device}"
    table = Table(title, "images", ours=(ON_DEVICE,), device=device)
    return compare(table, contenders, rounds=settings.rounds or ROUNDS, seconds=settings.seconds)


def run(settings: Settings) -> Iterator[Table]:
    rows, batch = settings.choose(ROWS, QUICK_ROWS), (settings.batches or (BATCH,))[0]
    ours = HfClipProcessor(HfClipImageProcessor(), HfClipTokenizer.from_vocabulary_file(find_vocabulary(offline=True)))
    stock = CLIPImageProcessorPil()
    with tempfile.TemporaryDirectory(prefix="hf_clip-benchmark-") as folder:
        pairs = write_pairs(Path(folder), rows)
        for device in settings.devices:
            if device != "cpu":
                yield on_gpu(pairs, ours, device, settings)
        if "cpu" not in settings.devices:
            return
        fault = find_difference(pairs, PairCollator(ours), stock)
        for workers in dict.fromkeys([1, settings.threads]):
            of = f"{workers} worker{'s' if workers > 1 else ''}"
            for kind, augmentation, collate in (
                ("plain", None, partial(pixels_of, stock)),
                ("augmented", AUGMENTATION, RandomPart(stock)),
            ):
                title = f"JPEGs of {SIZE[0]}x{SIZE[1]}, {kind}, {of}"
                table = Table(title, "images", ours=(OURS, ON_DEVICE))
                collators = [PairCollator(ours, augmentation, on_device=on_device) for on_device in (False, True)]
                starts: dict[str, Start] = {
                    OURS: partial(start_ours, pairs, collators[0], batch, True),
                    ON_DEVICE: partial(start_ours, pairs, collators[1], batch, False),
                    PEER: partial(start_peer, collate, rows, batch),
                }
                if kind == "plain" and fault:
                    table.left_out.append(fault)
                    del starts[OURS]
                yield measure(table, starts, workers, batch, settings)
