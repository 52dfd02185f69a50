"""Zero-shot classification: labels × templates → a matrix of text features, made once; images × matrix → scores.

1. Every name of a label is put into every template and encoded; each feature is brought to length one.
2. The features of a label are averaged, and the average is brought to length one again (section 3.1.4): a column.
3. An image's logits are its cosine similarities with the columns, times the logit scale.

Dimensions: I images, D embedding, K labels, U background labels, M = K + U columns.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import replace
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .calibration import fit_sigmoid, fit_softmax_scale, fit_thresholds
from .features import (
    TextError,
    TextTooLongError,
    check_batch_size,
    check_texts,
    encode_images,
    encode_text_batches,
    is_single_image,
    no_features,
    progress_bar,
    tokenizer_of,
)
from .matrix import SCORES, ClassifierMatrix, fingerprint_of
from .prompts import DEFAULT_TEMPLATE, LabelError, Template, as_plain, make_prompts, read_labels, read_templates


def default_scores(model: Any) -> str:
    """What the model was trained by."""
    return getattr(model.config, "contrastive_loss", "softmax")


def check_top_k(top_k: Any) -> None:
    if top_k is not None and (not isinstance(top_k, Integral) or top_k < 1):
        raise ValueError(f"top_k is {top_k!r}, but a whole number of at least 1 is needed, or None for all labels.")


def check_parts(model: Any, processor: Any) -> None:
    """Refuse what has no text tower or no tokenizer."""
    if isinstance(model, (str, Path)):
        raise ValueError(f"model is {str(model)!r}; load it first, with AutoModel.from_pretrained.")
    if not hasattr(model, "text_model") or not hasattr(model, "logit_scale"):
        raise ValueError(
            f"Labels are encoded by the text tower, which {type(model).__name__} doesn't have; pass an HfClipModel, or "
            f"take a saved classifier with ZeroShotClassifier.load."
        )
    if not hasattr(tokenizer_of(processor), "decode"):
        raise ValueError(
            f"processor is of type {type(processor).__name__}, but the model's HfClipProcessor is needed: "
            f"AutoProcessor.from_pretrained."
        )


def sum_prompts(
    model: Any,
    processor: Any,
    columns: list[list[str]],
    templates: list[Template],
    *,
    batch_size: int,
    progress: bool,
    settings: dict[str, Any],
) -> Tensor:
    """The sums (M, D) of the features of every column's prompts, each of length one.

    Each batch is added as soon as it is encoded, and prompts are made when they are encoded: what is held grows with
    the columns and not with the prompts.
    """
    check_batch_size(batch_size)

    def prompts() -> Iterator[str]:
        return (prompt for column in columns for prompt in make_prompts(column, templates))

    counts = torch.tensor([len(column) * len(templates) for column in columns])
    owner = torch.arange(len(columns)).repeat_interleave(counts)
    sums = no_features(model, len(columns))
    try:
        check_texts(model, processor, prompts(), len(owner), settings)
        with progress_bar("Encoding texts", "text", len(owner), progress) as update:
            batches = encode_text_batches(model, processor, prompts(), batch_size=batch_size, settings=settings)
            for places, features in batches:
                sums.index_add_(0, owner[places].to(sums.device), features.to(sums.device))
                update(len(places))
    except TextError as error:
        if error.index is None:
            raise
        prompt = next(islice(prompts(), error.index, None))
        raise TextError(error.problem, int(owner[error.index]), f"The prompt {prompt[:200]!r}") from error
    except TextTooLongError as error:
        raise TextTooLongError(
            f"The prompt {next(islice(prompts(), error.index, None))[:200]!r} has {error.length} tokens, start and end "
            f"included, but the model takes {error.limit}. Shorten the label or the template.",
            int(owner[error.index]),
            error.length,
            error.limit,
        ) from None
    return sums


def build_matrix(
    model: Any,
    processor: Any,
    labels: Any,
    templates: Any = DEFAULT_TEMPLATE,
    *,
    background: Any = (),
    scores: str | None = None,
    batch_size: int = 64,
    progress: bool = False,
    tokenizer_settings: dict[str, Any] | None = None,
) -> ClassifierMatrix:
    """Encode every name of every label in every template; the arguments are ZeroShotClassifier's."""
    check_parts(model, processor)
    scores = scores or default_scores(model)
    if scores not in SCORES:
        raise ValueError(f"scores is {scores!r}, but must be one of {', '.join(map(repr, SCORES))}.")
    functions, texts = read_templates(templates)
    names = read_labels(labels)
    if isinstance(background, str):
        raise ValueError(f"background is a single text, {background!r}; pass a list of background labels.")
    if isinstance(background, Iterable):
        background = background if isinstance(background, Mapping) else list(background)
    others = read_labels(background) if background else {}
    if both := names.keys() & others.keys():
        raise ValueError(f"{min(both)!r} is both a label and a background label; leave one out.")
    columns = [*names.values(), *others.values()]
    sums = sum_prompts(
        model,
        processor,
        columns,
        functions,
        batch_size=batch_size,
        progress=progress,
        settings=tokenizer_settings or {},
    )
    bias = getattr(model, "logit_bias", None)
    return ClassifierMatrix(
        weights=normalize(sums, dim=-1).T.contiguous(),
        labels=list(names),
        scores=scores,
        logit_scale=float(model.logit_scale.detach().float().exp()),
        logit_bias=0.0 if bias is None else float(bias.detach()),
        templates=texts,
        fingerprint=fingerprint_of(model),
    )


