"""How this package multiplies by a weight: the product itself, or what computes the same faster on this processor.

Dimensions: B batch, C channels, Y × X pixels, S patch side, W tower width.
"""

import platform
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

FEWEST_ROWS, FEWEST_PRODUCTS = 64, 2**23
"""Below, handing the weight to oneDNN in its own order of memory costs more than the product gains."""


@cache
def multiplies_faster_by_convolution() -> bool:
    """Whether torch's float32 matrix products are slower than its 1×1 convolutions on this processor.

    On a CPU torch gives products to MKL and convolutions to oneDNN. On AMD processors MKL reaches half of what oneDNN
    does; on others this was not measured, and products stay as they are.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    information = Path("/proc/cpuinfo")
    vendor = information.read_text() if information.is_file() else platform.processor()
    return "AuthenticAMD" in vendor


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`functional.linear` that multiplies by a 1×1 convolution where that is faster: large float32 products on AMD.

    (…, inputs) → (…, outputs), the same sums in another order, forward and backward. The convolution sees the rows as
    pixels whose channels lie side by side, which costs no copy. Traced, compiled and exported models have the linear
    map itself, and so have weights of other kinds than plain tensors (quantised, sharded).
    """
    is_faster = _is_faster_as_convolution(input, weight)
    if not is_faster or not (count := _images_for_onednn(input.numel() // weight.shape[1])):
        return nn.functional.linear(input, weight, bias)
    outputs, inputs = weight.shape
    pixels = input.reshape(count, -1, 1, inputs).permute(0, 3, 1, 2)  # (count, inputs, rows / count, 1)
    maps = nn.functional.conv2d(pixels, weight[:, :, None, None], bias)  # (count, outputs, rows / count, 1)
    return maps.permute(0, 2, 3, 1).reshape(*input.shape[:-1], outputs)


def _images_for_onednn(rows: int) -> int:
    """Into how many images of equal size rows are put; 0 where it can't be done.

    With several threads torch gives any 1×1 convolution to oneDNN, with one thread only those of 16 images or more.
    """
    if torch.get_num_threads() > 1:
        return 1
    return next((count for count in range(16, 33) if rows % count == 0), 0)


def _is_faster_as_convolution(input: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and input.dtype == weight.dtype == torch.float32
        and input.device.type == weight.device.type == "cpu"
        and input.numel() >= FEWEST_ROWS * weight.shape[1]
        and input.numel() * weight.shape[0] >= FEWEST_PRODUCTS
        and type(weight) in (nn.Parameter, Tensor)
        and not torch.is_autocast_enabled("cpu")
        and multiplies_faster_by_convolution()
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether somebody listens to this module's calls, or has put another function in their place."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    is_replaced = "forward" in vars(module) or module._compiled_call_impl is not None
    return any(own) or is_replaced or _has_any_global_hook()


def apply_linear(layer: nn.Module, input: Tensor) -> Tensor:
    """`layer(input)` by the faster way where the layer is an ordinary linear map: (…, inputs) → (…, outputs).

    The layers themselves are plain `nn.Linear`, since quantisation and other tools ask for exactly that type.
    """
    if (
        torch.compiler.is_compiling()
        or type(layer) is not nn.Linear
        or is_hooked(layer)
        or not isinstance(input, Tensor)
    ):
        return layer(input)
    return linear(input, layer.weight, layer.bias)


def cut_into_patches(images: Tensor, size: int) -> Tensor:
    """(B, C, Y, X) → (B, Y / S, X / S, C * S * S); pixels beyond the last whole patch are left out."""
    rows, columns = (side // size for side in images.shape[-2:])
    whole = images[..., : rows * size, : columns * size]
    patches = whole.unflatten(3, (columns, size)).unflatten(2, (rows, size))  # (B, C, Y / S, S, X / S, S)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3)


def apply_patch_embedding(layer: nn.Module, images: Tensor) -> Tensor:
    """A ViT's first layer: (B, C, Y, X) → (B, D, Y / S, X / S).

    Its convolution is a linear map of patches that do not overlap, and computed as that on CPUs: 1.5 to 8 times as
    fast. Compiled, exported and traced models have the convolution.
    """
    is_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if is_graph or not is_plain_patch_embedding(layer) or not images.device.type == layer.weight.device.type == "cpu":
        return layer(images)
    return linear(cut_into_patches(images, layer.stride[0]), layer.weight.flatten(1)).permute(0, 3, 1, 2)


def is_plain_patch_embedding(layer: Any) -> TypeGuard[nn.Conv2d]:
    """Whether a ViT's first layer is as it was made: no adapter, no quantised weight, nothing hooked to it."""
    is_plain = type(layer) is nn.Conv2d and type(layer.weight) is nn.Parameter and layer.bias is None
    return is_plain and layer.kernel_size == layer.stride and not is_hooked(layer)
