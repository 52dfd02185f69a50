"""Scale an image and cut its middle out, doing no work that cannot reach the cut.

The original scales the whole image and throws most of a wide one away. Pillow scales in two passes, one along each
axis, and stores whole grey levels in between; each pass treats every line alone. So lines that no later step reads
can be left out without changing a bit, as long as the passes come in Pillow's order.

What Pillow cannot do is to compute a part of a line: for very long images `part_of_lines` repeats its arithmetic
(fixed-point weights of 22 bits, sums rounded and clipped) for the part that is needed.

Invariant: `scale_and_cut` gives the bits of `image.resize(size).crop(box)`.

Dimensions: B batch, C channels, Y × X pixels before, y × x pixels after.
"""

from dataclasses import dataclass

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

PILLOW_MAJOR = int(PIL.__version__.split(".")[0])

WEIGHT_BITS = 22
"""Pillow's weights for images of 8 bits are multiples of 2⁻²²."""

BICUBIC_A = -0.5
SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}

MUCH_LONGER = 24
"""From this multiple of what is cut out on, a line is long enough for computing its part alone to be faster."""

LINES_AT_ONCE = 64
PIXELS_AT_ONCE = 1 << 26

PREMULTIPLIED = {"RGBA": "RGBa", "LA": "La"}
"""Pillow scales transparent images with their colours multiplied by their opacity, and divides them again."""

