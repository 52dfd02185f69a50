"""Wrong captions that a model takes for nearly right: hard negatives, found over the texts of the data set itself.

1. Rows with one image are one; all their captions are right for it. Captions that the model reads alike are one text.
2. For each image the similarities to all texts are computed, by its own feature or by those of its captions.
3. Its own captions are left out, and so is what is more similar than a share of the similarity of its own caption: such
   a text probably is right too, and nobody wrote it down (positive-aware mining, TopK-PercPos of Moreira et al. 2024,
   arXiv 2407.15831). Of the rest the most similar are taken.

The similarities are computed by blocks, all of them and exactly. So memory grows with the images and the texts, and not
with their product.

Dimensions: Q queries, T different texts, D embedding, J negative texts of a query.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...data.columns import UnusableRowError
from ...data.content import content_id, tokens_id
from ...evaluation.embedder import Embedder, Unreadable
from ...zero_shot.progress import progress_bar
from ...zero_shot.text_batches import in_batches
from .collator import PairCollator
from .pair_table import PairTable, Row

QUERIES_AT_ONCE, TEXTS_AT_ONCE = 512, 4096
"""Size of a block of similarities, which takes 8 MB."""

TOKENIZED_AT_ONCE = 4096


@dataclass(frozen=True)
class MiningOptions:
    """What is looked for.

    Attributes:
        negatives: At most so many for each image.
        by: "image": similar to the image. "text": similar to one of its captions; images are not opened.
        max_share: What is more similar than this part of the own caption's similarity is left out.
        skip_first: So many of the most similar are left out of the rest.
    """

    negatives: int = 1
    by: str = "image"
    max_share: float = 0.95
    skip_first: int = 0

    def __post_init__(self) -> None:
        if self.by not in ("image", "text"):
            raise ValueError(f"by is {self.by!r}, but must be 'image' or 'text'.")
        if self.negatives < 1 or self.skip_first < 0 or not self.max_share > 0:
            raise ValueError(
                f"negatives is {self.negatives}, skip_first {self.skip_first} and max_share {self.max_share:g}, but "
                f"must be at least 1, at least 0 and above 0."
            )


class Negative(NamedTuple):
    """A wrong caption.   score: its similarity   own_score: that of the right caption which it is compared with"""

    text: str
    score: float
    own_score: float


@dataclass
class Mined:
    """What was found.

    Attributes:
        of_rows: Of each row the number of its image; None where the row cannot be used.
        captions: Of each image its captions.
        negatives: Of each image its wrong captions, the most similar first.
        texts: The number of different texts among which they were looked for.
        unusable: Rows that cannot be used, each with the reason.
    """

    of_rows: list[int | None]
    captions: list[list[str]]
    negatives: list[list[Negative]]
    texts: int
    unusable: list[str] = field(default_factory=list)

    def of_row(self, row: int) -> list[Negative]:
        """The wrong captions of a row."""
        image = self.of_rows[row]
        return [] if image is None else self.negatives[image]


def limits_of(own: Tensor, max_share: float) -> Tensor:
    """What similarity is the highest that a negative may have.

    Args:
        own: (Q,) the similarities of the right captions.
        max_share: The part of these. Of one below zero the same distance is kept, downwards.
    """
    return own - (1 - max_share) * own.abs()


def most_similar(
    queries: Tensor,
    texts: Tensor,
    limits: Tensor,
    own_texts: list[list[int]],
    count: int,
    *,
    sizes: tuple[int, int] = (QUERIES_AT_ONCE, TEXTS_AT_ONCE),
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Find for each query the most similar texts that are wrong for it.

    Args:
        queries: (Q, D) of length one.
        texts: (T, D) of length one.
        limits: (Q,) texts that are more similar are left out.
        own_texts: Of each query the places of the texts that are right for it, which are left out.
        count: J.
        sizes: Queries and texts of a block.
        device: Where blocks are computed.
        progress: Whether to show a progress bar.

    Returns:
        Similarities and places of texts, (Q, J) each, the most similar first. -inf and -1 where there are no more.
    """
    found = torch.full((len(queries), count), -torch.inf), torch.full((len(queries), count), -1)
    with progress_bar("Search", "query", len(queries), progress) as update:
        for start in range(0, len(queries), sizes[0]):
            rows = slice(start, min(start + sizes[0], len(queries)))
            pairs = [(row, place) for row, places in enumerate(own_texts[rows]) for place in places]
            own = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
            scores, places = _best_of(queries[rows], texts, limits[rows], own, count, sizes[1], device)
            found[0][rows, : scores.shape[1]], found[1][rows, : scores.shape[1]] = scores.cpu(), places.cpu()
            update(rows.stop - rows.start)
    found[1][found[0] == -torch.inf] = -1
    return found


