"""Images on the GPU: grey levels beside Pillow's, images per second, and from JPEGs to features with worker processes.

Dimensions: B images, Y × X pixels.
"""

import shutil
import time
from functools import cache, partial
from io import BytesIO
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from hf_clip import HfClipImageProcessor, HfClipProcessor, HfClipTokenizer
from hf_clip.checkpoints.vocabulary import find_vocabulary
from hf_clip.data.columns import CaptionReader
from hf_clip.inference.cpu import count_cores
from hf_clip.model.image_steps import OPENAI_STD
from hf_clip.training.data.augment import Augmentation
from hf_clip.training.data.collator import PairCollator
from hf_clip.training.data.loader import PairLoader, build_loader
from hf_clip.training.data.pair_table import PairTable
from hf_clip.training.data.pairs import Pairs

from ..measuring import OURS, Contender, Table
from .models import Implementations, variant_of
from .report import LEFT_OUT, Setup

SIZES = ((640, 480), (480, 640), (500, 500), (130, 97), (1600, 300))
LEVELS_OF_A_VALUE = 255 * torch.tensor(OPENAI_STD)[:, None, None]
"""Grey levels that a difference of 1 in pixel_values stands for, of each channel."""
ONE_LEVEL, ONE_LEVEL_JITTERED = 1.001, 1.5
"""The second is one level whose brightness and contrast were raised by a fifth each."""
PHOTOGRAPHS = 8
BATCH, TINY_BATCH = 64, 4
COUNTED = 3.0
"""Seconds for which a loader is measured."""
WORDS = ("a", "photo", "of", "the", "red", "old", "house", "dog", "tree", "small", "lake", "morning")


def photograph(size: tuple[int, int], seed: int) -> Image.Image:
    """Smooth colours with some grain, as a photograph has."""
    drawn = np.random.default_rng(seed)
    coarse = Image.fromarray(drawn.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = drawn.normal(0, 6, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8))


@cache
def jpeg(seed: int) -> bytes:
    file = BytesIO()
    photograph((640, 480), seed).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_pairs(rows: int) -> Pairs:
    """JPEGs of 640×480 with captions, in memory; `datasets` is not needed."""
    files = [jpeg(seed) for seed in range(PHOTOGRAPHS)]
    drawn = np.random.default_rng(0)
    captions = [" ".join(drawn.choice(WORDS, 8)) for _ in range(rows)]
    table: Any = [{"image": files[row % PHOTOGRAPHS], "caption": captions[row]} for row in range(rows)]
    reader = CaptionReader("photographs", "caption", {"image": None, "caption": None})
    return Pairs([PairTable("photographs", table, "image", reader, rows=np.arange(rows))])


def make_processor(image_size: int) -> HfClipProcessor:
    tokenizer = HfClipTokenizer.from_vocabulary_file(find_vocabulary(offline=True))
    return HfClipProcessor(HfClipImageProcessor.for_image_size(image_size), tokenizer)


