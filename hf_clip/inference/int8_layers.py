"""The layers by which `optimize_for_inference(precision="int8")` replaces those of a model.

A row of activations x and a row of weights w are replaced by integers: x ≈ s · p with the largest |p| = 127, and
w ≈ t · r with the largest |r| = 127. The product is then s · t · Σ p r, whose sum is exact. Scales t are computed once
for each output channel. Scales s are computed in each call, for each token of a transformer or each image of a ResNet,
so that what one of them gives does not depend on the others in its batch.

The sums are computed by oneDNN, through operators of torch's compiler that are not public (`torch.ops.onednn`). They
take activations as bytes, p + 128, or p itself where it cannot be negative, since signed activations are far slower
on some processors. `has_int8_operators` checks the results before the operators are used. Everything but the products
is computed in float32 or the model's dtype.

Dimensions: B batch, L positions, C channels, Y × X pixels or cells, S patch side, W tower width, M rows, K inputs, N
outputs.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..model.attention import HfClipAttention, HfClipMLP
from ..model.linear_map import cut_into_patches
from ..model.resnet_tower import HfClipBottleneck, HfClipResNetStage
from .layers import StackedAttention, check_use, fold_norm, is_close

LARGEST = 127
"""Largest absolute value of an integer, so that its range is symmetric."""

LARGEST_BYTE = 255
"""Largest integer where none is negative."""

ZERO = 128
"""What is added to an integer to make it a byte without a sign."""

LEAST_SCALED = 1e-12
"""Activations whose largest absolute value is smaller than this count as zero."""

ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], float, float]] = {
    "quick_gelu": (lambda x: functional.silu(x, inplace=True), 1.702, 0.2785),
    "gelu": (functional.gelu, 1.0, 0.1701),
}
"""By `hidden_act`: a function f, a slope a, and a bound b, so that the activation is f(a x) / a, and f is above −b."""


def to_bytes(scaled: Tensor) -> Tensor:
    """Round numbers between −127 and 127 to integers, and return them as bytes, p + 128. Overwrites its input."""
    # A cast to int8 and the flip of its sign bit are several times as fast as a cast to uint8.
    return scaled.round_().to(torch.int8).view(torch.uint8).bitwise_xor_(ZERO)


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's integers as bytes p + 128 (…, K), and its scale (…, 1), in float32."""
    rows = rows.float()
    scales = rows.abs().amax(-1, keepdim=True).clamp_min_(LEAST_SCALED).div_(LARGEST)
    return to_bytes(rows / scales), scales


