"""What the machine can do at most, measured: its fastest large matrix product in each precision.

Two ways lead to a product in torch, and which is faster depends on the processor: `F.linear`, and a 1×1 convolution on
a channels-last view, which oneDNN computes. The ceiling is the best of both, over a square product and one of the
shape of a ViT's MLP. FLOPs count a multiplication and an addition as two.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear

from hf_clip import Variant

from .measuring import PRECISIONS, synchronize

SHAPES = {"cpu": [(2048, 2048, 2048), (4112, 1024, 4096)], "cuda": [(8192, 8192, 8192), (16448, 1024, 4096)]}
"""(rows, inputs, outputs)"""
REPEATS = 6
TEXT_LAYERS = 12


def as_convolution(rows: Tensor, weight: Tensor) -> Tensor:
    """(N, inputs) × (outputs, inputs) → (16, outputs, N / 16, 1): a linear map as a 1×1 convolution, without a copy.

    With one thread torch gives it to oneDNN only if there are so many images.
    """
    pixels = rows.view(16, len(rows) // 16, 1, -1).permute(0, 3, 1, 2)  # (16, inputs, N / 16, 1), channels last
    return conv2d(pixels, weight[:, :, None, None])


WAYS: Sequence[Callable[[Tensor, Tensor], Tensor]] = (linear, as_convolution)


@torch.inference_mode()
def measure_ceiling(device: str, precision: str) -> float:
    """FLOP per second of the fastest large product."""
    best = 0.0
    for rows, inputs, outputs in SHAPES[torch.device(device).type]:
        matrix = torch.randn(rows, inputs, device=device, dtype=PRECISIONS[precision])
        weight = torch.randn(outputs, inputs, device=device, dtype=PRECISIONS[precision])
        for multiply in WAYS:
            multiply(matrix, weight)
            for _ in range(REPEATS):
                synchronize(device)
                start = time.perf_counter()
                multiply(matrix, weight)
                synchronize(device)
                best = max(best, 2 * rows * inputs * outputs / (time.perf_counter() - start))
    return best


def text_flops(variant: Variant, lengths: Sequence[int]) -> float:
    """What the text tower has to compute for texts of these lengths; padding is no work that anyone asked for.

    A layer multiplies each of L tokens by 12 W² weights and twice by all others: 24 L W² + 4 L² W.
    """
    width = variant.text_width
    towers = sum(TEXT_LAYERS * (24 * length * width**2 + 4 * length**2 * width) for length in lengths)
    return float(towers + len(lengths) * 2 * width * variant.embed_dim)


def image_flops(variant: Variant) -> float:
    return variant.image_gflops * 1e9
