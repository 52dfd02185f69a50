"""The residual attention stack that the text tower and the Vision Transformer share, and its attention.

Each layer adds two branches to the residual stream: x + attention(norm(x)), then x + mlp(norm(x)). The
module paths are those of transformers' CLIP, so adapters, hooks and device maps written for it fit.

Dimensions: B batch, L positions (text tokens, or class token + patches), D width, H heads, E = D / H.
"""

import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_hf_clip import HfClipTextConfig, HfClipViTConfig

FEWEST_ROWS, FEWEST_PRODUCTS = 64, 2**23
"""Below, handing the weight to oneDNN in its own order of memory costs more than the product gains."""

PRODUCT_ATTENTION = "hf_clip_products"
"""Of optimized models on CPUs."""

BUILT_IN_ATTENTION = {None, "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"}
BUILT_IN_ATTENTION |= {PRODUCT_ATTENTION}
"""Kinds of attention whose arguments are known."""


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
    if not is_faster or not (count := _pictures_for_onednn(input.numel() // weight.shape[1])):
        return nn.functional.linear(input, weight, bias)
    outputs, inputs = weight.shape
    pixels = input.reshape(count, -1, 1, inputs).permute(0, 3, 1, 2)  # (count, inputs, rows / count, 1)
    maps = nn.functional.conv2d(pixels, weight[:, :, None, None], bias)  # (count, outputs, rows / count, 1)
    return maps.permute(0, 2, 3, 1).reshape(*input.shape[:-1], outputs)


def _pictures_for_onednn(rows: int) -> int:
    """Into how many pictures of equal size rows are put; 0 where it can't be done.

    With several threads torch gives any 1×1 convolution to oneDNN, with one thread only those of 16 pictures or more.
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


def cut_into_patches(pictures: Tensor, size: int) -> Tensor:
    """(B, C, Y, X) → (B, Y / S, X / S, C * S * S); pixels beyond the last whole patch are left out."""
    rows, columns = (side // size for side in pictures.shape[-2:])
    whole = pictures[..., : rows * size, : columns * size]
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


class HfClipQuickGELU(nn.Module):
    """x · σ(1.702 x), the original's activation, with one tensor of memory instead of three, or two for gradients."""

    def forward(self, input: Tensor) -> Tensor:
        scaled = input * 1.702
        # Not in place of the input, which hooks may look at; and where gradients are wanted, silu needs its own. A
        # trace must not depend on whether they are: torch.jit.trace compares it with one made under no_grad.
        in_place = not (torch.is_grad_enabled() or torch.jit.is_tracing())
        return nn.functional.silu(scaled, inplace=in_place).mul_(1 / 1.702)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention spelled out, for `attn_implementation="eager"`: the one that can return its weights.

    query (B, H, Lq, E), key and value (B, H, L, E), attention_mask additive and broadcast to (B, H, Lq, L).
    Returns the mixed values (B, Lq, H, E) and the weights (B, H, Lq, L).
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Run the attention that `module.config` asks for (eager, sdpa, flash or flex).

    query (B, Lq, D), key and value (B, L, D); `module` carries num_heads, dropout and is_causal.
    Returns (B, Lq, D) and the weights (B, H, Lq, L), which only `eager` has.
    """
    batch, query_length, width = query.shape
    heads = (module.num_heads, width // module.num_heads)  # with these written out, an empty batch has a shape too
    is_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
    kind = module.config._attn_implementation
    if not is_graph and batch == 0:  # which the other kinds cannot do, whatever mask they have
        kind, attention_mask = "eager", None
    attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention)
    mixed, weights = attention(
        module,
        query.unflatten(-1, heads).transpose(1, 2),  # (B, H, Lq, E)
        key.unflatten(-1, heads).transpose(1, 2),
        value.unflatten(-1, heads).transpose(1, 2),
        attention_mask,
        scaling=(width // module.num_heads) ** -0.5,
        dropout=module.dropout if module.training else 0.0,
        **kwargs,
    )
    return mixed.reshape(batch, query_length, width), weights


class HfClipAttention(nn.Module):
    """Multi-head self-attention with biases on all four projections."""

    def __init__(self, config: HfClipTextConfig | HfClipViTConfig, is_causal: bool):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.is_causal = is_causal
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = (apply_linear(p, hidden_states) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed, weights = attend(self, query, key, value, attention_mask, **kwargs)
        return apply_linear(self.out_proj, mixed), weights


class HfClipMLP(nn.Module):
    """Two linear maps around the tower's activation."""

    def __init__(self, config: HfClipTextConfig | HfClipViTConfig):
        super().__init__()
        self.activation_fn = HfClipQuickGELU() if config.hidden_act == "quick_gelu" else ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return apply_linear(self.fc2, self.activation_fn(apply_linear(self.fc1, hidden_states)))


class HfClipEncoderLayer(GradientCheckpointingLayer):
    """One pre-norm residual attention layer: (B, L, D) → (B, L, D)."""

    def __init__(self, config: HfClipTextConfig | HfClipViTConfig, is_causal: bool):
        super().__init__()
        self.self_attn = HfClipAttention(config, is_causal)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = HfClipMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(self.layer_norm1(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.layer_norm2(hidden_states))


class HfClipEncoder(nn.Module):
    """The stack of layers: (B, L, D) → (B, L, D)."""

    def __init__(self, config: HfClipTextConfig | HfClipViTConfig, is_causal: bool):
        super().__init__()
        self.layers = nn.ModuleList(HfClipEncoderLayer(config, is_causal) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return hidden_states


def resize_position_table(table: Tensor, old_grid: int, new_height: int, new_width: int) -> Tensor:
    """Resample a learned table of positions on a square grid to another grid, bicubically.

    table:   (1 + old_grid², D)  the first row (class token, or mean token) has no place on the grid and stays
    returns: (1 + new_height * new_width, D)
    """
    first, grid = table[:1], table[1:]
    grid = grid.T.reshape(1, -1, old_grid, old_grid).float()  # (1, D, old, old); half precision has no bicubic
    grid = nn.functional.interpolate(grid, size=(new_height, new_width), mode="bicubic", align_corners=False)
    return torch.cat([first, grid[0].flatten(1).T.to(table.dtype)])


def init_linear_bias_(linear: nn.Linear) -> None:
    """PyTorch's default for a linear layer's bias, which the original leaves in place: U(±1/√inputs)."""
    bound = linear.in_features**-0.5
    init.uniform_(linear.bias, -bound, bound)


def init_text_layer_(layer: HfClipEncoderLayer, num_layers: int, factor: float) -> None:
    """The original's initialisation of a text layer: smaller where the residual stream is written, as in GPT-2."""
    attention, mlp = layer.self_attn, layer.mlp
    width = attention.q_proj.in_features
    write_std = width**-0.5 * (2 * num_layers) ** -0.5 * factor
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        init.normal_(projection.weight, std=width**-0.5 * factor)
        init.zeros_(projection.bias)
    init.normal_(attention.out_proj.weight, std=write_std)
    init.zeros_(attention.out_proj.bias)
    init.normal_(mlp.fc1.weight, std=(2 * width) ** -0.5 * factor)
    init.normal_(mlp.fc2.weight, std=write_std)
    init_linear_bias_(mlp.fc1)
    init_linear_bias_(mlp.fc2)


def init_vit_layer_(layer: HfClipEncoderLayer) -> None:
    """The original's initialisation of a ViT layer, which is PyTorch's default for each part.

    `nn.MultiheadAttention` draws q, k and v as one (3D, D) matrix with Xavier's bound √(6 / (D + 3D)).
    """
    attention, mlp = layer.self_attn, layer.mlp
    width = attention.q_proj.in_features
    bound = (6 / (width + 3 * width)) ** 0.5
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        init.uniform_(projection.weight, -bound, bound)
        init.zeros_(projection.bias)
    for linear in (attention.out_proj, mlp.fc1, mlp.fc2):
        init.kaiming_uniform_(linear.weight, a=5**0.5)
    init.zeros_(attention.out_proj.bias)
    init_linear_bias_(mlp.fc1)
    init_linear_bias_(mlp.fc2)
