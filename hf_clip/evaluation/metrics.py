"""Metrics of classification and retrieval, as pure functions of tensors.

All metrics are fractions between 0 and 1, except ranks, which count from 0, and the median rank, which counts from 1.

Invariant: equal scores never help a model. Among equal scores the wrong entries are ranked before the right ones. A
model that gives one score to everything finds nothing, and no result depends on the order of rows. Average precision
is computed at thresholds, which entries with equal scores pass together, as in scikit-learn.

For retrieval, a gallery row is right for a query if the two have equal ids. Five captions of one image all get the
image's id.

Dimensions: I images, K classes, Q queries, G gallery rows, D embedding.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def _refuse(is_bad: Tensor, name: str, what: str) -> None:
    if is_bad.any():
        raise ValueError(
            f"{name} hold {what}, which have no place in a ranking: look for the inputs that they come from."
        )


def _check_cutoffs(ks: Sequence[int]) -> None:
    if not ks or any(k < 1 for k in ks):
        raise ValueError(f"The cut-offs are {tuple(ks)}, but at least one is needed, and each must be 1 or more.")


def _check_classes(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}, but (examples, classes) and "
            f"(examples,) with at least one example are needed."
        )
    lowest, highest = labels.min().item(), labels.max().item()
    if labels.is_floating_point() or not 0 <= lowest <= highest < logits.shape[1]:
        raise ValueError(
            f"labels are {labels.dtype} from {lowest} to {highest}, but the logits have {logits.shape[1]} classes: "
            f"whole numbers from 0 to {logits.shape[1] - 1} are needed."
        )
    _refuse(logits.isnan(), "logits", "NaN values")


def ranks_of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """Count for each image the classes that are ranked before its label.

    Args:
        logits: (I, K), higher for a more likely class.
        labels: (I,) class ids, integers from 0 to K - 1.

    Returns:
        Ranks (I,), int64. 0 means that the label has the highest logit.

    Raises:
        ValueError: The shapes do not fit, a label is out of range, or logits are NaN.
    """
    _check_classes(logits, labels)
    own = logits.gather(1, labels.long()[:, None])  # (I, 1)
    return (logits >= own).sum(dim=1) - 1


def top_k_accuracy(logits: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[int, float]:
    """Compute how often the label is among the k highest logits.

    Args:
        logits: (I, K), higher for a more likely class.
        labels: (I,) class ids, integers from 0 to K - 1.
        ks: The values of k, each at least 1. For k = K and more the accuracy is always 1.

    Returns:
        A dictionary from each k to the fraction of images.

    Raises:
        ValueError: A k is below 1, the shapes do not fit, a label is out of range, or logits are NaN.

    Example::

        top_k_accuracy(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([0, 1]), ks=[1, 2])  # {1: 0.5, 2: 1.0}
    """
    _check_cutoffs(ks)
    ranks = ranks_of_labels(logits, labels)
    return {k: (ranks < k).double().mean().item() for k in ks}


def mean_per_class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Compute the top-1 accuracy of each class, and average over the classes.

    Args:
        logits: (I, K), higher for a more likely class.
        labels: (I,) class ids, integers from 0 to K - 1.

    Returns:
        The mean over all classes that have an image.

    Raises:
        ValueError: The shapes do not fit, a label is out of range, or logits are NaN.
    """
    is_right = ranks_of_labels(logits, labels) == 0
    examples = labels.long().bincount(minlength=logits.shape[1])  # (K,)
    right = labels[is_right].long().bincount(minlength=logits.shape[1])
    occurs = examples > 0
    return (right[occurs].double() / examples[occurs]).mean().item()


def _precision_curve(scores: Tensor, is_right: Tensor) -> tuple[Tensor, Tensor]:
    """Count hits and compute precision at each distinct score, taken as a threshold, from the highest score down.

    Args:
        scores: (I,).
        is_right: (I,) bool.

    Returns:
        Hits and precision, one entry per threshold, float64. The last hit count is the number of all right images.
    """
    if scores.ndim != 1 or scores.shape != is_right.shape or is_right.dtype != torch.bool:
        raise ValueError(
            f"scores have shape {tuple(scores.shape)} and is_right is {is_right.dtype} of shape "
            f"{tuple(is_right.shape)}, but (examples,) for both and torch.bool are needed."
        )
    _refuse(scores.isnan(), "scores", "NaN values")
    if not is_right.any():
        raise ValueError(
            f"None of {len(scores)} examples is right, so that there is no precision to average: leave this class out."
        )
    ordered, places = scores.sort(descending=True)
    hits = is_right[places].cumsum(0).double()  # (I,): number of right images among the first 1, 2, ...
    passed = torch.arange(1, len(scores) + 1, dtype=torch.float64, device=scores.device)
    is_last_of_equals = torch.ones_like(hits, dtype=torch.bool)
    is_last_of_equals[:-1] = ordered[:-1] > ordered[1:]
    return hits[is_last_of_equals], (hits / passed)[is_last_of_equals]


