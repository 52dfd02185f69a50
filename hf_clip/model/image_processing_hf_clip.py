"""The image processor: turns images into the pixel values that CLIP takes.

By default it does what OpenAI's transform does, in the five steps of `image_steps`. `tensor_steps` has the same steps
for tensors.

Invariant: with `backend="pil"`, the default, the result equals that of OpenAI's transform in every bit. With
`backend="torch"` grey levels before step 4 differ by at most one; for the exceptions see `HfClipImageProcessor`.

Dimensions: B batch, C channels, Y × X pixels, y × x pixels after resizing.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import (
    BatchFeature,
    ImageProcessingMixin,  # noqa: F401  diffusers looks for this base class in a component's module to load it
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from .checked_files import check_no_methods, find_files, in_one_kind, one_line, read_object
from .hub_repository import HUB_ARGUMENTS, HubUpload, find_foreign
from .image_steps import OPENAI_SETTINGS, Writer
from .open_image import at_place, channel_axis, flatten_images
from .tensor_steps import TORCH_FILTERS, LevelsByTorch, Steps, check_pixels, has_levels_here, stack_images, to_tensor

BACKENDS = ("pil", "torch")
TOKENIZER_BACKENDS = ("tokenizers", "sentencepiece", "custom", "mistral_common")
"""Backends of tokenizers. Some processors of transformers pass these to the image processor, where they are ignored."""

UNCHECKED = {"return_tensors": str, "backend": str, "num_threads": int, "draft": bool}
"""Arguments of a call that are not checked by transformers if they are of these types."""


class HfClipImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of a call besides those of transformers' image processors; see `HfClipImageProcessor`."""

    fit: str | None
    backend: str | None
    num_threads: int | None
    draft: bool | None


Loaded = TypeVar("Loaded", bound="HfClipImageProcessor")


@contextmanager
def _refused_by_name(source: Any) -> Iterator[None]:
    """Let errors within a `with` block name the folder or repository whose image processor is refused."""
    try:
        with in_one_kind(source):
            yield
    except ValueError as error:
        raise ValueError(f"The image processor of {one_line(source, 200)} is refused: {error}") from error


