"""Ranks in both directions between many images and many texts, and the correction of hubs.

The similarities of all images and all texts are computed in blocks, and each block serves both directions. No more than
one block is in memory, whatever the number of images and texts.

1. In the blocks that hold a right pair, the best right similarity of each image and each text is found. These blocks
   are computed twice; they are few if the texts stand in the order of their images.
2. In all blocks, what is at least as similar is counted. What is right is taken off again.

Several processes divide the blocks of images among them. Maxima and counts do not depend on who found them.

Invariant: equal similarities never help a model, as in `metrics`. Among equal ones the wrong entries come first.

Dimensions: I images, T texts, D embedding, Q reference queries, G gallery rows.
"""

import torch
from torch import Tensor

from .metrics import _refuse
from .processes import ALONE, Processes

IMAGES_AT_ONCE, TEXTS_AT_ONCE = 512, 2048
"""Size of a block, whose similarities take 4 MB. Larger ones would leave the cache before they are counted."""

REFERENCES_AT_ONCE = 8192
"""Number of reference queries that are compared at once for the correction of hubs."""


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class _RightPairs:
    """The pairs of an image and a text with an equal id, of some images and all texts, in the texts' order.

    Args:
        image_ids: (rows,) ids of some images.
        text_ids: (T,) ids of all texts.
    """

    def __init__(self, image_ids: Tensor, text_ids: Tensor):
        ids, order = image_ids.sort()
        first, last = torch.searchsorted(ids, text_ids), torch.searchsorted(ids, text_ids, right=True)
        counts = last - first
        self.texts = torch.arange(len(text_ids), device=ids.device).repeat_interleave(counts)
        before = (counts.cumsum(0) - counts).repeat_interleave(counts)
        place_in_run = torch.arange(len(self.texts), device=ids.device) - before
        self.images = order[first.repeat_interleave(counts) + place_in_run]

    def within(self, columns: slice) -> tuple[Tensor, Tensor]:
        """Return the places of the pairs in a block: of the images, and of the texts."""
        ends = torch.tensor([columns.start, columns.stop], device=self.texts.device)
        start, stop = torch.searchsorted(self.texts, ends).tolist()
        return self.images[start:stop], self.texts[start:stop] - columns.start


def _check(image_embeds: Tensor, text_embeds: Tensor, image_ids: Tensor, text_ids: Tensor) -> None:
    shapes = [tuple(tensor.shape) for tensor in (image_embeds, text_embeds)]
    if any(len(shape) != 2 or 0 in shape for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            f"The images have shape {shapes[0]} and the texts {shapes[1]}, but (images, width) and (texts, width) with "
            f"one width are needed, and at least one of each."
        )
    sides = (("image", image_embeds, image_ids, text_ids), ("text", text_embeds, text_ids, image_ids))
    for name, embeds, ids, other_ids in sides:
        if ids.shape != embeds.shape[:1]:
            raise ValueError(f"{name}_ids have shape {tuple(ids.shape)}, but {(len(embeds),)} is needed: one for each.")
        for block in embeds.split(TEXTS_AT_ONCE):
            _refuse(~block.isfinite(), f"{name}_embeds", "values that are NaN or infinite")
        is_without = ~torch.isin(ids, other_ids)
        if is_without.any():
            first = int(is_without.int().argmax())
            raise ValueError(
                f"{is_without.sum().item()} of {len(ids)} {name}s belong to nothing on the other side, the first is "
                f"{name} {first} with id {ids[first].item()}: leave them out."
            )


