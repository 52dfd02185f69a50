"""Scale images of several sizes at once, on any device, with Pillow's arithmetic.

Pillow resizes along each axis by fixed-point weights of 22 bits and rounds to whole grey levels in between. It begins
with the width or with the height, see `hf_clip.model.resize`. Here each pass is a matrix product for all images.

Invariant: grey levels equal Pillow's. Products are taken in float32, which all devices multiply fast. To be exact,
weights are split in two parts of 11 bits, so that all products and sums are whole numbers below 2²⁴; TF32 holds the
factors too. Only where an image becomes more than sixteen times smaller may single values differ by one level.

Dimensions: B batch, Y × X pixels, y × x pixels that the model gets, K weights of a pixel.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...model.resize import BICUBIC_A, SUPPORT, WEIGHT_BITS, height_comes_first
from ...model.resize_tensors import PIXELS_AT_ONCE
from ...model.tensor_steps import TORCH_FILTERS, Steps

LOW_BITS = WEIGHT_BITS // 2


@dataclass(frozen=True)
class Placement:
    """Where an image goes.

    Attributes:
        size: Width and height of the image.
        new_size: To which it is resized.
        first: The column and row after resizing that come first in what the model gets; below 0 where margins do.
    """

    size: tuple[int, int]
    new_size: tuple[int, int]
    first: tuple[int, int]

    @classmethod
    def of(cls, steps: Steps, size: tuple[int, int]) -> "Placement":
        """Where the image processor puts an image of a size."""
        layout = steps.layout(size)
        left, top = layout.box[:2]
        width, height = (layout.box[axis + 2] - layout.box[axis] for axis in (0, 1))
        if margins := steps.margins(height, width):
            left, top = left - margins[0], top - margins[2]
        return cls(size, layout.size, (left, top))

    @property
    def is_height_first(self) -> bool:
        return bool(height_comes_first(self.size, self.new_size))


def _passes_weights(
    placements: Sequence[Placement], axis: int, count: int, most: int, name: str, device: Any
) -> Tensor:
    """Pillow's weights along one axis as matrices of whole numbers (B, count, most), float32, of 2²² in all."""
    where = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    numbers = [(p.size[axis], p.new_size[axis], p.first[axis]) for p in placements]
    inputs, outputs, first = torch.tensor(numbers, dtype=torch.float64).to(where).T[..., None]  # (B, 1) each
    scale = inputs / outputs
    stretch = scale.clamp(min=1)
    support = SUPPORT[name] * stretch
    place = first + torch.arange(count, device=where)  # (B, count)
    centre = (place + 0.5) * scale
    low = (centre - support + 0.5).trunc().clamp(min=0)
    high = torch.minimum((centre + support + 0.5).trunc(), inputs)
    widest = max(max(p.size[axis] / p.new_size[axis], 1.0) for p in placements)
    taps = torch.arange(2 * math.ceil(SUPPORT[name] * widest) + 2, device=where)  # (K,)
    x = ((low[..., None] + taps - centre[..., None] + 0.5) * (1 / stretch)[..., None]).abs()  # (B, count, K)
    if name == "bilinear":
        weights = (1 - x).clamp(min=0)
    else:
        a = BICUBIC_A
        near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * a
        weights = torch.where(x < 1.0, near, torch.where(x < 2.0, far, 0.0))
    weights = torch.where(taps < (high - low)[..., None], weights, 0.0)
    total = torch.zeros_like(centre)
    for tap in range(len(taps)):  # summed in Pillow's order, to be equal in the last bit
        total = total + weights[..., tap]
    is_there = (place >= 0) & (place < outputs)
    weights = torch.where(is_there[..., None], weights / total[..., None], 0.0) * 2.0**WEIGHT_BITS
    weights = (weights + torch.where(weights < 0, -0.5, 0.5)).trunc()
    columns = (low[..., None] + taps).long().clamp(0, most + len(taps) - 1)
    table = torch.zeros(*place.shape, most + len(taps), device=where)
    return table.scatter_(2, columns, weights.float())[..., :most].to(device)


