"""Resize an image and crop its centre, without computing pixels that the crop removes.

The original resizes the whole image and then removes most of a wide one. Pillow resizes in two passes, one along each
axis, and stores whole grey levels in between. Each pass treats every line by itself. Lines that no later step reads can
therefore be left out without changing a bit, as long as the passes come in Pillow's order.

Pillow cannot compute a part of a line. For very long images `part_of_lines` repeats Pillow's arithmetic for the part
that is needed: fixed-point weights of 22 bits, sums rounded and clipped.

Invariant: the result of `scale_and_cut` equals `image.resize(size).crop(box)` in every bit.

Dimensions: B batch, C channels, Y × X pixels, y × x pixels after resizing.
"""

from dataclasses import dataclass

import numpy as np
import PIL
from PIL import Image

PILLOW_RELEASE = tuple(int(number) for number in PIL.__version__.split(".")[:2])

WEIGHT_BITS = 22
"""Pillow's weights for images of 8 bits are multiples of 2⁻²²."""

BICUBIC_A = -0.5
SUPPORT = {"bicubic": 2.0, "bilinear": 1.0}

MUCH_LONGER = 24
"""A line that is this many times as long as its needed part is computed in part, which is faster from there on."""

LINES_AT_ONCE = 64

PREMULTIPLIED = {"RGBA": "RGBa", "LA": "La"}
"""Modes in which Pillow resizes transparent images: with colours multiplied by their opacity, then divided again."""

