"""How much of a batch each thread computes at once: what its caches hold, corrected by a short measurement.

The first guess is a thread's share of the largest cache. A virtual machine may report other caches than it has, and
processors differ in what they gain from which cache. So the guess, half of it, twice of it, and what the second-level
cache holds are timed on one layer of the model. Another size than the guess is taken only if it is clearly faster.

Dimensions: B batch, L positions, C channels, Y × X pixels or cells, W tower width.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..model.attention import HfClipEncoderLayer
from .cpu import Cpu, read_cpu
from .measure import remembered

LEAST_SHARE, MOST_SHARE = 2**20, 16 * 2**20
"""Bounds of the share of the largest cache, in bytes, that is believed. A virtual machine may report the whole cache of
a processor of which it has two cores."""

UNKNOWN_SHARE = 4 * 2**20
"""The share in bytes where the system reports no caches."""

FEWEST_POSITIONS, MOST_POSITIONS = 64, 6400
"""Bounds of the positions per thread in a part. Products of fewer are slower, and of more are not faster."""

SECONDS, FEWEST_ROUNDS = 0.25, 3
"""After this time and so many rounds, no further round of a measurement begins."""

LEAST_GAIN = 1.1
"""Another size than the guess is taken if it is so many times as fast. Times of parts are less exact than those of
single layers, and a wrong choice costs more than a right one gains."""

STAGES = ("layer1", "layer2", "layer3", "layer4")
"""Names of a ResNet's stages."""


@dataclass(frozen=True)
class PartSize:
    """The size of a part for each thread: positions of a transformer, or bytes of a ResNet's widest feature map.

    Attributes:
        per_thread: The size.
        reason: What was read and measured.
    """

    per_thread: int
    reason: str

    def now(self) -> int:
        """The size of a part for torch's present number of threads."""
        return self.per_thread * torch.get_num_threads()


def largest_share(cpu: Cpu) -> int:
    """A core's share in bytes of the largest cache, within the bounds that are believed."""
    if not cpu.cache_bytes:
        return UNKNOWN_SHARE
    level = max(cpu.cache_bytes)
    share = cpu.cache_bytes[level] // min(cpu.sharers.get(level, 1), max(1, cpu.cores))
    return min(max(share, LEAST_SHARE), MOST_SHARE)


def describe_caches(cpu: Cpu) -> str:
    """The caches as they are reported, such as `L2 1 MiB, L3 32 MiB for 2 cores`."""
    found = [part for part in cpu.describe().split(", ") if part[:1] == "L" and part[1:2] in "23"]
    return ", ".join(found) or "no caches reported"


