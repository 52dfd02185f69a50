"""Tags of images: all labels whose score reaches a threshold, of image files or of the embeddings of an index.

An image has as many tags as pass, and none where none does. What a score is:

- "background": the image is compared with one label and with the background label that is nearest to it, by a softmax.
  At 0.5 both are equally near. It needs no calibration, and does not depend on the other labels.
- "sigmoid": the probability of the label by itself, for a model that was trained so, or was calibrated.
- "cosine": the cosine similarity.
- "softmax": the label's share among all labels, only for a classifier that was saved with it.

Dimensions: I images, D embedding, K labels, U background labels.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.fetch import is_web_address
from ..zero_shot.files import Classified
from ..zero_shot.label_matrix import build_matrix, default_scores
from ..zero_shot.matrix import ClassifierMatrix
from ..zero_shot.pixel_classifier import PixelClassifier
from ..zero_shot.prompts import DEFAULT_TEMPLATE, LabelError, read_labels
from .image_index import ImageIndex
from .xmp_sidecar import SidecarError, add_keywords, is_keyword, sidecar_of

BACKGROUND = ("thing", "place", "pattern", "surface", "something else")
"""What an image shows that shows none of the labels. A label is to be nearer than all of these."""

SCORES = ("background", "sigmoid", "cosine")
LEAST_SCORE = 0.5
"""Default threshold of scores that are probabilities."""

IMAGES_AT_ONCE = 4096
"""Embeddings of an index whose scores are computed at once."""

BETWEEN_TAGS = "; "
TAG_COLUMNS = ["image", "tags", "scores", "error"]


class ImageTagger(PixelClassifier):
    """Gives images their tags. `classify_stream` takes it as a classifier.

    Args:
        model: HfClipModel in evaluation mode.
        processor: Its HfClipProcessor.
        labels: As for `ZeroShotClassifier`.
        templates: As for `ZeroShotClassifier`.
        background: Labels for everything else. None: `BACKGROUND`, for "background" scores.
        scores: "background", "sigmoid" or "cosine". None: "sigmoid" for a model that was trained so, else "background".
        threshold: The least score of a tag. None: 0.5, where scores are probabilities.
        batch_size: Number of prompts encoded at once.

    Raises:
        LabelError: A label is empty, appears twice, or is no keyword. A ValueError; its `index` is the label's place.
        ValueError: The scores cannot be used with this model, or need a threshold.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        labels: Any,
        templates: Any = DEFAULT_TEMPLATE,
        *,
        background: Any = None,
        scores: str | None = None,
        threshold: float | None = None,
        batch_size: int = 64,
    ):
        trained = default_scores(model)
        scores = scores or ("sigmoid" if trained == "sigmoid" else "background")
        check_scores(scores, threshold)
        if scores == "sigmoid" and trained != "sigmoid":
            raise ValueError(
                "This model was trained with a softmax, so its sigmoid scores are all near one: take background "
                "scores, or a classifier that was calibrated (ZeroShotClassifier.calibrate and save)."
            )
        names = read_labels(labels)
        check_keywords(names)
        # Of other scores a background has no part: a label passes by itself.
        others = (BACKGROUND if background is None else background) if scores == "background" else ()
        if scores == "background" and not others:
            raise ValueError("Background scores need background labels; give at least one.")
        self.model, self.processor = model, processor
        self.is_against_background = scores == "background"
        matrix_scores = "softmax" if self.is_against_background else scores
        self.matrix = build_matrix(
            model,
            processor,
            names,
            templates,
            background=[other for other in others if other not in names] if background is None else others,
            scores=matrix_scores,
            batch_size=batch_size,
        )
        least = LEAST_SCORE if threshold is None else threshold
        self.thresholds = torch.full((len(names),), float(least))

    @classmethod
    def load(cls, path: str | Path, model: Any, processor: Any, *, threshold: float | None = None) -> "ImageTagger":
        """Read a classifier that `ZeroShotClassifier.save` wrote. Its labels, scores and thresholds are taken.

        Args:
            path: The file.
            model: The model that made it.
            processor: Its processor.
            threshold: One threshold of all labels instead.

        Returns:
            What gives images the classifier's labels.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no classifier, of another model, or has no thresholds and `threshold` is None.
        """
        matrix = ClassifierMatrix.load(path)
        if not matrix.is_of(model) or matrix.weights.shape[0] > model.config.projection_dim:
            raise ValueError(f"{path} was made by another model than this one: its tags would mean nothing.")
        least = matrix.thresholds if threshold is None else torch.full((len(matrix.labels),), float(threshold))
        if least is None:
            raise ValueError(
                f"{path} has no thresholds: give one with --threshold, or find them by ZeroShotClassifier.calibrate "
                f"and save it again."
            )
        check_keywords(matrix.labels)
        tagger = cls.__new__(cls)
        tagger.model, tagger.processor, tagger.matrix = model, processor, matrix
        tagger.is_against_background = False
        tagger.thresholds = least
        return tagger

    @property
    def labels(self) -> list[str]:
        """The labels that may become tags."""
        return self.matrix.labels

    def scores_of(self, features: Tensor) -> Tensor:
        """The scores of images, by which tags are given.

        Args:
            features: (I, D) of any length.

        Returns:
            (I, K) float32.
        """
        count = len(self.labels)
        if not self.is_against_background:
            return self.matrix.score(features)[:, :count]
        logits = self.matrix.logits(features)
        return (logits[:, :count] - logits[:, count:].amax(dim=1, keepdim=True)).sigmoid()

    def tags_of(self, features: Tensor, top_k: int | None = None) -> list[list[dict[str, Any]]]:
        """The tags of images.

        Args:
            features: (I, D) of any length.
            top_k: Most tags of an image. None: all that pass.

        Returns:
            For each image a list of dictionaries with `label` and `score`, best first.
        """
        ordered, places = self.scores_of(features).cpu().sort(dim=1, descending=True, stable=True)
        passed = ordered >= self.thresholds[places]
        return [
            [{"label": self.labels[place], "score": score} for place, score, ok in zip(*row, strict=True) if ok][:top_k]
            for row in zip(places.tolist(), ordered.tolist(), passed.tolist(), strict=True)
        ]

    def _rank_features(self, features: Tensor, top_k: int | None) -> list[list[dict[str, Any]]]:
        """Find the tags of images, as `tags_of`."""
        return self.tags_of(features, top_k)


