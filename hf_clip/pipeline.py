"""`pipeline("zero-shot-image-classification")` that encodes its labels once.

The stock pipeline tokenizes and encodes all labels again for every batch, and a batch is one picture unless asked
otherwise. This one keeps the classifier matrix of every set of labels and templates that it was asked for.

transformers asks its registry for the task's class. `ZeroShotDispatcher` stands there and hands our models to our
pipeline and all others to the stock one.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers.pipelines import PIPELINE_REGISTRY, ZeroShotImageClassificationPipeline

from .classifier_matrix import ClassifierMatrix
from .configuration_hf_clip import HfClipConfig
from .features import is_single_picture
from .pictures_hf_clip import is_to_be_opened, open_picture, turn_upright
from .prompts import read_labels
from .zero_shot import build_matrix

TASK = "zero-shot-image-classification"
STOCK_TEMPLATE = "This is a photo of {}."
MOST_MATRICES = 16
"""Sets of labels that a pipeline remembers."""

PICTURES_AT_ONCE = 16
"""Of a list or a data set, unless the call or the pipeline says otherwise."""


def weights_state(model: Any) -> int:
    """A number that changes when a weight is moved, cast, trained or loaded, so that no matrix outlives its weights.

    What is written past autograd's sight, to a weight's `.data`, is not seen.
    """
    # Weights made in inference mode have no version, and can't be trained.
    return hash(tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()))


def as_key(value: Any) -> Any:
    """Labels with their names, templates or settings as a key of a dictionary; functions stand for themselves."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return value
    if isinstance(value, Mapping):
        return tuple((key, as_key(item)) for key, item in value.items())
    return tuple(map(as_key, value))


class HfClipZeroShotPipeline(ZeroShotImageClassificationPipeline):
    """Zero-shot classification of pictures with labels that are encoded once.

        classify = pipeline("zero-shot-image-classification", model="org/clip-vit-l14-336")
        classify(["cat.jpg", "dog.jpg"], candidate_labels=["cat", "dog"], top_k=1)

    Called as the stock pipeline and with the same results, and besides:

    candidate_labels:    anything that ZeroShotClassifier takes; may also be given when the pipeline is made
    hypothesis_template: also a list of templates, whose features are averaged, or the name of a set
    top_k:               how many labels to return (default: all)
    batch_size:          pictures encoded at once; 16 for lists and data sets, unless given. Generators yield a result
                         as soon as its picture is read
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._matrices: OrderedDict[Any, ClassifierMatrix] = OrderedDict()
        super().__init__(*args, **kwargs)

    def __call__(self, image: Any = None, candidate_labels: Any = None, **kwargs: Any) -> Any:
        image = kwargs.pop("images", image)
        if image is None:
            raise ValueError("The zero-shot pipeline needs pictures: pass them first, or as `images`.")
        if isinstance(image, (list, tuple)) and len(image) == 0:
            return []
        made = self._preprocess_params
        labels = made.get("candidate_labels") if candidate_labels is None else candidate_labels
        if labels is None:
            raise ValueError('The zero-shot pipeline needs candidate_labels, e.g. candidate_labels=["cat", "dog"].')
        template = kwargs.pop("hypothesis_template", made.get("hypothesis_template", STOCK_TEMPLATE))
        tokenizer_kwargs = kwargs.pop("tokenizer_kwargs", made.get("tokenizer_kwargs")) or {}
        matrix = self._matrix(labels, template, tokenizer_kwargs)
        image = list(image) if isinstance(image, tuple) else image
        if self._batch_size is None and isinstance(image, (list, Dataset)):
            kwargs.setdefault("batch_size", PICTURES_AT_ONCE)
        # Past the stock class, which would put the labels among the arguments of every picture.
        return super(ZeroShotImageClassificationPipeline, self).__call__(image, matrix=matrix, **kwargs)

    def _matrix(self, labels: Any, template: Any, tokenizer_kwargs: dict[str, Any]) -> ClassifierMatrix:
        """The classifier matrix of these labels and templates, from memory where it is."""
        labels = read_labels(labels)
        template = template if isinstance(template, str) or not isinstance(template, Iterable) else list(template)
        key = (as_key(labels), as_key(template), as_key(tokenizer_kwargs), weights_state(self.model))
        if (known := self._matrices.pop(key, None)) is not None:
            self._matrices[key] = known  # the last one used is the last one forgotten
            return known
        matrix = build_matrix(self.model, self.tokenizer, labels, template, tokenizer_settings=tokenizer_kwargs)
        matrix.weights = matrix.weights.cpu()  # where transformers puts the features before `postprocess`
        self._matrices[key] = matrix
        if len(self._matrices) > MOST_MATRICES:
            self._matrices.popitem(last=False)
        return matrix

    def _sanitize_parameters(
        self,
        candidate_labels: Any = None,
        hypothesis_template: Any = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        timeout: float | None = None,
        top_k: int | None = None,
        matrix: ClassifierMatrix | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Which step gets which argument. Those that make the matrix are only remembered, for `__call__`."""
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k is {top_k}, but must be at least 1, or None for all labels.")
        before = {
            "candidate_labels": candidate_labels,
            "hypothesis_template": hypothesis_template,
            "tokenizer_kwargs": tokenizer_kwargs,
            "timeout": timeout,
        }
        after = {"top_k": top_k, "matrix": matrix}
        return {k: v for k, v in before.items() if v is not None}, {}, {k: v for k, v in after.items() if v is not None}

    def preprocess(self, image: Any, timeout: float | None = None, **made_with: Any) -> dict[str, Tensor]:
        """A picture → pixel_values (1, 3, H, W). Files and opened files are turned as their EXIF orientation says."""
        if is_to_be_opened(image):  # by the image processor, which knows about drafts, unless there is a time limit
            image = image if timeout is None else open_picture(image, timeout=timeout)
        elif isinstance(image, Image.Image):
            image = turn_upright(image)
        elif not is_single_picture(image) or isinstance(image, (list, tuple)):
            raise ValueError(
                "The zero-shot pipeline takes one picture or a flat list of pictures, and this holds several."
            )
        try:
            return self.image_processor([image], return_tensors="pt").to(self.dtype)
        except ValueError as error:
            raise ValueError(str(error).replace("images[0]", "the picture", 1)) from error

    def _forward(self, model_inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"features": self.model(pixel_values=model_inputs["pixel_values"]).image_embeds}

    def postprocess(
        self, model_outputs: dict[str, Tensor], matrix: ClassifierMatrix, top_k: int | None = None
    ) -> list[dict[str, Any]]:
        """The features of one picture (1, D) → labels and scores, best first."""
        scores, places = matrix.score(model_outputs["features"])[0].sort(descending=True, stable=True)
        pairs = zip(scores[:top_k].tolist(), places[:top_k].tolist(), strict=True)
        return [{"score": score, "label": matrix.labels[place]} for score, place in pairs]


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
        return (HfClipZeroShotPipeline if is_ours else ZeroShotImageClassificationPipeline)(*args, **kwargs)


def register_pipeline() -> None:
    """Put the dispatcher where `transformers.pipeline` looks for the task's class."""
    PIPELINE_REGISTRY.supported_tasks[TASK]["impl"] = ZeroShotDispatcher
