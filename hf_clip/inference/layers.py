"""The layers by which `optimize_for_inference()` replaces those of a model.

On CPUs these layers gain time in two ways. Weights are stored in oneDNN's own order of memory, which otherwise happens
again in every call. And activations are computed while a product is still in the cache. torch offers both only as
operators of its compiler, `torch.ops.mkldnn`, which are not public. They are therefore checked before they are used
(`has_packed_operators`), and timed (`measure`). If they are missing, give other results, or are not faster, the public
operators are used.

Dimensions: B batch, L positions, A positions of all texts without padding, C channels, Y × X pixels or cells, S patch
side, W tower width, H heads, E = W / H.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_utils import AttentionInterface

from ..model.attention import (
    PRODUCT_ATTENTION,
    HfClipAttention,
    HfClipEncoderLayer,
    HfClipMLP,
    attend,
    product_attention,
)
from ..model.linear_map import apply_linear, cut_into_patches, is_hooked
from ..model.optimized import OptimizedModelError
from ..model.resnet_tower import HfClipAttentionPool, HfClipBottleneck

ROWS_OF_ORDER = 1600
"""Number of rows for which oneDNN chooses the order of a weight. It is as fast with any other number."""

SIZES_PACKED = 2
"""Number of input sizes for which a convolution keeps its reordered weight: parts of a batch, and a single image."""

FUSED_ACTIVATIONS = {"quick_gelu": ("swish", ""), "gelu": ("gelu", "none")}
"""oneDNN's name and algorithm for each `hidden_act`. quick_gelu(x) is swish(1.702 x) / 1.702."""


@cache
def has_packed_operators(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN's fused operators for this dtype on this machine, and their results are right."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    rows, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in ((64, 48), (32, 48), (32,)))
    shortcut = torch.randn(64, 32, generator=generator).to(dtype)
    maps, kernel = (torch.randn(size, generator=generator).to(dtype) for size in ((2, 16, 6, 6), (16, 16, 3, 3)))
    maps = maps.contiguous(memory_format=torch.channels_last)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(rows))
        for name, algorithm in FUSED_ACTIVATIONS.values():
            found = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, name, [], algorithm).float()
            products = functional.linear(rows.float(), weight.float(), bias.float())
            expected = functional.silu(products) if name == "swish" else functional.gelu(products)
            if not is_close(found, expected, tolerance):
                return False
        onto = torch.ops.mkldnn._linear_pointwise.binary(rows, shortcut, packed, bias, "add").float()
        if not is_close(onto, products + shortcut.float(), tolerance):
            return False
        convolution = InferenceConv2d(kernel, bias[:16], (1, 1), (1, 1), has_relu=True, is_fused=True)
        products = functional.conv2d(maps.float(), kernel.float(), bias[:16].float(), padding=1)
        ends = (convolution(maps).float(), convolution.add_to(maps.clone(), maps).float())
        expecteds = (products.relu(), (products + maps.float()).relu())
        return all(is_close(found, expected, tolerance) for found, expected in zip(ends, expecteds, strict=True))
    except (RuntimeError, AttributeError, NotImplementedError, TypeError):
        return False


def is_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


def refuse_gradients(input: Tensor) -> None:
    """Raise OptimizedModelError if gradients of an input are wanted."""
    if input.requires_grad and torch.is_grad_enabled():
        raise OptimizedModelError(
            "This model was optimized for inference and gives no gradients; load it again for them."
        )


def check_use(input: Tensor) -> None:
    refuse_gradients(input)
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
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_OF_ORDER)
        self.bias = None if linear.bias is None else linear.bias.detach() * (scale if scales_bias else 1)

    def forward(self, input: Tensor) -> Tensor:
        check_use(input)
        name, algorithm = self.activation
        input = input.to(self.dtype)
        return torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, name, [], algorithm)

    def add_to(self, sum: Tensor, input: Tensor) -> Tensor:
        """Compute sum + linear(input), the sum in the same pass: (…, outputs), (…, inputs) → (…, outputs)."""
        if not sum.dtype == input.dtype == self.dtype:  # as autocast leaves them
            return sum + self(input)
        check_use(input)
        return torch.ops.mkldnn._linear_pointwise.binary(input, sum, self.packed, self.bias, "add")


class PackedMLP(nn.Module):
    """An HfClipMLP whose activation is fused into the first linear map."""

    def __init__(self, mlp: HfClipMLP, hidden_act: str):
        super().__init__()
        slope = 1.702 if hidden_act == "quick_gelu" else 1.0
        self.fc1 = PackedLinear(mlp.fc1, FUSED_ACTIVATIONS[hidden_act], scale=slope)
        self.fc2 = PackedLinear(mlp.fc2, scale=1 / slope, scales_bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.fc1(hidden_states))


