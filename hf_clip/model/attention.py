"""The residual attention block that the text tower and the Vision Transformer share, and its attention.

Each layer adds two branches to the residual stream: x + attention(norm(x)), then x + mlp(norm(x)). The module paths
are those of transformers' CLIP, so adapters, hooks and device maps written for it fit.

Dimensions: B batch, L positions (text tokens, or class token and patches), W width, H heads, E = W / H.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_hf_clip import HfClipTextConfig, HfClipViTConfig
from .linear_map import apply_linear

PRODUCT_ATTENTION = "hf_clip_products"
"""Of optimized models on CPUs."""

BUILT_IN_ATTENTION = {None, "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"}

BUILT_IN_ATTENTION |= {PRODUCT_ATTENTION}
"""Kinds of attention whose arguments are known."""


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

    query (B, Lq, W), key and value (B, L, W); `module` carries num_heads, dropout and is_causal.
    Returns (B, Lq, W) and the weights (B, H, Lq, L), which only `eager` has.
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
    """One pre-norm residual attention layer: (B, L, W) → (B, L, W)."""

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
    """The stack of layers: (B, L, W) → (B, L, W)."""

    def __init__(self, config: HfClipTextConfig | HfClipViTConfig, is_causal: bool):
        super().__init__()
        self.layers = nn.ModuleList(HfClipEncoderLayer(config, is_causal) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return hidden_states


def init_linear_bias_(linear: nn.Linear) -> None:
    """PyTorch's default for a linear layer's bias, which the original leaves in place: U(±1/√inputs)."""
    bound = linear.in_features**-0.5
    init.uniform_(linear.bias, -bound, bound)
