"""`pipeline("zero-shot-image-classification")` that encodes its labels once for each call.

The stock pipeline tokenizes and encodes all labels again for every batch, and a batch is one image unless asked
otherwise. This one makes the classifier matrix when a call begins, and all images of the call are scored with it.

Invariant: nothing is remembered between calls. What a matrix depends on cannot all be known (weights, adapters and how
they are set, hooks, modules, configuration, the tokenizer, autocast), so a call is right whatever was changed before,
and calls of several threads share nothing. Who wants to encode labels once for many calls makes a ZeroShotClassifier.

transformers asks its registry for the task's class. `ZeroShotDispatcher` stands there and hands our models to our
pipeline and all others to the stock one.
"""

from collections.abc import Collection, Iterable, Iterator, Sized
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from transformers.pipelines import PIPELINE_REGISTRY, ZeroShotImageClassificationPipeline

from ..model.configuration_hf_clip import HfClipConfig
from ..model.open_image import UNREADABLE, UnreadableImageError, at_place, is_to_be_opened, open_image, turn_upright
from .classifier import ZeroShotClassifier, build_matrix, check_top_k
from .features import as_read, check_images, check_single, is_single_image, unread
from .matrix import ClassifierMatrix
from .prompts import read_labels

TASK = "zero-shot-image-classification"
STOCK_TEMPLATE = "This is a photo of {}."

IMAGES_AT_ONCE = 16
"""Of a list or a data set, unless the call or the pipeline says otherwise."""


@dataclass(frozen=True)
class Placed:
    """One of several images, and its place among them, for the error if it cannot be read."""

    image: Any
    index: int


class PlacedImages(Dataset):
    """A list, a column or a data set of images, read one by one."""

    def __init__(self, images: Any):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Placed:
        try:
            return Placed(self.images[index], index)
        except UNREADABLE as error:
            raise unread(index, error) from error


class PlacedStream(IterableDataset):
    """A generator or another iterable of images whose number nobody knows."""

    def __init__(self, images: Iterable[Any]):
        self.images = images

    def __iter__(self) -> Iterator[Placed]:
        for index, image in enumerate(as_read(self.images)):
            yield Placed(image, index)


