"""`encode_image` and `encode_text`, without what no feature needs.

A feature is taken at one position: a ViT's at the class token, a text's at its end. So the last layer is computed for
that position alone. Padding after the longest text of a part is left out. Where the texts of a part differ in length,
they stand one after the other in all products, without padding; only attention sees them apart.

Dimensions: B batch, L text length, C channels, Y × X pixels, P patches and class token, W tower width, D embedding.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..model.attention import HfClipAttention, HfClipEncoderLayer, attend, attention_of
from ..model.linear_map import apply_linear
from ..model.matryoshka import truncate
from ..model.text_ends import find_ends, find_starts
from .batches import even_parts, is_of_own_size, join, positions_of
from .layers import PackedEncoderLayer, RowsOfTexts
from .parts import PartSize
from .replace import has_hooks

LEAST_PADDING = 1 / 16
"""Share of padding below which texts are computed with it: to take them apart for attention costs time too."""


def parts_around_the_last_layer(tower: Any) -> tuple[nn.Module, ...]:
    """What a tower's `forward` calls, and what is not called where its last layer is computed for one position."""
    last = tower.encoder.layers[-1]
    return tower, tower.encoder, last, last.self_attn


def is_as_made(model: Any, tower: Any, method: str) -> bool:
    """Whether a model and a tower encode by this package's methods, not by those of a subclass or of a patch."""
    names = {f"HfClipModel.{method}", "HfClipViTModel.forward", "HfClipResNetModel.forward", "HfClipTextModel.forward"}
    methods = (type(tower).forward, getattr(type(model), method, type(tower).forward))
    is_patched = "forward" in vars(tower) or method in vars(model)
    return not is_patched and all(method.__qualname__ in names for method in methods)


def has_plain_last_layer(tower: Any) -> bool:
    """Whether a transformer's last layer is one of this package, with maps of its own for q, k and v."""
    around = parts_around_the_last_layer(tower)
    is_patched = any("forward" in vars(part) for part in around)
    return tuple(map(type, around[2:])) == (HfClipEncoderLayer, HfClipAttention) and not is_patched


def takes_texts_together(tower: Any) -> bool:
    """Whether the layers of a text tower before the last one can compute texts without padding.

    Hooks would be called with other shapes than usual, so with hooks padding is computed.
    """
    layers = tower.encoder.layers[:-1]
    is_packed = all(type(layer) is PackedEncoderLayer for layer in layers)
    return is_packed and not any(has_hooks(part) for layer in layers for part in layer.modules())


def skips_padding(model: Any) -> bool:
    """Whether `encode_text` of a model costs about as much as its texts have positions, however they differ."""
    return "encode_text" in vars(model) and hasattr(model, "text_model") and takes_texts_together(model.text_model)


def encode_at(
    tower: Any,
    hidden_states: Tensor,
    places: Tensor | None,
    attention_mask: Tensor | None = None,
    rows: RowsOfTexts | None = None,
) -> Tensor:
    """Run all layers, the last one for one position of each row alone.

    Args:
        tower: A text tower or a ViT.
        hidden_states: (B, L, W), the input of the first layer.
        places: (B,) the positions. None: the first.
        attention_mask: (B, 1, 1, L), true where the last layer's queries may look. None: everywhere.
        rows: Where the layers before the last one have no padding. None: they compute it.

    Returns:
        (B, W), the output of the last layer.
    """
    *layers, last = tower.encoder.layers
    if rows is None:
        for layer in layers:
            hidden_states = layer(hidden_states)
    else:
        together = rows.together(hidden_states)
        for layer in layers:
            together = layer(together, rows=rows)
        hidden_states = rows.apart(together)
    states, attention = last.layer_norm1(hidden_states), last.self_attn
    if places is None:
        one, query = hidden_states[:, :1], states[:, :1]
    else:
        each = torch.arange(len(places))
        one, query = (part[each, places][:, None] for part in (hidden_states, states))
    query = apply_linear(attention.q_proj, query)
    key, value = apply_linear(attention.k_proj, states), apply_linear(attention.v_proj, states)
    one = one + apply_linear(attention.out_proj, attend(attention, query, key, value, attention_mask)[0])
    return (one + last.mlp(last.layer_norm2(one)))[:, 0]


