"""Resize tensors and crop their centre, on any device, as `resize` does it for Pillow images.

Grey levels equal Pillow's, except on a CPU where an image becomes clearly smaller: there torch's own arithmetic is
used, which is faster and differs by one level at most.

Dimensions: B batch, C channels, Y × X pixels, y × x pixels after resizing.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from .resize import WEIGHT_BITS, Layout, filter_weights, fixed_point, height_comes_first, is_much_longer, scale_and_cut

PIXELS_AT_ONCE = 1 << 26

CLEARLY_SMALLER = 2.0
"""Least reduction for which torch's own arithmetic for uint8, with weights of 16 bits, is close enough to Pillow's.

Above 3 no value was found that differs by more than one grey level. From 2 to 3 one value was, in sixty pages of black
and white text.
"""

RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def _scale_levels(pixels: Tensor, axis: int, outputs: int, first: int, last: int, filter_name: str) -> Tensor:
    """Resize grey levels (B, C, Y, X) along one axis with Pillow's arithmetic and keep the lines first … last - 1."""
    inputs = pixels.shape[axis]
    if outputs == inputs:
        return pixels.narrow(axis, first, last - first)
    start, weights = filter_weights(inputs, outputs, first, last - first, filter_name)
    exact = torch.float32 if pixels.device.type == "mps" else torch.float64  # float64 holds the sums exactly
    table = torch.from_numpy(fixed_point(weights)).to(pixels.device, exact)  # (outputs, inputs read)
    part = pixels.narrow(axis, start, table.shape[1]).to(exact)
    sums = part @ table.T if axis == 3 else table @ part
    return (sums / 2.0**WEIGHT_BITS + 0.5).floor_().clamp_(0, 255)


def _scale_floats(pixels: Tensor, axis: int, outputs: int, first: int, last: int, filter_name: str) -> Tensor:
    """Resize floats (B, C, Y, X) along one axis and keep the lines first … last - 1."""
    inputs = pixels.shape[axis]
    if outputs == inputs:
        return pixels.narrow(axis, first, last - first)
    if is_much_longer(outputs, last - first):
        start, weights = filter_weights(inputs, outputs, first, last - first, filter_name)
        table = torch.from_numpy(weights).to(pixels)  # (outputs, inputs read)
        part = pixels.narrow(axis, start, table.shape[1])
        return part @ table.T if axis == 3 else table @ part
    size = [outputs if dimension == axis else pixels.shape[dimension] for dimension in (2, 3)]
    scaled = functional.interpolate(pixels, size=size, mode=filter_name, antialias=True)
    return scaled.narrow(axis, first, last - first)


def _kept_part(layout: Layout) -> tuple[int, int, int, int]:
    """Compute the part of the resized image that is kept, without margins: left, top, right, bottom."""
    left, top = (max(edge, 0) for edge in layout.box[:2])
    right, bottom = (min(edge, limit) for edge, limit in zip(layout.box[2:], layout.size, strict=True))
    return left, top, right, bottom


def _passes(size: tuple[int, int], layout: Layout) -> list[tuple[int, int, int, int]]:
    """List the passes in Pillow's order: axis, number of lines, first line to keep, and line after the last to keep."""
    left, top, right, bottom = _kept_part(layout)
    passes = [(3, layout.size[0], left, right), (2, layout.size[1], top, bottom)]
    return passes[::-1] if height_comes_first(size, layout.size) else passes


def scale_levels_exactly(pixels: Tensor, layout: Layout, filter_name: str) -> Tensor:
    """Resize grey levels on any device, with results equal to Pillow's.

    Args:
        pixels: (B, C, Y, X) grey levels.
        layout: Size to resize to, and part to keep. Margins are left out.
        filter_name: "bicubic" or "bilinear".

    Returns:
        (B, C, y, x) grey levels, as whole floats.
    """
    passes, done = _passes((pixels.shape[3], pixels.shape[2]), layout), []
    for some in pixels.split(max(1, PIXELS_AT_ONCE // pixels[0].numel())):
        for axis, outputs, first, last in passes:
            some = _scale_levels(some, axis, outputs, first, last, filter_name)
        done.append(some.float())
    return torch.cat(done)


def _by_pillow(pixels: Tensor, layout: Layout, filter_name: str) -> Tensor:
    """Resize grey levels (B, C, Y, X) on a CPU with Pillow itself. C is 1 or 3."""
    rows = []
    for row in pixels:
        array = row.movedim(0, -1).contiguous().numpy()  # (Y, X, C)
        image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
        scaled = np.array(scale_and_cut(image, layout, RESAMPLE[filter_name]))
        rows.append(torch.from_numpy(scaled.reshape(*scaled.shape[:2], -1)))
    return torch.stack(rows).movedim(-1, 1)


def scale_and_cut_tensor(pixels: Tensor, layout: Layout, filter_name: str) -> Tensor:
    """Resize and cut a batch of tensors, on any device.

    Args:
        pixels: (B, C, Y, X), uint8 or floats from 0 to 1.
        layout: Size to resize to, and box to cut out.
        filter_name: "bicubic" or "bilinear".

    Returns:
        (B, C, y, x). uint8 becomes grey levels, as uint8 or as whole floats. They equal Pillow's, except on a CPU where
        an image becomes clearly smaller: there torch's own arithmetic for uint8 is used, which is faster. Floats become
        float32, not rounded, and differentiable.
    """
    is_levels = pixels.dtype == torch.uint8
    left, top, right, bottom = _kept_part(layout)
    new_width, new_height = layout.size
    height, width = pixels.shape[2:]
    height_first = height_comes_first((width, height), layout.size)
    is_quick = (
        is_levels
        and pixels.device.type == "cpu"
        and min(width / new_width, height / new_height) >= CLEARLY_SMALLER
        and not (is_much_longer(new_width, right - left) or is_much_longer(new_height, bottom - top))
    )
    if is_levels and layout.size == (width, height):
        pixels = pixels[..., top:bottom, left:right]
    elif is_quick and height_first:  # torch begins with the width, and the order matters where values are clipped
        pixels = functional.interpolate(pixels.mT, size=(new_width, new_height), mode=filter_name, antialias=True).mT
        pixels = pixels[..., top:bottom, left:right]
    elif is_quick:
        pixels = functional.interpolate(pixels, size=(new_height, new_width), mode=filter_name, antialias=True)
        pixels = pixels[..., top:bottom, left:right]
    elif is_levels and pixels.device.type == "cpu":
        return _by_pillow(pixels, layout, filter_name)
    elif is_levels:
        pixels = scale_levels_exactly(pixels, layout, filter_name)
    else:
        pixels = pixels.float()
        for axis, outputs, first, last in _passes((width, height), layout):
            pixels = _scale_floats(pixels, axis, outputs, first, last, filter_name)
        pixels = pixels.clamp(0, 1)
    margins = (left - layout.box[0], layout.box[2] - right, top - layout.box[1], layout.box[3] - bottom)
    return functional.pad(pixels, margins) if any(margins) else pixels