class RowsOfTexts:
    """Which positions of padded texts are no padding: A of B x L.

    Args:
        shown: (B, L) bool: false at padding.
    """

    def __init__(self, shown: Tensor):
        self._shape, self._rows = shown.shape, shown.flatten().nonzero()[:, 0]

    def together(self, padded: Tensor) -> Tensor:
        """Leave out padding: (B, L, W) → (1, A, W)."""
        return padded.flatten(0, 1).index_select(0, self._rows)[None]

    def apart(self, rows: Tensor) -> Tensor:
        """Put the texts into rows of their own, with zeros as padding: (1, A, W) → (B, L, W)."""
        padded = rows.new_zeros(self._shape.numel(), rows.shape[-1])
        return padded.index_copy_(0, self._rows, rows[0]).unflatten(0, tuple(self._shape))


class StackedAttention(HfClipAttention):
    """An HfClipAttention that computes q, k and v as one product.

    Its module is that of the model, so that outputs and hooks of attention stay. Only the class and the maps change.
    """

    qkv_proj: nn.Module

    def mix(
        self, hidden_states: Tensor, attention_mask: Tensor | None, rows: "RowsOfTexts | None" = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Attend without the projection of the output: (B, L, W) → (B, L, W), and the weights.

        With `rows` the texts stand one after the other, (1, A, W) → (1, A, W), and each attends to itself.
        """
        mapped = self.qkv_proj(hidden_states)
        if rows is not None:
            mapped = rows.apart(mapped)
        query, key, value = mapped.chunk(3, dim=-1)
        mixed, weights = attend(self, query, key, value, attention_mask, **kwargs)
        return (mixed if rows is None else rows.together(mixed)), weights

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        mixed, weights = self.mix(hidden_states, attention_mask, **kwargs)
        return apply_linear(self.out_proj, mixed), weights


class PackedAttention(StackedAttention):
    """A StackedAttention whose maps are packed."""

    @classmethod
    def change_(cls, attention: HfClipAttention) -> None:
        """Make an HfClipAttention one of this class."""
        maps = (attention.q_proj, attention.k_proj, attention.v_proj)
        attention.qkv_proj = PackedLinear(stack_linear_maps(maps))
        attention.out_proj = PackedLinear(attention.out_proj)  # type: ignore[assignment]
        del attention.q_proj, attention.k_proj, attention.v_proj
        attention.__class__ = cls


def stack_linear_maps(maps: Sequence[nn.Linear]) -> nn.Linear:
    """Make one linear map whose outputs are those of all `maps` side by side."""
    stacked = nn.Linear(maps[0].in_features, sum(map.out_features for map in maps), device="meta")
    stacked.weight = nn.Parameter(torch.cat([map.weight.detach() for map in maps]), requires_grad=False)
    stacked.bias = nn.Parameter(torch.cat([map.bias.detach() for map in maps]), requires_grad=False)
    return stacked


class PackedEncoderLayer(HfClipEncoderLayer):
    """An HfClipEncoderLayer that adds to the residual stream in the pass of the product before."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        attention: Any = self.self_attn
        mlp: Any = self.mlp
        if any(map(is_hooked, (attention, attention.out_proj, mlp, mlp.fc2))):  # hooks are called with whole results
            return super().forward(hidden_states, attention_mask, **kwargs)
        mixed, _ = attention.mix(self.layer_norm1(hidden_states), attention_mask, **kwargs)
        hidden_states = attention.out_proj.add_to(hidden_states, mixed)
        return mlp.fc2.add_to(hidden_states, mlp.fc1(self.layer_norm2(hidden_states)))


class PackedPatches(nn.Module):
    """A ViT's patch embedding with its weight in oneDNN's order: (B, C, Y, X) → (B, W, Y / S, X / S)."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.size, self.weight = convolution.stride[0], convolution.weight
        weight = self.weight.detach().flatten(1)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_OF_ORDER)

    def forward(self, images: Tensor) -> Tensor:
        check_use(images)
        patches = cut_into_patches(images, self.size)
        tokens = torch.ops.mkldnn._linear_pointwise(patches, self.packed, None, "none", [], "")
        return tokens.permute(0, 3, 1, 2)


@torch.no_grad()
def fold_norm(convolution: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias of a convolution that includes the BatchNorm after it, in float32 or better.

    With `w * x` for the convolution, the result is y = gain · (w * x − mean) / √(variance + ε) + shift.
    """
    exact = torch.promote_types(convolution.weight.dtype, torch.float32)
    gain = norm.weight.to(exact) / (norm.running_var.to(exact) + norm.eps).sqrt()
    weight = convolution.weight.to(exact) * gain[:, None, None, None]
    return weight, norm.bias.to(exact) - norm.running_mean.to(exact) * gain


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
        """Make one convolution of a convolution and the BatchNorm after it."""
        weight, bias = fold_norm(convolution, norm)
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
            check_use(input)
            name = "relu" if self.has_relu else "none"
            return torch.ops.mkldnn._convolution_pointwise(input, *self._arguments(input), name, [], "")
        output = functional.conv2d(input, self.weight, self.bias, self.stride, self.padding)
        return output.relu_() if self.has_relu else output

    def add_to(self, sum: Tensor, input: Tensor) -> Tensor:
        """Compute ReLU(sum + convolution(input)). The result may overwrite `sum`."""
        if self.is_fused:
            check_use(input)
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


AttentionInterface.register(PRODUCT_ATTENTION, product_attention)
