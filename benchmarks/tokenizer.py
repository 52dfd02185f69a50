"""How fast captions become padded tensors, beside OpenAI's tokenizer, transformers' and instant-clip-tokenizer.

Captions are runs of 5 to 20 words of real English prose (the docstrings of torch and numpy), in one batch of 20,000.
Twice: plain as they are, and with a typographic apostrophe in every tenth. hf_clip is measured with
what it remembers of the round before, and with an empty memory that meets every word for the first time.
"""

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy
import torch
from transformers import CLIPTokenizer

from conversion.reference import load_reference_module
from hf_clip import HfClipTokenizer
from hf_clip.checkpoints.vocabulary import find_vocabulary
from hf_clip.model.bpe import read_merges

from .measuring import OURS, Contender, Table, compare
from .settings import Settings

OPTIONS = ("captions",)
NEEDS_CEILING = False
IS_ON_CPU = True
CAPTIONS, QUICK_CAPTIONS = 20_000, 4_000
ROUNDS, QUICK_ROUNDS = 5, 3
START, END, CONTEXT = 49406, 49407, 77
INSTANT = "instant-clip-tokenizer"
TITLES = {"plain captions": None, "a typographic apostrophe in every tenth caption": 10}


def prose() -> list[str]:
    """The words of many docstrings, in their order."""
    modules = (torch, torch.nn, torch.nn.functional, torch.distributions, torch.Tensor, numpy, numpy.linalg, numpy.fft)
    texts = [inspect.getdoc(value) or "" for module in modules for _, value in sorted(vars(module).items())]
    return [word for text in texts for word in text.split() if word.isascii() and any(map(str.isalpha, word))]


def make_captions(count: int, typographic_every: int | None, seed: int = 0) -> list[str]:
    words, generator = prose(), random.Random(seed)
    captions = []
    for index in range(count):
        start, length = generator.randrange(len(words) - 20), generator.randint(5, 20)
        caption = " ".join(words[start : start + length])
        captions.append(caption + " it’s" if typographic_every and index % typographic_every == 0 else caption)
    return captions


def openai_tokenize(encode: Callable[[str], list[int]], texts: list[str]) -> torch.Tensor:
    """What the original's `tokenize` does with its tokenizer: rows of 77, filled with zeros."""
    rows = torch.zeros(len(texts), CONTEXT, dtype=torch.int)
    for row, text in enumerate(texts):
        ids = [START, *encode(text)[: CONTEXT - 2], END]
        rows[row, : len(ids)] = torch.tensor(ids)
    return rows


def build_works(texts: list[str]) -> dict[str, Callable[[], object]]:
    vocabulary = find_vocabulary(offline=True)
    ours = HfClipTokenizer.from_vocabulary_file(vocabulary)
    merges = read_merges(vocabulary)
    stock = CLIPTokenizer(vocab=ours.get_vocab(), merges=merges, model_max_length=CONTEXT)
    encode = load_reference_module("simple_tokenizer").SimpleTokenizer().encode

    def fresh() -> object:
        if ours._memory is not None:
            ours._memory.forget()
        return ours(texts, truncation=True, return_tensors="pt")

    works: dict[str, Callable[[], object]] = {
        OURS: lambda: ours(texts, truncation=True, return_tensors="pt"),
        f"{OURS}, every word for the first time": fresh,
        f"{OURS}, lists": lambda: ours(texts, truncation=True, padding=False),
        "openai-clip": lambda: openai_tokenize(encode, texts),
        "transformers CLIPTokenizer": lambda: stock(texts, padding=True, truncation=True, return_tensors="pt"),
    }
    try:
        from instant_clip_tokenizer import Tokenizer as InstantTokenizer
    except ModuleNotFoundError:
        pass  # `run` says so
    else:
        instant = InstantTokenizer()
        works[INSTANT] = lambda: torch.from_numpy(
            instant.tokenize_batch(texts, context_length=CONTEXT).astype(numpy.int64)
        )
    return works


def agrees_with_original(texts: list[str], expected: list[list[int]]) -> Callable[[object], str | None]:
    """A check of ids, as a list of lists or as a padded tensor: up to the end of the text they must be these."""

    def check(found: Any) -> str | None:
        rows = found["input_ids"] if isinstance(found, Mapping) else found
        for text, row, ids in zip(texts, rows, expected, strict=True):
            if list(map(int, row[: len(ids)])) != ids:
                return f"it reads other tokens than the original, e.g. in {text[-40:]!r}"
        return None

    return check


def run(settings: Settings) -> Iterator[Table]:
    count = settings.captions or settings.choose(CAPTIONS, QUICK_CAPTIONS)
    encode = load_reference_module("simple_tokenizer").SimpleTokenizer().encode
    for title, every in TITLES.items():
        texts = make_captions(count, every)
        works = build_works(texts)
        expected = [[START, *encode(text)[: CONTEXT - 2], END] for text in texts]
        table = Table(f"{title}, {count:,} in a batch", "captions")
        if INSTANT not in works:
            table.left_out.append(f"{INSTANT} is left out: it is not installed (pip install {INSTANT})")
        check = agrees_with_original(texts, expected)
        contenders = [Contender(name, work, count, check=check) for name, work in works.items()]
        rounds = settings.rounds or settings.choose(ROUNDS, QUICK_ROUNDS)
        yield compare(table, contenders, rounds=rounds, seconds=settings.seconds)
