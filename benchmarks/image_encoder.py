"""How fast images are encoded: RN50, RN50x4, ViT-B/32, ViT-B/16 and ViT-L/14, in batches of 16 and one at a time.

Random weights, pixels from a generator, inference mode.
"""

from collections.abc import Iterator

import torch

from hf_clip import Variant
from hf_clip.model.variants import get_variant

from .ceiling import image_flops
from .encoders import Workload, encoder_tables
from .measuring import Table
from .peers import INT8, OPTIMIZED, OURS, Case, weights_folder
from .settings import Settings

OPTIONS = ("variants", "precision", "batch")
NEEDS_CEILING = True
IS_ON_CPU = False
VARIANTS, QUICK_VARIANTS = ("RN50", "RN50x4", "ViT-B/32", "ViT-B/16", "ViT-L/14"), ("ViT-B/32",)
BATCHES: dict[str, tuple[int, ...]] = {"cpu": (16, 1), "cuda": (256, 32, 1)}
QUICK_BATCHES: dict[str, tuple[int, ...]] = {"cpu": (16,), "cuda": (32,)}
ROUNDS, QUICK_ROUNDS = 7, 3


def make_workload(variant: Variant, batch: int, is_main: bool) -> Workload:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(batch, 3, variant.image_size, variant.image_size, generator=generator)
    return Workload(f"batch {batch}", {"pixel_values": pixels}, batch * image_flops(variant), is_main)


def run(settings: Settings) -> Iterator[Table]:
    rounds = settings.choose(ROUNDS, QUICK_ROUNDS)
    for name in settings.variants or settings.choose(VARIANTS, QUICK_VARIANTS):
        variant = get_variant(name)
        with weights_folder(variant) as folder:
            for device in settings.devices:
                batches = settings.batches or settings.choose(BATCHES, QUICK_BATCHES)[device]
                workloads = [make_workload(variant, batch, batch == max(batches)) for batch in batches]
                case = Case(variant, folder, "image", device=device)
                yield from encoder_tables(case, "images", workloads, settings, rounds, (OURS, OPTIMIZED, INT8))
