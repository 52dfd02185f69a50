"""Where in an image a text is: a map of similarities with what each part of the image shows.

CLIP learns one feature an image, and the features of its patches are no feature of what lies there: in a ViT they are
even less similar to the right text than to others. What lies at a place is in the values that the last attention would
gather from it. Mapped by the rest of the way to an image's feature, they are comparable with texts (Zhou et al. 2022,
"Extract Free Dense Labels from CLIP", section 3.2). The same holds for the attention pool of a ResNet.

Dimensions: T texts, D embedding, C channels, P patches and class token, Y × X cells of the grid.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..model.linear_map import apply_linear
from ..model.optimized import OptimizedModelError
from .features import encode_texts, image_processor_of
from .seen_square import cell_of, check_map_size, settings_of_square


def _vit_values(tower: Any, pixels: Tensor) -> Tensor:
    """What the last layer's attention gathers from each patch, (1, Y · X, W)."""
    hidden_states = tower.pre_layrnorm(tower.embeddings(pixels))
    *layers, last = tower.encoder.layers
    for layer in layers:
        hidden_states = layer(hidden_states)
    attention = last.self_attn
    values = apply_linear(attention.v_proj, last.layer_norm1(hidden_states)[:, 1:])
    return tower.post_layernorm(apply_linear(attention.out_proj, values))


def last_feature_map(tower: Any, pixels: Tensor) -> Tensor:
    """The last feature map of a ResNet, (1, C, Y, X), without its attention pool, whose positions fit one size."""
    feature_map = tower.stem(pixels)
    for stage in (tower.layer1, tower.layer2, tower.layer3, tower.layer4):
        feature_map = stage(feature_map)
    return feature_map


def _resnet_values(tower: Any, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """What the attention pool gathers from each cell, (1, Y · X, W), and (Y, X)."""
    feature_map = last_feature_map(tower, pixels)
    height, width = feature_map.shape[-2:]
    return apply_linear(tower.attnpool.v_proj, feature_map.flatten(2).transpose(1, 2)), (height, width)


@torch.no_grad()
def relevance_map(
    model: Any, processor: Any, image: Any, texts: str | Sequence[str], *, image_size: int | None = None
) -> Tensor:
    """Compute how much each part of an image is like each text.

    Compare texts at a place, or places for a text; values are cosine similarities, which are low for all.

    Args:
        model: HfClipModel, not optimized.
        processor: HfClipProcessor.
        image: A Pillow image, an array, a path, a URL or bytes.
        texts: One text or T texts, such as "a photo of a dog".
        image_size: Side of the square in pixels that the image is scaled and cut to; a multiple of the patch size, or
            of 32 for a ResNet. More pixels make a finer map. None: the model's own.

    Returns:
        (T, Y, X) float32, on the model's device: a cell for each patch of a ViT, or each cell of a ResNet's last map,
        of the square that the image processor cuts out.

    Raises:
        OptimizedModelError: The model was optimized.
        UnreadableImageError: The image cannot be read.
        ValueError: `image_size` does not fit, or there are no texts.

    Example::

        cats, dogs = relevance_map(model, processor, "pets.jpg", ["a photo of a cat", "a photo of a dog"])
        (cats > dogs).float().mean()  # how much of the image is more like a cat
    """
    if getattr(model, "optimizations", None) is not None:
        raise OptimizedModelError("This model was optimized for inference and shows no map; load it again for that.")
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not texts:
        raise ValueError("There are no texts; pass at least one, such as 'a photo of a dog'.")
    is_vit, cell = hasattr(model.vision_model, "encoder"), cell_of(model.vision_model)
    check_map_size(image_size, cell)
    settings = settings_of_square(image_size)
    pixels = image_processor_of(processor)([image], return_tensors="pt", **settings)["pixel_values"]
    pixels = pixels.to(model.device, model.dtype)
    if is_vit:
        grid = (pixels.shape[-2] // cell, pixels.shape[-1] // cell)
        values = _vit_values(model.vision_model, pixels)
    else:
        values, grid = _resnet_values(model.vision_model, pixels)
    places = normalize(model.visual_projection(values)[0].float(), dim=-1)  # (Y · X, D)
    return (encode_texts(model, processor, texts) @ places.T).unflatten(1, grid)


__all__ = ["last_feature_map", "relevance_map"]