class ZeroShotClassifier:
    """Classify images by labels that are given as texts; the labels are encoded once, here.

        classifier = ZeroShotClassifier(model, processor, ["cat", "dog"], templates="imagenet_7")
        classifier.classify("cat.jpg")   # [{"label": "cat", "score": 0.98}, {"label": "dog", "score": 0.02}]

    model:      HfClipModel; to load a saved classifier, HfClipVisionModelWithProjection is enough
    processor:  HfClipProcessor
    labels:     a list of texts, a list of lists of names of which the first is the label, a mapping from label to
                names, or the ClassLabel of a data set
    templates:  a template such as "a photo of a {}.", a list of them, functions from name to prompt, the name of a set
                in `hf_clip.zero_shot.prompts.TEMPLATE_SETS`, or a file with one template per line
    background: labels that take part and come back as None, "none of these"
    scores:     "softmax" over the labels at the model's own logit scale; "sigmoid" of each by itself, which needs a
                model that was trained that way, or `calibrate`; or "cosine". None: as the model was trained
    batch_size: prompts encoded at once
    progress:   show a progress bar while they are

    Raises ValueError for labels that are empty or appear twice and for templates without a placeholder.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        labels: Any,
        templates: Any = DEFAULT_TEMPLATE,
        *,
        background: Any = (),
        scores: str | None = None,
        batch_size: int = 64,
        progress: bool = True,
    ):
        self.model, self.processor = model, processor
        self.matrix = build_matrix(
            model,
            processor,
            labels,
            templates,
            background=background,
            scores=scores,
            batch_size=batch_size,
            progress=progress,
        )
        if self.matrix.scores == "sigmoid" and default_scores(model) != "sigmoid":
            warnings.warn(
                "This model was trained with a softmax: until `calibrate` has found a bias, its sigmoid scores are all "
                "near one.",
                stacklevel=2,
            )

    @property
    def labels(self) -> list[str]:
        """The labels, in the order of the columns."""
        return self.matrix.labels

    @property
    def weights(self) -> Tensor:
        """The classifier matrix (D, M): a column of length one for every label, then for every background label."""
        return self.matrix.weights

    @property
    def thresholds(self) -> dict[str, float] | None:
        """The score from which on `classify(..., thresholds=True)` gives each label; None before `calibrate`."""
        found = self.matrix.thresholds
        return None if found is None else dict(zip(self.labels, found.tolist(), strict=True))

    def _features(self, images: Any, batch_size: int, progress: bool, settings: dict[str, Any]) -> Tensor:
        return encode_images(self.model, self.processor, images, batch_size=batch_size, progress=progress, **settings)

    def logits(self, images: Any, *, batch_size: int = 16, progress: bool = False, **settings: Any) -> Tensor:
        """Images → (I, M) float32: cosine similarities times the logit scale (plus the bias, where there is one).

        images:   an image or any iterable of images: Pillow images, paths, URLs, bytes, arrays, rows of `datasets`
        settings: for the image processor, e.g. fit="pad"
        """
        return self.matrix.logits(self._features(images, batch_size, progress, settings))

    def classify(
        self,
        images: Any,
        top_k: int | None = None,
        *,
        thresholds: bool = False,
        batch_size: int = 16,
        progress: bool = False,
        **settings: Any,
    ) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        """Labels and scores of each image, best first: one list for one image, a list of lists for several.

        images:     as in `logits`
        top_k:      how many to return (default: all)
        thresholds: only labels whose score reaches the threshold that `calibrate` found; there may be none

        Each entry is {"label": ..., "score": ...}; background labels are one entry, whose label is None.
        """
        check_top_k(top_k)
        if not isinstance(thresholds, bool):
            raise ValueError(
                f"thresholds is {thresholds!r:.40}, but True or False is needed: the thresholds are those that "
                f"`calibrate` found. To cut elsewhere, compare the scores."
            )
        matrix = self.matrix  # once, as another thread may calibrate
        if thresholds and matrix.thresholds is None:
            raise ValueError("This classifier has no thresholds yet; `calibrate` finds them on images with labels.")
        scores = matrix.score(self._features(images, batch_size, progress, settings)).cpu()
        names = matrix.names
        least = [-math.inf] * len(names)
        ordered, places = scores.sort(dim=1, descending=True, stable=True)
        if thresholds and matrix.thresholds is not None:
            least = [*matrix.thresholds.tolist(), math.inf]
        else:
            ordered, places = ordered[:, :top_k], places[:, :top_k]
        results = [
            [
                {"label": names[place], "score": score}
                for place, score in zip(row_places, row, strict=True)
                if score >= least[place]
            ][:top_k]
            for row_places, row in zip(places.tolist(), ordered.tolist(), strict=True)
        ]
        return results[0] if is_single_image(images) else results

    def calibrate(
        self, images: Any, labels: Any, *, batch_size: int = 16, progress: bool = True, **settings: Any
    ) -> dict[str, float]:
        """Fit the logit scale, and a threshold for each label, on images whose labels are known.

        images: as in `logits`
        labels: for each image its label or its number, or None for an image of none of them; or the labels that it
            has, a list or set of them; or a bool tensor (I, K)

        With "softmax" scores an image has one label, and the scale at which that is likeliest is found (temperature
        scaling); with "sigmoid" a scale and a bias (Platt scaling); "cosine" scores have neither. The thresholds are
        those at which each label's F1 is highest. All of it is kept, saved, and used from now on.

        Returns the logit scale and bias, and F1 over these images and all labels at the thresholds.
        Raises LabelError, a ValueError with the `index` of an image whose labels cannot be used.
        """
        matrix = replace(self.matrix)  # takes its place when all of it is found, as another thread may classify
        is_right = self._read_truth(labels)  # (I, K)
        features = self._features(images, batch_size, progress, settings)
        if len(features) != len(is_right):
            raise ValueError(f"There are {len(features)} images and the labels of {len(is_right)}; one each is needed.")
        if len(features) == 0:
            raise ValueError("There are no images to calibrate on; pass some with their labels.")
        is_right = is_right.to(features.device)
        cosines = matrix.cosines(features)
        if matrix.scores == "softmax":
            if (several := is_right.sum(-1) > 1).any():
                index = int(several.int().argmax())
                raise LabelError(
                    f"Image {index} has several labels, but a softmax shares one out among them; build the classifier "
                    f'with scores="sigmoid".',
                    index,
                )
            is_none = ~is_right.any(-1, keepdim=True)
            count = cosines.shape[1] - is_right.shape[1]
            if is_none.any() and count == 0:
                index = int(is_none.int().argmax())
                raise LabelError(
                    f"Image {index} has none of the labels, but there are no background labels for it; pass some to "
                    f"ZeroShotClassifier, or leave the image out.",
                    index,
                )
            matrix.logit_scale = fit_softmax_scale(cosines, torch.cat([is_right, is_none.expand(-1, count)], dim=1))
        elif matrix.scores == "sigmoid":
            if is_right.all() or not is_right.any():
                raise ValueError(
                    f"All {is_right.numel()} pairs of image and label are {'right' if is_right.any() else 'wrong'}; "
                    f"to calibrate, images with and without a label are needed."
                )
            matrix.logit_scale, matrix.logit_bias = fit_sigmoid(cosines[:, : len(matrix.labels)], is_right)
        scores = matrix.score(features)[:, : len(matrix.labels)]
        matrix.thresholds = fit_thresholds(scores, is_right).cpu()
        given = scores >= matrix.thresholds.to(scores.device)
        f1 = 2 * (given & is_right).sum() / (given.sum() + is_right.sum()).clamp(min=1)
        self.matrix = matrix
        return {"logit_scale": matrix.logit_scale, "logit_bias": matrix.logit_bias, "f1": float(f1)}

    def _read_truth(self, labels: Any) -> Tensor:
        """Known labels as a bool tensor (I, K)."""
        if str(getattr(labels, "dtype", None)) in ("bool", "torch.bool"):
            if labels.ndim != 2 or labels.shape[1] != len(self.labels):
                raise ValueError(
                    f"labels have shape {tuple(labels.shape)}, but (images, {len(self.labels)}) is needed."
                )
            return torch.as_tensor(labels)
        labels = labels.tolist() if hasattr(labels, "tolist") else labels  # of an array or a tensor
        if isinstance(labels, (str, Mapping, Set)) or not isinstance(labels, Iterable):
            raise ValueError(f"labels is a {type(labels).__name__}, but for each image its label is needed, in a list.")
        labels = list(labels)
        place = {label: index for index, label in enumerate(self.labels)}
        is_right = torch.zeros(len(labels), len(self.labels), dtype=torch.bool)
        for row, given in enumerate(labels):
            several = [given] if isinstance(given, str) or not isinstance(given, Iterable) else given
            for label in [] if given is None else several:
                is_number = isinstance(label, Integral) and not isinstance(label, bool)
                index = place.get(label, -1) if isinstance(label, str) else int(label) if is_number else -1
                if not 0 <= index < len(self.labels):
                    raise LabelError(
                        f"Image {row} has the label {as_plain(label)!r}, which is none of this classifier's; None "
                        f"stands for none of them.",
                        row,
                    )
                is_right[row, index] = True
        return is_right

    def save(self, path: str | Path) -> None:
        """Write the matrix with its labels, scale and thresholds to one safetensors file; the model is not in it."""
        self.matrix.save(path)

    @classmethod
    def load(cls, path: str | Path, model: Any, processor: Any) -> "ZeroShotClassifier":
        """A saved classifier with the model whose images it classifies; the text tower is not needed.

        model:     HfClipModel or HfClipVisionModelWithProjection
        processor: HfClipProcessor or HfClipImageProcessor

        Raises FileNotFoundError, or ValueError for another file or a model of another width.
        """
        if not hasattr(model, "visual_projection"):
            raise ValueError(f"model is a {type(model).__name__}, but one with an image tower is needed.")
        matrix = ClassifierMatrix.load(path)
        if (width := model.config.projection_dim) != matrix.weights.shape[0]:
            raise ValueError(
                f"{path} was made by a model with features of {matrix.weights.shape[0]}, but this one has {width}; "
                f"take the model whose text tower made it."
            )
        if not matrix.is_of(model):
            warnings.warn(
                f"{path} was made by a model with another visual projection than this one's: unless the two have the "
                f"same text tower, its scores mean nothing.",
                stacklevel=2,
            )
        matrix.weights = matrix.weights.to(model.device)
        classifier = cls.__new__(cls)
        classifier.model, classifier.processor, classifier.matrix = model, processor, matrix
        return classifier