def guess_positions(width: int, itemsize: int, cpu: Cpu) -> list[int]:
    """Numbers of positions to try, the guess first: (W, bytes of a number) → positions per thread.

    The widest step of a layer reads W numbers of a position and writes 4 W.
    """
    of_a_position = 5 * width * itemsize
    guess = largest_share(cpu) // of_a_position
    sizes = [guess, guess // 2, guess * 2, cpu.cache_bytes.get(2, 0) // of_a_position]
    return list(dict.fromkeys(min(max(size, FEWEST_POSITIONS), MOST_POSITIONS) for size in sizes))


def guess_images(widest: int, cpu: Cpu) -> list[int]:
    """Numbers of images to try in a ResNet's first stage, the guess first: bytes of its widest map → images per thread.

    A block holds its input, its output and two maps in between.
    """
    guess = max(1, largest_share(cpu) // 4 // widest)
    return list(dict.fromkeys(max(1, size) for size in (guess, guess // 2, guess * 2)))


def choose_size(sizes: list[int], seconds: dict[int, float]) -> int:
    """The size whose items take the least time, if it is clearly faster than the first of `sizes`; else the first.

    Args:
        sizes: The sizes that were tried, the guess first.
        seconds: Time of one item, by size.
    """
    best = min(sizes, key=lambda size: seconds[size])
    return best if seconds[sizes[0]] >= LEAST_GAIN * seconds[best] else sizes[0]


@torch.no_grad()
def time_sizes(sizes: list[int], run: Callable[[int], object]) -> dict[int, float]:
    """Time `run` with each size, in turn. Returns the shortest time of one item, by size."""
    run(min(sizes))  # warms up
    shortest = dict.fromkeys(sizes, float("inf"))
    begin, rounds = time.perf_counter(), 0
    while rounds < FEWEST_ROUNDS or time.perf_counter() - begin < SECONDS:
        for size in sizes:
            start = time.perf_counter()
            run(size)
            shortest[size] = min(shortest[size], (time.perf_counter() - start) / size)
        rounds += 1
    return shortest


def _explain(chosen: int, seconds: dict[int, float], unit: str, cpu: Cpu) -> str:
    """`0.081 ms each with 1,092, 0.085 with 546 (L3 32 MiB for 2 cores)`."""
    order = [chosen, *(size for size in sorted(seconds) if size != chosen)]
    times = ", ".join(f"{seconds[size] * 1e3:.3g} ms with {size:,}" for size in order)
    return f"{unit} takes {times}; {describe_caches(cpu)}"


def measure_positions(tower: Any, length: int) -> PartSize:
    """Choose how many positions of a transformer each thread computes at once.

    Args:
        tower: The tower. Its first layer is timed.
        length: L of an image, or of a usual text.
    """
    layer: HfClipEncoderLayer = tower.encoder.layers[0]
    width, dtype, threads = tower.config.hidden_size, tower.dtype, torch.get_num_threads()

    def choose() -> PartSize:
        cpu = read_cpu()
        sizes = guess_positions(width, dtype.itemsize, cpu)
        states = torch.zeros(max(sizes) * threads // length + 1, length, width, dtype=dtype)
        seconds = time_sizes(sizes, lambda size: layer.mlp(layer.layer_norm2(states[: -(-size * threads // length)])))
        chosen = choose_size(sizes, seconds)
        return PartSize(chosen, _explain(chosen, seconds, "a position", cpu))

    return remembered(("positions", width, length, dtype, type(layer.mlp), threads), choose)


def widest_map(tower: Any, pixels: int) -> int:
    """Bytes of the widest feature map in a ResNet's first stage, of one image with so many pixels, Y · X."""
    return 4 * tower.config.stem_width * pixels // 16 * tower.dtype.itemsize


def guess_map_bytes(tower: Any) -> PartSize:
    """The size of a ResNet's parts before it is measured."""
    widest, cpu = widest_map(tower, tower.config.image_size**2), read_cpu()
    return PartSize(guess_images(widest, cpu)[0] * widest, describe_caches(cpu))


def measure_map_bytes(tower: Any) -> PartSize:
    """Choose how many bytes the widest feature map of a ResNet's first stage may have, for each thread."""
    side, dtype, threads = tower.config.image_size // 4, tower.dtype, torch.get_num_threads()
    block = tower.layer1[-1]
    channels = next(block.parameters()).shape[1]

    def choose() -> PartSize:
        cpu, widest = read_cpu(), widest_map(tower, tower.config.image_size**2)
        sizes = guess_images(widest, cpu)

        def run(size: int) -> Tensor:
            return block(torch.zeros(size * threads, side, side, channels, dtype=dtype).permute(0, 3, 1, 2))

        seconds = time_sizes(sizes, run)
        chosen = choose_size(sizes, seconds)
        return PartSize(chosen * widest, _explain(chosen, seconds, "a block of an image", cpu))

    return remembered(("maps", side, channels, dtype, type(block), threads), choose)


def images_at_once(tower: Any, pixels: int, stage: int, size: PartSize) -> int:
    """Return the number of images that a ResNet's stage takes at once. Each stage halves the size of the maps.

    Args:
        tower: The ResNet.
        pixels: Pixels of one channel of an image, Y · X.
        stage: Number of the stage, from 0.
        size: Bytes of the widest map in the first stage.
    """
    return max(1, (size.now() << stage) // widest_map(tower, pixels))
