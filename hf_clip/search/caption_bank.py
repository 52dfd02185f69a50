"""Captions of images by similarity: the nearest of a bank, and a phrase that is composed of a vocabulary.

Nothing here describes an image. The first finds, of the captions that there are, those nearest to it. The second adds
to a template, one after the other, the words that bring the text nearer to the image.

Dimensions: I images, D embedding, T texts, V phrases of a vocabulary, K captions of an image.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..zero_shot.features import encode_pixels, encode_text_batches, encode_texts, image_processor_of
from ..zero_shot.files import batches_of_images
from ..zero_shot.prompts import DEFAULT_TEMPLATE, format_template
from .image_index import ImageIndex

LEAST_GAIN = 0.005
"""Cosine similarity by which a further phrase brings the text nearer at least."""

SHORTLIST = 32
"""Phrases nearest to an image by themselves, which are tried in each step."""

MOST_PHRASES = 6


@dataclass(frozen=True)
class Caption:
    """A text and how near it is to an image.

    Attributes:
        text: The text.
        score: Cosine similarity.
    """

    text: str
    score: float


@dataclass
class CaptionedImage:
    """An image's captions.

    Attributes:
        name: Its path or address.
        captions: Nearest first.
        composed: The composed phrase, or None.
        error: Why it could not be opened, or None.
    """

    name: str
    captions: list[Caption] = field(default_factory=list)
    composed: Caption | None = None
    error: str | None = None


def read_lines(path: str | Path, what: str) -> list[str]:
    """Read a file with a text on each line, each kept once. `what` the texts are stands in errors.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It holds no text, or not in UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} of {what}; check the path.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The {what} {str(path)!r} cannot be read ({error}); save them as text in UTF-8.") from error
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise ValueError(f"The file {path} has no {what}: write one on each line.")
    return found


def captions_of_index(index: ImageIndex) -> list[str]:
    """The captions that an index holds, each once. There are none in an index of folders."""
    stored = index.tables.rows(["caption"], "caption IS NOT NULL")["caption"].to_pylist()
    return list(dict.fromkeys(caption.strip() for caption in stored if caption.strip()))


def nearest_captions(
    model: Any,
    processor: Any,
    features: Tensor,
    bank: Sequence[str],
    *,
    top_k: int = 3,
    batch_size: int = 64,
    advance: Callable[[int], Any] = lambda count: None,
) -> list[list[Caption]]:
    """Find the captions of a bank that are nearest to images. Memory does not grow with the bank's features.

    Args:
        model: HfClipModel.
        processor: Its processor.
        features: (I, D) of the images, of length one.
        bank: T captions. What is longer than the model takes is cut.
        top_k: How many to find for each image.
        batch_size: Captions encoded at once.
        advance: Called with a number of captions as they are encoded.

    Returns:
        For each image its captions, nearest first.
    """
    best = features.new_full((len(features), 0), -torch.inf)
    owners = torch.empty(len(features), 0, dtype=torch.int64)
    batches = encode_text_batches(model, processor, bank, batch_size=batch_size, settings={"truncation": True})
    for places, texts in batches:
        scores = torch.cat([best, features @ texts.to(features.device).T], dim=1)
        owners = torch.cat([owners, places[None].expand(len(features), -1)], dim=1)
        best, chosen = scores.topk(min(top_k, scores.shape[1]), dim=1)
        owners = owners.gather(1, chosen.cpu())
        advance(len(places))
    return [
        [Caption(bank[place], score) for place, score in zip(*row, strict=True)]
        for row in zip(owners.tolist(), best.tolist(), strict=True)
    ]


