"""Heads on frozen image embeddings: out of an image's feature a score, or probabilities of labels.

A head is one linear layer, or two with a ReLU between them. It is a file beside its model, `heads/NAME.safetensors`,
with the layers, the labels, a checksum, and the feature that the model gives to one fixed image. By this feature the
model is known again, whatever dtype it is loaded in: a head is of no use with other embeddings.

Dimensions: I images, D embedding, K labels.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import linear, normalize

from ..checkpoints.safetensors_stream import read_all
from ..checkpoints.whole_file import whole_file
from ..model.variants import VARIANTS
from .features import encode_images
from .pixel_classifier import PixelClassifier

FILE_FORMAT = "hf_clip.embedding_head.1"
FOLDER, SUFFIX = "heads", ".safetensors"
KINDS = ("scores", "labels")

SAME = 0.02
"""Distance of two features of length one up to which they are of the same model. In bfloat16 it is about 0.003."""

Layer = tuple[Tensor, Tensor]
"""Weights (outputs, inputs) and biases (outputs,), float32."""


def reference_image() -> Image.Image:
    """Return the fixed image by whose feature a model is known: two slopes of colour and a chequered pattern."""
    y, x = np.mgrid[0:192, 0:256]
    chequered = 255 * ((x // 32 + y // 32) % 2)
    return Image.fromarray(np.stack([x, 255 * y // 191, chequered], axis=-1).astype(np.uint8))


def check_head_name(name: str) -> str:
    """Return the name of a head. Raises ValueError if it is none."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name.endswith(SUFFIX):
        raise ValueError(
            f"{name!r} is no name of a head: letters, digits, '.', '_' and '-' are taken, without a folder or an "
            f"ending, since it becomes the file {FOLDER}/NAME{SUFFIX} beside the model."
        )
    return name


def path_of_head(model: str | Path, name: str) -> Path:
    """Return where a local model's head lies. Raises ValueError if the name is none."""
    return Path(model) / FOLDER / f"{check_head_name(name)}{SUFFIX}"


