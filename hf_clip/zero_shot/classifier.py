"""Zero-shot classification: labels become a matrix of text features once, and images are compared with its columns.

1. Each name of a label is put into each template. The text tower encodes the prompts, and each feature is normalised.
2. The features of a label are averaged and normalised again (Radford et al. 2021, section 3.1.4). This gives one column
   of the matrix.
3. An image's logits are its cosine similarities with the columns, times the logit scale.

Dimensions: I images, D embedding, K labels, U background labels, M = K + U columns.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..model.repair_text import TextError
from .calibration import fit_sigmoid, fit_softmax_scale, fit_thresholds
from .features import (
    check_texts,
    check_width,
    encode_images,
    encode_pixels,
    encode_text_batches,
    image_processor_of,
    is_single_image,
    no_features,
    progress_bar,
    tokenizer_of,
    truncated,
)
from .matrix import SCORES, ClassifierMatrix, fingerprint_of
from .prompts import DEFAULT_TEMPLATE, LabelError, Template, as_plain, make_prompts, read_labels, read_templates
from .text_batches import TextTooLongError, check_batch_size


def default_scores(model: Any) -> str:
    """Return the scores that fit the model's training loss: "softmax" or "sigmoid"."""
    return getattr(model.config, "contrastive_loss", "softmax")


def check_top_k(top_k: Any) -> None:
    """Raise ValueError unless `top_k` is None or a whole number of at least 1."""
    if top_k is not None and (not isinstance(top_k, Integral) or top_k < 1):
        raise ValueError(f"top_k is {top_k!r}, but a whole number of at least 1 is needed, or None for all labels.")


def check_parts(model: Any, processor: Any) -> None:
    """Raise ValueError for a model without a text tower, or a processor without a tokenizer."""
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
    truncate_dim: int | None = None,
) -> Tensor:
    """Sum the normalised features of each column's prompts.

    Prompts are made when they are encoded, and each batch is added to its sums at once. Memory grows with the number
    of columns, not with the number of prompts.

    Args:
        model: HfClipModel.
        processor: HfClipProcessor.
        columns: For each of the M columns the names of its label.
        templates: Functions from a name to a prompt.
        batch_size: Number of prompts encoded at once.
        progress: Whether to show a progress bar.
        settings: Arguments for the tokenizer.
        truncate_dim: How many of each feature's first numbers are taken, before it is normalised. None: all.

    Returns:
        The sums (M, D) or (M, truncate_dim), float32.

    Raises:
        TextError: A prompt cannot be tokenized; `index` is the place of its label.
        TextTooLongError: A prompt is too long; `index` is the place of its label.
    """
    check_batch_size(batch_size)

    def prompts() -> Iterator[str]:
        return (prompt for column in columns for prompt in make_prompts(column, templates))

    counts = torch.tensor([len(column) * len(templates) for column in columns])
    owner = torch.arange(len(columns)).repeat_interleave(counts)
    sums = no_features(model, len(columns))[:, :truncate_dim]
    try:
        check_texts(model, processor, prompts(), len(owner), settings)
        with progress_bar("Encoding texts", "text", len(owner), progress) as update:
            batches = encode_text_batches(model, processor, prompts(), batch_size=batch_size, settings=settings)
            for places, features in batches:
                features = truncated(features, truncate_dim)
                sums.index_add_(0, owner[places].to(sums.device), features.to(sums.device))
                update(len(places))
    except (TextError, TextTooLongError) as error:
        if error.index is not None:
            error.index, error.is_prompt = int(owner[error.index]), True
        raise
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
    truncate_dim: int | None = None,
) -> ClassifierMatrix:
    """Make the matrix of a zero-shot classifier: encode each name of each label in each template.

    The arguments are those of `ZeroShotClassifier`. Besides, `tokenizer_settings` holds arguments for the tokenizer,
    e.g. `{"truncation": True}`. The matrix is on the model's device.
    """
    check_parts(model, processor)
    check_width(model, truncate_dim)
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
        truncate_dim=truncate_dim,
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
        truncate_dim=truncate_dim,
    )


