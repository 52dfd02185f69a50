"""Zero-shot classification by exported graphs, without torch and transformers: the first result comes in a second.

It is `classifier` in other operators. Ids and pixels are the same, and so is the order of all sums; the towers are run
by ONNX Runtime, and what follows them is numpy. Scores differ by rounding only.

Dimensions: I images, T texts, L text length, D embedding, K labels.
"""

from pathlib import Path
from typing import Any

import numpy as np

from ..model.repair_text import TextError
from .plain_inputs import PlainTokenizer, read_image_steps
from .prompts import DEFAULT_TEMPLATE, make_prompts, read_labels, read_templates
from .text_batches import TextTooLongError, check_batch_size, check_texts, text_batches
from .tower_graphs import TowerGraphs, export_again

SMALLEST_NORM = np.float32(1e-12)
FACTS = ("logit_scale", "logit_bias", "scores", "max_position_embeddings")


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors (…, D) to length one."""
    norms = np.sqrt(np.square(vectors, dtype=np.float32).sum(axis=-1, keepdims=True))
    return vectors / np.maximum(norms, SMALLEST_NORM)


def check_names(session: Any, path: Path, input: str, output: str) -> None:
    """Refuse the graph of another tower or of another program."""
    found = [[value.name for value in values] for values in (session.get_inputs(), session.get_outputs())]
    if found != [[input], [output]]:
        names = ", ".join(found[0]), ", ".join(found[1])
        raise ValueError(
            f"{path} computes {names[1]} from {names[0]}, but {output} from {input} is needed; export it again: "
            f"{export_again(path)}."
        )


class OnnxClassifier:
    """Classify images by labels that are given as texts, with the graphs of a folder.

    Args:
        graphs: The graphs of both towers.
        labels: As for `ZeroShotClassifier`.
        templates: As for `ZeroShotClassifier`.
        batch_size: Number of prompts encoded at once.

    Raises:
        FileNotFoundError: The folder has no tokenizer or no image processor.
        ValueError: As for `ZeroShotClassifier`; or a file is damaged.

    Example::

        classifier = OnnxClassifier(TowerGraphs("clip-vit-b32"), ["cat", "dog"])
        pixels = classifier.pixels_of("cat.jpg")
        classifier.rank_pixels([pixels], 1)  # [[{"label": "cat", "score": 0.98}]]
    """

    def __init__(self, graphs: TowerGraphs, labels: Any, templates: Any = DEFAULT_TEMPLATE, *, batch_size: int = 64):
        check_batch_size(batch_size)
        names = read_labels(labels)
        self.labels = list(names)
        self.steps, self.tokenizer = read_image_steps(graphs.folder), PlainTokenizer(graphs.folder)
        text = graphs.sessions["text_model"].result()
        check_names(text, graphs.paths["text_model"], "input_ids", "text_embeds")
        self._read_facts(text, graphs.paths["text_model"])
        self.weights = self._encode_labels(text, list(names.values()), templates, batch_size)
        self.images = graphs.sessions["vision_model"].result()
        check_names(self.images, graphs.paths["vision_model"], "pixel_values", "image_embeds")
        self._check_size(graphs.paths["vision_model"])

    def _read_facts(self, session: Any, path: Path) -> None:
        """Read from a graph's metadata what turns embeddings into scores."""
        found = session.get_modelmeta().custom_metadata_map
        try:
            scale, bias, self.scores, limit = (found[f"hf_clip.{name}"] for name in FACTS)
            self.logit_scale, self.logit_bias, self.limit = float(scale), float(bias), int(limit)
        except (KeyError, ValueError):
            raise ValueError(
                f"{path} does not say how its model scores, as hf-clip's exports do; export it again: "
                f"{export_again(path)}."
            ) from None

    def _check_size(self, path: Path) -> None:
        """Refuse a graph of another model, and an image processor that makes other images than the graph takes."""
        embedded, needed = self.images.get_outputs()[0].shape[-1], len(self.weights)
        if isinstance(embedded, int) and embedded != needed:
            raise ValueError(
                f"{path} embeds images in {embedded} numbers, and the graph beside it embeds texts in {needed}: "
                f"they are of two models; export them again: {export_again(path)}."
            )
        height, width = self.images.get_inputs()[0].shape[2:]
        crop = self.steps.crop_size
        if not self.steps.do_center_crop or (crop.height, crop.width) != (height, width):
            made = f"{crop.height}x{crop.width}" if self.steps.do_center_crop else "of any size"
            raise ValueError(
                f"The image processor of {path.parents[1]} makes images {made}, but {path.name} takes "
                f"{height}x{width}: save the model's own processor there."
            )

    def _encode_labels(self, session: Any, columns: list[list[str]], templates: Any, batch_size: int) -> np.ndarray:
        """Encode each name of each label in each template; returns the classifier matrix (D, K), float32."""
        functions, _ = read_templates(templates)

        def prompts() -> Any:
            return (prompt for column in columns for prompt in make_prompts(column, functions))

        owner = np.repeat(np.arange(len(columns)), [len(column) * len(functions) for column in columns])
        sums: np.ndarray | None = None
        try:
            check_texts(self.tokenizer, self.limit, prompts(), len(owner), {})
            batches = text_batches(self.tokenizer, self.limit, prompts(), batch_size=batch_size, settings={})
            for places, ids in batches:
                features = normalised(session.run(["text_embeds"], {"input_ids": np.ascontiguousarray(ids)})[0])
                sums = np.zeros((len(columns), features.shape[1]), np.float32) if sums is None else sums
                np.add.at(sums, owner[places], features)
        except (TextError, TextTooLongError) as error:
            if error.index is not None:
                error.index, error.is_prompt = int(owner[error.index]), True
            raise
        assert sums is not None  # there is a label, or `read_labels` has refused them
        return np.ascontiguousarray(normalised(sums).T)

    def pixels_of(self, image: Any, **settings: Any) -> np.ndarray:
        """Prepare one image: pixel values (3, y, x), float32. Threads may call this at the same time."""
        return self.steps.prepare(image)(None)

    def score(self, pixels: np.ndarray) -> np.ndarray:
        """Compute the scores (I, K), float32, of pixel values (I, 3, y, x)."""
        features = normalised(self.images.run(["image_embeds"], {"pixel_values": pixels})[0])
        logits = features @ self.weights * np.float32(self.logit_scale) + np.float32(self.logit_bias)
        if self.scores == "sigmoid":
            # As tanh, which overflows nowhere.
            return 0.5 * (1 + np.tanh(0.5 * logits))
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    def rank_pixels(self, pixels: list[np.ndarray], top_k: int | None) -> list[list[dict[str, Any]]]:
        """Find the labels and scores of each image that `pixels_of` made, best first."""
        scores = self.score(np.stack(pixels))
        places = np.argsort(-scores, axis=1, kind="stable")[:, :top_k]
        ordered = np.take_along_axis(scores, places, axis=1)
        return [
            [{"label": self.labels[place], "score": score} for place, score in zip(*row, strict=True)]
            for row in zip(places.tolist(), ordered.tolist(), strict=True)
        ]


__all__ = ["OnnxClassifier"]
