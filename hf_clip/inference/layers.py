"""The layers by which `optimize_for_inference()` replaces those of a model.

On CPUs these layers gain time in two ways. Weights are stored in oneDNN's own order of memory, which otherwise happens
again in every call. And activations are computed while a product is still in the cache. torch offers both only as
operators of its compiler, `torch.ops.mkldnn`, which are not public. They are therefore checked before they are used
(`has_packed_operators`), and timed (`measure`). If they are missing, give other results, or are not faster, the public
operators are used.

Dimensions: B batch, L positions, C channels, Y × X pixels or cells, S patch side, W tower width, H heads, E = W / H.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import AttentionInterface

from ..model.attention import PRODUCT_ATTENTION, HfClipMLP
from ..model.linear_map import cut_into_patches
from ..model.optimized import OptimizedModelError
from ..model.resnet_tower import HfClipAttentionPool, HfClipBottleneck

ROWS_OF_A_THREAD = 800
"""Number of positions, per thread, that a transformer computes at once in float32. More do not fit the caches."""

SIZES_PACKED = 2
"""Number of input sizes for which a convolution keeps its reordered weight: parts of a batch, and a single image."""

FUSED_ACTIVATIONS = {"quick_gelu": ("swish", ""), "gelu": ("gelu", "none")}
"""oneDNN's name and algorithm for each `hidden_act`. quick_gelu(x) is swish(1.702 x) / 1.702."""


MAP_BYTES_OF_A_THREAD = 4 * 2**20
"""Largest size in bytes, per thread, of a ResNet's widest feature map in its first stage, for all images at once."""

STAGES = ("layer1", "layer2", "layer3", "layer4")
"""Names of a ResNet's stages."""


def rows_at_once(dtype: torch.dtype) -> int:
    """Return the number of positions that a transformer computes at once, for torch's present number of threads.

    Images per second of ViT-B/32 with two threads: float32 48.7 with 1,600 positions and 44.2 with 3,200. bfloat16,
    whose rows take half the memory: 92.7 with 1,600, 95.1 with 3,200 and 83.6 with 6,400. One thread is as fast with
    800 positions as with 1,600.
    """
    return ROWS_OF_A_THREAD * torch.float32.itemsize // dtype.itemsize * torch.get_num_threads()


def map_bytes_at_once() -> int:
    """Return the size in bytes of a ResNet's widest feature map in its first stage, for torch's number of threads."""
    return MAP_BYTES_OF_A_THREAD * torch.get_num_threads()


def images_at_once(tower: Any, pixels: int, stage: int) -> int:
    """Return the number of images that a ResNet's stage takes at once. Each stage halves the size of the maps.

    Args:
        tower: The ResNet.
        pixels: Pixels of one channel of an image, Y · X.
        stage: Number of the stage, from 0.
    """
    widest = 4 * tower.config.stem_width * pixels // 16 * tower.dtype.itemsize
    return max(1, (map_bytes_at_once() << stage) // widest)


@cache
def has_packed_operators(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN's fused operators for this dtype on this machine, and their results are right."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    rows, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in ((64, 48), (32, 48), (32,)))
    maps, kernel = (torch.randn(size, generator=generator).to(dtype) for size in ((2, 16, 6, 6), (16, 16, 3, 3)))
    maps = maps.contiguous(memory_format=torch.channels_last)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(rows))
        for name, algorithm in FUSED_ACTIVATIONS.values():
            found = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, name, [], algorithm).float()
            products = functional.linear(rows.float(), weight.float(), bias.float())
            expected = functional.silu(products) if name == "swish" else functional.gelu(products)
            if not _is_close(found, expected, tolerance):
                return False
        convolution = InferenceConv2d(kernel, bias[:16], (1, 1), (1, 1), has_relu=True, is_fused=True)
        products = functional.conv2d(maps.float(), kernel.float(), bias[:16].float(), padding=1)
        ends = (convolution(maps).float(), convolution.add_to(maps.clone(), maps).float())
        expecteds = (products.relu(), (products + maps.float()).relu())
        return all(_is_close(found, expected, tolerance) for found, expected in zip(ends, expecteds, strict=True))
    except (RuntimeError, AttributeError, NotImplementedError, TypeError):
        return False


def _is_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