def average_precision(scores: Tensor, is_right: Tensor) -> float:
    """Compute the area under the precision-recall curve, not interpolated.

    It is the sum over all thresholds of the precision there, times the recall that the threshold adds.

    Args:
        scores: (I,), higher for an image that is more likely right.
        is_right: (I,) bool.

    Returns:
        The average precision.

    Raises:
        ValueError: No image is right, the shapes do not fit, or scores are NaN.
    """
    hits, precision = _precision_curve(scores, is_right)
    added = hits.diff(prepend=hits.new_zeros(1))
    return (added * precision).sum().item() / hits[-1].item()


def eleven_point_average_precision(scores: Tensor, is_right: Tensor) -> float:
    """Compute the average precision of VOC 2007, with eleven levels of recall.

    For each recall 0, 0.1, ..., 1 the best precision at this recall or a higher one is taken, and these are averaged.

    Args:
        scores: (I,), higher for an image that is more likely right.
        is_right: (I,) bool.

    Returns:
        The average precision.

    Raises:
        ValueError: No image is right, the shapes do not fit, or scores are NaN.
    """
    hits, precision = _precision_curve(scores, is_right)
    best = precision.flip(0).cummax(0).values.flip(0)  # at this threshold or a lower one
    levels = torch.arange(11, dtype=torch.float64, device=hits.device) * hits[-1]
    first = torch.searchsorted(10 * hits, levels)  # whole numbers, so that no division rounds
    return best[first].mean().item()


def mean_average_precision(
    scores: Tensor, is_right: Tensor, eleven_point: bool = False, is_counted: Tensor | None = None
) -> float:
    """Compute the average precision of each class, and average over the classes. An image may have several labels.

    Args:
        scores: (I, K), higher for a label that is more likely right.
        is_right: (I, K) bool.
        eleven_point: Whether to average over eleven levels of recall, as for VOC 2007 and for CLIP's linear probes on
            it (Radford et al. 2021, appendix A).
        is_counted: (I, K) bool. False leaves an image out of a class, as VOC does with its "difficult" ones. None
            counts all images.

    Returns:
        The mean over the K classes.

    Raises:
        ValueError: A class has no right image, the shapes do not fit, or scores are NaN.
    """
    is_counted = torch.ones_like(is_right) if is_counted is None else is_counted
    if scores.ndim != 2 or not scores.shape == is_right.shape == is_counted.shape or scores.shape[1] == 0:
        raise ValueError(
            f"scores have shape {tuple(scores.shape)}, is_right {tuple(is_right.shape)} and is_counted "
            f"{tuple(is_counted.shape)}, but (examples, classes) for all of them is needed."
        )
    precision_of = eleven_point_average_precision if eleven_point else average_precision
    columns = zip(scores.T, is_right.T, is_counted.T, strict=True)
    found = [precision_of(column[counted], right[counted]) for column, right, counted in columns]
    return sum(found) / len(found)