def _rounded(table: Tensor, multiply: Any) -> Tensor:
    """Weighted sums of grey levels, rounded and clipped. multiply: a table of weights → products, float32."""
    high = (table / 2**LOW_BITS).round()
    sums = multiply(high).int() << LOW_BITS
    sums = sums + multiply(table - high * 2**LOW_BITS).int() + (1 << (WEIGHT_BITS - 1))
    return (sums >> WEIGHT_BITS).clamp_(0, 255).float()


def _scale_group(
    images: Sequence[Tensor], placements: Sequence[Placement], frame: tuple[int, int], name: str
) -> Tensor:
    """Images (Y, X, 3) that are all resized in the same order of axes → (B, 3, y, x), whole floats."""
    device, (width, height) = images[0].device, frame
    most_x, most_y = (max(p.size[axis] for p in placements) for axis in (0, 1))
    pixels = torch.zeros(len(images), most_y, 3, most_x, device=device)
    for row, image in zip(pixels, images, strict=True):
        row[: image.shape[0], :, : image.shape[1]] = image.movedim(-1, 1)
    columns = _passes_weights(placements, 0, width, most_x, name, device).mT  # (B, X, x)
    rows = _passes_weights(placements, 1, height, most_y, name, device)  # (B, y, Y)
    for axis in (1, 0) if placements[0].is_height_first else (0, 1):
        if axis == 0:
            lines = pixels.flatten(1, 2)  # (B, Y·3, X)
            pixels = _rounded(columns, lambda table, lines=lines: torch.bmm(lines, table)).unflatten(1, (-1, 3))
        else:
            lines = pixels.flatten(2)  # (B, Y, 3·X)
            pixels = _rounded(rows, lambda table, lines=lines: torch.bmm(table, lines)).unflatten(2, (3, -1))
    return pixels.movedim(2, 1)


def _groups(placements: Sequence[Placement]) -> Iterator[list[int]]:
    """Places of images that are scaled together: of one order of axes, like sizes, and few enough for the memory."""
    places = sorted(range(len(placements)), key=lambda n: (placements[n].is_height_first, placements[n].size))
    group: list[int] = []
    for place in places:
        size, is_height_first = placements[place].size, placements[place].is_height_first
        sizes = [placements[other].size for other in group] + [size]
        area = max(width for width, _ in sizes) * max(height for _, height in sizes)
        is_alike = not group or placements[group[0]].is_height_first == is_height_first
        if group and (not is_alike or 3 * area * len(sizes) > PIXELS_AT_ONCE):
            yield group
            group = []
        group.append(place)
    if group:
        yield group


def scale_on_device(
    images: Sequence[Tensor], placements: Sequence[Placement], frame: tuple[int, int], steps: Steps
) -> Tensor:
    """Resize images and put them in the model's frame.

    Args:
        images: (Y, X, 3) each, uint8, on one device.
        placements: Where each goes.
        frame: Width and height that the model gets.
        steps: Of the image processor, for its filter and the colour of margins.

    Returns:
        (B, 3, y, x), grey levels as whole floats, on that device.
    """
    width, height = frame
    name, device = TORCH_FILTERS.get(steps.resample, "bicubic"), images[0].device
    pixels = torch.empty(len(images), 3, height, width, device=device)
    with torch.autocast(device.type, enabled=False):
        for group in _groups(placements):
            some = [placements[place] for place in group]
            scaled = _scale_group([images[place] for place in group], some, frame, name)
            if steps.fit == "pad":
                scaled = torch.where(_inside(some, frame, device), scaled, _margin_colour(steps, device))
            pixels[torch.tensor(group, device=device)] = scaled
    return pixels


def _inside(placements: Sequence[Placement], frame: tuple[int, int], device: Any) -> Tensor:
    """Which pixels of the frame are of the image, and not of its margins: (B, 1, y, x)."""
    masks = []
    for axis in (0, 1):
        numbers = torch.tensor([(p.first[axis], p.new_size[axis]) for p in placements], device=device)
        place = numbers[:, :1] + torch.arange(frame[axis], device=device)
        masks.append((place >= 0) & (place < numbers[:, 1:]))
    return masks[1][:, None, :, None] & masks[0][:, None, None, :]


def _margin_colour(steps: Steps, device: Any) -> Tensor:
    return torch.as_tensor(steps.margin_colour(), dtype=torch.float32).reshape(-1, 1, 1).to(device)
