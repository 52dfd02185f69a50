"""Linear maps, computed as matrix products, or as convolutions on processors where these are faster.

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
"""Below these sizes oneDNN spends more time on reordering the weight than the product saves."""


@cache
def multiplies_faster_by_convolution() -> bool:
    """Whether torch's float32 matrix products are slower than its 1×1 convolutions on this processor.

    On CPUs torch computes products with MKL and convolutions with oneDNN. On AMD processors MKL is half as fast as
    oneDNN. Other processors were not measured, so products are kept there.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    information = Path("/proc/cpuinfo")
    vendor = information.read_text() if information.is_file() else platform.processor()
    return "AuthenticAMD" in vendor


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `functional.linear`, by a 1×1 convolution where that is faster: large float32 products on AMD processors.

    The convolution computes the same sums in another order, forward and backward. It sees the rows as pixels whose
    channels lie side by side, so nothing is copied. Traced, compiled and exported models use the linear map itself, and
    so do weights that are not plain tensors (quantised, sharded).

    Args:
        input: (…, inputs).
        weight: (outputs, inputs).
        bias: (outputs,).

    Returns:
        (…, outputs).
    """
    is_faster = _is_faster_as_convolution(input, weight)
    if not is_faster or not (count := _images_for_onednn(input.numel() // weight.shape[1])):
        return nn.functional.linear(input, weight, bias)
    outputs, inputs = weight.shape
    pixels = input.reshape(count, -1, 1, inputs).permute(0, 3, 1, 2)  # (count, inputs, rows / count, 1)
    maps = nn.functional.conv2d(pixels, weight[:, :, None, None], bias)  # (count, outputs, rows / count, 1)
    return maps.permute(0, 2, 3, 1).reshape(*input.shape[:-1], outputs)


def _images_for_onednn(rows: int) -> int:
    """Find the number of equal images that the rows are divided into. 0: they cannot be divided.

    With several threads torch computes every 1×1 convolution with oneDNN, with one thread only one of at least 16
    images.
    """
    if torch.get_num_threads() > 1:
        return 1
    return next((count for count in range(16, 33) if rows % count == 0), 0)


def _is_faster_as_convolution(input: Tensor, weight: Tensor) -> bool:
    return (  # the dtype first, since a half-precision model asks this at every layer
        input.dtype == weight.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and input.device.type == weight.device.type == "cpu"
        and input.numel() >= FEWEST_ROWS * weight.shape[1]
        and input.numel() * weight.shape[0] >= FEWEST_PRODUCTS
        and type(weight) in (nn.Parameter, Tensor)
        and not torch.is_autocast_enabled("cpu")
        and multiplies_faster_by_convolution()
    )


def forward_hooks(module: nn.Module) -> list[Any]:
    """List what is called before and after a module's `forward`."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks, or its `forward` was replaced."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    is_replaced = "forward" in vars(module) or module._compiled_call_impl is not None
    return any(own) or is_replaced or has_global_hooks()


def has_global_hooks() -> bool:
    """Whether there are hooks on all modules of this process at once."""
    return _has_any_global_hook()


def apply_linear(layer: nn.Module, input: Tensor) -> Tensor:
    """Compute `layer(input)`, in the faster way if the layer is an ordinary linear map: (…, inputs) → (…, outputs).

    This is a function and not a class of layers, since quantisation and other tools look for `nn.Linear` itself.
    """
    if type(layer) is not nn.Linear or not isinstance(input, Tensor):
        return layer(input)
    if not _is_faster_as_convolution(input, layer.weight) or is_hooked(layer):
        return layer(input)
    return linear(input, layer.weight, layer.bias)


def cut_into_patches(images: Tensor, size: int) -> Tensor:
    """Cut images into patches: (B, C, Y, X) → (B, Y / S, X / S, C · S · S). Pixels beyond the last are dropped."""
    rows, columns = (side // size for side in images.shape[-2:])
    whole = images[..., : rows * size, : columns * size]
    patches = whole.unflatten(3, (columns, size)).unflatten(2, (rows, size))  # (B, C, Y / S, S, X / S, S)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3)


def apply_patch_embedding(layer: nn.Module, images: Tensor) -> Tensor:
    """Compute a ViT's patch embedding: (B, C, Y, X) → (B, W, Y / S, X / S).

    The convolution is a linear map of patches that do not overlap. On CPUs it is computed as such, which is 1.5 to 8
    times as fast. Compiled, exported and traced models use the convolution.
    """
    is_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if is_graph or not is_plain_patch_embedding(layer) or not images.device.type == layer.weight.device.type == "cpu":
        return layer(images)
    return linear(cut_into_patches(images, layer.stride[0]), layer.weight.flatten(1)).permute(0, 3, 1, 2)


def is_plain_patch_embedding(layer: Any) -> TypeGuard[nn.Conv2d]:
    """Whether a ViT's patch embedding is unchanged: no adapter, no quantised weight, no hooks."""
    is_plain = type(layer) is nn.Conv2d and type(layer.weight) is nn.Parameter and layer.bias is None
    return is_plain and layer.kernel_size == layer.stride and not is_hooked(layer)
