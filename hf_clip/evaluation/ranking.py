"""Ranks in both directions between many images and many texts, and the correction of hubs.

The similarities of all images and all texts are computed in blocks, and each block serves both directions. No more than
one block is in memory: about 300 MB at the default sizes, whatever the number of images and texts.

1. In the blocks that hold a right pair, the best right similarity of each image and each text is found.
2. In all blocks, what is at least as similar is counted. What is right is taken off again.

Invariant: equal similarities never help a model, as in `metrics`. Among equal ones the wrong entries come first.

Dimensions: I images, T texts, D embedding, Q reference queries, G gallery rows.
"""

import torch
from torch import Tensor

from .metrics import _refuse

IMAGES_AT_ONCE, TEXTS_AT_ONCE = 2048, 8192
"""Size of a block. Larger ones are not faster."""


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _blocks_with_right_pairs(image_ids: Tensor, text_ids: Tensor, sizes: tuple[int, int]) -> set[tuple[int, int]]:
    """Return the pairs of numbers of blocks in which an image and a text have an equal id."""
    of_images: dict[int, set[int]] = {}
    for place, number in enumerate(image_ids.tolist()):
        of_images.setdefault(number, set()).add(place // sizes[0])
    found: set[tuple[int, int]] = set()
    for place, number in enumerate(text_ids.tolist()):
        found.update((block, place // sizes[1]) for block in of_images.get(number, ()))
    return found


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
    rights = _blocks_with_right_pairs(image_ids, text_ids, sizes)

    def compare(images: Tensor, columns: slice, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the similarities for the images' search and for the texts' search: one tensor if there is no bias."""
        found = images @ text_embeds[columns].to(dtype).T
        for_images = found if text_bias is None else found - text_bias[columns].to(dtype)
        return for_images, found if image_bias is None else found - image_bias[rows, None].to(dtype)

    for is_counting in (False, True):
        for first, rows in enumerate(_blocks(len(image_ids), sizes[0])):
            images = image_embeds[rows].to(dtype)
            for second, columns in enumerate(_blocks(len(text_ids), sizes[1])):
                has_right = (first, second) in rights
                if not is_counting and not has_right:
                    continue
                for_images, for_texts = compare(images, columns, rows)
                is_right = image_ids[rows, None] == text_ids[None, columns] if has_right else None
                if not is_counting:
                    assert is_right is not None
                    best = for_images.masked_fill(~is_right, -torch.inf).amax(1)
                    image_best[rows] = image_best[rows].maximum(best)
                    best = for_texts.masked_fill(~is_right, -torch.inf).amax(0)
                    text_best[columns] = text_best[columns].maximum(best)
                    continue
                for scores, best, ranks, places, axis in (
                    (for_images, image_best[rows, None], image_ranks, rows, 1),
                    (for_texts, text_best[None, columns], text_ranks, columns, 0),
                ):
                    is_before = scores >= best
                    ranks[places] += is_before.sum(axis)
                    if is_right is not None:
                        ranks[places] -= (is_before & is_right).sum(axis)
    return image_ranks, text_ranks


def hub_bias(gallery: Tensor, references: Tensor, *, alpha: float = 0.75, k: int = 128, chunk: int = 4096) -> Tensor:
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
    found = []
    for rows in gallery.split(chunk):
        best = torch.full((len(rows), 0), 0.0, dtype=torch.float32, device=gallery.device)
        for queries in references.split(TEXTS_AT_ONCE):
            both = torch.cat([best, rows.float() @ queries.float().T], dim=1)
            best = both.topk(min(k, both.shape[1]), dim=1).values
        found.append(best.mean(1))
    return alpha * torch.cat(found)
