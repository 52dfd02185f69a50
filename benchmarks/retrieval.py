"""Ranks of retrieval in both directions, in blocks, beside the whole matrix of similarities.

The whole matrix is what CLIP_benchmark and most scripts hold: all similarities, and for each direction a second matrix
that says which of them are at least as high as the best right one. Both count equal similarities against the model,
and their ranks must be equal but for similarities that differ in the last bit.

Peak memory is that of a process of its own, above the embeddings.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_clip.evaluation.ranking import rank_both_ways

from .measuring import (
    OURS,
    Check,
    Contender,
    LeftOutError,
    Table,
    compare,
    forget_peak_memory,
    memory_of_this_process,
    run_alone,
)
from .settings import Settings

OPTIONS = ()
NEEDS_CEILING = False
IS_ON_CPU = True
IMAGES, TEXTS = 20_000, 100_000
QUICK_IMAGES, QUICK_TEXTS = 2_000, 10_000
WIDTH = 512
ROUNDS = 1
WHOLE = "whole matrix"
MOST_DIFFERENT = 1e-3
"""Part of the ranks that may differ. Two products of other shapes round differently."""

Ranks = tuple[Tensor, Tensor]


def embeddings(images: int, texts: int) -> dict[str, Tensor]:
    """Random images, and for each several texts near it: about half of the texts find their image first."""
    generator = torch.Generator().manual_seed(0)
    image_ids, text_ids = torch.arange(images), torch.arange(texts) * images // texts
    image_embeds = normalize(torch.randn(images, WIDTH, generator=generator), dim=-1)
    text_embeds = torch.randn(texts, WIDTH, generator=generator).mul_(0.24).add_(image_embeds[text_ids])
    text_embeds /= text_embeds.norm(dim=-1, keepdim=True)
    return {"image_embeds": image_embeds, "text_embeds": text_embeds, "image_ids": image_ids, "text_ids": text_ids}


def rank_by_whole_matrix(
    image_embeds: Tensor, text_embeds: Tensor, image_ids: Tensor, text_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """The plain way, for texts that belong to one image each."""
    similarities = image_embeds @ text_embeds.T
    right = similarities[text_ids, torch.arange(len(text_ids))]
    image_best = torch.full((len(image_ids),), -torch.inf).scatter_reduce(0, text_ids, right, "amax")
    image_ranks = (similarities >= image_best[:, None]).sum(1)
    image_ranks -= torch.zeros_like(image_ranks).index_add(0, text_ids, (right >= image_best[text_ids]).long())
    return image_ranks, (similarities >= right).sum(0) - 1


WAYS = {OURS: rank_both_ways, WHOLE: rank_by_whole_matrix}


def memory_alone(name: str, images: int, texts: int, threads: int) -> int | None:
    """The most memory, in bytes, that ranking takes above the embeddings, in a process that does nothing else."""
    torch.set_num_threads(threads)
    given = embeddings(images, texts)
    given["image_embeds"][:64] @ given["text_embeds"][:64].T  # the library of products is in memory now
    forget_peak_memory()
    before = memory_of_this_process("VmRSS")
    WAYS[name](**given)
    most = memory_of_this_process("VmHWM")
    return None if before is None or most is None else most - before


def same_ranks(expected: Ranks) -> Check:
    def check(found: Ranks) -> str | None:
        different = sum(int((a != b).sum()) for a, b in zip(found, expected, strict=True))
        part = different / sum(map(len, expected))
        return None if part <= MOST_DIFFERENT else f"{part:.2%} of its ranks are others"

    return check


def run(settings: Settings) -> Iterator[Table]:
    images, texts = settings.choose((IMAGES, TEXTS), (QUICK_IMAGES, QUICK_TEXTS))
    given: dict[str, Any] = embeddings(images, texts)
    check = same_ranks(rank_both_ways(**given))
    table = Table(f"retrieval, {images:,} images and {texts:,} texts, width {WIDTH}, both ways", "queries")
    contenders = []
    for name, rank in WAYS.items():
        contender = Contender(name, partial(rank, **given), images + texts, "float32", check)
        if settings.is_memory_measured:
            try:
                contender.peak_memory = run_alone(
                    memory_alone, name=name, images=images, texts=texts, threads=settings.threads
                )
            except LeftOutError as error:
                table.left_out.append(f"{name} is left out: {error}")
                continue
        contenders.append(contender)
    if settings.is_memory_measured:
        table.notes.append("peak memory: above the embeddings")
    yield compare(table, contenders, rounds=settings.rounds or ROUNDS, seconds=settings.seconds)