EIGHT_BIT_MODES = ("L", "La", "RGB", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")

UNFILTERED_MODES = ("1", "P")
"""Modes for which Pillow takes the nearest pixel and ignores the filter."""

WIDEST_REACH = 3.0
KNOWN_FILTERS = (1, 2, 3, 4, 5)
"""Lanczos (which reaches furthest, three pixels), bilinear, bicubic, box, Hamming."""


@dataclass(frozen=True)
class Layout:
    """How an image is resized and cut.

    Attributes:
        size: Width and height after resizing.
        box: Part that is cut out of it: left, top, right, bottom. Beyond the edges it adds black margins.
    """

    size: tuple[int, int]
    box: tuple[int, int, int, int]


def cut_centre(size: tuple[int, int], cut: tuple[int, int]) -> tuple[int, int, int, int]:
    """Compute the box of size `cut`, (width, height), at the centre. Half pixels round to even, margins halve down."""
    left, top = (-((c - n) // 2) if n < c else round((n - c) / 2) for n, c in zip(size, cut, strict=True))
    return left, top, left + cut[0], top + cut[1]


def shorter_side_to(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Compute the size at which the shorter side has `side` pixels. The longer side is rounded down."""
    width, height = size
    return (side, int(side * height / width)) if width <= height else (int(side * width / height), side)


def fit_inside(size: tuple[int, int], frame: tuple[int, int]) -> tuple[int, int]:
    """Compute the largest size of the same shape within a frame (width, height). No side is below one pixel."""
    ratio = min(f / n for f, n in zip(frame, size, strict=True))
    width, height = (min(f, max(1, round(n * ratio))) for n, f in zip(size, frame, strict=True))
    return width, height


def filter_weights(
    inputs: int, outputs: int, first: int, count: int, filter_name: str = "bicubic"
) -> tuple[int, np.ndarray]:
    """Compute Pillow's weights for a part of a line.

    Args:
        inputs: Length of the line before resizing, in pixels.
        outputs: Length after resizing.
        first: First pixel that is needed after resizing.
        count: Number of pixels that are needed.
        filter_name: "bicubic" or "bilinear".

    Returns:
        The first input pixel that is read, and the weights (count, pixels read), float64.
    """
    scale = inputs / outputs
    stretch = max(scale, 1.0)  # for a reduction the filter is widened to cover all input pixels of an output pixel
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
    for tap in taps:  # summed in Pillow's order, to be equal in the last bit
        total += weights[:, tap]
    weights /= total[:, None]
    start, end = int(low.min()), int(high.max())
    table = np.zeros((count, end - start + len(taps)))
    np.put_along_axis(table, low[:, None] - start + taps, weights, axis=1)
    return start, table[:, : end - start]


def fixed_point(weights: np.ndarray) -> np.ndarray:
    """Round weights as Pillow does for images of 8 bits: to multiples of 2⁻²². They are returned times 2²²."""
    return np.trunc(weights * 2.0**WEIGHT_BITS + np.where(weights < 0, -0.5, 0.5))


def part_of_lines(lines: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Resize grey levels (lines, inputs, C) → (lines, outputs, C) with weights (outputs, inputs), exactly as Pillow."""
    fixed = fixed_point(weights).T
    scaled = np.empty((len(lines), weights.shape[0], lines.shape[2]), dtype=np.uint8)
    for start in range(0, len(lines), LINES_AT_ONCE):
        some = lines[start : start + LINES_AT_ONCE].transpose(0, 2, 1).astype(np.float64)  # (n, C, inputs)
        sums = some @ fixed  # whole numbers below 2⁵³, so exact
        levels = np.floor(sums / 2.0**WEIGHT_BITS + 0.5).clip(0, 255)
        scaled[start : start + LINES_AT_ONCE] = levels.transpose(0, 2, 1)
    return scaled


def _part_of_image(image: Image.Image, axis: int, weights: np.ndarray) -> Image.Image:
    """Resize an image of 8 bits along its rows (axis 0) or columns (axis 1) with weights (outputs, inputs)."""
    array = np.asarray(image)
    array = array.reshape(*array.shape[:2], -1)  # (Y, X, C)
    lines = array if axis == 0 else array.transpose(1, 0, 2)
    scaled = part_of_lines(lines, weights)
    scaled = scaled if axis == 0 else scaled.transpose(1, 0, 2)
    height, width, _ = scaled.shape
    return Image.frombytes(image.mode, (width, height), scaled.tobytes())


def is_much_longer(outputs: int, needed: int) -> bool:
    return outputs >= MUCH_LONGER * max(needed, 1)


def height_comes_first(size: tuple[int, int], new_size: tuple[int, int]) -> bool | None:
    """Whether Pillow resizes along the columns first, which changes roundings. None if that is unknown.

    Releases up to 12.1 never do. Release 12.2 does for a height of more than 100 widths that becomes smaller, release
    13.0 if the height loses more than twice as many pixels as the width (python-pillow/Pillow#9524, #9549).
    """
    (width, height), (new_width, new_height) = size, new_size
    if PILLOW_RELEASE < (12, 2):
        return False
    if PILLOW_RELEASE < (13, 0):
        return height > 100 * width and height > new_height
    if PILLOW_RELEASE < (14, 0):
        return height > new_height and height - new_height > 2 * (width - new_width)
    return None


def _lines_read(inputs: int, outputs: int, first: int, last: int) -> tuple[int, int]:
    """Compute which of `inputs` lines any known filter reads for the lines first … last - 1 of `outputs`."""
    if inputs == outputs:
        return first, last
    scale = inputs / outputs
    reach = WIDEST_REACH * max(scale, 1.0) + 1
    return max(int((first + 0.5) * scale - reach), 0), min(int((last - 0.5) * scale + reach) + 1, inputs)


def _cut_lines(image: Image.Image, axis: int, first: int, last: int) -> Image.Image:
    """Cut out columns (axis 0) or rows (axis 1) first … last - 1. Those beyond the edges are black."""
    if (first, last) == (0, image.size[axis]):
        return image
    return image.crop((first, 0, last, image.height) if axis == 0 else (0, first, image.width, last))


def _scale_along(
    image: Image.Image, axis: int, inputs: int, outputs: int, first: int, last: int, given: int, resample: int
) -> Image.Image:
    """Resize along the rows (axis 0) or columns (axis 1) and keep the lines first … last - 1 of `outputs`.

    Of the original `inputs` lines the image holds only those that are read, from line `given` on.
    """
    if inputs == outputs:
        return _cut_lines(image, axis, first - given, last - given)
    can_do_parts = image.mode in EIGHT_BIT_MODES and resample == Image.Resampling.BICUBIC
    if can_do_parts and is_much_longer(outputs, last - first):
        start, weights = filter_weights(inputs, outputs, first, last - first)
        read = _cut_lines(image, axis, start - given, start - given + weights.shape[1])
        return _part_of_image(read, axis, weights)
    image = _cut_lines(image, axis, -given, inputs - given)  # black lines put the others in their places
    size = (outputs, image.height) if axis == 0 else (image.width, outputs)
    return _cut_lines(image.resize(size, resample), axis, first, last)


def scale_and_cut(image: Image.Image, layout: Layout, resample: int) -> Image.Image:
    """Compute `image.resize(layout.size, resample).crop(layout.box)` without the pixels that the crop removes.

    Args:
        image: A Pillow image of any mode.
        layout: Size to resize to, and box to cut out.
        resample: Filter, as a number of `PIL.Image.Resampling`.

    Returns:
        The image, equal in every bit to Pillow's.
    """
    mode, size, new_size, box = image.mode, image.size, layout.size, layout.box
    if size == new_size:
        return image.crop(box)
    height_first = height_comes_first(size, new_size)
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