def levels_off(found: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest difference in grey levels, and the part of the values that differ."""
    difference = (found.float().cpu() - expected.float().cpu()).abs() * LEVELS_OF_A_VALUE
    return difference.max().item(), (difference > 0.5).float().mean().item()


def processed(setup: Setup) -> None:
    """`HfClipImageProcessor(backend="torch", device=…)` beside Pillow: within one grey level."""
    processor = HfClipImageProcessor()
    for number, size in enumerate(SIZES):
        image = photograph(size, number)
        expected = processor(images=image, return_tensors="pt")["pixel_values"]
        pixels = torch.from_numpy(np.array(image)).movedim(-1, 0)
        found = processor(images=[pixels], backend="torch", device=setup.device, return_tensors="pt")["pixel_values"]
        setup.report.expect(f"pixels of {size[0]}x{size[1]} lie on {setup.device}", found.device.type == setup.device)
        most, part = levels_off(found, expected)
        setup.report.check(f"pixels of {size[0]}x{size[1]}", most, ONE_LEVEL, f"{part:.2%} differ", "levels")


def first_batch(pairs: Pairs, processor: Any, augmentation: Augmentation | None, on_device: bool, count: int) -> Any:
    collator = PairCollator(processor, augmentation, on_device=on_device)
    loader = build_loader(pairs, collator, count, training=augmentation is not None, finish_images=False)
    return next(loader.epoch())["pixel_values"]


def augmented(setup: Setup) -> None:
    """`--augment_on device` beside the workers' own: equal in evaluation, within one grey level in training."""
    count = setup.choose(PHOTOGRAPHS, 4)
    pairs, processor = make_pairs(count), make_processor(224)
    ways = {
        "plain": None,
        "cropped, flipped": Augmentation(crop=0.5, flip=0.5),
        "cropped, flipped, jittered": Augmentation(crop=0.5, flip=0.5, jitter=0.2),
    }
    for name, augmentation in ways.items():
        on_device, by_worker = (first_batch(pairs, processor, augmentation, kind, count) for kind in (True, False))
        if setup.on_gpu:
            on_device = on_device.pin_memory()
        found = on_device.to(setup.device, non_blocking=True)
        setup.report.expect(f"{name}: images lie on {setup.device}", found.device.type == setup.device)
        most, part = levels_off(found, by_worker.to("cpu"))
        limit = 1e-3 if augmentation is None else ONE_LEVEL_JITTERED if augmentation.jitter else ONE_LEVEL
        setup.report.check(f"--augment_on device, {name}", most, limit, f"{part:.2%} differ", "levels")
        halves = torch.cat([half.to(setup.device) for half in on_device.split(count // 2)])
        most, _ = levels_off(halves, found)
        setup.report.check(f"--augment_on device, {name}, in two parts", most, 1e-3, unit="levels")


def device_speed(setup: Setup) -> None:
    """Decoded images to pixel values, all on the GPU; and from the host's memory."""
    count = setup.choose(256, 4)
    processor = HfClipImageProcessor()
    images = [torch.from_numpy(np.array(photograph((640, 480), seed))).movedim(-1, 0) for seed in range(4)]
    there = [image.to(setup.device) for image in images] * (count // 4)
    floats = torch.stack(there).float()
    pairs = make_pairs(PHOTOGRAPHS)
    batch = first_batch(pairs, make_processor(224), Augmentation(crop=0.9), True, setup.choose(PHOTOGRAPHS, 4))
    batch = batch.pin_memory() if setup.on_gpu else batch
    ours, on_device = f"{OURS}, backend='torch'", f"{OURS}, --augment_on device, from the host"

    def by_processor() -> Tensor:
        return processor(images=there, backend="torch", device=setup.device, return_tensors="pt")["pixel_values"]

    def by_torch() -> Tensor:
        scaled = interpolate(floats, (224, 298), mode="bicubic", antialias=True, align_corners=False)
        return scaled[:, :, :, 37:261] / 255

    contenders = [
        Contender(ours, by_processor, count),
        Contender(on_device, partial(batch.to, setup.device, non_blocking=True), len(batch)),
        Contender("interpolate of floats alone", by_torch, count),
    ]
    table = setup.compare(Table("640x480 to pixel values", "images", ours=(ours, on_device)), contenders)
    for row in table.rows[:2]:
        setup.report.figure(f"640x480 to pixel values: {row.name}", row.per_second, "images/s")


def shared_memory() -> int | None:
    """Bytes that are free where workers hand over their batches. None where the system does not tell."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return None


def workers_tried() -> tuple[int, ...]:
    cores = count_cores()
    return tuple(sorted({1, min(4, cores), min(max(cores - 1, 1), 16)}))


def start(setup: Setup, pairs: Pairs, processor: Any, workers: int, on_device: bool) -> PairLoader:
    collator = PairCollator(processor, Augmentation(crop=0.9), on_device=on_device)
    size = setup.choose(BATCH, TINY_BATCH)
    options: dict[str, Any] = {"num_workers": workers, "pin_memory": setup.on_gpu, "finish_images": False}
    return build_loader(pairs, collator, size, **options)


def end_to_end(setup: Setup) -> None:
    """JPEGs to features of ViT-B/32 in bfloat16, by so many workers."""
    variant = variant_of("ViT-B/32", setup.is_dry)
    model = Implementations(variant, setup.device).ours("bf16")
    pairs, processor = make_pairs(setup.choose(4096, 16)), make_processor(variant.image_size)
    for workers in setup.choose(workers_tried(), (1,)):
        for on_device in (False, True):
            title = f"JPEGs to features, {workers} workers{', --augment_on device' if on_device else ''}"
            if not setup.report.has_time(title, 8.0):
                return
            needed = 2 * workers * setup.choose(BATCH, TINY_BATCH) * 3 * (640 * 480 if on_device else 224**2)
            if (free := shared_memory()) is not None and free < 1.2 * needed:
                why = f"/dev/shm has {free / 2**20:,.0f} MiB free, and it takes {needed / 2**20:,.0f}"
                setup.report.add(title, LEFT_OUT, note=f"{why} (docker run --ipc=host)")
                continue
            batches = start(setup, pairs, processor, workers, on_device).batches()
            for _ in islice(batches, 2 * workers):
                pass
            count, begun = 0, time.perf_counter()
            with torch.inference_mode():
                while count == 0 or time.perf_counter() - begun < setup.choose(COUNTED, 0.0):
                    _, batch = next(batches)
                    pixels = batch["pixel_values"].to(setup.device, non_blocking=True)
                    features = model.encode_image(pixels.to(torch.bfloat16))
                    count += len(features)
            setup.synchronize()
            setup.report.figure(title, count / (time.perf_counter() - begun), "images/s")
            setup.report.expect(f"{title}: features are numbers", bool(features.isfinite().all()))
            batches.close()  # type: ignore[attr-defined]


def killed_worker(setup: Setup) -> None:
    """A worker that is killed is started anew, where batches are pinned too. A second one ends the run."""
    import psutil

    from hf_clip.training.data.loader import WorkerKilledError

    pairs, processor = make_pairs(256), make_processor(64)
    wanted = [batch["image_ids"].tolist() for _, batch in islice(start(setup, pairs, processor, 0, False).batches(), 6)]
    before = set(psutil.Process().children())

    def kill() -> None:
        for child in set(psutil.Process().children()) - before:
            if child.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in " ".join(child.cmdline()):
                child.kill()

    batches = start(setup, pairs, processor, 1, False).batches()
    found = [batch["image_ids"].tolist() for _, batch in islice(batches, 2)]
    kill()
    found += [batch["image_ids"].tolist() for _, batch in islice(batches, 4)]
    setup.report.expect("a killed worker is started anew, and no batch is lost", found == wanted)
    kill()
    try:
        list(islice(batches, 12))
    except WorkerKilledError as error:
        setup.report.expect("killed again, it ends the run in one line", "was killed, and again" in str(error))
    else:
        setup.report.expect("killed again, it ends the run in one line", False)


PARTS = ((processed, 10.0), (augmented, 8.0), (device_speed, 8.0), (end_to_end, 10.0))
SURVIVAL = ((killed_worker, 25.0),)