@dataclass
class EmbeddingHead:
    """A head on the embeddings of one model.

    Attributes:
        kind: "scores", one number for each image, or "labels".
        labels: The K labels. Of scores: one, the name of the score.
        layers: One or two linear layers, with a ReLU between them.
        reference: (D,) the feature that the model gives to `reference_image`, of length one.
        model: Name of the model, for messages.
        facts: What else is worth knowing, e.g. how the head was trained and measured. JSON can hold it.
    """

    kind: str
    labels: list[str]
    layers: list[Layer]
    reference: Tensor
    model: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """The width D of the embeddings."""
        return self.layers[0][0].shape[1]

    def outputs(self, features: Tensor) -> Tensor:
        """Compute what the last layer gives.

        Args:
            features: (I, D) of any length.

        Returns:
            (I, K) float32: logits of the labels. Of scores: (I, 1), the scores.

        Raises:
            ValueError: The features have another width.
        """
        if features.ndim != 2 or features.shape[1] != self.width:
            raise ValueError(
                f"The features have shape {tuple(features.shape)}, but this head was trained on (images, "
                f"{self.width}): take the embeddings of {self.model or 'its own model'}."
            )
        found = normalize(features.float(), dim=-1)
        for place, (weight, bias) in enumerate(self.layers):
            found = linear(found.relu() if place else found, weight.to(found.device), bias.to(found.device))
        return found

    def score(self, features: Tensor) -> Tensor:
        """Score images.

        Args:
            features: (I, D), such as `encode_images` returns.

        Returns:
            (I, K) probabilities of the labels, float32. Of scores: (I, 1), the scores.

        Raises:
            ValueError: The features have another width.
        """
        found = self.outputs(features)
        return found if self.kind == "scores" else found.softmax(-1)

    def rank(self, features: Tensor, top_k: int | None = None) -> list[list[dict[str, Any]]]:
        """Find the labels and their probabilities of each image, best first. Of scores: the one score.

        Args:
            features: (I, D), such as `encode_images` returns.
            top_k: Number of labels for each image. None: all.

        Returns:
            For each image a list of dictionaries with `label` and `score`.
        """
        ordered, places = self.score(features).cpu().sort(dim=1, descending=True, stable=True)
        return [
            [{"label": self.labels[place], "score": score} for place, score in zip(row, scores, strict=True)][:top_k]
            for row, scores in zip(places.tolist(), ordered.tolist(), strict=True)
        ]

    def check_reference(self, found: Tensor, name: str = "this head") -> None:
        """Compare a model's feature of `reference_image` with that of the head's own model.

        Args:
            found: (D,) the model's feature, of length one.
            name: What the head is called in the error.

        Raises:
            ValueError: It is another model's.
        """
        own = f"the embeddings of {self.model}" if self.model else "other embeddings"
        advice = "Take that model, or train a head for this one with `hf-clip evaluate head`."
        if found.shape != self.reference.shape:
            raise ValueError(
                f"{name} was trained on {own}, which have {len(self.reference)} dimensions, and this model's have "
                f"{found.shape[-1]}. {advice}"
            )
        distance = float((found.float().cpu() - self.reference).norm())
        if not distance <= SAME:
            raise ValueError(
                f"{name} was trained on {own}, and this model's are others: its feature of a test image lies "
                f"{distance:.2f} away, where {SAME} is the most. {advice}"
            )

    def check_model(self, model: Any, processor: Any, name: str = "this head") -> None:
        """Compare the embeddings of a model with those that the head was trained on.

        Args:
            model: HfClipModel or HfClipVisionModelWithProjection, in evaluation mode.
            processor: HfClipProcessor or HfClipImageProcessor.
            name: What the head is called in the error.

        Raises:
            ValueError: They are others.
        """
        self.check_reference(encode_images(model, processor, reference_image())[0], name)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all.

        Args:
            path: The file. Its folder is created if it is missing.

        Raises:
            IsADirectoryError: `path` is a folder.
        """
        tensors = {"reference": self.reference.float().cpu().contiguous()}
        for place, (weight, bias) in enumerate(self.layers):
            tensors[f"layers.{place}.weight"] = weight.float().cpu().contiguous()
            tensors[f"layers.{place}.bias"] = bias.float().cpu().contiguous()
        metadata = {"format": FILE_FORMAT, "kind": self.kind, "labels": json.dumps(self.labels)}
        metadata |= {"model": self.model, "normalised": "true", "facts": json.dumps(self.facts)}
        metadata["checksum"] = _checksum(tensors, metadata)
        with whole_file(path) as unfinished:
            save_file(tensors, unfinished, metadata)

    @classmethod
    def load(cls, path: str | Path) -> "EmbeddingHead":
        """Read a file that `save` wrote.

        Args:
            path: The file.

        Returns:
            The head. `check_model` says whether it is of a model.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is a file of another kind, or damaged.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no head {path}; `hf-clip evaluate head` trains one.")
        tensors, metadata = read_all(path)
        if metadata.get("format") != FILE_FORMAT:
            raise ValueError(f"{path} is no head of hf_clip's ({FILE_FORMAT}); `hf-clip evaluate head` trains one.")
        if metadata.get("checksum") != _checksum(tensors, metadata):
            raise ValueError(f"{path} is damaged: its checksum is another. Train the head again, or copy it anew.")
        try:
            count = sum(name.startswith("layers.") for name in tensors) // 2
            head = cls(
                kind=metadata["kind"],
                labels=json.loads(metadata["labels"]),
                layers=[(tensors[f"layers.{n}.weight"], tensors[f"layers.{n}.bias"]) for n in range(count)],
                reference=tensors["reference"],
                model=metadata["model"],
                facts=json.loads(metadata["facts"]),
            )
        except (KeyError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}); train the head again.") from error
        if problem := head._contradiction():
            raise ValueError(f"{path} is damaged: {problem}; train the head again.")
        return head

    def _contradiction(self) -> str | None:
        """Describe a contradiction within a file's content, for a message. None if there is none."""
        if self.kind not in KINDS:
            return f"its kind is {self.kind[:80]!r}, none of {', '.join(KINDS)}"
        if not isinstance(self.labels, list) or not all(isinstance(label, str) for label in self.labels):
            return "its labels are no list of texts"
        if not self.labels:
            return "it has no labels"
        if not isinstance(self.facts, dict):
            return "its facts are no JSON object"
        if self.kind == "scores" and len(self.labels) != 1:
            return f"it has {len(self.labels)} names for one score"
        if self.reference.ndim != 1 or not self.layers:
            return "it has no layers"
        inputs = len(self.reference)
        for weight, bias in self.layers:
            if weight.ndim != 2 or weight.shape[1] != inputs or bias.shape != weight.shape[:1]:
                return f"a layer of shape {tuple(weight.shape)} follows on {inputs} inputs"
            inputs = len(weight)
        if inputs != len(self.labels):
            return f"it has {len(self.labels)} labels and {inputs} outputs"
        held = [self.reference, *(tensor for layer in self.layers for tensor in layer)]
        if not all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in held):
            return "its tensors hold something other than finite float32 numbers"
        return None


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for name in ("format", "kind", "labels", "model", "normalised", "facts"):
        state.update(f"{name}={metadata.get(name)}\0".encode())
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        state.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())  # NumPy lacks some dtypes
    return state.hexdigest()


