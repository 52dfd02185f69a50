"""The residual attention block that the text tower and the Vision Transformer share.

Each layer adds two branches to the residual stream: x + attention(norm(x)), then x + mlp(norm(x)). The modules have
the paths of transformers' CLIP, so adapters, hooks and device maps written for it fit.

Dimensions: B batch, L positions (text tokens, or class token and patches), Lq positions of the queries, W tower width,
H heads, E = W / H.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_hf_clip import HfClipTextConfig, HfClipViTConfig
from .linear_map import apply_linear

PRODUCT_ATTENTION = "hf_clip_products"
"""The attention of optimized models on CPUs."""

BUILT_IN_ATTENTION = {None, "eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3"}

BUILT_IN_ATTENTION |= {PRODUCT_ATTENTION}
"""Kinds of attention whose arguments are known, so that an argument without effect can be refused."""

FEWEST_QUERIES = 32
"""Below this number of positions, torch's fused attention is not slower than products."""

SCORE_BYTES = 8 * 2**20
"""Most bytes of attention scores that `product_attention` holds at once. The memory does not grow with the batch."""


class HfClipQuickGELU(nn.Module):
    """The original's activation, x · σ(1.702 x).

    It needs the memory of one tensor where the plain formula needs three, and of two where gradients are computed.
    """

    def forward(self, input: Tensor) -> Tensor:
        scaled = input * 1.702
        # The input is never overwritten, since hooks may look at it. With gradients silu needs a tensor of its own. A
        # trace must not depend on this: torch.jit.trace compares it with a second trace, made under no_grad.
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
    """Compute attention step by step, for `attn_implementation="eager"`, which alone can return its weights.

    Args:
        module: The attention module, for its training mode.
        query: (B, H, Lq, E).
        key: (B, H, L, E).
        value: (B, H, L, E).
        attention_mask: Added to the scores, and broadcast to (B, H, Lq, L).
        scaling: Factor of the scores.
        dropout: Probability that a weight is dropped in training.
        **kwargs: Ignored; other kinds of attention take more arguments.

    Returns:
        The mixed values (B, Lq, H, E) and the weights (B, H, Lq, L).
    """
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


@cache
def attends_faster_by_products() -> bool:
    """Whether two matrix products and a softmax are faster in bfloat16 than torch's fused attention on this processor.

    On AMD processors with instructions for bfloat16 they are up to twice as fast. Other processors were not measured,
    so the fused attention is kept there, above all where AMX computes its products.
    """
    information = Path("/proc/cpuinfo")
    text = information.read_text() if information.is_file() else ""
    return "AuthenticAMD" in text and "avx512_bf16" in text and "amx_bf16" not in text


def _prefers_products(query: Tensor, attention_mask: Tensor | None) -> bool:
    """Whether attention of queries (B, Lq, W) without a causal mask is faster as products."""
    return (
        query.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and query.shape[1] >= FEWEST_QUERIES
        and attention_mask is None
        and not torch.is_grad_enabled()
        and attends_faster_by_products()
    )


def product_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention as two matrix products with a softmax between them, for as many images as the cache holds.

    Shapes are those of `eager_attention`. There is never a mask and no dropout, since only image towers use it, and
    only for inference.
    """
    images, heads, length, width = query.shape
    at_once = max(1, SCORE_BYTES // (heads * length * key.shape[2] * query.itemsize))
    if images > at_once:
        parts = zip(query.split(at_once), key.split(at_once), value.split(at_once), strict=True)
        return torch.cat([product_attention(module, q, k, v, None, scaling)[0] for q, k, v in parts]), None
    query, key, value = (part.flatten(0, 1).contiguous() for part in (query, key, value))  # (B * H, L, E)
    # With beta = 0 the first argument is not read.
    scores = torch.baddbmm(query.new_empty(()), query, key.transpose(1, 2), beta=0, alpha=scaling)
    return (scores.softmax(dim=-1) @ value).view(images, heads, length, width).transpose(1, 2), None


def attention_of(config: PreTrainedConfig) -> str | None:
    """Return the name of the attention that a configuration chooses. transformers has no public name to ask."""
    return config._attn_implementation


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Run the attention that `module.config` asks for (eager, sdpa, flash or flex).

    Args:
        module: The attention module, with `num_heads`, `dropout` and `is_causal`.
        query: (B, Lq, W).
        key: (B, L, W).
        value: (B, L, W).
        attention_mask: Mask in the form that this kind of attention takes.
        **kwargs: Further arguments for the attention.

    Returns:
        The mixed values (B, Lq, W); and the weights (B, H, Lq, L), or None for any kind but `eager`.
    """
    batch, query_length, width = query.shape
    heads = (module.num_heads, width // module.num_heads)  # written out, since -1 cannot be inferred for an empty batch
    is_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
    kind = attention_of(module.config)
    if not is_graph and batch == 0:  # only eager attention can do an empty batch
        kind, attention_mask = "eager", None
    attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention)
    dropout = module.dropout if module.training else 0.0
    is_plain = not (module.is_causal or kwargs.get("is_causal") or dropout)
    if kind == "sdpa" and is_plain and not is_graph and _prefers_products(query, attention_mask):
        attention = product_attention
    mixed, weights = attention(
        module,
        query.unflatten(-1, heads).transpose(1, 2),  # (B, H, Lq, E)
        key.unflatten(-1, heads).transpose(1, 2),
        value.unflatten(-1, heads).transpose(1, 2),
        attention_mask,
        scaling=(width // module.num_heads) ** -0.5,
        dropout=dropout,
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
        """Attend: (B, L, W) → (B, L, W), and the weights (B, H, L, L), which only eager attention has."""
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
    """Initialise the bias of a linear layer as PyTorch and the original do: uniform in ±1/√inputs."""
    bound = linear.in_features**-0.5
    init.uniform_(linear.bias, -bound, bound)