class PhraseComposer:
    """Composes a text for an image of a template and the phrases of a vocabulary.

    Each step puts each of the phrases that are nearest to the image at each place between those that are chosen, and
    keeps the text that is nearest to the image. It ends when no text is nearer by a margin.

    Args:
        model: HfClipModel.
        processor: Its processor.
        vocabulary: V words or phrases.
        template: A text with {} where they belong.
        margin: Cosine similarity by which a step brings the text nearer at least.
        most: Most phrases of a text.
        batch_size: Texts encoded at once.
        progress: Whether to show a progress bar while the vocabulary is encoded.

    Raises:
        ValueError: The template has no {}.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        vocabulary: Sequence[str],
        template: str = DEFAULT_TEMPLATE,
        *,
        margin: float = LEAST_GAIN,
        most: int = MOST_PHRASES,
        batch_size: int = 64,
        progress: bool = False,
    ):
        self.model, self.processor = model, processor
        self.vocabulary, self.template = list(vocabulary), format_template(template)
        self.margin, self.most, self.batch_size = margin, most, batch_size
        texts = [self.text_of([phrase]) for phrase in self.vocabulary]
        self.singles = self._encode(texts, progress)  # (V, D)
        self.start = self._encode([self.text_of([])])

    def _encode(self, texts: list[str], progress: bool = False) -> Tensor:
        settings: dict[str, Any] = {"batch_size": self.batch_size, "progress": progress, "truncation": True}
        return encode_texts(self.model, self.processor, texts, **settings)

    def text_of(self, phrases: Sequence[str]) -> str:
        """The template with phrases in it; without any, the template alone."""
        text = self.template(" ".join(phrases))
        return text if phrases else re.sub(r"\s+(?=[.,;:!?]|$|\s)", "", text).strip() or text

    def compose(self, feature: Tensor) -> Caption:
        """Compose a text for an image.

        Args:
            feature: (D,) of length one.

        Returns:
            The text. It is the template alone if no phrase brings it nearer.
        """
        phrases: list[str] = []
        score = float(self.start[0] @ feature)
        near = (self.singles @ feature).topk(min(SHORTLIST, len(self.vocabulary)))
        shortlist = [self.vocabulary[place] for place in near.indices.tolist()]
        while len(phrases) < self.most:
            tried = [
                [*phrases[:place], phrase, *phrases[place:]]
                for phrase in shortlist
                if phrase not in phrases
                for place in range(len(phrases) + 1)
            ]
            if not tried:
                break
            scores = self._encode([self.text_of(words) for words in tried]) @ feature if phrases else near.values
            best = int(scores.argmax())
            if float(scores[best]) < score + self.margin:
                break
            phrases, score = tried[best], float(scores[best])
        return Caption(self.text_of(phrases), score)


def encode_image_files(
    model: Any,
    processor: Any,
    items: Iterable[tuple[str, Any]],
    *,
    opener: Callable[[Any], Any],
    batch_size: int = 16,
    advance: Callable[[int], Any] = lambda count: None,
) -> tuple[list[CaptionedImage], Tensor]:
    """Encode images, whatever becomes of one of them.

    Args:
        model: HfClipModel.
        processor: Its processor.
        items: Names, and what `opener` opens.
        opener: Called in a thread; a ValueError of it becomes the image's error.
        batch_size: Images encoded at once.
        advance: Called with a number of images as they are encoded.

    Returns:
        All images in their order, still without captions; and the features (I, D) of those without an error.
    """
    image_processor = image_processor_of(processor)
    found, features = [], []
    encoded = batches_of_images(
        items,
        lambda item: image_processor([opener(item)], return_tensors="pt")["pixel_values"][0],
        lambda pixels: encode_pixels(model, torch.stack(pixels)),
        batch_size=batch_size,
    )
    for name, feature, error in encoded:
        found.append(CaptionedImage(name, error=error))
        features += [] if feature is None else [feature]
        advance(1)
    return found, torch.stack(features) if features else torch.empty(0, model.config.projection_dim)


__all__ = [
    "Caption",
    "CaptionedImage",
    "PhraseComposer",
    "captions_of_index",
    "encode_image_files",
    "nearest_captions",
    "read_lines",
]
