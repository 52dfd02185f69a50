"""Pictures to CLIP's input: resize the shorter side, crop the centre, RGB, scale, normalise.

Invariant: for a Pillow picture the result is bit-identical to OpenAI's torchvision transform: the same
Pillow resize in the picture's own mode, the same rounding of sizes and offsets, and the same float32
operations, (x / 255 − mean) / std, in that order.

Dimensions: H × W pixels, C = 3 channels.
"""

from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import SizeDict, load_image

OPENAI_MEAN = [0.48145466, 0.4578275, 0.40821073]
OPENAI_STD = [0.26862954, 0.26130258, 0.27577711]


def resize_shorter_side(image: Image.Image, side: int, resample: int) -> Image.Image:
    """Scale a picture so that its shorter side has `side` pixels; the longer one is rounded down."""
    width, height = image.size
    if min(width, height) == side:
        return image
    if width <= height:
        return image.resize((side, int(side * height / width)), resample)
    return image.resize((int(side * width / height), side), resample)


def crop_centre(image: Image.Image, height: int, width: int) -> Image.Image:
    """Cut the middle out, rounding half offsets to even; a picture that is too small gets a margin of zeros."""
    if image.width < width or image.height < height:
        padded = Image.new(image.mode, (max(image.width, width), max(image.height, height)))
        if image.mode == "P":
            padded.putpalette(image.getpalette() or [])
        padded.paste(image, (max(width - image.width, 0) // 2, max(height - image.height, 0) // 2))
        image = padded
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def flatten_pictures(images: Any) -> list[Any]:
    """One picture, a batch array (B, ...), a path or URL, or any nesting of lists of these → a list of pictures."""
    if isinstance(images, (list, tuple)):
        return [picture for item in images for picture in flatten_pictures(item)]
    if isinstance(images, str):
        return [load_image(images)]
    if getattr(images, "ndim", 0) == 4:
        return list(images)
    return [images]


def _describe(image: Any, array: np.ndarray) -> str:
    return f"an array of {array.dtype}" if hasattr(image, "ndim") else f"of type {type(image).__name__}"


def to_picture(image: Any, index: int) -> Image.Image:
    """Accept what users have: a Pillow picture, or a uint8 array of shape (H, W), (H, W, C) or (C, H, W)."""
    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"images[{index}] has {image.width}x{image.height} pixels; a picture needs at least one.")
        return image
    array = np.asarray(image)
    if array.dtype != np.uint8:
        raise ValueError(
            f"images[{index}] is {_describe(image, array)}, but pictures are needed: pass Pillow pictures or arrays "
            f"of uint8 from 0 to 255."
        )
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3):
        array = array.transpose(1, 2, 0)  # (H, W, C)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 3)):
        raise ValueError(
            f"images[{index}] is an array of shape {np.shape(image)}, but (H, W), (H, W, 3) or (3, H, W) is needed."
        )
    return Image.fromarray(np.ascontiguousarray(array))


class HfClipImageProcessor(BaseImageProcessor):
    """OpenAI's preprocessing as an image processor: pictures → `pixel_values` (B, 3, H, W), float32.

    size:      {"shortest_edge": n} keeps the aspect ratio, {"height": h, "width": w} doesn't
    crop_size: {"height": h, "width": w}
    resample:  Pillow's number; 3 is bicubic
    Each step can be switched off with its `do_...`, when constructing or in a call.
    """

    model_input_names = ["pixel_values"]
    default_to_square = False
    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 224}
    resample = 3
    do_center_crop = True
    crop_size = {"height": 224, "width": 224}
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = OPENAI_MEAN
    image_std = OPENAI_STD

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)

    @classmethod
    def for_image_size(cls, image_size: int, **kwargs: Any) -> "HfClipImageProcessor":
        """The processor of a model that takes square pictures of `image_size` pixels."""
        square = {"height": image_size, "width": image_size}
        return cls(**({"size": {"shortest_edge": image_size}, "crop_size": square} | kwargs))

    def _preprocess_image_like_inputs(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        pictures = flatten_pictures(images)
        if len(pictures) == 0:
            raise ValueError("HfClipImageProcessor got an empty list of images; pass at least one.")
        return_tensors = kwargs.pop("return_tensors", None)
        self._check_steps(**kwargs)
        arrays = [self._process(to_picture(picture, index), **kwargs) for index, picture in enumerate(pictures)]
        if len({array.shape for array in arrays}) == 1:
            return BatchFeature({"pixel_values": np.stack(arrays)}, tensor_type=return_tensors)
        return BatchFeature({"pixel_values": arrays}, tensor_type=return_tensors)

    @staticmethod
    def _check_steps(
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        **kwargs: Any,
    ) -> None:
        """Refuse settings that no step knows, before any picture is touched."""
        if do_resize and not (size.shortest_edge or (size.height and size.width)):
            raise ValueError(
                f'size is {dict(size)}, but {{"shortest_edge": n}} or {{"height": h, "width": w}} is needed.'
            )
        if do_resize and (isinstance(resample, str) or resample not in set(Image.Resampling)):
            raise ValueError(f"resample is {resample!r}, but one of PIL.Image.Resampling is needed; 3 is bicubic.")
        if do_center_crop and not (crop_size.height and crop_size.width):
            raise ValueError(f'crop_size is {dict(crop_size)}, but {{"height": h, "width": w}} is needed.')
        if do_normalize and len({len(np.atleast_1d(values)) for values in (image_mean, image_std)} - {1, 3}):
            raise ValueError(
                f"image_mean {image_mean} and image_std {image_std} need one number, or one per channel: three."
            )

    @staticmethod
    def _process(
        picture: Image.Image,
        do_convert_rgb: bool,
        do_resize: bool,
        size: SizeDict,
        resample: int,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: tuple[float, ...],
        image_std: tuple[float, ...],
        **kwargs: Any,
    ) -> np.ndarray:
        """One picture → (C, H, W) float32."""
        if do_resize and size.shortest_edge:
            picture = resize_shorter_side(picture, size.shortest_edge, int(resample))
        elif do_resize:
            picture = picture.resize((size.width, size.height), int(resample))
        if do_center_crop:
            picture = crop_centre(picture, crop_size.height, crop_size.width)
        if do_convert_rgb:
            picture = picture.convert("RGB")
        array = np.array(picture, dtype=np.float32)
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        if do_rescale:
            # Dividing by 255 and multiplying by its inverse differ in the last bit; the original divides.
            array = array / np.float32(1 / rescale_factor)
        if do_normalize:
            mean, std = (np.asarray(values, dtype=np.float32).reshape(-1, 1, 1) for values in (image_mean, image_std))
            array = (array - mean) / std
        return np.ascontiguousarray(array)


__all__ = ["HfClipImageProcessor"]
