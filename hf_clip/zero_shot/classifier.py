"""Zero-shot classification: labels become a matrix of text features once, and images are compared with its columns.

`label_matrix` makes the matrix. An image's logits are its cosine similarities with the columns, times the logit scale.
`calibration` fits that scale on images whose labels are known.

Dimensions: I images, D embedding, K labels, U background labels, M = K + U columns.
"""

import warnings
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any

from torch import Tensor

from .calibration import calibrate_, read_known_labels
from .features import encode_images, is_single_image
from .label_matrix import build_matrix, default_scores
from .matrix import ClassifierMatrix
from .pixel_classifier import PixelClassifier
from .prompts import DEFAULT_TEMPLATE


def check_top_k(top_k: Any) -> None:
    """Raise ValueError unless `top_k` is None or a whole number of at least 1."""
    if top_k is not None and (not isinstance(top_k, Integral) or top_k < 1):
        raise ValueError(f"top_k is {top_k!r}, but a whole number of at least 1 is needed, or None for all labels.")


class ZeroShotClassifier(PixelClassifier):
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

    def _rank_features(self, features: Tensor, top_k: int | None) -> list[list[dict[str, Any]]]:
        """Find the labels and scores of images whose features (I, D) are given, best first."""
        return self.matrix.rank(features, top_k)

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
        is_right = read_known_labels(labels, matrix.labels)  # (I, K)
        features = self._features(images, batch_size, progress, settings)
        if len(features) != len(is_right):
            raise ValueError(f"There are {len(features)} images and the labels of {len(is_right)}; one each is needed.")
        if len(features) == 0:
            raise ValueError("There are no images to calibrate on; pass some with their labels.")
        f1 = calibrate_(matrix, features, is_right.to(features.device))
        self.matrix = matrix
        return {"logit_scale": matrix.logit_scale, "logit_bias": matrix.logit_bias, "f1": f1}

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
