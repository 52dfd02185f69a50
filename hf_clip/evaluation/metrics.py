"""Metrics, as pure functions of tensors; all are fractions between 0 and 1, but the median rank.

Invariant: equal scores never help. What is wrong counts as ranked before what is right with the same score, so that a
model that gives everything one score finds nothing, and no result depends on the order of rows. Average precision
looks at thresholds, where equal scores pass together (as scikit-learn has it).

Retrieval names what belongs together by numbers: a gallery row is right for a query if their ids are equal. So five
captions of one image, or an image that several captions share, need no more than equal ids.

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
    """How many wrong classes each example's right one has before it: (I, K), (I,) → (I,), 0 where it is first."""
    _check_classes(logits, labels)
    own = logits.gather(1, labels.long()[:, None])  # (I, 1)
    return (logits >= own).sum(dim=1) - 1


def top_k_accuracy(logits: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)) -> dict[int, float]:
    """For each k how often the label is among the k highest logits: (I, K), (I,). From k = C on that is always."""
    _check_cutoffs(ks)
    ranks = ranks_of_labels(logits, labels)
    return {k: (ranks < k).double().mean().item() for k in ks}


def mean_per_class_accuracy(logits: Tensor, labels: Tensor) -> float:
    """The mean over the classes of each one's top-1 accuracy: (I, K), (I,). Classes without examples do not count."""
    is_right = ranks_of_labels(logits, labels) == 0
    examples = labels.long().bincount(minlength=logits.shape[1])  # (K,)
    right = labels[is_right].long().bincount(minlength=logits.shape[1])
    occurs = examples > 0
    return (right[occurs].double() / examples[occurs]).mean().item()


def _precision_curve(scores: Tensor, is_right: Tensor) -> tuple[Tensor, Tensor]:
    """Hits and precision at each distinct threshold, from the highest score down.

    (I,), (I,) bool → (thresholds,), (thresholds,). The last of the hits is the number of all right ones.
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
    hits = is_right[places].cumsum(0).double()  # (I,) right ones among the first 1, 2, ...
    passed = torch.arange(1, len(scores) + 1, dtype=torch.float64, device=scores.device)
    is_last_of_equals = torch.ones_like(hits, dtype=torch.bool)
    is_last_of_equals[:-1] = ordered[:-1] > ordered[1:]
    return hits[is_last_of_equals], (hits / passed)[is_last_of_equals]


def average_precision(scores: Tensor, is_right: Tensor) -> float:
    """The sum of each threshold's precision times what recall it adds: (I,), (I,) bool. Not interpolated."""
    hits, precision = _precision_curve(scores, is_right)
    added = hits.diff(prepend=hits.new_zeros(1))
    return (added * precision).sum().item() / hits[-1].item()


def eleven_point_average_precision(scores: Tensor, is_right: Tensor) -> float:
    """VOC 2007's: the mean, over recalls 0, 0.1, ..., 1, of the best precision at that recall or a higher one."""
    hits, precision = _precision_curve(scores, is_right)
    best = precision.flip(0).cummax(0).values.flip(0)  # at this threshold or a lower one
    levels = torch.arange(11, dtype=torch.float64, device=hits.device) * hits[-1]
    first = torch.searchsorted(10 * hits, levels)  # in tenths of the whole, so that no division rounds
    return best[first].mean().item()


def mean_average_precision(
    scores: Tensor, is_right: Tensor, eleven_point: bool = False, is_counted: Tensor | None = None
) -> float:
    """The mean over classes of their average precision, for examples of several labels: (I, K), (I, K) bool.

    eleven_point: as VOC 2007 and CLIP's linear probes on it (appendix A)
    is_counted:   (I, K) bool: an example that isn't is left out of that class (VOC's "difficult" ones)

    Raises ValueError for a class without a right example.
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
    """For at most `chunk` queries at a time, their similarities (chunk, G) and which of them are right, (chunk, G)."""
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
    """How many wrong gallery rows each query finds before the first right one: (Q,) int64, 0 where that is first.

    query_embeds (Q, D), gallery_embeds (G, D): compared by their dot product; normalise them for the cosine
    query_ids (Q,), gallery_ids (G,):           a row is right for a query if their ids are equal
    chunk:                                      so many queries at a time: (chunk, G) is all that there ever is

    Raises ValueError for a query that no gallery row is right for, and for values that are not finite.
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
    """For each k how many queries find a right row, one at least, among their first k. As `ranks_of_first_right`."""
    _check_cutoffs(ks)
    ranks = ranks_of_first_right(query_embeds, gallery_embeds, query_ids, gallery_ids, chunk)
    return {k: (ranks < k).double().mean().item() for k in ks}


def median_rank(
    query_embeds: Tensor, gallery_embeds: Tensor, query_ids: Tensor, gallery_ids: Tensor, chunk: int = 1024
) -> float:
    """The median place of the first right row, 1 being the best. As `ranks_of_first_right`."""
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
    """The mean over queries of their average precision within the first k rows. As `ranks_of_first_right`.

    A query's is the sum of the precisions at its right rows, over how many there could be: min(k, all right rows).
    """
    _check_cutoffs([k])
    found = []
    for similarities, is_right in _similarities(query_embeds, gallery_embeds, query_ids, gallery_ids, chunk):
        wrong_first = is_right.int().argsort(dim=1, stable=True)  # and they stay first among equals
        order = similarities.gather(1, wrong_first).argsort(dim=1, descending=True, stable=True)[:, :k]
        hits = is_right.gather(1, wrong_first).gather(1, order)  # (chunk, K)
        precision = hits.cumsum(1).double() / torch.arange(1, hits.shape[1] + 1, device=hits.device)
        found.append((precision * hits).sum(1) / is_right.sum(1).clamp(max=k))
    return torch.cat(found).mean().item()
