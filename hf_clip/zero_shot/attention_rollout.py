"""Which parts of an image its feature was gathered from, whatever the text: attention rollout.

A ViT's class token gathers from the patches in each layer, and the patches gather from one another before. Rollout
follows both (Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers", section 3): a layer passes on
A = (W + I) / 2, where W are its weights, averaged over the heads, and I is the residual connection. The product of all
layers' A says which share of the class token came from which patch. A ResNet has one attention, that of its pool: the
weights of the mean's query over the cells.

The queries and keys are computed here, beside the layers, since no kind of attention but `eager` returns weights. So
the model is neither changed nor hooked, and several threads may use it.

Dimensions: H attention heads, P patches and class token (of a ResNet: cells and their mean), Q queries, W tower width,
C channels, Y × X cells.
"""

from typing import Any

import torch
from torch import Tensor

from ..model.linear_map import apply_linear
from ..model.optimized import OptimizedModelError
from ..model.position_table import resize_position_table
from .features import image_processor_of
from .relevance import last_feature_map
from .seen_square import cell_of, check_map_size, settings_of_square


def _mean_weights(attention: Any, queries: Tensor, keys: Tensor) -> Tensor:
    """Compute attention weights, averaged over the heads.

    Args:
        attention: The attention module, with `num_heads`.
        queries: Projected queries (1, Q, W), of all positions or of the first alone.
        keys: Projected keys (1, P, W).

    Returns:
        (Q, P), float32. Each row sums to 1.
    """
    heads = (attention.num_heads, queries.shape[-1] // attention.num_heads)
    query, key = (part[0].float().unflatten(-1, heads).transpose(0, 1) for part in (queries, keys))  # (H, P, W / H)
    return (query @ key.transpose(1, 2) * heads[1] ** -0.5).softmax(dim=-1).mean(dim=0)


def _vit_rollout(tower: Any, pixels: Tensor) -> Tensor:
    """Return the shares of the patches in the class token, (P - 1,)."""
    hidden_states = tower.pre_layrnorm(tower.embeddings(pixels))
    passed_on: list[Tensor] = []
    for layer in tower.encoder.layers:
        attention, normed = layer.self_attn, layer.layer_norm1(hidden_states)
        queries, keys = (apply_linear(p, normed) for p in (attention.q_proj, attention.k_proj))
        passed_on.append(_mean_weights(attention, queries, keys))  # (P, P)
        if len(passed_on) < len(tower.encoder.layers):  # what comes out of the last layer is not needed
            hidden_states = layer(hidden_states)
    # Only the class token's row of the product is needed. From the last layer on it is a vector times each matrix.
    share = torch.zeros_like(passed_on[0][0])
    share[0] = 1
    for weights in reversed(passed_on):
        share = (share @ weights + share) / 2
    return share[1:]


def _resnet_weights(tower: Any, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return the attention pool's weights of the cells, (Y · X,), and (Y, X)."""
    feature_map = last_feature_map(tower, pixels)
    pool, (height, width) = tower.attnpool, feature_map.shape[-2:]
    cells = feature_map.flatten(2).transpose(1, 2)
    tokens = torch.cat([cells.mean(dim=1, keepdim=True), cells], dim=1)  # (1, P, W)
    positions = pool.positional_embedding
    if (height, width) != (pool.grid_size, pool.grid_size):
        positions = resize_position_table(positions, pool.grid_size, height, width)
    tokens = tokens + positions.to(tokens.dtype)
    weights = _mean_weights(pool, apply_linear(pool.q_proj, tokens[:, :1]), apply_linear(pool.k_proj, tokens))
    return weights[0, 1:], (height, width)


@torch.no_grad()
def attention_rollout(model: Any, processor: Any, image: Any, *, image_size: int | None = None) -> Tensor:
    """Compute from which parts of an image its feature was gathered.

    It says where the model looks, and nothing about a text; see `relevance_map` for that.

    Args:
        model: HfClipModel or HfClipVisionModelWithProjection, not optimized, loaded with any kind of attention.
        processor: HfClipProcessor or HfClipImageProcessor.
        image: A Pillow image, an array, a path, a URL or bytes.
        image_size: Side of the square in pixels that the image is scaled and cut to; a multiple of the patch size, or
            of 32 for a ResNet. More pixels make a finer map. None: the model's own.

    Returns:
        (Y, X) float32, on the model's device, at least 0. It sums to 1: what the class token (in a ResNet: the mean of
        the cells) had from itself is left out. A cell for each patch of a ViT, or each cell of a ResNet's last map, of
        the square that the image processor cuts out (`seen_region`).

    Raises:
        OptimizedModelError: The model was optimized.
        UnreadableImageError: The image cannot be read.
        ValueError: `image_size` does not fit.

    Example::

        shares = attention_rollout(model, processor, "pets.jpg")  # (7, 7) for ViT-B/32
        shares[:, 3:].sum()  # how much of the image's feature came from the right half
    """
    tower = model.vision_model
    if any(getattr(part, "optimizations", None) is not None for part in (model, tower)):
        raise OptimizedModelError(
            "This model was optimized for inference and shows no attention; load it again for that."
        )
    is_vit, cell = hasattr(tower, "encoder"), cell_of(tower)
    check_map_size(image_size, cell)
    settings = settings_of_square(image_size)
    pixels = image_processor_of(processor)([image], return_tensors="pt", **settings)["pixel_values"]
    pixels = pixels.to(model.device, model.dtype)
    if is_vit:
        shares, grid = _vit_rollout(tower, pixels), (pixels.shape[-2] // cell, pixels.shape[-1] // cell)
    else:
        shares, grid = _resnet_weights(tower, pixels)
    return (shares / shares.sum()).unflatten(0, grid)


__all__ = ["attention_rollout"]
