"""The layers that `optimize_for_inference()` puts in place of a model's on GPUs. Their weights stay where they are.

Dimensions: B batch, L positions, C channels, Y × X pixels or cells, W tower width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..model.attention import HfClipAttention, attend
from ..model.linear_map import apply_linear, is_hooked
from .layers import InferenceBottleneck, InferenceConv2d, check_use

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def is_plain_linear(module: Any) -> bool:
    """Whether a module is an ordinary linear map: no adapter, no quantised weight, and nothing to call beside it.

    This is asked in each call, and is stricter than `replace.is_plain`: what multiplies by a weight alone calls no
    hook, not even those by which transformers records outputs.
    """
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and not is_hooked(module)


def can_fuse(attention: nn.Module) -> bool:
    """Whether the queries, keys and values of an attention layer can come from one product."""
    is_made_here = type(attention) is HfClipAttention and "forward" not in vars(attention)
    return is_made_here and all(is_plain_linear(getattr(attention, name)) for name in PROJECTIONS)


class FusedAttention(HfClipAttention):
    """HfClipAttention whose queries, keys and values come from one product: (B, L, W) → (B, L, W).

    The three linear maps stay, as parts of the one weight. If one of them is replaced or gets a hook later, they are
    computed one by one again.
    """

    fused_weight: Tensor
    fused_bias: Tensor

    @staticmethod
    @torch.no_grad()
    def join_weights_(attention: HfClipAttention) -> None:
        """Let the weights of the three maps be parts of one tensor. The layer computes what it did before."""
        maps = [getattr(attention, name) for name in PROJECTIONS]
        # Plain attributes and no buffers: the tensors are counted, saved and moved as those of the three maps.
        joined: Any = attention
        joined.fused_weight = torch.cat([linear.weight for linear in maps])
        joined.fused_bias = torch.cat([linear.bias for linear in maps])
        parts = zip(maps, joined.fused_weight.chunk(3), joined.fused_bias.chunk(3), strict=True)
        for linear, weight, bias in parts:
            linear.weight.data, linear.bias.data = weight, bias

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if not all(is_plain_linear(getattr(self, name)) for name in PROJECTIONS):
            return super().forward(hidden_states, attention_mask, **kwargs)
        query, key, value = functional.linear(hidden_states, self.fused_weight, self.fused_bias).chunk(3, dim=-1)
        mixed, weights = attend(self, query, key, value, attention_mask, **kwargs)
        return apply_linear(self.out_proj, mixed), weights


def has_cudnn() -> bool:
    """Whether cuDNN computes this torch's convolutions, and torch has its operators with ReLU."""
    names = ("cudnn_convolution_relu", "cudnn_convolution_add_relu")
    is_there = torch.version.hip is None and torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled
    return is_there and all(hasattr(torch, name) for name in names)


class CudnnConv2d(InferenceConv2d):
    """An InferenceConv2d whose ReLU, and the sum before it, are computed in cuDNN's pass.

    (B, C, Y, X) → (B, C', Y', X'), the sizes after the convolution.

    torch's operators for that are public, but nothing says which sizes and types cuDNN has a kernel for. A layer for
    which it has none computes step by step from then on.
    """

    has_no_kernel = False

    def _is_in_one_pass(self, input: Tensor) -> bool:
        if self.has_no_kernel or torch.is_autocast_enabled("cuda") or not input.numel():
            return False
        check_use(input)
        return True

    def forward(self, input: Tensor) -> Tensor:
        if self.has_relu and self._is_in_one_pass(input):
            try:
                rest = (self.bias, self.stride, self.padding, (1, 1), 1)
                return torch.cudnn_convolution_relu(input, self.weight, *rest)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                self.has_no_kernel = True
        return super().forward(input)

    def add_to(self, sum: Tensor, input: Tensor) -> Tensor:
        if self._is_in_one_pass(input):
            try:
                rest = (self.bias, self.stride, self.padding, (1, 1), 1)
                return torch.cudnn_convolution_add_relu(input, self.weight, sum, 1.0, *rest)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                self.has_no_kernel = True
        return super().add_to(sum, input)


def convolutions_of(tower: nn.Module) -> list[InferenceConv2d]:
    """The convolutions of a ResNet after BatchNorm was folded into them."""
    return [module for module in tower.modules() if isinstance(module, InferenceConv2d)]


def compute_in_one_pass_(tower: nn.Module, is_so: bool) -> None:
    """Let cuDNN compute ReLU and sums of a ResNet's blocks in the convolutions' pass, or step by step."""
    for block in tower.modules():
        if isinstance(block, InferenceBottleneck):
            for convolution in (block.conv1, block.conv2, block.conv3):
                convolution.__class__ = CudnnConv2d if is_so else InferenceConv2d


def set_layout_(tower: nn.Module, layout: torch.memory_format) -> None:
    """Set the memory layout of a ResNet's weights. cuDNN computes in the layout of the weights."""
    for convolution in convolutions_of(tower):
        convolution.weight.data = convolution.weight.data.contiguous(memory_format=layout)