def _check_use(input: Tensor) -> None:
    if input.requires_grad and torch.is_grad_enabled():
        raise OptimizedModelError(
            "This model was optimized for inference and gives no gradients; load it again for them."
        )
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        raise OptimizedModelError(
            "This model was optimized for inference and can be neither compiled nor exported; load it again for that."
        )


class PackedLinear(nn.Module):
    """A linear map with its weight in oneDNN's order, followed by an activation: (…, inputs) → (…, outputs).

    Args:
        linear: The linear map that is replaced.
        activation: oneDNN's name and algorithm of the activation; ("none", "") for none.
        scale: Factor of the weight.
        scales_bias: Whether the bias is multiplied by `scale` too.
    """

    def __init__(
        self,
        linear: nn.Linear,
        activation: tuple[str, str] = ("none", ""),
        *,
        scale: float = 1.0,
        scales_bias: bool = True,
    ):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype, self.activation = linear.weight.dtype, activation
        # Plain attributes and no parameters, since oneDNN's tensors can be neither saved nor moved.
        weight = (linear.weight.detach().float() * scale).to(self.dtype)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows_at_once(self.dtype))
        self.bias = None if linear.bias is None else linear.bias.detach() * (scale if scales_bias else 1)

    def forward(self, input: Tensor) -> Tensor:
        _check_use(input)
        name, algorithm = self.activation
        input = input.to(self.dtype)
        return torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, name, [], algorithm)


class PackedMLP(nn.Module):
    """An HfClipMLP whose activation is fused into the first linear map."""

    def __init__(self, mlp: HfClipMLP, hidden_act: str):
        super().__init__()
        slope = 1.702 if hidden_act == "quick_gelu" else 1.0
        self.fc1 = PackedLinear(mlp.fc1, FUSED_ACTIVATIONS[hidden_act], scale=slope)
        self.fc2 = PackedLinear(mlp.fc2, scale=1 / slope, scales_bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.fc1(hidden_states))


class PackedPatches(nn.Module):
    """A ViT's patch embedding with its weight in oneDNN's order: (B, C, Y, X) → (B, W, Y / S, X / S)."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.size, self.weight = convolution.stride[0], convolution.weight
        weight = self.weight.detach().flatten(1)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows_at_once(weight.dtype))

    def forward(self, images: Tensor) -> Tensor:
        _check_use(images)
        patches = cut_into_patches(images, self.size)
        tokens = torch.ops.mkldnn._linear_pointwise(patches, self.packed, None, "none", [], "")
        return tokens.permute(0, 3, 1, 2)


class InferenceConv2d(nn.Module):
    """A convolution that includes the BatchNorm after it, followed by ReLU: (B, C, Y, X) → (B, C', Y', X').

    With `is_fused`, ReLU and the sum with a shortcut are fused into the convolution, and the weight is stored in
    oneDNN's order. That order depends on the size of the input, so the weight is reordered for each size and kept for
    the latest `SIZES_PACKED` of them.

    Args:
        weight: Weight of the convolution, with BatchNorm's gain.
        bias: (C',) BatchNorm's shift.
        stride: As for `nn.Conv2d`.
        padding: As for `nn.Conv2d`.
        has_relu: Whether ReLU follows.
        is_fused: Whether to use oneDNN's fused operators.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        has_relu: bool,
        is_fused: bool,
    ):
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.stride, self.padding, self.has_relu, self.is_fused = stride, padding, has_relu, is_fused
        self.packed: dict[tuple[int, ...], Tensor] = {}

    @classmethod
    @torch.no_grad()
    def fold(cls, convolution: Any, norm: Any, has_relu: bool, is_fused: bool) -> "InferenceConv2d":
        """Make one convolution of a convolution and the BatchNorm after it, computed in float32 or better.

        With `w * x` for the convolution, the result is y = gain · (w * x − mean) / √(variance + ε) + shift.
        """
        exact = torch.promote_types(convolution.weight.dtype, torch.float32)
        gain = norm.weight.to(exact) / (norm.running_var.to(exact) + norm.eps).sqrt()
        weight = convolution.weight.to(exact) * gain[:, None, None, None]
        bias = norm.bias.to(exact) - norm.running_mean.to(exact) * gain
        dtype = convolution.weight.dtype
        return cls(weight.to(dtype), bias.to(dtype), convolution.stride, convolution.padding, has_relu, is_fused)

    def _arguments(self, input: Tensor) -> tuple[Any, ...]:
        size = tuple(input.shape)
        packed = self.packed.get(size)
        if packed is None:
            form = (self.padding, self.stride, (1, 1), 1, size)
            packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight.detach(), *form)
            for oldest in list(self.packed)[: 1 - SIZES_PACKED]:
                self.packed.pop(oldest, None)  # None: another thread may have removed it already
            self.packed[size] = packed
        return packed, self.bias, self.padding, self.stride, (1, 1), 1

    def forward(self, input: Tensor) -> Tensor:
        if self.is_fused:
            _check_use(input)
            name = "relu" if self.has_relu else "none"
            return torch.ops.mkldnn._convolution_pointwise(input, *self._arguments(input), name, [], "")
        output = functional.conv2d(input, self.weight, self.bias, self.stride, self.padding)
        return output.relu_() if self.has_relu else output

    def add_to(self, sum: Tensor, input: Tensor) -> Tensor:
        """Compute ReLU(sum + convolution(input)). The result may overwrite `sum`."""
        if self.is_fused:
            _check_use(input)
            end: tuple[Any, ...] = ("add", 1.0, "relu", [], "")
            return torch.ops.mkldnn._convolution_pointwise_.binary(sum, input, *self._arguments(input), *end)
        return functional.conv2d(input, self.weight, self.bias, self.stride, self.padding).add_(sum).relu_()


