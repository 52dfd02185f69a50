"""Divide batches into parts that fit the processor's cache, and skip padding and positions that no output needs.

Dimensions: B batch, L text length, C channels, Y × X pixels, P patches and class token, W tower width, D embedding.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..model.attention import HfClipAttention, HfClipEncoderLayer, attend, attention_of
from ..model.linear_map import apply_linear
from ..model.matryoshka import truncate
from ..model.text_ends import EndOfTextError, find_ends, find_starts
from .layers import STAGES, images_at_once, rows_at_once
from .measure import LEAST_GAIN, gain_of_products
from .replace import attend_by_products_, has_hooks


def _even_parts(batch: Tensor, most: int) -> tuple[Tensor, ...]:
    """Divide a batch into as few parts of at most `most` rows as possible, of about equal size."""
    return batch.tensor_split(-(-len(batch) // max(1, most)))


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _work_in_parts_(tower: Any, part_size: Callable[[Tensor], int], encode: Callable[..., Any] | None = None) -> None:
    """Let a tower encode its input in parts. If the outputs of all layers are asked for, it is encoded at once.

    Args:
        tower: The tower, whose `forward` is replaced.
        part_size: Returns the number of rows of a part, given the input.
        encode: Encodes a part. None: the tower's own `forward`.
    """
    whole = tower.forward
    encode = encode or whole
    captured = ("output_hidden_states", "output_attentions")

    def forward(input: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        input = kwargs.pop(tower.main_input_name, input)
        is_simple = isinstance(input, Tensor) and input.ndim > 1 and input.numel() > 0 and not args
        is_simple = is_simple and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        is_simple = is_simple and not any(isinstance(value, Tensor) for value in kwargs.values())
        is_simple = is_simple and not any(kwargs.get(name, getattr(tower.config, name, False)) for name in captured)
        if not is_simple:
            return whole(input, *args, **kwargs)
        as_dict = kwargs.pop("return_dict", tower.config.return_dict) is not False
        try:
            parts = [encode(part, return_dict=True, **kwargs) for part in _even_parts(input, part_size(input))]
        except EndOfTextError:
            return whole(input, **kwargs)  # raises the error with places in the whole batch
        fields = ("last_hidden_state", "pooler_output")
        output = BaseModelOutputWithPooling(**{name: _join([part[name] for part in parts]) for name in fields})
        return output if as_dict else output.to_tuple()

    tower.forward = forward


def _positions(tower: Any) -> int:
    """Return P, for an image of the ViT's own size."""
    return 1 + tower.config.grid_size**2


def _rows_in_parts(tower: Any) -> Callable[[Tensor], int]:
    """Return a function from texts (B, L), or images (B, C, Y, X), to the number that a transformer takes at once."""
    if tower.config.model_type == "hf_clip_text":
        return lambda ids: rows_at_once(tower.dtype) // ids.shape[1]
    area = tower.config.patch_size**2
    return lambda images: rows_at_once(tower.dtype) // (1 + images[0, 0].numel() // area)


def is_of_own_size(images: Any, tower: Any) -> bool:
    """Whether these are images of the tower's own size, so that nothing has to be resampled or refused."""
    shape = (tower.config.num_channels, tower.config.image_size, tower.config.image_size)
    return isinstance(images, Tensor) and images.shape[1:] == shape and images.is_floating_point()


def _work_depth_first_(tower: Any, is_as_made: bool) -> None:
    """Let each stage of a ResNet process feature maps while they are in the cache.

    Early stages have large maps and take few images at once, later stages take more. The images that a stage takes at
    once go through the earlier stages in smaller parts.

    If the tower was changed (`is_as_made` is False), its own `forward` encodes as many images as the last stage takes.
    """
    whole = tower.forward
    stages = [tower.get_submodule(name) for name in STAGES]

    def run(images: Tensor, last: int) -> Tensor:
        maps = []
        for part in _even_parts(images, images_at_once(tower, images[0, 0].numel(), last)):
            maps.append(stages[last](run(part, last - 1) if last else tower.stem(part)))
        return _join(maps)

    def encode(images: Tensor, **kwargs: Any) -> Any:
        if not (is_as_made and is_of_own_size(images, tower)):
            return whole(images, **kwargs)  # resamples positions, or refuses the images
        feature_map = run(images.to(tower.dtype), len(stages) - 1)
        pooled, _ = tower.attnpool(feature_map)
        return BaseModelOutputWithPooling(last_hidden_state=feature_map, pooler_output=pooled)

    _work_in_parts_(tower, lambda images: images_at_once(tower, images[0, 0].numel(), len(stages) - 1), encode)


