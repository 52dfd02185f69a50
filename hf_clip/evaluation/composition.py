"""Compositionality: does a model tell a right caption from a wrong one that has nearly the same words?

Two layouts: an image with a right and one or several wrong captions (ARO, SugarCrepe), for which there is a text score;
and two images with a caption each (Winoground), for which there are text, image and group score.

Equal similarities count against the model.

Dimensions: N rows, D embedding.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..zero_shot.progress import progress_bar
from .captioned_images import Choices, open_choices
from .class_metrics import pair_scores
from .embedder import Embedder, Unreadable
from .feature_cache import processor_settings


@dataclass
class CompositionResult:
    """What a test of compositionality gave.

    Attributes:
        metrics: `text_score`: the right caption is more similar than all wrong ones. Of rows with two images also
            `image_score` and `group_score`, see `pair_scores`.
        count: Number of rows.
        protocol: How it was measured, in words.
        precision: The dtype that the model computed in.
        split: The data set's split.
        processor: The image processor's settings.
        unreadable: Rows that are left out, since an image cannot be opened, each with its reason.
        metric: The one that the data set is reported by.
    """

    metrics: dict[str, float]
    count: int
    protocol: str
    precision: str
    processor: dict[str, Any]
    split: str = ""
    unreadable: list[str] = field(default_factory=list)
    metric: str = "text_score"

    @property
    def value(self) -> float:
        """The metric that the data set is reported by."""
        return self.metrics[self.metric]


class _OneImage(NamedTuple):
    name: str
    image: Any
    row: int
    side: int


def evaluate_composition(
    model: Any,
    processor: Any,
    dataset: Any,
    *,
    split: str | None = None,
    image_column: str | None = None,
    right_column: str | None = None,
    wrong_column: str | None = None,
    right_index: int | None = None,
    batch_size: int = 32,
    threads: int | None = None,
    progress: bool = False,
) -> CompositionResult:
    """Measure how often the right caption of an image is told from wrong ones.

    Args:
        model: A model of the CLIP family: ours, or transformers' CLIP or SigLIP.
        processor: Its processor.
        dataset: Whatever `open_choices` takes.
        split: Name of the split. None: the only one, or `test`, or `validation`.
        image_column: The column of images. None: the only one that can be it.
        right_column: The column of right captions. None: `caption`, `true_caption` and the like.
        wrong_column: The column of wrong captions. None: `negative_caption`, `false_caption` and the like.
        right_index: Where all captions stand in one column `caption_options`: the place of the right one, from 0.
        batch_size: Number of images encoded at once.
        threads: Number of threads that open images. None: the number of processors.
        progress: Whether to show a progress bar.

    Returns:
        The result.

    Raises:
        UnreadableImagesError: More than 1 % of the images cannot be opened. A ValueError.
        NotFiniteFeaturesError: The model gives NaN. A ValueError.
        ValueError: The split is empty, or a column is missing.
    """
    columns: dict[str, Any] = {"image_column": image_column, "right_column": right_column, "wrong_column": wrong_column}
    columns["right_index"] = right_index
    data: Choices = open_choices(dataset, split, **columns)
    embedder = Embedder(model, processor, batch_size=batch_size, threads=threads)
    captions: list[list[str]] = []

    def images() -> Iterator[_OneImage]:
        for place, row in enumerate(data.rows()):
            captions.append(row.captions)
            for side, image in enumerate(row.images):
                yield _OneImage(row.name, image, place, side)

    unreadable = Unreadable(data.name)  # the rows are known, and not their images
    found: dict[tuple[int, int], Tensor] = {}
    with embedder.evaluating(), progress_bar(f"Composition on {data.name}", "image", data.count, progress) as update:
        for rows, features in embedder.images(images(), places=data.places, unreadable=unreadable):
            found |= {(row.row, row.side): feature for row, feature in zip(rows, features, strict=True)}
            update(len(rows))
        sides = 1 + max((side for _, side in found), default=0)
        whole = [place for place in range(len(captions)) if all((place, side) in found for side in range(sides))]
        if not whole:
            raise ValueError(f"{data.name} has no rows in its split {data.split!r}.")
        texts = embedder.texts([text for place in whole for text in captions[place]], truncation=True)
    features = texts.split([len(captions[place]) for place in whole])
    pairs = [
        torch.stack([found[place, side] for side in range(sides)]) @ own.T
        for place, own in zip(whole, features, strict=True)
    ]  # for each row (images, captions)
    metrics = pair_scores(torch.stack(pairs)) if sides == 2 else {"text_score": _text_score(pairs)}
    return CompositionResult(
        metrics=metrics,
        count=len(whole),
        protocol=f"composition, {data.layout}; equal similarities count against the model",
        precision=embedder.precision,
        split=data.split,
        processor=processor_settings(processor),
        unreadable=unreadable.reasons,
    )


def _text_score(similarities: list[Tensor]) -> float:
    """Compute how often the first caption is the most similar one, out of (1, captions) for each row."""
    right = [bool((row[0, 0] > row[0, 1:]).all()) for row in similarities]
    return sum(right) / len(right)
