"""Time layers and their replacements on this processor, in the model's dtype, before a layer is replaced.

A process remembers what it has measured, by kind, size, dtype and number of threads.

Dimensions: L positions, C channels, Y × X pixels or cells, H heads, E = W / H.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..model.attention import HfClipMLP, product_attention
from ..model.linear_map import apply_linear, apply_patch_embedding

LEAST_GAIN = 1.05
"""A replacement is used if it is at least this many times as fast as the public operator, on this processor."""

SECONDS, FEWEST_ROUNDS = 0.08, 5
"""A comparison ends after this time, but not before so many rounds."""

FEW_ROWS, MANY_ROWS = 48, 256
"""Rows of a linear map that are timed: about those of one image, and for each thread those of a part of a batch."""

Found = TypeVar("Found")

_found: dict[Hashable, Any] = {}


def remembered(key: Hashable, measure: Callable[[], Found]) -> Found:
    """Return what was measured under this key before, or measure it now."""
    if key not in _found:
        _found[key] = measure()
    return _found[key]


@dataclass(frozen=True)
class Comparison:
    """Seconds of a layer and of its replacement.

    Attributes:
        before: Time of the layer as it was.
        after: Time of the replacement.
    """

    before: float
    after: float

    @property
    def gain(self) -> float:
        """How many times as fast the replacement is."""
        return self.before / self.after

    @property
    def pays(self) -> bool:
        """Whether the replacement is to be used."""
        return self.gain >= LEAST_GAIN

    def __str__(self) -> str:
        return f"{self.gain:.2f} times as fast ({self.after * 1e3:.3g} ms instead of {self.before * 1e3:.3g})"

    @staticmethod
    def mean(comparisons: list["Comparison"]) -> "Comparison":
        """The geometric means of times, so that each comparison counts by its ratio."""
        befores, afters = ([getattr(one, name) for one in comparisons] for name in ("before", "after"))
        return Comparison(geometric_mean(befores), geometric_mean(afters))


@torch.no_grad()
def compare(before: Callable[[], object], after: Callable[[], object]) -> Comparison:
    """Run two ways in turn. The shortest times count, since other work on the machine only adds time."""
    shortest = [float("inf"), float("inf")]
    before(), after()
    begin, rounds = time.perf_counter(), 0
    while rounds < FEWEST_ROUNDS or time.perf_counter() - begin < SECONDS:
        for place, work in enumerate((before, after)):
            start = time.perf_counter()
            work()
            shortest[place] = min(shortest[place], time.perf_counter() - start)
        rounds += 1
    return Comparison(*shortest)


def compare_packed(layer: Any, packed: nn.Module) -> Comparison:
    """Compare a linear map, an MLP or a patch embedding with its replacement, with few rows and with many."""
    weight = (layer.fc1 if isinstance(layer, HfClipMLP) else layer).weight
    kinds = {nn.Linear: apply_linear, nn.Conv2d: apply_patch_embedding}
    apply = kinds.get(type(layer), nn.Module.__call__)

    def measure() -> Comparison:
        found = []
        for count in (FEW_ROWS, MANY_ROWS * torch.get_num_threads()):
            shape: tuple[int, ...] = (count, weight.shape[1])
            if isinstance(layer, nn.Conv2d):  # one image with `count` patches side by side
                shape = (1, weight.shape[1], weight.shape[2], count * weight.shape[3])
            input = torch.zeros(shape, dtype=weight.dtype)
            found.append(compare(lambda input=input: apply(layer, input), lambda input=input: packed(input)))  # type: ignore[misc]
        return Comparison.mean(found)

    return remembered((type(layer), type(packed), weight.shape, weight.dtype, torch.get_num_threads()), measure)


def compare_fused(
    public: Sequence[nn.Module], fused: Sequence[nn.Module], shapes: list[list[tuple[int, ...]]]
) -> Comparison:
    """Compare a ResNet's blocks with those that have ReLU and sums fused into the convolutions.

    Args:
        public: A block of each stage.
        fused: Their replacements.
        shapes: Several lists of input shapes (B, Y, X, C), one shape for each block.
    """

    def run(blocks: Sequence[nn.Module], maps: list[Tensor]) -> None:
        for block, map in zip(blocks, maps, strict=True):
            block(map)

    dtype = next(public[0].parameters()).dtype
    found = []
    for several in shapes:
        maps = [torch.zeros(shape, dtype=dtype).permute(0, 3, 1, 2) for shape in several]
        found.append(compare(lambda maps=maps: run(public, maps), lambda maps=maps: run(fused, maps)))  # type: ignore[misc]
    return Comparison.mean(found)


def compare_attention(heads: int, width: int, length: int, dtype: torch.dtype) -> Comparison:
    """Compare torch's fused attention with two matrix products, for one image and for several: (H, E, L)."""

    def measure() -> Comparison:
        found = []
        for images in (1, 4 * torch.get_num_threads()):
            query, key, value = torch.zeros(images, length, 3, heads, width, dtype=dtype).transpose(1, 3).unbind(2)
            arguments = (nn.Identity(), query, key, value, None, width**-0.5)
            found.append(
                compare(
                    lambda given=(query, key, value): functional.scaled_dot_product_attention(*given),  # type: ignore[misc]
                    lambda given=arguments: product_attention(*given),  # type: ignore[misc]
                )
            )
        return Comparison.mean(found)

    return remembered(("attention", heads, width, length, dtype, torch.get_num_threads()), measure)