def quantize_activated(rows: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Do the same to float32 rows whose values are all above −bound. Overwrites them.

    The absolute values need not be computed. A row's scale is never less than bound / 127.
    """
    scales = rows.amax(-1, keepdim=True).clamp_min_(bound).div_(LARGEST)
    return to_bytes(rows.div_(scales)), scales


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the integers of a float32 weight (N, …), int8, and the scale of each output channel (N,)."""
    scales = weight.flatten(1).abs().amax(1).clamp_min_(LEAST_SCALED).div_(LARGEST)
    by_output = scales.view(-1, *[1] * (weight.ndim - 1))
    return (weight / by_output).round_().to(torch.int8), scales


class Int8Linear(nn.Module):
    """A linear map in integers: (…, K) → (…, N).

    Args:
        weight: (N, K).
        bias: (N,), or None.
        dtype: Type of the outputs.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # Plain attributes and no parameters, since oneDNN's tensors can be neither saved nor moved.
        integers, self.scales = quantize_weight(weight.float())
        self.packed = torch.ops.onednn.qlinear_prepack(integers, None)
        self.zeros = torch.zeros(self.out_features, dtype=torch.int64)
        self.bias, self.dtype = None if bias is None else bias.to(dtype), dtype

    @classmethod
    @torch.no_grad()
    def replace(cls, *linears: nn.Linear, slope: float = 1.0, dtype: torch.dtype | None = None) -> "Int8Linear":
        """Make one map of several with the same input. Its outputs are theirs, side by side, times `slope`."""
        weight = torch.cat([linear.weight.float() for linear in linears]) * slope
        biases = [
            torch.zeros(linear.out_features) if linear.bias is None else linear.bias.float() for linear in linears
        ]
        return cls(weight, torch.cat(biases) * slope, dtype or linears[0].weight.dtype)

    def multiply(self, integers: Tensor, scales: Tensor) -> Tensor:
        """Multiply rows that were quantized, (M, K) with scales (M, 1), and add the bias: (M, N)."""
        if not len(integers):
            return scales.new_empty(0, self.out_features, dtype=self.dtype)
        products = torch.ops.onednn.qlinear_pointwise(
            integers, 1.0, ZERO, self.packed, self.scales, self.zeros, None, 1.0, 0, self.dtype, "none", [], ""
        )
        # oneDNN takes one scale for all rows, so it could not add the bias, which is not scaled.
        scales = scales.to(self.dtype)
        if self.bias is None:
            return products.mul_(scales)
        return torch.addcmul(self.bias, products, scales, out=products)

    def forward(self, input: Tensor) -> Tensor:
        check_use(input)
        rows = input.reshape(-1, self.in_features)
        return self.multiply(*quantize_rows(rows)).view(*input.shape[:-1], self.out_features)


class Int8MLP(nn.Module):
    """An HfClipMLP in integers. Its activation is computed in float32."""

    def __init__(self, mlp: HfClipMLP, hidden_act: str):
        super().__init__()
        self.activation, slope, self.bound = ACTIVATIONS[hidden_act]
        self.fc1 = Int8Linear.replace(mlp.fc1, slope=slope, dtype=torch.float32)
        second = mlp.fc2
        self.fc2 = Int8Linear(second.weight.detach().float() / slope, second.bias, second.weight.dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        check_use(hidden_states)
        rows = hidden_states.reshape(-1, self.fc1.in_features)
        activated = self.activation(self.fc1.multiply(*quantize_rows(rows)))
        return self.fc2.multiply(*quantize_activated(activated, self.bound)).view(hidden_states.shape)


class Int8Attention(StackedAttention):
    """A StackedAttention whose input is quantized once, for queries, keys and values together."""

    @classmethod
    def change_(cls, attention: HfClipAttention) -> None:
        """Make an HfClipAttention one of this class. Its `out_proj` stays as it is."""
        attention.qkv_proj = Int8Linear.replace(attention.q_proj, attention.k_proj, attention.v_proj)
        del attention.q_proj, attention.k_proj, attention.v_proj
        attention.__class__ = cls


class Int8Patches(nn.Module):
    """A ViT's patch embedding in integers: (B, C, Y, X) → (B, W, Y / S, X / S). Each patch has its scale."""

    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self.size = convolution.stride[0]
        weight = convolution.weight.detach()
        self.linear = Int8Linear(weight.flatten(1), None, weight.dtype)
        self.weight = nn.Parameter(weight.new_empty(0), requires_grad=False)  # the tower asks for its dtype

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(cut_into_patches(images, self.size)).permute(0, 3, 1, 2)


def quantize_map(feature_map: Tensor) -> tuple[Tensor, float]:
    """Return the integers of one image's feature map (1, C, Y, X), none of it negative, as bytes, and their scale."""
    scale = max(feature_map.amax().item(), LEAST_SCALED) / LARGEST_BYTE
    # A cast to uint8 by way of int16 is twice as fast as a direct one.
    return feature_map.mul(1 / scale).round_().to(torch.int16).to(torch.uint8), scale


class Int8Conv2d(nn.Module):
    """A convolution in integers that includes the BatchNorm after it: (B, C, Y, X) → (B, C', Y', X').

    No input may be negative.

    Args:
        weight: Weight of the convolution, with BatchNorm's gain.
        bias: (C',) BatchNorm's shift.
        stride: As for `nn.Conv2d`.
        padding: As for `nn.Conv2d`.
        has_relu: Whether ReLU follows.
        dtype: Type of the outputs.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        has_relu: bool,
        dtype: torch.dtype,
    ):
        super().__init__()
        integers, self.scales = quantize_weight(weight.float())
        self.bias, self.dtype = bias.float(), dtype
        self.activation = "relu" if has_relu else "none"
        self.is_pointwise = integers.shape[2:] == (1, 1)
        self.places = (stride, padding, (1, 1), 1)
        if self.is_pointwise:
            self.packed = torch.ops.onednn.qlinear_prepack(integers.flatten(1), None)
        else:
            self.packed = torch.ops.onednn.qconv_prepack(integers, self.scales, 1.0, 0, *self.places, None)
        self.zeros = torch.zeros(len(weight), dtype=torch.int64)

    @classmethod
    def fold(cls, convolution: Any, norm: Any, has_relu: bool) -> "Int8Conv2d":
        """Make one convolution of a convolution and the BatchNorm after it."""
        weight, bias = fold_norm(convolution, norm)
        return cls(weight, bias, convolution.stride, convolution.padding, has_relu, convolution.weight.dtype)

    def multiply(self, integers: Tensor, scale: float) -> Tensor:
        """Convolve an image's map that was quantized."""
        weight = (scale, 0, self.packed, self.scales, self.zeros)
        end: tuple[Any, ...] = (1.0, 0, self.dtype, self.activation, [], "")
        if not self.is_pointwise:
            return torch.ops.onednn.qconv_pointwise(integers, *weight, self.bias, *self.places, *end)
        # oneDNN has 1×1 convolutions of integers that are 30 times as slow as others. Its linear maps are all fast.
        return _as_map(torch.ops.onednn.qlinear_pointwise(_as_rows(integers), *weight, self.bias, *end), integers)

    def add_to(self, sum: Tensor, integers: Tensor, scale: float) -> Tensor:
        """Compute ReLU(sum + convolution) of a 1×1 convolution. The result may overwrite `sum`."""
        weight, end = (scale, 0, self.packed, self.scales, self.zeros), (1.0, 0, self.dtype, 1.0, 0)
        rows = torch.ops.onednn.qlinear_pointwise.binary(
            _as_rows(integers), *weight, _as_rows(sum), self.bias, *end, "sum", 1.0, "relu", [], ""
        )
        return _as_map(rows, integers)

    def forward(self, input: Tensor) -> Tensor:
        check_use(input)
        return _by_image(lambda image: self.multiply(*quantize_map(image)), input)


def _by_image(encode: Callable[[Tensor], Tensor], maps: Tensor) -> Tensor:
    """Let a layer take one image at a time. For no image it takes one of zeros, to find the shape of its output."""
    if not len(maps):
        return encode(maps.new_zeros(1, *maps.shape[1:]))[:0]
    return encode(maps) if len(maps) == 1 else torch.cat([encode(image) for image in maps.split(1)])


def _as_rows(feature_map: Tensor) -> Tensor:
    """See a map (1, C, Y, X) with channels last as rows (Y · X, C)."""
    return feature_map.permute(0, 2, 3, 1).reshape(-1, feature_map.shape[1])


def _as_map(rows: Tensor, like: Tensor) -> Tensor:
    """See rows (Y · X, C) as a map (1, C, Y, X) of the size of another."""
    return rows.view(1, *like.shape[2:], -1).permute(0, 3, 1, 2)


class Int8Bottleneck(nn.Module):
    """An HfClipBottleneck in integers, for one image. If its input is the shortcut, the result overwrites the input."""

    def __init__(self, block: HfClipBottleneck):
        super().__init__()
        self.conv1 = Int8Conv2d.fold(block.conv1, block.bn1, True)
        self.conv2 = Int8Conv2d.fold(block.conv2, block.bn2, True)
        self.conv3 = Int8Conv2d.fold(block.conv3, block.bn3, False)
        self.pool = block.pool
        self.downsample = None
        if block.downsample is not None:
            convolution, norm = block.downsample
            self.downsample = Int8Conv2d.fold(convolution, norm, False)

    def forward(self, feature_map: Tensor) -> Tensor:
        integers, scale = quantize_map(feature_map)
        branch = self.pool(self.conv2(self.conv1.multiply(integers, scale)))
        shortcut = feature_map if self.downsample is None else self.downsample(self.pool(feature_map))
        result = self.conv3.add_to(shortcut, *quantize_map(branch))
        # Integers cannot say NaN or infinity, and oneDNN's ReLU makes 0 of NaN.
        return result if math.isfinite(scale) else result.fill_(math.nan)


class Int8Stage(HfClipResNetStage):
    """A stage whose blocks take one image at a time. Its module is that of the model, and only the class is changed."""

    def forward(self, input: Tensor) -> Tensor:
        check_use(input)
        return _by_image(super().forward, input)


@cache
def has_int8_operators(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN's operators on integers on this machine, and their results are right for this dtype.

    The integers are as large as they may be: some processors add products in 16 bits, which these exceed.
    """
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    sizes = ((64, 48), (1, 16, 6, 6)), ((32, 48), (16, 16, 3, 3), (16, 16, 1, 1))
    rows, maps = (torch.randint(0, 256, size, generator=generator) for size in sizes[0])
    weights = [torch.randint(-127, 128, size, generator=generator) for size in sizes[1]]
    for weight in weights:
        weight.flatten(1)[:, 0] = LARGEST  # so that the scales of the weights are 1
    exact, kernel, point = (weight.double() for weight in weights)
    bias, scales = exact[:, 1], torch.linspace(0.5, 2, len(rows))[:, None].to(dtype).float()
    bytes = maps.to(torch.uint8).contiguous(memory_format=torch.channels_last)
    try:
        form = (bias[:16], (1, 1), (1, 1), True, dtype)
        found = (
            Int8Linear(exact, bias, dtype).multiply(rows.to(torch.uint8), scales),
            Int8Conv2d(kernel, *form).multiply(bytes, 0.5),
            Int8Conv2d(point, *form).multiply(bytes, 0.5),
            Int8Conv2d(point, *form).add_to(bytes.to(dtype), bytes, 0.5),
        )
    except (RuntimeError, AttributeError, NotImplementedError, TypeError):
        return False
    large, small = (
        functional.conv2d(maps.double(), weight, padding=weight.shape[2] // 2) * 0.5 + bias[:16, None, None]
        for weight in (kernel, point)
    )
    expected = (rows.double() - ZERO) @ exact.T * scales + bias, large.relu(), small.relu(), (small + maps).relu()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    return all(is_close(one.double(), right, tolerance) for one, right in zip(found, expected, strict=True))
