"""The square that an image processor makes of an image: what of the image the model saw.

Dimensions: Y × X pixels.
"""

from dataclasses import replace
from typing import Any

from transformers.image_utils import SizeDict

from .features import image_processor_of


def settings_of_square(image_size: int | None) -> dict[str, Any]:
    """Return an image processor's settings for a square of another side than its own, in pixels. None: its own."""
    if image_size is None:
        return {}
    return {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}


def cell_of(tower: Any) -> int:
    """Side of a cell of a tower's maps, in pixels: a ViT's patch, or what a ResNet's strides come to."""
    return tower.config.patch_size if hasattr(tower, "encoder") else tower.config.total_stride


def check_map_size(image_size: int | None, cell: int) -> None:
    """Raise ValueError for a side in pixels that is no multiple of a cell's."""
    if image_size is not None and (image_size < cell or image_size % cell):
        raise ValueError(
            f"image_size is {image_size}, but must be a multiple of {cell}, which is a cell of this model."
        )


def seen_region(
    processor: Any, size: tuple[int, int], *, image_size: int | None = None
) -> tuple[float, float, float, float]:
    """Compute which part of an image a model sees.

    Args:
        processor: HfClipProcessor or HfClipImageProcessor.
        size: Width and height of the image, in pixels.
        image_size: As for `relevance_map`.

    Returns:
        Left, top, right, bottom in pixels of the image. By default it is the square at the centre. With `fit="squash"`
        it is the whole image. With `fit="pad"` it reaches beyond the image, where the margins are.

    Example::

        seen_region(processor, (640, 480))  # (80.0, 0.0, 560.0, 480.0)
    """
    steps = image_processor_of(processor).steps()
    settings = {name: SizeDict(**sides) for name, sides in settings_of_square(image_size).items()}
    steps = replace(steps, **settings)
    layout = steps.layout(size)
    left, top, right, bottom = layout.box
    if margins := steps.margins(bottom - top, right - left):
        left, right, top, bottom = left - margins[0], right + margins[1], top - margins[2], bottom + margins[3]
    across, down = (old / new for old, new in zip(size, layout.size, strict=True))
    return left * across, top * down, right * across, bottom * down


__all__ = ["cell_of", "check_map_size", "seen_region", "settings_of_square"]