class HfClipImageProcessor(HubUpload, BaseImageProcessor):
    """Prepares images for the model, as OpenAI's transform does: images become `pixel_values` (B, 3, y, x), float32.

    An image is one of these:

    - a Pillow image;
    - an array or tensor (Y, X), (Y, X, C) or (C, Y, X), where C is 1 or 3: uint8, or floats from 0 to 1. Four
      dimensions are a batch of images;
    - a path, a URL, bytes, an open file, or an undecoded row of `datasets`. Such an image is opened here and turned as
      its EXIF orientation says. Images that are given as images are never turned.

    All arguments below can be given to the class, or to a call for that call alone. Those up to `fit` are saved with
    the processor. Those from `backend` on are not: they say how this machine computes.

    Args:
        do_convert_rgb: Whether to convert images to RGB.
        do_resize: Whether to resize images to `size`.
        size: `{"shortest_edge": n}` resizes the shorter side to n pixels and keeps the aspect ratio.
            `{"height": h, "width": w}` does not keep it.
        resample: Filter, as a number of `PIL.Image.Resampling`. 3 is bicubic.
        do_center_crop: Whether to crop the centre to `crop_size`.
        crop_size: `{"height": h, "width": w}` in pixels.
        do_rescale: Whether to multiply grey levels by `rescale_factor`.
        rescale_factor: Default 1 / 255, which brings grey levels to the range from 0 to 1.
        do_normalize: Whether to subtract `image_mean` and divide by `image_std`.
        image_mean: A number per channel, or one for all.
        image_std: A number per channel, or one for all.
        fit: How an image that is not square is made square. "crop" (default) cuts its longer side, as the original
            does. "pad" scales the whole image into `crop_size` and adds margins in the colour `image_mean`. "squash"
            distorts the whole image to `crop_size`.
        backend: "pil" (default) is exact. Where the package hf-processors-rs is installed, it resizes most images, with
            the same result. "torch" works on tensors, in batches and on the argument `device` of a call, and float
            tensors keep their gradients. Grey and RGB images differ from "pil" by at most one grey level; in drawings
            with hard edges about one value in some millions differs by two. Images of other modes are converted to RGB
            before they are resized, and not afterwards.
        num_threads: Number of images that are worked on at once on the CPU. None: the number of threads that torch
            uses. The result is the same.
        draft: Whether to decode large JPEGs at a half, a quarter or an eighth of their size, if they are opened here
            and at least four times as large as needed. This is faster and not exact.
        **kwargs: As for any image processor of transformers.

    Raises:
        ValueError: A setting has a value that cannot be used.
        UnreadableImageError: In a call, an image cannot be read. A ValueError; its `index` is the image's place.

    Example::

        processor = HfClipImageProcessor.from_pretrained("org/clip-vit-b32")
        processor(["cat.jpg", "dog.jpg"], return_tensors="pt")["pixel_values"].shape  # (2, 3, 224, 224)
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = HfClipImageProcessorKwargs
    default_to_square = False
    do_convert_rgb = OPENAI_SETTINGS["do_convert_rgb"]
    do_resize = OPENAI_SETTINGS["do_resize"]
    size = OPENAI_SETTINGS["size"]
    resample = OPENAI_SETTINGS["resample"]
    do_center_crop = OPENAI_SETTINGS["do_center_crop"]
    crop_size = OPENAI_SETTINGS["crop_size"]
    do_rescale = OPENAI_SETTINGS["do_rescale"]
    rescale_factor = OPENAI_SETTINGS["rescale_factor"]
    do_normalize = OPENAI_SETTINGS["do_normalize"]
    image_mean = OPENAI_SETTINGS["image_mean"]
    image_std = OPENAI_SETTINGS["image_std"]
    fit = OPENAI_SETTINGS["fit"]
    backend = "pil"
    num_threads = None
    draft = False

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)
        self.steps()

    @classmethod
    def for_image_size(cls, image_size: int, **kwargs: Any) -> "HfClipImageProcessor":
        """Make the processor of a model that takes square images.

        Args:
            image_size: Height and width in pixels.
            **kwargs: Settings that shall differ from OpenAI's, as for the class.

        Returns:
            The image processor.
        """
        square = {"height": image_size, "width": image_size}
        return cls(**({"size": {"shortest_edge": image_size}, "crop_size": square} | kwargs))

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the settings of a folder or repository; with the package also those of an open_clip repository."""
        if (foreign := find_foreign(pretrained_model_name_or_path, kwargs)) is not None:
            return foreign.image_processor_values(), {k: v for k, v in kwargs.items() if k not in HUB_ARGUMENTS}
        return cls._read_own_layout(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _read_own_layout(cls, source: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        hub = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
        for path in find_files(source, (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME), hub):
            values = read_object(path)
            check_no_methods(cls, values.get("image_processor", values), path)
        return super().get_image_processor_dict(source, **kwargs)

    @classmethod
    def from_own_layout(cls, source: Any, **hub: Any) -> "HfClipImageProcessor":
        """Load an image processor from a repository that is known to be in transformers' layout.

        Unlike `from_pretrained` it does not read config.json.

        Args:
            source: A folder, or the name of a repository on the Hub.
            **hub: The Hub's arguments of `from_pretrained`.

        Returns:
            The image processor.

        Raises:
            OSError: There is no image processor.
            ValueError: A file is damaged, or a setting has a value that cannot be used.
        """
        with _refused_by_name(source):
            return cls.from_dict(cls._read_own_layout(source, **hub)[0])

    @classmethod
    def from_pretrained(cls: type[Loaded], pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Loaded:
        """Load an image processor from a folder or from a repository on the Hub.

        Args:
            pretrained_model_name_or_path: A folder, or the name of a repository, such as "org/clip-vit-b32".
            *args: As for any image processor of transformers.
            **kwargs: Settings that shall differ, as for the class; and the arguments of any image processor of
                transformers: `revision`, `subfolder`, `token`, …

        Returns:
            The image processor.

        Raises:
            OSError: There is no such folder or repository.
            ValueError: A file is damaged, or a setting has a value that cannot be used.
        """
        with _refused_by_name(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that are saved: those of the model, not those that say how this machine computes."""
        return {k: v for k, v in super().to_dict().items() if k not in ("backend", "num_threads", "draft", "device")}

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Return addresses unopened: transformers' loader would convert to RGB, and here an image keeps its mode."""
        return image_url_or_urls

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """Prepare images; a call of the processor does the same.

        Args:
            images: An image, a list of images, or a batch of images as an array or tensor.
            *args: As for any image processor of transformers.
            **kwargs: Settings for this call, as for the class; `return_tensors` ("pt" or "np"), `device` and
                `data_format`.

        Returns:
            `pixel_values` (B, 3, y, x), float32; a list of arrays if images end in different sizes.

        Raises:
            UnreadableImageError: An image cannot be read. A ValueError; its `index` is the image's place.
        """
        # transformers' checks of arguments take longer than normalising an image. Those of these arguments stand below.
        if args or any(type(value) is not UNCHECKED.get(name) for name, value in kwargs.items()):
            return super().preprocess(images, *args, **kwargs)
        return self._preprocess_image_like_inputs(images, **(self._settings() | kwargs))

    def _settings(self) -> dict[str, Any]:
        return self._standardize_kwargs(**{name: getattr(self, name, None) for name in self._valid_kwargs_names})

    def steps(self) -> Steps:
        """Return the steps of this processor, for code that calls them one by one, such as augmentation.

        Returns:
            The settings of this processor, checked.

        Raises:
            ValueError: A setting has a value that cannot be used.
        """
        settings = self._settings()
        return Steps(**{name: settings[name] for name in Steps.__dataclass_fields__})

    def _preprocess_image_like_inputs(
        self,
        images: Any,
        *,
        backend: str = "pil",
        num_threads: int | None = None,
        draft: bool = False,
        device: Any = None,
        return_tensors: Any = None,
        data_format: Any = None,
        input_data_format: Any = None,
        do_pad: bool | None = None,
        **settings: Any,
    ) -> BatchFeature:
        steps = Steps(**{name: settings[name] for name in Steps.__dataclass_fields__})
        if do_pad:
            raise ValueError('do_pad=True is not known here; fit="pad" scales the whole image and adds margins.')
        if backend in TOKENIZER_BACKENDS:
            backend = self.backend
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}, but must be one of {', '.join(map(repr, BACKENDS))}.")
        if num_threads is not None and num_threads < 1:
            raise ValueError(f"num_threads is {num_threads}, but must be at least 1.")
        formats = (getattr(data_format, "value", data_format), getattr(input_data_format, "value", input_data_format))
        if not set(formats) <= {None, "channels_first", "channels_last"}:
            raise ValueError(
                f"data_format and input_data_format are {formats[0]!r} and {formats[1]!r}, but 'channels_first' or "
                f"'channels_last' is needed."
            )
        side = steps.draft_side() if draft else None
        if backend == "torch":
            pixels: Any = self._with_torch(images, steps, input_data_format, device, side, num_threads)
        elif device is not None and torch.device(device).type != "cpu":
            raise ValueError(f'device={str(device)!r} needs backend="torch"; Pillow works on the CPU.')
        else:
            prepare = partial(steps.prepare, data_format=input_data_format, draft=side)
            pixels = self._one_by_one(flatten_images(images), steps, prepare, num_threads)
        if formats[0] == "channels_last":
            last = (lambda x: x.movedim(-3, -1)) if backend == "torch" else (lambda x: np.moveaxis(x, -3, -1))
            pixels = [last(image) for image in pixels] if isinstance(pixels, list) else last(pixels)
        if backend == "torch" and return_tensors == "np":
            pixels = [p.numpy(force=True) for p in pixels] if isinstance(pixels, list) else pixels.numpy(force=True)
        if return_tensors == "pt" and isinstance(pixels, np.ndarray):  # transformers takes as long as normalising does
            pixels, return_tensors = torch.from_numpy(pixels), None
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    @staticmethod
    def _one_by_one(
        items: list[Any], steps: Steps, prepare: Callable[..., Writer], num_threads: int | None
    ) -> np.ndarray | list[np.ndarray]:
        """Prepare images, each by itself: (B, C, y, x), or a list of (C, y, x) if sizes differ.

        Args:
            items: The images.
            steps: The steps.
            prepare: Resizes one image, and returns what normalises it into an array. It is also told how many threads
                there are.
            num_threads: Number of images to work on at once. None: the number of threads that torch uses.
        """
        if len(items) == 0:
            raise ValueError("HfClipImageProcessor got an empty list of images; pass at least one.")
        workers = min(num_threads or torch.get_num_threads(), len(items))
        is_one_size = len(items) > 1 and steps.do_center_crop and steps.do_convert_rgb
        shape = (len(items), 3, steps.crop_size.height, steps.crop_size.width) if is_one_size else None
        batch = np.empty(shape, dtype=np.float32) if shape else None

        def process(index: int) -> np.ndarray:
            with at_place(index):
                write = prepare(items[index], threads=workers)
            return write(None if batch is None else batch[index])

        if workers == 1:
            arrays = [process(index) for index in range(len(items))]
        else:
            with ThreadPoolExecutor(workers) as pool:
                arrays = list(pool.map(process, range(len(items))))
        if batch is not None:
            return batch
        if len(arrays) == 1:
            return arrays[0][None]
        return np.stack(arrays) if len({array.shape for array in arrays}) == 1 else arrays

    @staticmethod
    def _with_torch(
        images: Any, steps: Steps, data_format: str | None, device: Any, draft: int | None, num_threads: int | None
    ) -> Tensor | list[Tensor]:
        """Prepare images with torch: (B, C, y, x), or a list of (C, y, x) if sizes differ.

        Grey levels on the CPU are processed one image by one, on threads of ours. Those that torch would start for the
        arithmetic of each batch wait for one another, and lose more than they gain where other programs run. Other
        images of one size are processed as one batch.
        """
        if steps.do_resize and steps.resample not in TORCH_FILTERS:
            raise ValueError(f'backend="torch" resizes with resample 3 (bicubic) or 2, not {int(steps.resample)}.')
        items = flatten_images(images)
        is_here = torch.device(device or torch.get_default_device()).type == "cpu"
        if is_here and items and all(map(has_levels_here, items)):
            prepare = LevelsByTorch(steps, data_format, draft).prepare
            done_here = HfClipImageProcessor._one_by_one(items, steps, prepare, num_threads)
            is_list = isinstance(done_here, list)
            return list(map(torch.from_numpy, done_here)) if is_list else torch.from_numpy(done_here)
        if getattr(images, "ndim", 0) == 4:
            images = np.require(images, requirements=["C", "W"]) if isinstance(images, np.ndarray) else images
            batch = torch.as_tensor(images, device=device)
            with at_place(0):
                axis = channel_axis(tuple(batch.shape[1:]), data_format) if len(batch) else 0
            groups = [batch.movedim(axis + 1, 1)]
        else:
            tensors = []
            for index, item in enumerate(items):
                with at_place(index):
                    tensors.append(to_tensor(item, steps, data_format, device, draft))
            kinds = {(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors}
            groups = [stack_images(tensors)] if len(kinds) == 1 else [tensor[None] for tensor in tensors]
        if sum(map(len, groups)) == 0:
            raise ValueError("HfClipImageProcessor got an empty list of images; pass at least one.")
        for index, group in enumerate(groups):
            check_pixels(group, first=index)
        done = [steps.run_tensor(group) for group in groups]
        if len(done) == 1:
            return done[0]
        if len({image.shape for image in done}) == 1:
            return torch.cat(done)
        return [image[0] for image in done]


__all__ = ["HfClipImageProcessor"]