def _best_of(
    queries: Tensor, texts: Tensor, limits: Tensor, own: Tensor, count: int, size: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """`most_similar` of some queries.   own: (pairs, 2) the places of queries and of their own texts"""
    queries, limits = queries.to(device), limits.to(device)
    scores, places = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    for first in range(0, len(texts), size):
        block = queries @ texts[first : first + size].to(device).T
        block.masked_fill_(block > limits[:, None], -torch.inf)
        inside = own[(own[:, 1] >= first) & (own[:, 1] < first + size)].to(device)
        block[inside[:, 0], inside[:, 1] - first] = -torch.inf
        best, where = block.topk(min(count, block.shape[1]))
        scores, places = torch.cat([scores, best], dim=1), torch.cat([places, where + first], dim=1)
        scores, kept = scores.topk(min(count, scores.shape[1]))
        places = places.gather(1, kept)
    return scores, places


class _Image(NamedTuple):
    """An image to be encoded.   number: among all different ones"""

    name: str
    image: Any
    number: int


class _Reading:
    """Goes through the rows once, and remembers which have one image, and the captions of each."""

    def __init__(self, source: PairTable):
        self.source = source
        self.of_rows: list[int | None] = []
        self.captions: list[dict[str, None]] = []  # each once, in their order
        self.unusable: list[str] = []
        self._numbers: dict[Any, int] = {}

    def images(self) -> Iterator[_Image]:
        """Each image when it comes first."""
        for place in self.source.rows.tolist():
            row = self.source.row(self.source.table[place], f"row {place} of {self.source.name}")
            if row.reason is not None or not row.image:
                self.unusable.append(f"{row.name}: {row.reason or 'its image is missing'}")
                self.of_rows.append(None)
                continue
            number = self._numbers.setdefault(_key(row), len(self.captions))
            self.of_rows.append(number)
            if is_new := number == len(self.captions):
                self.captions.append({})
            self.captions[number] |= dict.fromkeys(text for text in row.captions if text)
            if is_new:
                yield _Image(row.name, row.image, number)


def _key(row: Row) -> int | str:
    """What an image is known by: its bytes, or where they are."""
    stored = row.image
    if isinstance(stored, dict):
        stored = stored.get("path") if stored.get("bytes") is None else stored["bytes"]
    return content_id(bytes(stored)) if isinstance(stored, (bytes, bytearray)) else str(stored)


def _different_texts(captions: Iterable[str], collator: PairCollator) -> tuple[list[str], dict[str, int]]:
    """Texts that the model reads differently, and the place of each caption among them; none of what it cannot read."""
    texts: list[str] = []
    by_tokens: dict[int, int] = {}
    places: dict[str, int] = {}
    for some in in_batches(dict.fromkeys(captions), TOKENIZED_AT_ONCE):
        known = collator.encode_together(some)
        for caption in some:
            try:
                ids, _ = known[caption] if caption in known else collator.encode(caption)
            except UnusableRowError:
                continue
            places[caption] = by_tokens.setdefault(tokens_id(ids), len(texts))
            if places[caption] == len(texts):
                texts.append(caption)
    return texts, places


def _encode_images(embedder: Embedder, reading: _Reading, progress: bool) -> dict[int, Tensor]:
    """The features (D,) of the images that can be opened, by their numbers."""
    source, found = reading.source, dict[int, Tensor]()
    unreadable = Unreadable(source.name, consequence="too many rows would have no negative captions")
    with progress_bar("Images", "image", len(source.rows), progress) as update:
        for rows, features in embedder.images(reading.images(), places=source.places, unreadable=unreadable):
            found |= {row.number: feature for row, feature in zip(rows, features, strict=True)}
            update(len(rows))
    reading.unusable += unreadable.reasons
    return found


def mine_negatives(
    model: Any,
    processor: Any,
    source: PairTable,
    options: MiningOptions,
    *,
    batch_size: int = 32,
    threads: int | None = None,
    progress: bool = False,
) -> Mined:
    """Find wrong captions for the rows of a source that the model takes for nearly right.

    Args:
        model: An HfClipModel.
        processor: Its processor.
        source: A table of pairs, see `load_pairs`.
        options: What is looked for.
        batch_size: Number of images encoded at once.
        threads: Number of threads that open images. None: the number of processors.
        progress: Whether to show progress bars.

    Returns:
        What was found.

    Raises:
        UnreadableImagesError: More than 1 % of the images cannot be opened. A ValueError.
        NotFiniteFeaturesError: The model gives NaN. A ValueError.
        ValueError: There are fewer than two images, or fewer than two different texts.
    """
    embedder, reading = Embedder(model, processor, batch_size=batch_size, threads=threads), _Reading(source)
    with embedder.evaluating():
        if options.by == "image":
            images = _encode_images(embedder, reading, progress)
        else:
            images = {image.number: torch.zeros(0) for image in reading.images()}
        every = [text for number in images for text in reading.captions[number]]
        texts, places = _different_texts(every, PairCollator(processor))
        if len(images) < 2 or len(texts) < 2:
            raise ValueError(
                f"{source.name} has {len(images)} different images that can be used and {len(texts)} different "
                f"captions, but at least 2 of each are needed: negatives are captions of other images."
            )
        embeds = embedder.texts(texts, truncation=True)
    own = {number: list(dict.fromkeys(places[t] for t in reading.captions[number] if t in places)) for number in images}
    own = {number: found for number, found in own.items() if found}
    if options.by == "image":
        owners = list(own)
        queries = torch.stack([images[number] for number in owners])
        of_own = torch.stack([(embeds[own[number]] @ images[number]).min() for number in owners])
    else:
        owners = [number for number, found in own.items() for _ in found]
        queries = embeds[[place for found in own.values() for place in found]]
        of_own = (queries * queries).sum(1)
    found = most_similar(
        queries,
        embeds,
        limits_of(of_own, options.max_share),
        [own[number] for number in owners],
        options.skip_first + options.negatives,
        device=model.device,
        progress=progress,
    )
    negatives = _of_images(owners, found, of_own, texts, options, len(reading.captions))
    captions = [list(captions) for captions in reading.captions]
    return Mined(reading.of_rows, captions, negatives, len(texts), reading.unusable)


def _of_images(
    owners: list[int],
    found: tuple[Tensor, Tensor],
    of_own: Tensor,
    texts: list[str],
    options: MiningOptions,
    count: int,
) -> list[list[Negative]]:
    """Of each image the best of what was found for its queries."""
    best: list[dict[str, Negative]] = [{} for _ in range(count)]
    for owner, scores, places, own in zip(owners, *(part.tolist() for part in (*found, of_own)), strict=True):
        for score, place in zip(scores, places, strict=True):
            if place < 0:
                break
            known = best[owner].get(texts[place])
            if known is None or known.score < score:
                best[owner][texts[place]] = Negative(texts[place], score, own)
    chosen = slice(options.skip_first, options.skip_first + options.negatives)
    return [sorted(negatives.values(), key=lambda negative: -negative.score)[chosen] for negatives in best]
