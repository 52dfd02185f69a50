"""Retrieval of images by texts and of texts by images, with one or several captions to an image.

A caption is right for its own image alone, as in the usual protocol on COCO and Flickr30k, even if another image has
the same words. Equal similarities count against the model. An image that stands in several rows is one image.

Dimensions: I images, T texts, D embedding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..data.content import content_id
from ..zero_shot.features import truncated
from ..zero_shot.progress import progress_bar
from .captioned_images import CaptionedImages, CaptionedRow, open_captioned
from .embedder import Embedder, Unreadable
from .feature_cache import FeatureCache, processor_settings
from .ranking import hub_bias, rank_both_ways
from .widths import embedding_dim, read_widths, widths_in_words

KS = (1, 5, 10)
HUB_K = 128
"""Number of reference queries whose similarities are averaged, as in arXiv:2410.24114."""

CORRECTED = "_hub_corrected"
"""What stands behind the name of a metric that was measured with hubs corrected."""


@dataclass
class RetrievalResult:
    """What retrieval on a data set gave.

    Attributes:
        metrics: `image_retrieval_recall@k`: texts whose image is among the first k; `text_retrieval_recall@k`: images
            one of whose captions is; `mean_recall@k` of both; `..._median_rank`, where 1 is the best.
        corrected: The same with the correction of hubs. Empty without it.
        images: Number of images.
        texts: Number of captions.
        protocol: How it was measured, in words.
        precision: The dtype that the model computed in.
        split: The data set's split.
        processor: The image processor's settings.
        unreadable: Images that cannot be opened, which are left out with their captions, each with its reason.
        metric: The one that the data set is reported by.
        widths: With `truncate_dim`: the metrics of each width that was asked for, the corrected ones with
            `_hub_corrected` behind their names. `metrics` and `corrected` are of the first of them.
        embedding_dim: D of the model.
    """

    metrics: dict[str, float]
    images: int
    texts: int
    protocol: str
    precision: str
    processor: dict[str, Any]
    split: str = ""
    corrected: dict[str, float] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    metric: str = "mean_recall@1"
    widths: dict[int, dict[str, float]] = field(default_factory=dict)
    embedding_dim: int | None = None

    @property
    def count(self) -> int:
        """Number of images."""
        return self.images

    @property
    def value(self) -> float:
        """The metric that the data set is reported by."""
        return self.metrics[self.metric]


@dataclass
class CaptionedEmbeds:
    """Embeddings of a data set.   images: (I, D)   texts: (T, D)   text_ids: (T,) the image of each text"""

    images: Tensor
    texts: Tensor
    text_ids: Tensor
    unreadable: list[str]


def _key(stored: Any) -> Any:
    """Return what an image is known by: its path, or a hash of its bytes."""
    if isinstance(stored, dict):
        stored = stored.get("path") if stored.get("bytes") is None else stored["bytes"]
    if isinstance(stored, (bytes, bytearray)):
        return content_id(bytes(stored))
    return stored if isinstance(stored, str) else id(stored)


def embed_captioned(
    embedder: Embedder, data: CaptionedImages, *, cache: FeatureCache | None = None, progress: bool = False
) -> CaptionedEmbeds:
    """Encode the images and captions of a data set. Captions that are too long are cut.

    Args:
        embedder: The model.
        data: The data set.
        cache: Features of images that are known.
        progress: Whether to show a progress bar.

    Raises:
        UnreadableImagesError: More than 1 % of the images cannot be opened.
        NotFiniteFeaturesError: The model gives NaN.
        ValueError: There are fewer than two images.
    """
    captions: dict[Any, list[str]] = {}
    alive: list[Any] = []  # images without bytes are known by their address, which must not be used again

    def first_rows() -> Iterator[CaptionedRow]:
        for row in data.rows():
            key = _key(row.image)
            if key in captions:
                captions[key] += row.captions
                continue
            if not isinstance(key, str) and not isinstance(row.image, (dict, bytes)):
                alive.append(row.image)
            captions[key] = list(row.captions)
            yield row

    unreadable = Unreadable(data.name, data.count)
    parts: list[Tensor] = []
    found: list[Any] = []
    with progress_bar(f"Retrieval on {data.name}", "image", data.count, progress) as update:
        for rows, features in embedder.images(first_rows(), places=data.places, unreadable=unreadable, cache=cache):
            parts.append(features)
            found += [_key(row.image) for row in rows]
            update(len(rows))
    if len(found) < 2:
        raise ValueError(f"{data.name} has {len(found)} images, but at least 2 are needed to search among.")
    texts = [(place, text) for place, key in enumerate(found) for text in captions[key]]
    text_embeds = embedder.texts([text for _, text in texts], truncation=True)
    return CaptionedEmbeds(
        torch.cat(parts), text_embeds, torch.tensor([place for place, _ in texts]), unreadable.reasons
    )


def retrieval_metrics(image_ranks: Tensor, text_ranks: Tensor, ks: tuple[int, ...] = KS) -> dict[str, float]:
    """Compute recalls and median ranks out of ranks, which count from 0.

    Args:
        image_ranks: (I,) of each image's first right text.
        text_ranks: (T,) of each text's first right image.
        ks: The cut-offs.

    Returns:
        See `RetrievalResult.metrics`.
    """
    found: dict[str, float] = {}
    for name, ranks in (("image_retrieval", text_ranks), ("text_retrieval", image_ranks)):
        found |= {f"{name}_recall@{k}": (ranks < k).double().mean().item() for k in ks}
    for k in ks:
        found[f"mean_recall@{k}"] = (found[f"image_retrieval_recall@{k}"] + found[f"text_retrieval_recall@{k}"]) / 2
    for name, ranks in (("image_retrieval", text_ranks), ("text_retrieval", image_ranks)):
        found[f"{name}_median_rank"] = ranks.double().quantile(0.5).item() + 1
    return found


def evaluate_retrieval(
    model: Any,
    processor: Any,
    dataset: Any,
    *,
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    hub_correction: float | None = None,
    references: Any = None,
    hub_k: int = HUB_K,
    batch_size: int = 32,
    feature_cache: Any = None,
    threads: int | None = None,
    progress: bool = False,
    truncate_dim: int | Sequence[int] | None = None,
) -> RetrievalResult:
    """Measure retrieval in both directions on a data set of images with captions.

    Args:
        model: A model of the CLIP family: ours, or transformers' CLIP or SigLIP.
        processor: Its processor.
        dataset: Whatever `open_captioned` takes.
        split: Name of the split. None: the only one, or `test`, or `validation`.
        image_column: The column of images. None: the only one that can be it.
        caption_column: The column of captions, or a template over the columns. None: the only one that can be it.
        hub_correction: α: how much of the mean of the `hub_k` highest similarities to reference queries is subtracted;
            see `hub_bias`. None: no correction.
        references: Data set of the reference queries, for example the training split opened by `open_captioned`.
        hub_k: Number of similarities in that mean.
        batch_size: Number of images encoded at once.
        feature_cache: Folder in which image features are kept. None: they are not kept.
        threads: Number of threads that open images. None: the number of processors.
        progress: Whether to show a progress bar.
        truncate_dim: How many of a feature's first numbers are compared; or several such widths, at each of which the
            model is measured. Images and texts are encoded once. None: all numbers.

    Returns:
        The result.

    Raises:
        UnreadableImagesError: More than 1 % of the images cannot be opened. A ValueError.
        NotFiniteFeaturesError: The model gives NaN. A ValueError.
        ValueError: The split is empty, columns or reference queries are missing, or a width is not from 1 to D.

    Example::

        result = evaluate_retrieval(model, processor, "captions.parquet")
        print(f"{result.metrics['image_retrieval_recall@5']:.1%}")
    """
    if (hub_correction is None) != (references is None):
        raise ValueError(
            "The correction of hubs needs both its factor and reference queries, which are not those of the test: name "
            "both, e.g. --hub-correction 0.75 --hub-references train."
        )
    columns: dict[str, Any] = {"image_column": image_column, "caption_column": caption_column}
    data = open_captioned(dataset, split, **columns)
    embedder = Embedder(model, processor, batch_size=batch_size, threads=threads)
    named = read_widths(truncate_dim, model)
    widths: list[int | None] = [*named] or [None]

    with embedder.evaluating():
        distinct = None if data.fingerprint is None else f"{data.fingerprint} distinct"
        cache = embedder.cache_in(feature_cache, distinct)
        found = embed_captioned(embedder, data, cache=cache, progress=progress)
        given: CaptionedEmbeds | None = None
        protocol = (
            f"retrieval, captions cut at {embedder.text_limit} tokens, equal similarities count against the model"
        )
        if hub_correction is not None:
            others = open_captioned(references, **({} if isinstance(references, CaptionedImages) else columns))
            given = embed_captioned(embedder, others, progress=progress)
            protocol += _correction_in_words(others, given, hub_correction, hub_k)
        measured = [
            _measure(found, given, width, hub_correction, hub_k, processes=embedder.processes) for width in widths
        ]
    metrics, corrected = measured[0]
    return RetrievalResult(
        metrics=metrics,
        images=len(found.images),
        texts=len(found.texts),
        protocol=protocol + widths_in_words(named, model),
        precision=embedder.precision,
        split=data.split,
        processor=processor_settings(processor),
        corrected=corrected,
        unreadable=found.unreadable,
        widths={
            width: plain | {f"{name}{CORRECTED}": value for name, value in other.items()}
            for width, (plain, other) in zip(named, measured, strict=False)
        },
        embedding_dim=embedding_dim(model),
    )


def _correction_in_words(others: CaptionedImages, given: CaptionedEmbeds, alpha: float, k: int) -> str:
    """What a protocol says of the correction of hubs: the factor, and the reference queries."""
    split = f" ({others.split})" if others.split else ""
    return (
        f"; corrected: {alpha:g} times the mean of {k} of {len(given.texts)} reference texts and of "
        f"{len(given.images)} reference images of {others.name}{split}"
    )


def _measure(
    found: CaptionedEmbeds,
    references: CaptionedEmbeds | None,
    width: int | None,
    alpha: float | None,
    k: int,
    **shared: Any,
) -> tuple[dict[str, float], dict[str, float]]:
    """Figures at a width, and the same with the correction of hubs, empty without reference queries."""
    images, texts = truncated(found.images, width), truncated(found.texts, width)
    ids = torch.arange(len(images))
    metrics = retrieval_metrics(*rank_both_ways(images, texts, ids, found.text_ids, **shared))
    if references is None or alpha is None:
        return metrics, {}
    # Images are searched for by texts, so their bias is that of the reference texts.
    image_bias = hub_bias(images, truncated(references.texts, width), alpha=alpha, k=k, **shared)
    text_bias = hub_bias(texts, truncated(references.images, width), alpha=alpha, k=k, **shared)
    biases: dict[str, Any] = {"image_bias": image_bias, "text_bias": text_bias}
    return metrics, retrieval_metrics(*rank_both_ways(images, texts, ids, found.text_ids, **biases, **shared))
