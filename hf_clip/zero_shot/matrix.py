"""A zero-shot classifier without its model: the matrix of text features, how its scores are computed, and its file.

Dimensions: I images, D embedding, K labels, U background labels, M = K + U columns.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from ..checkpoints.safetensors_stream import read_all
from ..checkpoints.whole_file import whole_file

FINGERPRINT = 8
"""Number of rows and of columns of the visual projection that are kept to recognise the model."""

SCORES = ("softmax", "sigmoid", "cosine")
FILE_FORMAT = "hf_clip.zero_shot.1"


def fingerprint_of(model: Any) -> Tensor:
    """Return a corner of the visual projection, at most (8, 8), float32, which tells models apart."""
    return model.visual_projection.weight.detach()[:FINGERPRINT, :FINGERPRINT].float().cpu().clone()


@dataclass
class ClassifierMatrix:
    """A zero-shot classifier without its model: all that is saved, and all that scores are computed from.

    Attributes:
        weights: (D, M) float32, with columns of length one: first those of the labels, then those of the background
            labels.
        labels: K texts.
        scores: "softmax", "sigmoid" or "cosine".
        logit_scale: Factor of the cosine similarities: one over the temperature.
        logit_bias: Number that is added after scaling.
        thresholds: (K,) the least score at which each label is given. None before calibration.
        templates: The templates as texts. None if one of them is a function.
        fingerprint: A corner of the model's visual projection, by which the model is recognised.
        truncate_dim: Number of a feature's first numbers that are compared, which is D. None: a feature has no more.
    """

    weights: Tensor
    labels: list[str]
    scores: str
    logit_scale: float
    logit_bias: float = 0.0
    thresholds: Tensor | None = None
    templates: list[str] | None = None
    fingerprint: Tensor | None = None
    truncate_dim: int | None = None

    @property
    def names(self) -> list[str | None]:
        """Names of the columns of `score`. These are the labels, then None if there are background labels."""
        return [*self.labels, *([None] if self.weights.shape[1] > len(self.labels) else [])]

    def cosines(self, features: Tensor) -> Tensor:
        """Compute cosine similarities: features (I, D) of any length → (I, M), float32.

        With `truncate_dim` the features may have more numbers than that.
        """
        if self.truncate_dim is not None:
            features = features[..., : self.truncate_dim]
        if features.ndim != 2 or features.shape[1] != self.weights.shape[0]:
            raise ValueError(
                f"The features have shape {tuple(features.shape)}, but this classifier was made for (images, "
                f"{self.weights.shape[0]}): take the model whose text tower made it."
            )
        return normalize(features.float(), dim=-1) @ self.weights.to(features.device)

    def logits(self, features: Tensor) -> Tensor:
        """Compute cosine similarities times the logit scale, plus the logit bias: (I, D) → (I, M)."""
        return self.cosines(features) * self.logit_scale + self.logit_bias

    def score(self, features: Tensor) -> Tensor:
        """Compute the scores of images.

        Args:
            features: (I, D) of any length.

        Returns:
            (I, K), or (I, K + 1) if there are background labels. The last column then means "none of these". It is the
            sum of the background labels' softmax scores, else the highest of their scores.
        """
        if self.scores == "cosine":
            scores = self.cosines(features)
        else:
            logits = self.logits(features)
            scores = logits.softmax(-1) if self.scores == "softmax" else logits.sigmoid()
        own, background = scores[:, : len(self.labels)], scores[:, len(self.labels) :]
        if background.shape[1] == 0:
            return own
        none = background.sum(-1) if self.scores == "softmax" else background.amax(-1)
        return torch.cat([own, none[:, None]], dim=1)

    def rank(
        self, features: Tensor, top_k: int | None = None, *, thresholds: bool = False
    ) -> list[list[dict[str, Any]]]:
        """Find the labels and scores of each image, best first.

        Args:
            features: (I, D) of any length.
            top_k: Number of labels for each image. None: all.
            thresholds: Whether to leave out labels whose score is below their threshold, and the background.

        Returns:
            For each image a list of dictionaries with `label` and `score`. The label of the background is None.
        """
        scores, names = self.score(features).cpu(), self.names
        least = [-math.inf] * len(names)
        ordered, places = scores.sort(dim=1, descending=True, stable=True)
        if thresholds and self.thresholds is not None:
            least = [*self.thresholds.tolist(), math.inf]
        else:
            ordered, places = ordered[:, :top_k], places[:, :top_k]
        return [
            [
                {"label": names[place], "score": score}
                for place, score in zip(row_places, row, strict=True)
                if score >= least[place]
            ][:top_k]
            for row_places, row in zip(places.tolist(), ordered.tolist(), strict=True)
        ]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file. It is written beside `path` and renamed once it is complete."""
        path = Path(path)
        tensors = {
            "weights": self.weights.cpu().contiguous(),
            "logit_scale": torch.tensor(self.logit_scale, dtype=torch.float64),
            "logit_bias": torch.tensor(self.logit_bias, dtype=torch.float64),
        }
        if self.thresholds is not None:
            tensors["thresholds"] = self.thresholds.cpu()
        if self.fingerprint is not None:
            tensors["fingerprint"] = self.fingerprint.cpu()
        metadata = {"format": FILE_FORMAT, "labels": json.dumps(self.labels), "scores": self.scores}
        if self.templates is not None:
            metadata["templates"] = json.dumps(self.templates)
        if self.truncate_dim is not None:
            metadata["truncate_dim"] = str(self.truncate_dim)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; name a file, e.g. {path / 'classifier.safetensors'}.")
        with whole_file(path) as unfinished:
            save_file(tensors, unfinished, metadata)

    def is_of(self, model: Any) -> bool:
        """Whether a model, of any dtype, has the visual projection of the model that made this matrix."""
        if self.fingerprint is None:
            return True
        found = fingerprint_of(model)
        return found.shape == self.fingerprint.shape and bool((found - self.fingerprint).norm() < 0.05 * found.norm())

    @classmethod
    def load(cls, path: str | Path) -> "ClassifierMatrix":
        """Read a file that `save` wrote. Raises FileNotFoundError, and ValueError for a file of another kind."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no classifier {path}; ZeroShotClassifier.save writes one.")
        tensors, metadata = read_all(path)
        if metadata.get("format") != FILE_FORMAT:
            raise ValueError(
                f"{path} is no zero-shot classifier of hf_clip's ({FILE_FORMAT}); ZeroShotClassifier.save writes one."
            )
        try:
            matrix = cls(
                weights=tensors["weights"],
                labels=json.loads(metadata["labels"]),
                scores=metadata["scores"],
                logit_scale=tensors["logit_scale"].item(),
                logit_bias=tensors["logit_bias"].item(),
                thresholds=tensors.get("thresholds"),
                fingerprint=tensors.get("fingerprint"),
                templates=json.loads(metadata["templates"]) if "templates" in metadata else None,
                truncate_dim=int(metadata["truncate_dim"]) if "truncate_dim" in metadata else None,
            )
        except (KeyError, ValueError, RuntimeError) as error:  # RecursionError is a RuntimeError
            reason = f"{type(error).__name__}: {str(error)[:200]!r}"
            raise ValueError(f"{path} is damaged ({reason}); save the classifier anew.") from error
        if problem := matrix._contradiction():
            raise ValueError(f"{path} is damaged: {problem}; save the classifier anew.")
        return matrix

    def _contradiction(self) -> str | None:
        """Describe a contradiction within a file's content, for a message. None if there is none."""
        if not isinstance(self.labels, list) or not all(isinstance(label, str) for label in self.labels):
            return "its labels are no list of texts"
        if self.weights.ndim != 2 or self.weights.shape[1] < len(self.labels) or self.weights.dtype != torch.float32:
            shape = tuple(self.weights.shape)
            return f"it has {len(self.labels)} labels and weights of {self.weights.dtype} and shape {shape}"
        if self.truncate_dim not in (None, self.weights.shape[0]):
            return f"its truncate_dim is {self.truncate_dim}, and its weights have {self.weights.shape[0]} rows"
        if self.scores not in SCORES:
            return f"its scores are {self.scores[:80]!r}, none of {', '.join(SCORES)}"
        if self.thresholds is not None and self.thresholds.shape != (len(self.labels),):
            return f"it has {len(self.labels)} labels and thresholds of shape {tuple(self.thresholds.shape)}"
        return None