class HfClipZeroShotPipeline(ZeroShotImageClassificationPipeline):
    """Zero-shot classification of images with labels that are encoded once for each call.

        classify = pipeline("zero-shot-image-classification", model="org/clip-vit-l14-336")
        classify(["cat.jpg", "dog.jpg"], candidate_labels=["cat", "dog"], top_k=1)

    Called as the stock pipeline and with the same results, and besides:

    images:              one image, or a list, a tuple or a column of `datasets`, which give a list of results; or a
                         data set, a generator or another iterator, which give results one by one
    candidate_labels:    anything that ZeroShotClassifier takes, or a ZeroShotClassifier, whose labels stay as they were
                         encoded when it was made; may also be given when the pipeline is made
    hypothesis_template: also a list of templates, whose features are averaged, or the name of a set
    top_k:               how many labels to return (default: all)
    batch_size:          images encoded at once; 16 for lists and data sets, unless given. Generators yield a result
                         as soon as its image is read

    Raises UnreadableImageError, a ValueError, for an image that cannot be read; its `index` is the image's place.
    """

    def __call__(self, image: Any = None, candidate_labels: Any = None, **kwargs: Any) -> Any:
        image = kwargs.pop("images", image)
        if image is None:
            raise ValueError("The zero-shot pipeline needs images: pass them first, or as `images`.")
        check_images(image)
        made = self._preprocess_params
        labels = made.get("candidate_labels") if candidate_labels is None else candidate_labels
        if labels is None:
            raise ValueError('The zero-shot pipeline needs candidate_labels, e.g. candidate_labels=["cat", "dog"].')
        labels = labels if isinstance(labels, ZeroShotClassifier) else read_labels(labels)
        if is_single_image(image) or getattr(image, "ndim", 1) > 1:
            images = image
        elif hasattr(image, "__getitem__") and isinstance(image, Sized):
            images = PlacedImages(image)
        else:
            images = PlacedImages(list(image)) if isinstance(image, Collection) else PlacedStream(image)
        if isinstance(images, PlacedImages):
            if len(images) == 0:
                return []
            if self._batch_size is None:
                kwargs.setdefault("batch_size", IMAGES_AT_ONCE)
        matrix = self._matrix(labels, kwargs)
        # Past the stock class, which would put the labels among the arguments of every image.
        results = super(ZeroShotImageClassificationPipeline, self).__call__(images, matrix=matrix, **kwargs)
        is_lazy = isinstance(images, PlacedStream) or isinstance(image, Dataset)
        return list(results) if isinstance(images, PlacedImages) and not is_lazy else results

    def _matrix(self, labels: Any, kwargs: dict[str, Any]) -> ClassifierMatrix:
        """The classifier matrix of one call, whose arguments for it are taken out of `kwargs`."""
        made = self._preprocess_params
        given = {name: kwargs.pop(name) for name in ("hypothesis_template", "tokenizer_kwargs") if name in kwargs}
        if isinstance(labels, ZeroShotClassifier):
            if given:
                raise ValueError(
                    f"{min(given)} cannot be changed where candidate_labels is a ZeroShotClassifier, whose labels are "
                    f"encoded already; give it to ZeroShotClassifier, or pass the labels themselves."
                )
            matrix = labels.matrix
        else:
            template = given.get("hypothesis_template", made.get("hypothesis_template", STOCK_TEMPLATE))
            settings = given.get("tokenizer_kwargs", made.get("tokenizer_kwargs")) or {}
            matrix = build_matrix(self.model, self.tokenizer, labels, template, tokenizer_settings=settings)
        return replace(matrix, weights=matrix.weights.cpu())  # where transformers puts features before `postprocess`

    def _sanitize_parameters(
        self,
        candidate_labels: Any = None,
        hypothesis_template: Any = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
        top_k: int | None = None,
        matrix: ClassifierMatrix | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Which step gets which argument. Those that make the matrix are only kept, for `__call__`."""
        check_top_k(top_k)
        before = {
            "candidate_labels": candidate_labels,
            "hypothesis_template": hypothesis_template,
            "tokenizer_kwargs": tokenizer_kwargs,
            "timeout": timeout,
        }
        after = {"top_k": top_k, "matrix": matrix}
        return {k: v for k, v in before.items() if v is not None}, {}, {k: v for k, v in after.items() if v is not None}

    def preprocess(self, image: Any, timeout: float | None = None, **made_with: Any) -> dict[str, Any]:
        """An image → pixel_values (1, 3, y, x). Files and opened files are turned as their EXIF orientation says."""
        index = image.index if isinstance(image, Placed) else None
        in_worker = get_worker_info() is not None
        try:
            with at_place(index):
                pixels = self._pixels(image.image if isinstance(image, Placed) else image, timeout)
        except UnreadableImageError as error:
            if not in_worker:
                raise
            # DataLoader hands on no more of a worker's error than its text, so this one goes as data; see `_forward`.
            side = self.image_processor.crop_size
            return {"pixel_values": torch.zeros(1, 3, side.height, side.width, dtype=self.dtype), "error": error}
        return {"pixel_values": pixels, "error": None} if in_worker else {"pixel_values": pixels}

    def _pixels(self, image: Any, timeout: float | None) -> Tensor:
        """One image, whatever it is → (1, 3, y, x)."""
        check_single(image)
        if is_to_be_opened(image):  # by the image processor, which knows about drafts, unless there is a time limit
            image = image if timeout is None else open_image(image, timeout=timeout)
        elif isinstance(image, Image.Image):
            image = turn_upright(image)
        return self.image_processor([image], return_tensors="pt").to(self.dtype)["pixel_values"]

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Tensor]:
        errors = model_inputs.get("error")
        for error in errors if isinstance(errors, list) else [errors]:
            if error is not None:
                raise error
        return {"features": self.model(pixel_values=model_inputs["pixel_values"]).image_embeds}

    def postprocess(
        self, model_outputs: dict[str, Tensor], matrix: ClassifierMatrix, top_k: int | None = None
    ) -> list[dict[str, Any]]:
        """The features of one image (1, D) → labels and scores, best first."""
        scores, places = matrix.score(model_outputs["features"])[0].sort(descending=True, stable=True)
        pairs = zip(scores[:top_k].tolist(), places[:top_k].tolist(), strict=True)
        names = matrix.names
        return [{"score": score, "label": names[place]} for score, place in pairs]


def check_device(device: Any) -> None:
    """Refuse an accelerator that isn't there; transformers takes the CPU for `device=0`, and torch's errors differ."""
    if device is None or (isinstance(device, int) and device < 0):
        return
    named = torch.device(device) if isinstance(device, str) else device
    kind, number = ("", int(named)) if isinstance(named, int) else (named.type, named.index or 0)
    if kind in ("cpu", "meta"):
        return
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None or kind not in ("", found.type):
        there = "none" if found is None else f"{found.type} alone"
        raise ValueError(
            f"device={device!r} asks for an accelerator, but torch {torch.__version__} finds {there} here; pass "
            f'device="cpu", or leave device out to take what there is.'
        )
    if number >= torch.accelerator.device_count():
        raise ValueError(
            f"device={device!r} asks for number {number}, but there are {torch.accelerator.device_count()}, counted "
            f"from 0."
        )


class ZeroShotDispatcher:
    """What stands in transformers' registry of tasks: it makes our pipeline for our models, else the stock one."""

    _load_processor = ZeroShotImageClassificationPipeline._load_processor
    _load_image_processor = ZeroShotImageClassificationPipeline._load_image_processor
    _load_video_processor = ZeroShotImageClassificationPipeline._load_video_processor
    _load_feature_extractor = ZeroShotImageClassificationPipeline._load_feature_extractor
    _load_tokenizer = ZeroShotImageClassificationPipeline._load_tokenizer

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        model = kwargs["model"] if "model" in kwargs else args[0]
        is_ours = getattr(getattr(model, "config", None), "model_type", None) == HfClipConfig.model_type
        if not is_ours:
            return ZeroShotImageClassificationPipeline(*args, **kwargs)
        check_device(kwargs.get("device"))
        return HfClipZeroShotPipeline(*args, **kwargs)


def register_pipeline() -> None:
    """Put the dispatcher where `transformers.pipeline` looks for the task's class."""
    PIPELINE_REGISTRY.supported_tasks[TASK]["impl"] = ZeroShotDispatcher