class InferenceBottleneck(nn.Module):
    """An HfClipBottleneck without BatchNorm. If its input is the shortcut, the result overwrites the input."""

    def __init__(self, block: HfClipBottleneck, is_fused: bool):
        super().__init__()
        self.conv1 = InferenceConv2d.fold(block.conv1, block.bn1, True, is_fused)
        self.conv2 = InferenceConv2d.fold(block.conv2, block.bn2, True, is_fused)
        self.conv3 = InferenceConv2d.fold(block.conv3, block.bn3, False, is_fused)
        self.pool = block.pool
        self.downsample = None
        if block.downsample is not None:
            convolution, norm = block.downsample
            self.downsample = InferenceConv2d.fold(convolution, norm, False, is_fused)

    def forward(self, feature_map: Tensor) -> Tensor:
        branch = self.pool(self.conv2(self.conv1(feature_map)))
        shortcut = feature_map if self.downsample is None else self.downsample(self.pool(feature_map))
        return self.conv3.add_to(shortcut, branch)


class SingleQueryAttentionPool(HfClipAttentionPool):
    """The attention pool, computed without keys and values, since it has a single query q.

    Scores need no keys, because q · (K x) = (Kᵀ q) · x: one direction per head is multiplied by all cells x. The result
    needs no values, because Σ aᵢ V xᵢ = V Σ aᵢ xᵢ: one weighted mean of the cells per head is multiplied by V. The bias
    of the keys adds the same number to all scores of a head, which the softmax removes.
    """

    def gather(self, tokens: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        batch, _, width = tokens.shape
        by_head = (self.num_heads, width // self.num_heads, width)
        query = self.q_proj(tokens[:, 0]).view(batch, *by_head[:2]).transpose(0, 1)  # (H, B, E)
        directions = (query * by_head[1] ** -0.5) @ self.k_proj.weight.view(by_head)  # (H, B, W)
        weights = (directions.transpose(0, 1) @ tokens.transpose(1, 2)).softmax(dim=-1)  # (B, H, L)
        means = (weights @ tokens).transpose(0, 1)  # (H, B, W)
        mixed = means @ self.v_proj.weight.view(by_head).transpose(1, 2)  # (H, B, E)
        return mixed.transpose(0, 1).reshape(batch, 1, width) + self.v_proj.bias, weights[:, :, None]


def attention_by_products(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention as two matrix products. In bfloat16 on CPUs this is twice as fast as torch's fused kernel.

    Shapes are those of `eager_attention`. There is never a mask, since only image towers use it.
    """
    by_head = query.shape
    query, key, value = (part.flatten(0, 1) for part in (query * scaling, key, value))  # (B * H, L, E)
    weights = (query @ key.transpose(1, 2)).softmax(dim=-1)
    return (weights @ value).view(by_head).transpose(1, 2), None


AttentionInterface.register(PRODUCT_ATTENTION, attention_by_products)