def check_scores(scores: str, threshold: float | None) -> None:
    """Refuse scores that are unknown, or that say nothing without a threshold."""
    if scores not in SCORES:
        raise ValueError(f"scores is {scores!r}, but must be one of {', '.join(SCORES)}.")
    if scores == "cosine" and threshold is None:
        raise ValueError(
            "Cosine similarities need a threshold, since each model has others: give --threshold, such as 0.25."
        )


def check_keywords(labels: Iterable[str]) -> None:
    """Raise LabelError for a label that could not be told from two, or not be written into a sidecar."""
    for place, label in enumerate(labels):
        if BETWEEN_TAGS.strip() in label or not is_keyword(label):
            raise LabelError(
                f"Label {place}, {label!r:.60}, cannot be a tag: it holds a semicolon or a control character. Leave "
                f"that out.",
                place,
            )


def tag_index(
    tagger: ImageTagger, index: ImageIndex, *, top_k: int | None = None, where: str | None = None
) -> Iterator[Classified]:
    """Give the images of an index their tags, from their embeddings. No image is opened.

    Args:
        tagger: Of the index's model.
        index: The index.
        top_k: Most tags of an image. None: all that pass.
        where: A condition on the index's columns, such as `path LIKE '%2023%'`.

    Yields:
        A result for each image, in the order in which the images came into the index.
    """
    matrix = index.matrix()
    stored = index.tables.rows(["id", "path_bytes"], where)
    ids = stored["id"].to_pylist()
    names = [os.fsdecode(path) for path in stored["path_bytes"].to_pylist()]
    for first in range(0, len(ids), IMAGES_AT_ONCE):
        features = matrix.of(ids[first : first + IMAGES_AT_ONCE])
        tags = tagger.tags_of(features.to(tagger.matrix.weights.device), top_k)
        for name, found in zip(names[first:], tags, strict=False):
            yield Classified(name, found)


def write_sidecars(results: Iterable[Classified]) -> Iterator[Classified]:
    """Write each image's tags into its sidecar, and hand the result on, with what went wrong as its error."""
    for result in results:
        problem = _write_sidecar(result) if result.labels and result.error is None else None
        yield result if problem is None else replace(result, error=problem)


def _write_sidecar(result: Classified) -> str | None:
    if is_web_address(result.name) or not os.path.isfile(result.name):
        return "there is no such file, beside which a sidecar could be written"
    sidecar = sidecar_of(result.name)
    try:
        add_keywords(sidecar, [entry["label"] for entry in result.labels])
    except SidecarError as error:
        return str(error)
    except OSError as error:
        return f"the sidecar {os.path.basename(sidecar)} cannot be written ({error.strerror or error})"
    return None


def tag_row(result: Classified, name: str) -> dict[str, str | float | None]:
    """A result as a row of a table, whose columns are TAG_COLUMNS."""
    tags: Sequence[dict[str, Any]] = result.labels
    joined = BETWEEN_TAGS.join(entry["label"] for entry in tags)
    scores = BETWEEN_TAGS.join(f"{entry['score']:.4f}" for entry in tags)
    return dict(zip(TAG_COLUMNS, (name, joined, scores, result.error), strict=True))


__all__ = [
    "BACKGROUND",
    "SCORES",
    "TAG_COLUMNS",
    "ImageTagger",
    "check_keywords",
    "check_scores",
    "tag_index",
    "tag_row",
    "write_sidecars",
]