def encode_texts_by_length_(model: Any, size: PartSize, by_end: bool) -> None:
    """Let `encode_text` sort texts by length, divide them into parts, and skip the columns after the longest text.

    Args:
        model: The model.
        size: Positions of a part.
        by_end: Whether the last layer is computed at the ends of texts alone. Hooks on the layer or its attention would
            not be called, so with hooks it is computed as usual.
    """
    whole, tower = model.encode_text, model.text_model

    def encode(input_ids: Tensor, lengths: Tensor) -> Tensor:
        is_simple = by_end and attention_of(tower.config) == "sdpa" and not torch.compiler.is_compiling()
        if not is_simple or any(map(has_hooks, parts_around_the_last_layer(tower))):
            return whole(input_ids)
        mask = rows = None
        if int(lengths[0]) < input_ids.shape[1]:  # the shortest
            shown = torch.arange(input_ids.shape[1]) < lengths[:, None]
            mask = shown[:, None, None]
            padding = shown.numel() - int(lengths.sum())
            rows = (
                RowsOfTexts(shown) if padding > LEAST_PADDING * shown.numel() and takes_texts_together(tower) else None
            )
        ends = encode_at(tower, tower.embeddings(input_ids), lengths - 1, mask, rows)
        return model.text_projection(tower.final_layer_norm(ends))

    def encode_text(input_ids: Tensor, attention_mask: Tensor | None = None, truncate_dim: int | None = None) -> Tensor:
        is_simple = isinstance(input_ids, Tensor) and input_ids.ndim == 2 and min(input_ids.shape) > 0
        is_simple = is_simple and not input_ids.is_floating_point() and not torch.jit.is_tracing()
        is_simple = is_simple and find_starts(attention_mask) is None
        if not is_simple or input_ids.shape[1] > tower.config.max_position_embeddings:  # the tower refuses the latter
            return whole(input_ids, attention_mask, truncate_dim)
        lengths = find_ends(input_ids, None, model.config.text_config)[0] + 1
        if attention_mask is not None and not _hides_only_ends(attention_mask, lengths, input_ids):
            return whole(input_ids, attention_mask, truncate_dim)
        if len(lengths) == 1:
            return truncate(encode(input_ids[:, : int(lengths)], lengths), truncate_dim, model.config)
        lengths, order = lengths.sort()
        features, first, most = [], 0, size.now()
        while first < len(order):
            # A part has as many texts as give at most `most` positions. Its last text is its longest.
            positions = torch.arange(1, len(order) - first + 1) * lengths[first:]
            last = first + max(1, int((positions <= most).sum()))
            ids = input_ids[order[first:last], : int(lengths[last - 1])]
            features.append(encode(ids, lengths[first:last]))
            first = last
        return truncate(torch.cat(features)[order.argsort()], truncate_dim, model.config)

    model.encode_text = encode_text


def _hides_only_ends(attention_mask: Tensor, lengths: Tensor, input_ids: Tensor) -> bool:
    """Whether a mask shows each text up to its end. What it hides after the end changes no feature."""
    if attention_mask.shape != input_ids.shape:
        return False
    shown = attention_mask.to(torch.bool)
    is_needed = torch.arange(shown.shape[1], device=shown.device) < lengths[:, None]
    return bool((shown | ~is_needed).all())


def can_encode_by_class_token(model: Any) -> bool:
    """Whether a model's images are encoded by a ViT whose last layer is as this package makes it."""
    if not (hasattr(model, "encode_image") and hasattr(model.vision_model, "encoder")):
        return False
    return has_plain_last_layer(model.vision_model) and is_as_made(model, model.vision_model, "encode_image")


def encode_by_class_token(model: Any, images: Tensor) -> Tensor:
    """Compute image features (B, D) of a ViT, whose last layer is computed for the class token alone."""
    tower = model.vision_model
    tokens = encode_at(tower, tower.pre_layrnorm(tower.embeddings(images)), None)
    return model.visual_projection(tower.post_layernorm(tokens))


def encode_images_by_class_token_(model: Any, size: PartSize) -> None:
    """Let `encode_image` compute a ViT's last layer for the class token alone, since it needs no other position.

    Hooks on the layer or its parts would not be called, so with hooks the layer is computed as usual.

    Args:
        model: The model.
        size: Positions of a part.
    """
    whole, tower = model.encode_image, model.vision_model

    def encode_image(
        pixel_values: Tensor, interpolate_pos_encoding: bool = False, truncate_dim: int | None = None
    ) -> Tensor:
        is_simple = is_of_own_size(pixel_values, tower) and len(pixel_values) > 0
        is_simple = is_simple and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        if not is_simple or any(map(has_hooks, parts_around_the_last_layer(tower))):
            return whole(pixel_values, interpolate_pos_encoding, truncate_dim)
        parts = even_parts(pixel_values, size.now() // positions_of(tower))
        return truncate(join([encode_by_class_token(model, part) for part in parts]), truncate_dim, model.config)

    model.encode_image = encode_image


def encode_what_features_need_(model: Any, sizes: dict[Any, PartSize]) -> list[str]:
    """Make the changes of this file to a model of both towers on a CPU. Returns descriptions of the changes.

    Args:
        model: The model, whose towers do not yet work in parts.
        sizes: The size of a part, by tower.
    """
    done = []
    if hasattr(model, "encode_text"):
        tower = model.text_model
        by_end = is_as_made(model, tower, "encode_text") and has_plain_last_layer(tower)
        encode_texts_by_length_(model, sizes[tower], by_end)
        done.append("encode_text sorts its texts by length and computes no padding")
        if by_end:
            done.append("encode_text computes its last layer at the ends of texts alone")
    if can_encode_by_class_token(model):
        encode_images_by_class_token_(model, sizes[model.vision_model])
        done.append("encode_image computes its last layer for the class token alone")
    return done
