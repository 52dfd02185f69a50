"""The layers that `optimize_for_inference()` puts in the place of a model's: fewer, fused, their weights reordered.

On CPUs, weights are brought into the order of memory that oneDNN wants once instead of in every call, and activations
are computed in the same pass as the product. torch has that only as the operators that its own compiler emits,
`torch.ops.mkldnn`, so they are tried out before they are used (`has_packed_operators`), and timed (`measure`):
where they are missing, compute something else or gain too little, the public ones stay.

Dimensions: B batch, L positions, C channels, W width, H heads, E = W / H.
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
"""Positions in float32 that a transformer works on at once for each thread: more fall out of the caches."""

SIZES_PACKED = 2
"""For how many sizes of its input a convolution's weight is held in oneDNN's order: for parts of a batch, and one."""

FUSED_ACTIVATIONS = {"quick_gelu": ("swish", ""), "gelu": ("gelu", "none")}
"""`hidden_act` → oneDNN's name of it and which algorithm; quick_gelu is swish of 1.702 x, divided by 1.702."""


MAP_BYTES_OF_A_THREAD = 4 * 2**20
"""How large a ResNet's widest feature map of a stage may be for each thread, all images that it takes at once."""

STAGES = ("layer1", "layer2", "layer3", "layer4")
"""A ResNet's, by their names."""


def rows_at_once(dtype: torch.dtype) -> int:
    """Positions that a transformer works on at once, with as many threads as torch has now.

    Measured with two threads, images per second (ViT-B/32): float32 48.7 by 1,600, 44.2 by 3,200; bfloat16, whose
    rows are half as large, 92.7 by 1,600, 95.1 by 3,200, 83.6 by 6,400. One thread is as fast by 800 as by 1,600.
    """
    return ROWS_OF_A_THREAD * torch.float32.itemsize // dtype.itemsize * torch.get_num_threads()


def map_bytes_at_once() -> int:
    """The size of a ResNet's widest feature map in its first stage, with as many threads as torch has now."""
    return MAP_BYTES_OF_A_THREAD * torch.get_num_threads()


def images_at_once(tower: Any, pixels: int, stage: int) -> int:
    """How many images of so many pixels a ResNet's stage takes at once: its maps are half those of the one before."""
    widest = 4 * tower.config.stem_width * pixels // 16 * tower.dtype.itemsize
    return max(1, (map_bytes_at_once() << stage) // widest)


@cache
def has_packed_operators(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN's fused operators for this type here, and they compute what is expected."""
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
    """A linear map with its weight in oneDNN's order, and an activation if there is one: (…, inputs) → (…, outputs).

    scale: what the weight is multiplied by, and if `scales_bias` the bias too
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
        # Plain attributes: oneDNN's tensors can neither be saved nor moved.
        weight = (linear.weight.detach().float() * scale).to(self.dtype)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows_at_once(self.dtype))
        self.bias = None if linear.bias is None else linear.bias.detach() * (scale if scales_bias else 1)

    def forward(self, input: Tensor) -> Tensor:
        _check_use(input)
        name, algorithm = self.activation
        input = input.to(self.dtype)
        return torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, name, [], algorithm)


class PackedMLP(nn.Module):
    """HfClipMLP with its activation computed in the pass of the first product."""

    def __init__(self, mlp: HfClipMLP, hidden_act: str):
        super().__init__()
        slope = 1.702 if hidden_act == "quick_gelu" else 1.0
        self.fc1 = PackedLinear(mlp.fc1, FUSED_ACTIVATIONS[hidden_act], scale=slope)
        self.fc2 = PackedLinear(mlp.fc2, scale=1 / slope, scales_bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.fc1(hidden_states))


class PackedPatches(nn.Module):
    """A ViT's patch embedding, its weight in oneDNN's order: (B, C, Y, X) → (B, W, Y / S, X / S), S a patch's side."""

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
    """A convolution with BatchNorm's gain and shift in it, and ReLU after it: (B, C, Y, X) → (B, C', Y', X').

    Fused, ReLU and the sum with a shortcut are computed in the pass of the convolution, whose weight is in oneDNN's
    order. That order depends on the size of the input, so it is made for each size and held for the latest ones.
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
        """y = gain · (w * x − mean) / √(variance + ε) + shift as one convolution, computed in float32 or better."""
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
                self.packed.pop(oldest, None)  # another thread may have been faster
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
        """max(0, sum + this convolution of `input`), which may take the place of `sum`."""
        if self.is_fused:
            _check_use(input)
            end: tuple[Any, ...] = ("add", 1.0, "relu", [], "")
            return torch.ops.mkldnn._convolution_pointwise_.binary(sum, input, *self._arguments(input), *end)
        return functional.conv2d(input, self.weight, self.bias, self.stride, self.padding).add_(sum).relu_()


class InferenceBottleneck(nn.Module):
    """HfClipBottleneck without BatchNorm; its result takes the memory of its input where the input is the shortcut."""

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
    """The attention pool for its one query q: q · (K x) = (Kᵀ q) · x, and Σ aᵢ V xᵢ = V Σ aᵢ xᵢ.

    So no key and no value is computed, but a direction and a mean of the cells for each head. What the keys' bias adds
    is the same for all cells, and the softmax takes it out again.
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
    """Attention as two matrix products, which in bfloat16 on CPUs run twice as fast as torch's fused kernel.

    Shapes are those of `eager_attention`; there is no mask, since this is for the image tower alone.
    """
    by_head = query.shape
    query, key, value = (part.flatten(0, 1) for part in (query * scaling, key, value))  # (B * H, L, E)
    weights = (query @ key.transpose(1, 2)).softmax(dim=-1)
    return (weights @ value).view(by_head).transpose(1, 2), None


AttentionInterface.register(PRODUCT_ATTENTION, attention_by_products)