def rank_both_ways(
    image_embeds: Tensor,
    text_embeds: Tensor,
    image_ids: Tensor,
    text_ids: Tensor,
    *,
    image_bias: Tensor | None = None,
    text_bias: Tensor | None = None,
    sizes: tuple[int, int] = (IMAGES_AT_ONCE, TEXTS_AT_ONCE),
    processes: Processes = ALONE,
) -> tuple[Tensor, Tensor]:
    """Count for each image the wrong texts, and for each text the wrong images, that come before the first right one.

    Args:
        image_embeds: (I, D). Images and texts are compared by dot product; normalise both for cosine similarity.
        text_embeds: (T, D).
        image_ids: (I,) numbers. A text is right for an image if their ids are equal.
        text_ids: (T,) numbers.
        image_bias: (I,) is subtracted from the similarities when images are searched for; see `hub_bias`.
        text_bias: (T,) is subtracted from the similarities when texts are searched for.
        sizes: Number of images and of texts that are compared at once.
        processes: Those that call this with the same arguments and divide the work.

    Returns:
        The ranks of the images (I,) and of the texts (T,), int64. 0 means that a right one comes first.

    Raises:
        ValueError: An image or a text belongs to nothing, the shapes do not fit, or embeddings are not finite.
    """
    _check(image_embeds, text_embeds, image_ids, text_ids)
    dtype = torch.promote_types(image_embeds.dtype, torch.float32)
    image_best = torch.full((len(image_ids),), -torch.inf, dtype=dtype, device=image_embeds.device)
    text_best = torch.full((len(text_ids),), -torch.inf, dtype=dtype, device=image_embeds.device)
    image_ranks = torch.zeros(len(image_ids), dtype=torch.int64, device=image_embeds.device)
    text_ranks = torch.zeros(len(text_ids), dtype=torch.int64, device=image_embeds.device)

    def compare(images: Tensor, columns: slice, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the similarities for the images' search and for the texts' search: one tensor if there is no bias."""
        found = images @ text_embeds[columns].to(dtype).T
        for_images = found if text_bias is None else found - text_bias[columns].to(dtype)
        return for_images, found if image_bias is None else found - image_bias[rows, None].to(dtype)

    for is_counting in (False, True):
        if is_counting:
            for best in (image_best, text_best):
                processes.reduce(best, "best right similarities", "MAX")
        for number, rows in enumerate(_blocks(len(image_ids), sizes[0])):
            if not processes.is_own(number):
                continue
            images = image_embeds[rows].to(dtype)
            pairs = _RightPairs(image_ids[rows], text_ids)
            for columns in _blocks(len(text_ids), sizes[1]):
                right = pairs.within(columns)
                if not is_counting and not len(right[0]):
                    continue
                sides = zip(
                    compare(images, columns, rows),
                    (image_best[rows], text_best[columns]),
                    (image_ranks[rows], text_ranks[columns]),
                    right,
                    (1, 0),
                    strict=True,
                )
                for scores, best, ranks, places, axis in sides:
                    if is_counting:
                        # As ones and zeros in float32, whose sums are exact up to 2**24 and many times as fast.
                        is_before = torch.ge(scores, best.unsqueeze(axis), out=torch.empty_like(scores))
                        ranks += is_before.sum(axis).long()
                        ranks.index_add_(0, places, -(scores[right] >= best[places]).long())
                    else:
                        best.scatter_reduce_(0, places, scores[right], "amax")
    return processes.reduce(image_ranks, "ranks of images"), processes.reduce(text_ranks, "ranks of texts")


def hub_bias(
    gallery: Tensor,
    references: Tensor,
    *,
    alpha: float = 0.75,
    k: int = 128,
    chunk: int = 4096,
    processes: Processes = ALONE,
) -> Tensor:
    """Compute what is subtracted from the similarities of each gallery row, so that hubs are found less often.

    A hub is similar to many queries that it does not belong to. The bias is `alpha` times the mean of a row's `k`
    highest similarities to reference queries (Chowdhury et al. 2024, arXiv:2410.24114). Training pairs may serve as
    references; those of the test set must not.

    Args:
        gallery: (G, D).
        references: (Q, D) queries of the kind that will be asked.
        alpha: Factor of the mean.
        k: Number of similarities in the mean, at most Q.
        chunk: Number of gallery rows compared at once.
        processes: Those that call this with the same arguments and divide the work.

    Returns:
        The bias (G,), float32.

    Raises:
        ValueError: There are fewer than `k` references, or `k` is below 1.
    """
    if not 1 <= k <= len(references):
        raise ValueError(
            f"The correction of hubs takes the mean of {k} similarities, but there are {len(references)} reference "
            f"queries: take a larger set, or a smaller number."
        )
    mean = torch.zeros(len(gallery), dtype=torch.float32, device=gallery.device)
    for number, rows in enumerate(gallery.split(chunk)):
        if not processes.is_own(number):
            continue
        best = torch.full((len(rows), 0), 0.0, dtype=torch.float32, device=gallery.device)
        for queries in references.split(REFERENCES_AT_ONCE):
            both = torch.cat([best, rows.float() @ queries.float().T], dim=1)
            best = both.topk(min(k, both.shape[1]), dim=1).values
        mean[number * chunk : number * chunk + len(rows)] = best.mean(1)
    return alpha * processes.reduce(mean, "similarities of hubs")