def _encode_texts_by_length_(model: Any) -> None:
    """Let `encode_text` sort texts by length, divide them into parts, and skip the columns after the longest text."""
    whole = model.encode_text

    def encode_text(input_ids: Tensor, attention_mask: Tensor | None = None, truncate_dim: int | None = None) -> Tensor:
        is_simple = isinstance(input_ids, Tensor) and input_ids.ndim == 2 and min(input_ids.shape) > 0
        is_simple = is_simple and not input_ids.is_floating_point() and not torch.jit.is_tracing()
        is_simple = is_simple and find_starts(attention_mask) is None
        if not is_simple:
            return whole(input_ids, attention_mask, truncate_dim)
        lengths = find_ends(input_ids, None, model.config.text_config)[0] + 1
        if attention_mask is not None and not _hides_only_ends(attention_mask, lengths, input_ids):
            return whole(input_ids, attention_mask, truncate_dim)
        lengths, order = lengths.sort()
        features, first, most = [], 0, rows_at_once(model.dtype)
        while first < len(order):
            # A part has as many texts as give at most `most` positions. Its last text is its longest.
            positions = torch.arange(1, len(order) - first + 1) * lengths[first:]
            last = first + max(1, int((positions <= most).sum()))
            features.append(whole(input_ids[order[first:last], : int(lengths[last - 1])]))
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


def encode_by_class_token(model: Any, images: Tensor) -> Tensor:
    """Compute image features (B, D) of a ViT, whose last layer is computed for the class token alone."""
    tower = model.vision_model
    *layers, last = tower.encoder.layers
    hidden_states = tower.pre_layrnorm(tower.embeddings(images))
    for layer in layers:
        hidden_states = layer(hidden_states)
    states, class_token, attention = last.layer_norm1(hidden_states), hidden_states[:, :1], last.self_attn
    query = apply_linear(attention.q_proj, states[:, :1])
    key, value = apply_linear(attention.k_proj, states), apply_linear(attention.v_proj, states)
    class_token = class_token + apply_linear(attention.out_proj, attend(attention, query, key, value)[0])
    class_token = class_token + last.mlp(last.layer_norm2(class_token))
    return model.visual_projection(tower.post_layernorm(class_token[:, 0]))


def _encode_images_by_class_token_(model: Any) -> None:
    """Let `encode_image` compute a ViT's last layer for the class token alone, since it needs no other position.

    Hooks on the layer or its parts would not be called, so with hooks the layer is computed as usual.
    """
    whole, tower = model.encode_image, model.vision_model

    def encode_image(
        pixel_values: Tensor, interpolate_pos_encoding: bool = False, truncate_dim: int | None = None
    ) -> Tensor:
        is_simple = is_of_own_size(pixel_values, tower) and len(pixel_values) > 0
        is_simple = is_simple and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        if not is_simple or any(map(has_hooks, parts_around_the_last_layer(tower))):
            return whole(pixel_values, interpolate_pos_encoding, truncate_dim)
        size = rows_at_once(tower.dtype) // _positions(tower)
        features = [encode_by_class_token(model, part) for part in _even_parts(pixel_values, size)]
        return truncate(_join(features), truncate_dim, model.config)

    model.encode_image = encode_image


def parts_around_the_last_layer(tower: Any) -> tuple[nn.Module, ...]:
    last = tower.encoder.layers[-1]
    return tower, tower.encoder, last, last.self_attn


def _is_as_made(model: Any, tower: Any) -> bool:
    """Whether a model and its image tower encode images by this package's methods, not those of a subclass or patch."""
    names = {"HfClipModel.encode_image", "HfClipViTModel.forward", "HfClipResNetModel.forward"}
    methods = (type(tower).forward, getattr(type(model), "encode_image", type(tower).forward))
    is_patched = "forward" in vars(tower) or "encode_image" in vars(model)
    return not is_patched and all(method.__qualname__ in names for method in methods)


def can_encode_by_class_token(model: Any) -> bool:
    """Whether a model's images are encoded by a ViT whose last layer is as this package makes it."""
    if not (hasattr(model, "encode_image") and hasattr(model.vision_model, "encoder")):
        return False
    around, kinds = parts_around_the_last_layer(model.vision_model), (HfClipEncoderLayer, HfClipAttention)
    is_plain = tuple(map(type, around[2:])) == kinds and not any("forward" in vars(part) for part in around)
    return is_plain and _is_as_made(model, model.vision_model)


def suit_the_cache_(model: Any) -> list[str]:
    """Make all changes of this file to a model on a CPU. Returns descriptions of the changes."""
    by_class_token = can_encode_by_class_token(model)
    for tower in [module for module in model.modules() if hasattr(module, "attnpool") or hasattr(module, "encoder")]:
        kind = tower.config.model_type
        is_half_vit = kind == "hf_clip_vit" and tower.dtype == torch.bfloat16
        if is_half_vit and attention_of(tower.config) == "sdpa":
            heads = tower.config.num_attention_heads
            width = tower.config.hidden_size // heads
            if gain_of_products(heads, width, _positions(tower), tower.dtype) >= LEAST_GAIN:
                attend_by_products_(tower)
        if kind == "hf_clip_resnet":
            _work_depth_first_(tower, _is_as_made(model, tower))
        else:
            _work_in_parts_(tower, _rows_in_parts(tower))
    done = ["large batches cut into parts that stay in the cache"]
    if hasattr(model, "encode_text"):
        _encode_texts_by_length_(model)
        done.append("encode_text sorts its texts by length and computes no padding")
        if by_class_token:
            _encode_images_by_class_token_(model)
            done.append("encode_image computes its last layer for the class token alone")
    return done
