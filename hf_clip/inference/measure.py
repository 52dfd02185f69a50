"""Time layers and their replacements on this processor, in the model's dtype, before a layer is replaced.

Dimensions: L positions, C channels, Y × X pixels or cells, H heads, E = W / H.
"""

import time
from collections.abc import Callable
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..model.attention import HfClipMLP
from ..model.linear_map import apply_linear, apply_patch_embedding
from .layers import STAGES, InferenceBottleneck, attention_by_products, images_at_once, rows_at_once

LEAST_GAIN = 1.05
"""A replacement is used if it is at least this many times as fast as the public operator, on this processor."""


@torch.no_grad()
def _gain(before: Callable[[], object], after: Callable[[], object], repeats: int = 7) -> float:
    """Return how many times as fast `after` is as `before`.

    The two run in turn, and their shortest times are compared, since other work on the machine only adds time.
    """
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for work, taken in zip((before, after), times, strict=True):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
    return min(times[0][1:]) / min(times[1][1:])


def gain_of_packing(layer: Any, packed: nn.Module) -> float:
    """Return how many times as fast the replacement of a linear map, an MLP or a patch embedding is."""
    weight = (layer.fc1 if isinstance(layer, HfClipMLP) else layer).weight
    count = rows_at_once(weight.dtype) // 2
    shape: tuple[int, ...] = (count, weight.shape[1])
    if isinstance(layer, nn.Conv2d):  # one image with `count` patches side by side
        shape = (1, weight.shape[1], weight.shape[2], count * weight.shape[3])
    input = torch.zeros(shape, dtype=weight.dtype)
    kinds = {nn.Linear: apply_linear, nn.Conv2d: apply_patch_embedding}
    apply = kinds.get(type(layer), nn.Module.__call__)
    return _gain(lambda: apply(layer, input), lambda: packed(input))


def gain_of_fusing(tower: Any) -> float:
    """Return how many times as fast a ResNet's blocks are with ReLU and sums fused into the convolutions.

    The last block of each stage is timed, with one image and with as many images as the stage takes at once. The result
    is the geometric mean of the two gains.
    """
    public, fused = (
        [InferenceBottleneck(tower.get_submodule(name)[-1], kind) for name in STAGES] for kind in (False, True)
    )
    pixels, dtype = tower.config.image_size**2, tower.dtype
    batches = ((1,) * len(STAGES), tuple(images_at_once(tower, pixels, stage) for stage in range(len(STAGES))))
    gains = []
    for counts in batches:
        maps = []
        for stage, (count, block) in enumerate(zip(counts, public, strict=True)):
            side = (tower.config.image_size >> 2 + stage) * getattr(block.pool, "kernel_size", 1)
            shape = (count, block.conv1.weight.shape[1], side, side)
            maps.append(torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last))

        def run(blocks: list[InferenceBottleneck], maps: list[Tensor] = maps) -> None:
            for block, map in zip(blocks, maps, strict=True):
                block(map)

        gains.append(_gain(lambda run=run: run(public), lambda run=run: run(fused), 5))  # type: ignore[misc]
    return geometric_mean(gains)


def gain_of_products(heads: int, width: int, length: int, dtype: torch.dtype) -> float:
    """Return how many times as fast attention is as two matrix products, compared with torch's fused kernel."""
    query, key, value = (torch.zeros(8, length, heads, width, dtype=dtype).transpose(1, 2) for _ in range(3))
    return _gain(
        lambda: functional.scaled_dot_product_attention(query, key, value),
        lambda: attention_by_products(nn.Identity(), query, key, value, None, 0.125),
    )
