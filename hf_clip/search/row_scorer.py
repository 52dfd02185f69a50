"""Scores of rows: the similarity of image and caption, those of heads, and tags.

Dimensions: I images, D embedding.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..zero_shot.embedding_head import EmbeddingHead, load_head
from ..zero_shot.laion_head import read_laion_head
from .image_tags import ImageTagger
from .index_model import hash_of_tensors, text_weights
from .index_table import shown_path
from .indexed_image import full_size, perceptual_hash
from .row_encoding import EmbeddedRow
from .scored_rows import check_column

CLIP_SCORE = "clip_score"


class RowScorer:
    """All scores of rows: of captions, heads and labels.

    Args:
        model: HfClipModel.
        processor: Its processor.
        with_captions: Whether rows have captions, which are scored then.
        heads: Heads of scores: names of heads beside the model, their files, or LAION's.
        labels: Labels that may become tags, as for `ImageTagger`. None: there are no tags.
        source: Where the model is.

    Attributes:
        scores: Names of the columns that hold scores.
        tagger: What gives rows tags, or None.

    Raises:
        OSError: There is no such head.
        ValueError: A head is of another model or gives no scores, or two give the same.
    """

    def __init__(self, model: Any, processor: Any, with_captions: bool, heads: Sequence[Any], labels: Any, source: str):
        self.model, self.processor, self.with_captions = model, processor, with_captions
        self.heads: dict[str, EmbeddingHead] = {}
        for head in heads:
            read = _read_head(head, model, processor, source)
            column = check_column(read.labels[0])
            if column.lower() in map(str.lower, self.heads):  # SQL does not tell them apart
                raise ValueError(f"Two heads have a score {column!r}, and a column has one: give one of them.")
            self.heads[column] = read
        self.scores = [*([CLIP_SCORE] if with_captions else []), *self.heads]
        self.tagger = None if labels is None else ImageTagger(model, processor, labels)

    def made_of(self) -> dict[str, Any]:
        """What the scores depend on besides the image tower. JSON can hold it."""
        layers = {
            f"{name} {place} {part}": tensor
            for name, head in self.heads.items()
            for place, layer in enumerate(head.layers)
            for part, tensor in zip(("weight", "bias"), layer, strict=True)
        }
        found: dict[str, Any] = {"heads": hash_of_tensors(layers), "text_weights": None, "labels": None}
        if self.with_captions:
            found["text_weights"] = hash_of_tensors(text_weights(self.model))
        if self.tagger is not None:
            found["labels"] = [self.tagger.labels, hash_of_tensors({"labels": self.tagger.matrix.weights})]
        return found

    def columns_of(self, found: Sequence[EmbeddedRow]) -> tuple[list[dict[str, Any]], np.ndarray]:
        """The columns of rows that were opened, and their embeddings (I, D)."""
        embeddings = np.stack([one.embedding for one in found if one.embedding is not None])
        features = torch.from_numpy(embeddings)
        of_heads = {name: head.score(features)[:, 0].tolist() for name, head in self.heads.items()}
        tags = self.tagger.tags_of(features.to(self.model.device)) if self.tagger else None
        rows = []
        for place, one in enumerate(found):
            _, width, height = one.seen
            row = {"id": one.row.number, "path": shown_path(one.row.path), "width": width, "height": height}
            row |= {"caption": one.row.caption, "metadata": one.row.metadata}
            if self.with_captions:
                text = one.text_embedding
                row[CLIP_SCORE] = None if text is None else float(embeddings[place] @ text)
            row |= {name: values[place] for name, values in of_heads.items()}
            if tags is not None:
                row["tags"] = json.dumps([tag["label"] for tag in tags[place]], ensure_ascii=False)
            rows.append(row)
        return rows, embeddings


def _read_head(head: Any, model: Any, processor: Any, source: str) -> EmbeddingHead:
    if isinstance(head, EmbeddingHead):
        found = head
    elif str(head).lower().endswith((".pth", ".pt")):
        found = read_laion_head(os.path.expanduser(head))
    else:
        found = load_head(head, model, processor, source=source)
    if found.kind != "scores":
        raise ValueError(f"The head {head} gives labels, but a column needs a score: train one with --score-column.")
    if found.width != model.config.projection_dim:
        raise ValueError(
            f"The head {head} is for embeddings of {found.width} numbers, and this model's have "
            f"{model.config.projection_dim}: take the head of this model."
        )
    return found


def look(data: bytes, image: Image.Image) -> tuple[int, int, int]:
    """Perceptual hash, width and height of an image, which may be a draft."""
    return perceptual_hash(image), *full_size(data, image)


__all__ = ["CLIP_SCORE", "RowScorer", "look"]