@dataclass(frozen=True)
class HeadClassifier(PixelClassifier):
    """A model and a head on its embeddings, for `classify_stream`."""

    model: Any
    processor: Any
    head: EmbeddingHead

    @property
    def labels(self) -> list[str]:
        """The labels of the head."""
        return self.head.labels

    def _rank_features(self, features: Tensor, top_k: int | None) -> list[list[dict[str, Any]]]:
        """Find the labels and scores of images whose features (I, D) are given, best first."""
        return self.head.rank(features, top_k)


def find_head(head: str | Path, model: str, *, local_files_only: bool = False) -> Path:
    """Find the file of a head.

    Args:
        head: A name, or the path of a file: with a folder in it, or ending in `.safetensors`.
        model: The folder or repository in which a name is looked up.
        local_files_only: Whether nothing may be downloaded.

    Returns:
        The file.

    Raises:
        FileNotFoundError: There is no such head.
        ValueError: It is no name of a head.
    """
    text = str(head)
    if text.endswith(SUFFIX) or re.search(r"[/\\]", text):
        if not (path := Path(os.path.expanduser(text))).is_file():
            raise FileNotFoundError(f"There is no head {text}; `hf-clip evaluate head` trains one.")
        return path
    check_head_name(text)
    folder = Path(model)
    if folder.is_dir():
        if (path := path_of_head(folder, text)).is_file():
            return path
        names = sorted(file.stem for file in (folder / FOLDER).glob(f"*{SUFFIX}"))
        there = f"its heads are {', '.join(names)}" if names else "it has none"
        raise FileNotFoundError(
            f"{model} has no head {text!r}: {there}. Name one of them or a file, or train one with `hf-clip evaluate "
            f"head`."
        )
    if model.count("/") != 1 or folder.exists() or model in VARIANTS:
        raise FileNotFoundError(f"{model} is no folder beside whose model a head {text!r} could lie: name its file.")
    try:
        return Path(hf_hub_download(model, f"{FOLDER}/{text}{SUFFIX}", local_files_only=local_files_only))
    except (EntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise FileNotFoundError(
            f"The repository {model} has no head {text!r} that could be loaded ({reason}). Name a file, or train one "
            f"with `hf-clip evaluate head`."
        ) from error


def load_head(
    head: str | Path, model: Any, processor: Any, *, source: str | None = None, local_files_only: bool = False
) -> EmbeddingHead:
    """Load a head that was trained on this model's embeddings.

    Args:
        head: The name of a head beside the model, or the path of a file.
        model: HfClipModel or HfClipVisionModelWithProjection, in evaluation mode.
        processor: HfClipProcessor or HfClipImageProcessor.
        source: The folder or repository in which a name is looked up. None: where the model was loaded from.
        local_files_only: Whether nothing may be downloaded.

    Returns:
        The head.

    Raises:
        FileNotFoundError: There is no such head.
        ValueError: The file is damaged or no head, or the head is another model's.

    Example::

        head = load_head("aesthetic", model, processor)
        head.score(encode_images(model, processor, ["a.jpg", "b.jpg"]))  # (2, 1)
    """
    place = source if source is not None else str(getattr(model, "name_or_path", ""))
    path = find_head(head, place, local_files_only=local_files_only)
    found = EmbeddingHead.load(path)
    found.check_model(model, processor, str(path))
    return found


__all__ = ["EmbeddingHead", "HeadClassifier", "find_head", "load_head", "path_of_head", "reference_image"]