class ZeroShotClassifier:
    """Classify images by labels that are given as texts.

    The labels are encoded once, when the classifier is made. It can then be used for any number of images.

    Args:
        model: HfClipModel in evaluation mode.
        processor: Its HfClipProcessor.
        labels: The K labels: a list of texts, a list of lists of names (the first name is the label), a mapping from
            labels to names, or the `ClassLabel` of a data set.
        templates: How a name becomes a prompt: a text such as `"a photo of a {}."`, a function from a name to a
            prompt, a list of these, the name of a set ("simple", "imagenet_80", "imagenet_7", "cifar_18"), or the path
            of a file with one template per line. The features of several templates are averaged.
        background: Further labels for everything else that an image may show. They compete with `labels`, and in the
            results all of them together are one entry, whose label is None.
        scores: How logits become scores. "softmax": probabilities that sum to one over labels and background labels.
            "sigmoid": a probability for each label by itself, for a model trained by the sigmoid loss, or after
            `calibrate`. "cosine": cosine similarities, from -1 to 1. None (default): "softmax" or "sigmoid", as the
            model was trained.
        batch_size: Number of prompts encoded at once.
        progress: Whether to show a progress bar while the labels are encoded.
        truncate_dim: How many of a feature's first numbers are compared, for a model that was trained at that width
            (`config.matryoshka_dims`). None: all.

    Raises:
        LabelError: A label is empty, or appears twice. A ValueError; its `index` is the label's place.
        TextTooLongError: A prompt is longer than the model takes. A ValueError; its `index` is the label's place.
        TextError: A prompt cannot be tokenized. A ValueError; its `index` is the label's place.
        ValueError: A template has no placeholder `{}`, or another argument cannot be used.

    Example::

        classifier = ZeroShotClassifier(model, processor, ["cat", "dog"], templates="imagenet_7")
        classifier.classify("cat.jpg")  # [{"label": "cat", "score": 0.98}, {"label": "dog", "score": 0.02}]
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
        truncate_dim: int | None = None,
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
            truncate_dim=truncate_dim,
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
        """The classifier matrix (D, M), float32, with a normalised column per label, then one per background label."""
        return self.matrix.weights

    @property
    def thresholds(self) -> dict[str, float] | None:
        """The least score at which `classify(..., thresholds=True)` gives each label. None before `calibrate`."""
        found = self.matrix.thresholds
        return None if found is None else dict(zip(self.labels, found.tolist(), strict=True))

    def _features(self, images: Any, batch_size: int, progress: bool, settings: dict[str, Any]) -> Tensor:
        return encode_images(self.model, self.processor, images, batch_size=batch_size, progress=progress, **settings)

    def pixels_of(self, image: Any, **settings: Any) -> Tensor:
        """Prepare one image for `rank_pixels`. Threads may call this at the same time.

        Args:
            image: A Pillow image, or what else the image processor takes.
            **settings: Arguments for the image processor, e.g. `fit="pad"`.

        Returns:
            Pixel values (3, y, x), float32.

        Raises:
            UnreadableImageError: It cannot be read. A ValueError.
        """
        return image_processor_of(self.processor)([image], return_tensors="pt", **settings)["pixel_values"][0]

    def rank_pixels(self, pixels: list[Tensor], top_k: int | None) -> list[list[dict[str, Any]]]:
        """Encode a batch of images, and find the labels and scores of each one, best first.

        Args:
            pixels: What `pixels_of` made of each image.
            top_k: Number of labels for each image. None: all.

        Returns:
            For each image a list of dictionaries with `label` and `score`.
        """
        return self.matrix.rank(encode_pixels(self.model, torch.stack(pixels)), top_k)

    def logits(self, images: Any, *, batch_size: int = 16, progress: bool = False, **settings: Any) -> Tensor:
        """Compute the logits of images, before softmax or sigmoid.

        Args:
            images: An image, or any iterable of I images. An image is a Pillow image, an array, a path, a URL, bytes,
                or a row of an image column of `datasets`.
            batch_size: Number of images encoded at once.
            progress: Whether to show a progress bar.
            **settings: Arguments for the image processor, e.g. `fit="pad"`.

        Returns:
            (I, M) float32, the cosine similarities times the logit scale, plus the logit bias if there is one. The
            columns are the labels, then the background labels.

        Raises:
            UnreadableImageError: An image cannot be read. A ValueError; its `index` is the image's place.
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
        """Classify images: find the labels and scores of each one, best first.

        Args:
            images: An image, or any iterable of I images, as in `logits`.
            top_k: Number of labels to return for each image. None: all.
            thresholds: Whether to return only labels whose score reaches the threshold that `calibrate` found. An
                image may then have no label, or several.
            batch_size: Number of images encoded at once.
            progress: Whether to show a progress bar.
            **settings: Arguments for the image processor, e.g. `fit="pad"`.

        Returns:
            A list for one image, or a list of lists for several. Each entry is a dictionary with `label` and `score`.
            The background labels together are one entry, whose label is None. Its score is the sum of their softmax
            scores, else the highest of their scores.

        Raises:
            UnreadableImageError: An image cannot be read. A ValueError; its `index` is the image's place.
            ValueError: `top_k` is no whole number of at least 1, or `thresholds=True` is asked for before
                `calibrate`.

        Example::

            classifier.classify(["cat.jpg", "dog.jpg"], top_k=1)
            # [[{"label": "cat", "score": 0.98}], [{"label": "dog", "score": 0.95}]]
        """
        check_top_k(top_k)
        if not isinstance(thresholds, bool):
            raise ValueError(
                f"thresholds is {thresholds!r:.40}, but True or False is needed: the thresholds are those that "
                f"`calibrate` found. To cut elsewhere, compare the scores."
            )
        matrix = self.matrix  # read once, since another thread may calibrate meanwhile
        if thresholds and matrix.thresholds is None:
            raise ValueError("This classifier has no thresholds yet; `calibrate` finds them on images with labels.")
        results = matrix.rank(self._features(images, batch_size, progress, settings), top_k, thresholds=thresholds)
        return results[0] if is_single_image(images) else results

    def calibrate(
        self, images: Any, labels: Any, *, batch_size: int = 16, progress: bool = True, **settings: Any
    ) -> dict[str, float]:
        """Fit the scores, and a threshold for each label, on images whose labels are known.

        The result is kept in this classifier. It is used from now on, and `save` writes it.

        - "softmax" scores: the logit scale is fitted by temperature scaling (Guo et al. 2017). An image has one label.
        - "sigmoid" scores: a logit scale and a bias are fitted by Platt scaling (Platt 1999).
        - "cosine" scores have neither a scale nor a bias.

        The threshold of a label is the score at which its F1 on these images is highest.

        Args:
            images: An image, or any iterable of I images, as in `logits`.
            labels: The truth about each image: a label or its number, None for an image that has none of the labels,
                or a list or set of labels. Or for all images together a bool array or tensor (I, K).
            batch_size: Number of images encoded at once.
            progress: Whether to show a progress bar.
            **settings: Arguments for the image processor, e.g. `fit="pad"`.

        Returns:
            `logit_scale` and `logit_bias` after fitting, and `f1`, the F1 score over all pairs of these images and the
            labels at the thresholds.

        Raises:
            LabelError: The labels of an image cannot be used. A ValueError; its `index` is the image's place.
            UnreadableImageError: An image cannot be read. A ValueError; its `index` is the image's place.
            ValueError: There are no images, or another number of images than of labels.

        Example::

            classifier.calibrate(["a.jpg", "b.jpg", "c.jpg"], ["cat", "dog", "cat"])
        """
        matrix = replace(self.matrix)  # a copy: another thread may classify until the fit is complete
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
        """Return the known labels of images as a bool tensor (I, K)."""
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
        """Write the classifier to one safetensors file: matrix, labels, scale, bias and thresholds, without the model.

        Args:
            path: The file. Its folder is created if it is missing.

        Raises:
            IsADirectoryError: `path` is a folder.
        """
        self.matrix.save(path)

    @classmethod
    def load(cls, path: str | Path, model: Any, processor: Any) -> "ZeroShotClassifier":
        """Read a classifier that `save` wrote. The text tower is not needed for this.

        Args:
            path: The file.
            model: The model that encodes the images: HfClipModel or HfClipVisionModelWithProjection.
            processor: HfClipProcessor or HfClipImageProcessor.

        Returns:
            The classifier. A warning is given if its matrix was made by a model with another visual projection.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is no classifier, or the model's embeddings have another width.

        Example::

            classifier.save("pets.safetensors")
            vision = HfClipVisionModelWithProjection.from_pretrained("org/clip-vit-b32").eval()
            classifier = ZeroShotClassifier.load("pets.safetensors", vision, processor)
        """
        if not hasattr(model, "visual_projection"):
            raise ValueError(f"model is a {type(model).__name__}, but one with an image tower is needed.")
        matrix = ClassifierMatrix.load(path)
        width, compared = model.config.projection_dim, matrix.weights.shape[0]
        if width < compared or (width > compared and matrix.truncate_dim is None):
            raise ValueError(
                f"{path} was made by a model with features of {compared}, but this one has {width}; "
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