EIGHT_BIT_MODES = ("L", "La", "RGB", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")

UNFILTERED_MODES = ("1", "P")
"""Pillow takes the nearest pixel of these, whatever filter was asked for."""

WIDEST_REACH = 3.0
KNOWN_FILTERS = (1, 2, 3, 4, 5)
"""Lanczos, which reaches three pixels far, bilinear, bicubic, box, Hamming."""

CLEARLY_SMALLER = 2.0
"""The least scale at which torch's own arithmetic for uint8, with weights of 16 bits, stays near Pillow's.

Above 3 no value was seen more than one level off; from 2 to 3 one value of sixty pages of black and white text was.
"""

RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Layout:
    """size: width and height to scale to.   box: what to cut out of that; left, top, right, bottom, margins included"""

    size: tuple[int, int]
    box: tuple[int, int, int, int]


def cut_centre(size: tuple[int, int], cut: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box of `cut` = (width, height) in the middle: half pixels round to even, margins halve downwards."""
    left, top = (-((c - n) // 2) if n < c else round((n - c) / 2) for n, c in zip(size, cut, strict=True))
    return left, top, left + cut[0], top + cut[1]


def shorter_side_to(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The size at which the shorter side has `side` pixels; the longer one is rounded down."""
    width, height = size
    return (side, int(side * height / width)) if width <= height else (int(side * width / height), side)


def fit_inside(size: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int]:
    """The largest size of the same shape within a frame of (width, height), no side below one pixel."""
    ratio = min(f / n for f, n in zip(frame, size, strict=True))
    width, height = (min(f, max(1, round(n * ratio))) for n, f in zip(size, frame, strict=True))
    return width, height


def filter_weights(
    inputs: int, outputs: int, first: int, count: int, filter_name: str = "bicubic"
) -> tuple[int, np.ndarray]:
    """Pillow's weights for `count` of `outputs` pixels, from pixel `first` on, made of `inputs` pixels.

    Returns the first input pixel that they read and the weights (count, pixels read), float64.
    """
    scale = inputs / outputs
    stretch = max(scale, 1.0)  # a filter for making smaller is as wide as the pixels that become one
    support = SUPPORT[filter_name] * stretch
    centre = (np.arange(first, first + count) + 0.5) * scale
    low = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    high = np.minimum((centre + support + 0.5).astype(np.int64), inputs)
    taps = np.arange(int((high - low).max()))
    x = np.abs((low[:, None] + taps - centre[:, None] + 0.5) * (1.0 / stretch))  # (count, taps)
    if filter_name == "bilinear":
        weights = np.maximum(1.0 - x, 0.0)
    else:
        a = BICUBIC_A
        near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * a
        weights = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    weights[taps >= (high - low)[:, None]] = 0.0
    total = np.zeros(count)
    for tap in taps:  # added up in Pillow's order, for the last bit
        total += weights[:, tap]
    weights /= total[:, None]
    start, end = int(low.min()), int(high.max())
    table = np.zeros((count, end - start + len(taps)))
    np.put_along_axis(table, low[:, None] - start + taps, weights, axis=1)
    return start, table[:, : end - start]


def fixed_point(weights: np.ndarray) -> np.ndarray:
    """Weights as Pillow has them for images of 8 bits: whole multiples of 2⁻²², here times 2²²."""
    return np.trunc(weights * 2.0**WEIGHT_BITS + np.where(weights < 0, -0.5, 0.5))


def part_of_lines(lines: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Scale grey levels (lines, inputs, C) → (lines, outputs, C) with weights (outputs, inputs), bits as Pillow's."""
    fixed = fixed_point(weights).T
    scaled = np.empty((len(lines), weights.shape[0], lines.shape[2]), dtype=np.uint8)
    for start in range(0, len(lines), LINES_AT_ONCE):
        some = lines[start : start + LINES_AT_ONCE].transpose(0, 2, 1).astype(np.float64)  # (n, C, inputs)
        sums = some @ fixed  # whole numbers below 2⁵³, so exact
        levels = np.floor(sums / 2.0**WEIGHT_BITS + 0.5).clip(0, 255)
        scaled[start : start + LINES_AT_ONCE] = levels.transpose(0, 2, 1)
    return scaled


def _part_of_image(image: Image.Image, axis: int, weights: np.ndarray) -> Image.Image:
    """Scale an image of 8 bits along its rows (axis 0) or columns (axis 1) with weights (outputs, inputs)."""
    array = np.asarray(image)
    array = array.reshape(*array.shape[:2], -1)  # (Y, X, C)
    lines = array if axis == 0 else array.transpose(1, 0, 2)
    scaled = part_of_lines(lines, weights)
    scaled = scaled if axis == 0 else scaled.transpose(1, 0, 2)
    height, width, _ = scaled.shape
    return Image.frombytes(image.mode, (width, height), scaled.tobytes())


def _is_much_longer(outputs: int, needed: int) -> bool:
    return outputs >= MUCH_LONGER * max(needed, 1)


def _height_comes_first(size: tuple[int, int], new_size: tuple[int, int]) -> bool | None:
    """Whether Pillow scales along the columns first, on which roundings depend; None where that isn't known.

    Releases before 12 never do, 13 does where the height loses more than twice as many pixels as the width.
    """
    (width, height), (new_width, new_height) = size, new_size
    if PILLOW_MAJOR < 12:
        return False
    if PILLOW_MAJOR == 13:
        return height > new_height and height - new_height > 2 * (width - new_width)
    return None


def _lines_read(inputs: int, outputs: int, first: int, last: int) -> tuple[int, int]:
    """Which of `inputs` lines can reach the lines first ... last - 1 of `outputs`, through any known filter."""
    if inputs == outputs:
        return first, last
    scale = inputs / outputs
    reach = WIDEST_REACH * max(scale, 1.0) + 1
    return max(int((first + 0.5) * scale - reach), 0), min(int((last - 0.5) * scale + reach) + 1, inputs)


def _cut_lines(image: Image.Image, axis: int, first: int, last: int) -> Image.Image:
    """Columns (axis 0) or rows (axis 1) first ... last - 1; those beyond the edges are blank."""
    if (first, last) == (0, image.size[axis]):
        return image
    return image.crop((first, 0, last, image.height) if axis == 0 else (0, first, image.width, last))


def _scale_along(
    image: Image.Image, axis: int, inputs: int, outputs: int, first: int, last: int, given: int, resample: int
) -> Image.Image:
    """Scale along the rows (axis 0) or columns (axis 1) and keep the lines first ... last - 1 of `outputs`.

    The image holds only some of the `inputs` lines that it had, from line `given` on: all that are read.
    """
    if inputs == outputs:
        return _cut_lines(image, axis, first - given, last - given)
    can_do_parts = image.mode in EIGHT_BIT_MODES and resample == Image.Resampling.BICUBIC
    if can_do_parts and _is_much_longer(outputs, last - first):
        start, weights = filter_weights(inputs, outputs, first, last - first)
        read = _cut_lines(image, axis, start - given, start - given + weights.shape[1])
        return _part_of_image(read, axis, weights)
    image = _cut_lines(image, axis, -given, inputs - given)  # blank lines bring the others to their places
    size = (outputs, image.height) if axis == 0 else (image.width, outputs)
    return _cut_lines(image.resize(size, resample), axis, first, last)


def scale_and_cut(image: Image.Image, layout: Layout, resample: int) -> Image.Image:
    """`image.resize(layout.size, resample).crop(layout.box)`, without what is scaled only to be thrown away."""
    mode, size, new_size, box = image.mode, image.size, layout.size, layout.box
    if size == new_size:
        return image.crop(box)
    height_first = _height_comes_first(size, new_size)
    if height_first is None or mode in UNFILTERED_MODES or resample not in KNOWN_FILTERS:
        return image.resize(new_size, resample).crop(box)
    if mode in PREMULTIPLIED:
        image = image.convert(PREMULTIPLIED[mode])
    needed = [(max(box[axis], 0), min(box[axis + 2], new_size[axis])) for axis in (0, 1)]
    early, late = (1, 0) if height_first else (0, 1)
    read, read_end = _lines_read(size[late], new_size[late], *needed[late])
    image = _cut_lines(image, late, read, read_end)
    image = _scale_along(image, early, size[early], new_size[early], *needed[early], 0, resample)
    image = _scale_along(image, late, size[late], new_size[late], *needed[late], read, resample)
    if mode in PREMULTIPLIED:
        image = image.convert(mode)
    (left, _), (top, _) = needed
    frame = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
    return image if frame == (0, 0, *image.size) else image.crop(frame)


def _scale_levels(pixels: Tensor, axis: int, outputs: int, first: int, last: int, filter_name: str) -> Tensor:
    """Scale grey levels (B, C, Y, X) along one axis with Pillow's arithmetic and keep the lines first ... last - 1."""
    inputs = pixels.shape[axis]
    if outputs == inputs:
        return pixels.narrow(axis, first, last - first)
    start, weights = filter_weights(inputs, outputs, first, last - first, filter_name)
    exact = torch.float32 if pixels.device.type == "mps" else torch.float64  # which holds the sums as whole numbers
    table = torch.from_numpy(fixed_point(weights)).to(pixels.device, exact)  # (outputs, inputs read)
    part = pixels.narrow(axis, start, table.shape[1]).to(exact)
    sums = part @ table.T if axis == 3 else table @ part
    return (sums / 2.0**WEIGHT_BITS + 0.5).floor_().clamp_(0, 255)


def _scale_floats(pixels: Tensor, axis: int, outputs: int, first: int, last: int, filter_name: str) -> Tensor:
    """Scale floats (B, C, Y, X) along one axis and keep the lines first ... last - 1."""
    inputs = pixels.shape[axis]
    if outputs == inputs:
        return pixels.narrow(axis, first, last - first)
    if _is_much_longer(outputs, last - first):
        start, weights = filter_weights(inputs, outputs, first, last - first, filter_name)
        table = torch.from_numpy(weights).to(pixels)  # (outputs, inputs read)
        part = pixels.narrow(axis, start, table.shape[1])
        return part @ table.T if axis == 3 else table @ part
    size = [outputs if dimension == axis else pixels.shape[dimension] for dimension in (2, 3)]
    scaled = functional.interpolate(pixels, size=size, mode=filter_name, antialias=True)
    return scaled.narrow(axis, first, last - first)


def scale_levels_exactly(pixels: Tensor, passes: list[tuple[int, int, int, int]], filter_name: str) -> Tensor:
    """Grey levels (B, C, Y, X) with Pillow's bits on any device, as whole floats.

    passes: (axis, lines to scale to, first line to keep, the line behind the last), in Pillow's order
    """
    done = []
    for some in pixels.split(max(1, PIXELS_AT_ONCE // pixels[0].numel())):
        for axis, outputs, first, last in passes:
            some = _scale_levels(some, axis, outputs, first, last, filter_name)
        done.append(some.float())
    return torch.cat(done)


def _by_pillow(pixels: Tensor, layout: Layout, filter_name: str) -> Tensor:
    """Grey levels (B, C, Y, X) on a CPU, C being 1 or 3, scaled by Pillow itself."""
    rows = []
    for row in pixels:
        array = row.movedim(0, -1).contiguous().numpy()  # (Y, X, C)
        image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
        scaled = np.array(scale_and_cut(image, layout, RESAMPLE[filter_name]))
        rows.append(torch.from_numpy(scaled.reshape(*scaled.shape[:2], -1)))
    return torch.stack(rows).movedim(-1, 1)


def scale_and_cut_tensor(pixels: Tensor, layout: Layout, filter_name: str) -> Tensor:
    """The same for a batch of tensors, on any device: (B, C, Y, X) → (B, C, y, x).

    pixels: uint8, then the result is grey levels, as uint8 or as whole floats: on a CPU by torch's own arithmetic for
        uint8 where the image becomes clearly smaller, else with Pillow's bits; or floats from 0 to 1, then the result
        is float32, not rounded, and differentiable
    filter_name: "bicubic" or "bilinear"
    """
    is_levels = pixels.dtype == torch.uint8
    left, top = (max(edge, 0) for edge in layout.box[:2])
    right, bottom = (min(edge, limit) for edge, limit in zip(layout.box[2:], layout.size, strict=True))
    new_width, new_height = layout.size
    height, width = pixels.shape[2:]
    height_first = _height_comes_first((width, height), layout.size)
    is_quick = (
        is_levels
        and pixels.device.type == "cpu"
        and min(width / new_width, height / new_height) >= CLEARLY_SMALLER
        and not (_is_much_longer(new_width, right - left) or _is_much_longer(new_height, bottom - top))
    )
    passes = [(3, new_width, left, right), (2, new_height, top, bottom)]
    if height_first:
        passes.reverse()
    if is_levels and layout.size == (width, height):
        pixels = pixels[..., top:bottom, left:right]
    elif is_quick and height_first:  # torch begins with the width, and the order matters where levels are clipped
        pixels = functional.interpolate(pixels.mT, size=(new_width, new_height), mode=filter_name, antialias=True).mT
        pixels = pixels[..., top:bottom, left:right]
    elif is_quick:
        pixels = functional.interpolate(pixels, size=(new_height, new_width), mode=filter_name, antialias=True)
        pixels = pixels[..., top:bottom, left:right]
    elif is_levels and pixels.device.type == "cpu":
        return _by_pillow(pixels, layout, filter_name)
    elif is_levels:
        pixels = scale_levels_exactly(pixels, passes, filter_name)
    else:
        pixels = pixels.float()
        for axis, outputs, first, last in passes:
            pixels = _scale_floats(pixels, axis, outputs, first, last, filter_name)
        pixels = pixels.clamp(0, 1)
    margins = (left - layout.box[0], layout.box[2] - right, top - layout.box[1], layout.box[3] - bottom)
    return functional.pad(pixels, margins) if any(margins) else pixels