def _similarities(
    query_embeds: Tensor, gallery_embeds: Tensor, query_ids: Tensor, gallery_ids: Tensor, chunk: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Compare at most `chunk` queries at a time with the gallery.

    Yields:
        The similarities (chunk, G), and which gallery rows are right for each query (chunk, G), bool.
    """
    shapes = [tuple(tensor.shape) for tensor in (query_embeds, gallery_embeds)]
    if any(len(shape) != 2 for shape in shapes) or shapes[0][1] != shapes[1][1] or 0 in shapes[0] + shapes[1]:
        raise ValueError(
            f"The queries have shape {shapes[0]} and the gallery {shapes[1]}, but (queries, width) and (rows, width) "
            f"with one width are needed, and at least one of each."
        )
    for name, embeds, ids in (("query", query_embeds, query_ids), ("gallery", gallery_embeds, gallery_ids)):
        if ids.shape != embeds.shape[:1]:
            raise ValueError(f"{name}_ids have shape {tuple(ids.shape)}, but {(len(embeds),)} is needed: one for each.")
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}, but at least one query must be looked at at a time.")
    for name, embeds in (("query_embeds", query_embeds), ("gallery_embeds", gallery_embeds)):
        _refuse(~embeds.isfinite(), name, "values that are NaN or infinite")
    is_without = ~torch.isin(query_ids, gallery_ids)
    if is_without.any():
        first = int(is_without.int().argmax())
        raise ValueError(
            f"{is_without.sum().item()} of {len(query_ids)} queries have no right row in the gallery, the first is "
            f"query {first} with id {query_ids[first].item()}: leave them out, or complete the gallery."
        )
    dtype = torch.promote_types(query_embeds.dtype, torch.float32)
    gallery = gallery_embeds.to(dtype).T  # (D, G)
    for embeds, ids in zip(query_embeds.split(chunk), query_ids.split(chunk), strict=True):
        yield embeds.to(dtype) @ gallery, ids[:, None] == gallery_ids[None]


def ranks_of_first_right(
    query_embeds: Tensor, gallery_embeds: Tensor, query_ids: Tensor, gallery_ids: Tensor, chunk: int = 1024
) -> Tensor:
    """Count for each query the wrong gallery rows that are ranked before its first right row.

    Args:
        query_embeds: (Q, D). Queries and gallery are compared by dot product; normalise both for cosine similarity.
        gallery_embeds: (G, D).
        query_ids: (Q,) numbers. A gallery row is right for a query if their ids are equal.
        gallery_ids: (G,) numbers.
        chunk: Number of queries compared at once. Memory is needed for (chunk, G) similarities.

    Returns:
        Ranks (Q,), int64. 0 means that a right row comes first.

    Raises:
        ValueError: No gallery row is right for some query, the shapes do not fit, or embeddings are not finite.
    """
    ranks = []
    for similarities, is_right in _similarities(query_embeds, gallery_embeds, query_ids, gallery_ids, chunk):
        best_right = similarities.masked_fill(~is_right, -torch.inf).amax(dim=1, keepdim=True)  # (chunk, 1)
        ranks.append(((similarities >= best_right) & ~is_right).sum(dim=1))
    return torch.cat(ranks)


def recall_at_k(
    query_embeds: Tensor,
    gallery_embeds: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 1024,
) -> dict[int, float]:
    """Compute how many queries find at least one right row among their first k rows.

    Args:
        query_embeds: (Q, D). Queries and gallery are compared by dot product; normalise both for cosine similarity.
        gallery_embeds: (G, D).
        query_ids: (Q,) numbers. A gallery row is right for a query if their ids are equal.
        gallery_ids: (G,) numbers.
        ks: The values of k, each at least 1.
        chunk: Number of queries compared at once. Memory is needed for (chunk, G) similarities.

    Returns:
        A dictionary from each k to the fraction of queries.

    Raises:
        ValueError: A k is below 1, no gallery row is right for some query, the shapes do not fit, or embeddings are
            not finite.

    Example::

        ids = torch.arange(len(texts))  # caption i belongs to image i
        recall_at_k(text_embeds, image_embeds, ids, ids, ks=[1, 5])  # {1: 0.58, 5: 0.82}
    """
    _check_cutoffs(ks)
    ranks = ranks_of_first_right(query_embeds, gallery_embeds, query_ids, gallery_ids, chunk)
    return {k: (ranks < k).double().mean().item() for k in ks}


def median_rank(
    query_embeds: Tensor, gallery_embeds: Tensor, query_ids: Tensor, gallery_ids: Tensor, chunk: int = 1024
) -> float:
    """Compute the median, over the queries, of the place of the first right row. 1 is the best.

    Args:
        query_embeds: (Q, D). Queries and gallery are compared by dot product; normalise both for cosine similarity.
        gallery_embeds: (G, D).
        query_ids: (Q,) numbers. A gallery row is right for a query if their ids are equal.
        gallery_ids: (G,) numbers.
        chunk: Number of queries compared at once. Memory is needed for (chunk, G) similarities.

    Returns:
        The median. Between two places it is their mean.

    Raises:
        ValueError: No gallery row is right for some query, the shapes do not fit, or embeddings are not finite.
    """
    ranks = ranks_of_first_right(query_embeds, gallery_embeds, query_ids, gallery_ids, chunk)
    return ranks.double().quantile(0.5).item() + 1


def mean_average_precision_at_k(
    query_embeds: Tensor,
    gallery_embeds: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    k: int,
    chunk: int = 1024,
) -> float:
    """Compute the average precision of each query within its first k rows, and average over the queries.

    For one query the precisions at its right rows are added, and the sum is divided by the largest possible number of
    right rows: k, or the number of right rows in the gallery if that is less.

    Args:
        query_embeds: (Q, D). Queries and gallery are compared by dot product; normalise both for cosine similarity.
        gallery_embeds: (G, D).
        query_ids: (Q,) numbers. A gallery row is right for a query if their ids are equal.
        gallery_ids: (G,) numbers.
        k: Number of rows that count, at least 1.
        chunk: Number of queries compared at once. Memory is needed for (chunk, G) similarities.

    Returns:
        The mean over the Q queries.

    Raises:
        ValueError: `k` is below 1, no gallery row is right for some query, the shapes do not fit, or embeddings are
            not finite.
    """
    _check_cutoffs([k])
    found = []
    for similarities, is_right in _similarities(query_embeds, gallery_embeds, query_ids, gallery_ids, chunk):
        wrong_first = is_right.int().argsort(dim=1, stable=True)  # stable sorts keep wrong rows first among equals
        order = similarities.gather(1, wrong_first).argsort(dim=1, descending=True, stable=True)[:, :k]
        hits = is_right.gather(1, wrong_first).gather(1, order)  # (chunk, k)
        precision = hits.cumsum(1).double() / torch.arange(1, hits.shape[1] + 1, device=hits.device)
        found.append((precision * hits).sum(1) / is_right.sum(1).clamp(max=k))
    return torch.cat(found).mean().item()
