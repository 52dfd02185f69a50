"""Resize an image with hf-processors-rs, which is written in Rust, where that package is installed.

Pillow adds up the weighted pixels of a line one by one. hf-processors-rs does the same sums with vector instructions,
in about a third of the time. It is asked only for what it does exactly:

- images of 8 bits in the modes L and RGB, with the bicubic or the bilinear filter;
- where Pillow resizes along the rows first, since that is the order in hf-processors-rs. See `height_comes_first`;
- where most of the resized image is kept. Pillow is faster where the crop removes most of it, since then it is given
  only what is needed.

Invariant: grey levels equal Pillow's in every bit. Before the first use some images are resized in both ways. If one
bit differs, or the package cannot do what is asked, Pillow is used from then on.

hf-processors-rs resizes in threads of its own. A fork does not copy these, and a child process would wait for them
forever. A child whose parent had imported the package therefore uses Pillow.

Dimensions: C channels, y × x pixels after resizing.
"""

import logging
import os
import sys
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from .resize import Layout, height_comes_first, scale_and_cut, shorter_side_to

PACKAGE = "hf_processors_rs"
CHANNELS = {"L": 1, "RGB": 3}
FILTERS = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)

LEAST_KEPT = 0.4
"""Least part of the resized image that is kept. Below, Pillow is about as fast, because it skips the rest."""

MOST_PIXELS_READ = 1 << 26
"""Largest number of pixels of an image. The package refuses images that are larger still."""

KNOWN_PROCESSORS = 64

CHECKED_SIZES = (
    ((97, 61), 20, (20, 20)),
    ((61, 97), 20, (20, 21)),
    ((40, 56), 57, (57, 57)),
    ((60, 41), 40, (41, 40)),
)
"""Sizes of the images that are resized in both ways, the shorter side after resizing, and what is cut out."""

logger = logging.getLogger(__name__)


class ThreadsOfParent:
    """Whether this process was forked from one that had imported the package, so that its threads are not here."""

    are_lost = False

    @classmethod
    def look(cls) -> None:
        """Find out, as the first thing that a forked process does."""
        cls.are_lost = cls.are_lost or PACKAGE in sys.modules


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=ThreadsOfParent.look)


@lru_cache(maxsize=KNOWN_PROCESSORS)
def _processor(size: tuple[int, ...], cut: tuple[int, int] | None, resample: int) -> Any:
    """Make what resizes and cuts in Rust.

    Args:
        size: The length of the shorter side, or width and height.
        cut: Width and height of what is cut out of the centre, or None.
        resample: Filter, as a number of `PIL.Image.Resampling`.

    Returns:
        A function from an array (Y, X) or (Y, X, C), uint8, to (1, C, y, x), float32.
    """
    from_dict = sys.modules[PACKAGE].AutoImageProcessor.from_dict
    settings = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": False,
        "do_resize": True,
        "size": {"shortest_edge": size[0]} if len(size) == 1 else {"width": size[0], "height": size[1]},
        "resample": resample,
        "do_center_crop": cut is not None,
        "crop_size": None if cut is None else {"width": cut[0], "height": cut[1]},
        "do_rescale": False,
        "do_normalize": False,
    }
    return from_dict(settings, backend="pil")


def _scale(image: Image.Image, layout: Layout, resample: int, threads: int) -> np.ndarray:
    """Resize and cut an image in Rust → (C, y, x). The box lies within the resized image."""
    width, height = layout.size
    left, top, right, bottom = layout.box
    # The package, as transformers, halves margins downwards, and the original rounds them.
    is_centre = (left, top) == ((width - right + left) // 2, (height - bottom + top) // 2)
    side = min(layout.size)
    size = (side,) if layout.size == shorter_side_to(image.size, side) else layout.size
    process = _processor(size, (right - left, bottom - top) if is_centre else None, resample)
    shape = (image.height, image.width, CHANNELS[image.mode])
    pixels = np.frombuffer(image.tobytes(), dtype=np.uint8).reshape(shape)  # faster than np.asarray
    levels = process(pixels, num_threads=threads, input_data_format="channels_last")[0]
    return levels if is_centre else levels[:, top:bottom, left:right]


def _noise(size: tuple[int, int], mode: str) -> Image.Image:
    """Grey levels in no order, most of them black or white, so that sums are clipped too."""
    generator = np.random.default_rng(0)
    levels = generator.integers(-256, 512, (size[1], size[0], 3)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(levels if mode == "RGB" else levels[..., 0])


@lru_cache(maxsize=1)
def is_exact() -> bool:
    """Whether hf-processors-rs is installed and resizes as the installed Pillow does. It is tried once."""
    try:
        import hf_processors_rs  # noqa: F401
    except ImportError:
        return False
    try:
        for mode in CHANNELS:
            for size, side, cut in CHECKED_SIZES:
                for resample in FILTERS:
                    image, new_size = _noise(size, mode), shorter_side_to(size, side)
                    left, top = round((new_size[0] - cut[0]) / 2), round((new_size[1] - cut[1]) / 2)
                    layout = Layout(new_size, (left, top, left + cut[0], top + cut[1]))
                    found = _scale(image, layout, int(resample), 1)
                    expected = np.asarray(scale_and_cut(image, layout, int(resample))).reshape(*cut[::-1], -1)
                    if not np.array_equal(found, expected.transpose(2, 0, 1)):
                        raise ValueError(f"{size[0]}x{size[1]} pixels of mode {mode} become other grey levels")
    except Exception as error:
        logger.warning(f"hf-processors-rs is not used, because it does not do what Pillow does here: {error}")
        return False
    return True


def scale_and_cut_in_rust(image: Image.Image, layout: Layout, resample: int, threads: int = 1) -> np.ndarray | None:
    """Compute `scale_and_cut` in Rust, where that is possible, exact and faster.

    Args:
        image: A Pillow image of any mode.
        layout: Size to resize to, and box to cut out.
        resample: Filter, as a number of `PIL.Image.Resampling`.
        threads: Number of threads of the caller that resize at the same time.

    Returns:
        Grey levels (C, y, x), whole numbers as float32, in memory of their own; or None: use Pillow.
    """
    size, box = layout.size, layout.box
    if image.mode not in CHANNELS or resample not in FILTERS or image.size == size:
        return None
    if not (0 <= box[0] < box[2] <= size[0] and 0 <= box[1] < box[3] <= size[1]):
        return None
    kept = (box[2] - box[0]) * (box[3] - box[1])
    if kept < LEAST_KEPT * size[0] * size[1] or image.width * image.height > MOST_PIXELS_READ:
        return None
    if height_comes_first(image.size, size) is not False or ThreadsOfParent.are_lost or not is_exact():
        return None
    return _scale(image, layout, resample, threads)


__all__ = ["scale_and_cut_in_rust"]
