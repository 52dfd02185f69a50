"""The pipeline `zero-shot-image-classification` for CLIP models, which encodes its labels once per call.

The stock pipeline encodes all labels again for every batch, and by default a batch is one image. This pipeline makes
the classifier matrix at the start of a call and scores all images of the call with it.

Invariant: a call remembers nothing for the next one. A stored matrix would become wrong when weights, adapters, hooks,
the configuration, the tokenizer or autocast change, and not all of these changes can be noticed. Calls of several
threads therefore share nothing either. To encode labels once for many calls, pass a `ZeroShotClassifier` as
`candidate_labels`.

transformers looks up the class of a task in its registry. There `ZeroShotDispatcher` takes the place of the stock
class: it makes our pipeline for our models and the stock pipeline for all others.

Dimensions: I images, D embedding, C channels, y × x pixels after resizing.
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
from .classifier import ZeroShotClassifier, check_top_k
from .features import as_read, check_images, check_single, is_single_image, unread
from .label_matrix import build_matrix
from .matrix import ClassifierMatrix
from .prompts import read_labels

TASK = "zero-shot-image-classification"
STOCK_TEMPLATE = "This is a photo of {}."

IMAGES_AT_ONCE = 16
"""Default batch size for a list or a data set."""

OF_LABELS = ("hypothesis_template", "tokenizer_kwargs", "truncate_dim")
"""Arguments that decide what becomes of the labels."""


@dataclass(frozen=True)
class Placed:
    """One of several images with its place among them, which an error names if the image cannot be read."""

    image: Any
    index: int


class PlacedImages(Dataset):
    """A list, column or data set of images, which are read one by one."""

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
    """A generator, or another iterable of images whose number is unknown."""

    def __init__(self, images: Iterable[Any]):
        self.images = images

    def __iter__(self) -> Iterator[Placed]:
        for index, image in enumerate(as_read(self.images)):
            yield Placed(image, index)


class HfClipZeroShotPipeline(ZeroShotImageClassificationPipeline):
    """Zero-shot image classification that encodes its labels once per call.

    It is called like the stock pipeline and gives the same results. `__call__` lists what it takes beyond that.

    Example::

        classify = pipeline("zero-shot-image-classification", model="org/clip-vit-l14-336")
        classify(["cat.jpg", "dog.jpg"], candidate_labels=["cat", "dog"], top_k=1)
        # [[{"score": 0.98, "label": "cat"}], [{"score": 0.95, "label": "dog"}]]
    """

    def __call__(self, image: Any = None, candidate_labels: Any = None, **kwargs: Any) -> Any:
        """Classify images.

        Args:
            image: One image, or several: a list, a tuple, a column of `datasets`, a data set, a generator or another
                iterator. Also taken as `images`. Files are turned as their EXIF orientation says.
            candidate_labels: The labels, in any form that `ZeroShotClassifier` takes, or a `ZeroShotClassifier`, whose
                labels are not encoded again. May also be given when the pipeline is made.
            **kwargs: `hypothesis_template` ("This is a photo of {}."): one template, a list of templates whose features
                are averaged, or the name of a set. `top_k`: number of labels to return; None for all. `batch_size`:
                images encoded at once; 16 for lists and data sets, 1 for generators. `timeout`: seconds until the
                download of an image is given up; None for 60. `tokenizer_kwargs`: arguments for the tokenizer.
                `truncate_dim`: how many of a feature's first numbers are compared; None for all.

        Returns:
            For one image a list of dictionaries with `score` and `label`, best first. For a list, tuple or column a
            list of such lists. For a data set, generator or iterator an iterator, which yields each result as soon as
            it is known.

        Raises:
            UnreadableImageError: An image cannot be read. A ValueError; its `index` is the image's place.
            ValueError: Images or labels are missing, or cannot be used.
        """
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
        # Calls the base class of the stock pipeline: the stock `__call__` would pass the labels along with every image.
        results = super(ZeroShotImageClassificationPipeline, self).__call__(images, matrix=matrix, **kwargs)
        is_lazy = isinstance(images, PlacedStream) or isinstance(image, Dataset)
        return list(results) if isinstance(images, PlacedImages) and not is_lazy else results

    def _matrix(self, labels: Any, kwargs: dict[str, Any]) -> ClassifierMatrix:
        """Make the classifier matrix of one call. Its arguments are removed from `kwargs`."""
        made = self._preprocess_params
        given = {name: kwargs.pop(name) for name in OF_LABELS if name in kwargs}
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
            width = given.get("truncate_dim", made.get("truncate_dim"))
            matrix = build_matrix(
                self.model, self.tokenizer, labels, template, tokenizer_settings=settings, truncate_dim=width
            )
        return replace(matrix, weights=matrix.weights.cpu())  # transformers moves features there

    def _sanitize_parameters(
        self,
        candidate_labels: Any = None,
        hypothesis_template: Any = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
        top_k: int | None = None,
        matrix: ClassifierMatrix | None = None,
        truncate_dim: int | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Sort arguments by the step that takes them. Those that make the matrix are only kept, for `__call__`."""
        check_top_k(top_k)
        before = {
            "candidate_labels": candidate_labels,
            "hypothesis_template": hypothesis_template,
            "tokenizer_kwargs": tokenizer_kwargs,
            "timeout": timeout,
            "truncate_dim": truncate_dim,
        }
        after = {"top_k": top_k, "matrix": matrix}
        return {k: v for k, v in before.items() if v is not None}, {}, {k: v for k, v in after.items() if v is not None}

    def preprocess(self, image: Any, timeout: float | None = None, **made_with: Any) -> dict[str, Any]:
        """Prepare one image: pixel_values (1, 3, y, x), float. Files are turned as their EXIF orientation says."""
        index = image.index if isinstance(image, Placed) else None
        in_worker = get_worker_info() is not None
        try:
            with at_place(index):
                pixels = self._pixels(image.image if isinstance(image, Placed) else image, timeout)
        except UnreadableImageError as error:
            if not in_worker:
                raise
            # A DataLoader keeps only the text of a worker's error. The error is therefore sent as data, and `_forward`
            # raises it.
            side = self.image_processor.crop_size
            return {"pixel_values": torch.zeros(1, 3, side.height, side.width, dtype=self.dtype), "error": error}
        return {"pixel_values": pixels, "error": None} if in_worker else {"pixel_values": pixels}

    def _pixels(self, image: Any, timeout: float | None) -> Tensor:
        """Open an image if needed, and preprocess it: (1, 3, y, x)."""
        check_single(image)
        if is_to_be_opened(image):  # with a time limit here, else by the image processor, which can decode drafts
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
        """Turn the features of one image (1, D) into labels and scores, best first."""
        scores, places = matrix.score(model_outputs["features"])[0].sort(descending=True, stable=True)
        pairs = zip(scores[:top_k].tolist(), places[:top_k].tolist(), strict=True)
        names = matrix.names
        return [{"score": score, "label": names[place]} for score, place in pairs]


def check_device(device: Any) -> None:
    """Raise ValueError for an accelerator that is missing, and for what is no device.

    Without this, transformers takes the CPU for `device=0`, and for other devices torch raises errors of several kinds.
    """
    if device is None or (isinstance(device, int) and device < 0):
        return
    try:
        named = torch.device(device) if isinstance(device, str) else device
    except RuntimeError:
        raise ValueError(f"device={device!r} is no device; write cpu, cuda, cuda:1, mps or the like.") from None
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


def default_device() -> torch.device:
    """Return the accelerator of this machine, or else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


class ZeroShotDispatcher:
    """The entry in transformers' registry of tasks: makes our pipeline for our models, the stock one for others."""

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
    """Enter the dispatcher into the registry in which `transformers.pipeline` looks up the task's class."""
    PIPELINE_REGISTRY.supported_tasks[TASK]["impl"] = ZeroShotDispatcher
