"""How fast captions become padded tensors, beside OpenAI's tokenizer, transformers' and instant-clip-tokenizer.

    python -m benchmarks.tokenizer

Captions are runs of 5 to 20 words of real English prose (the docstrings of torch and numpy), in one batch of 20,000.
Twice: plain as they are, and with a typographic apostrophe in every tenth. hf_clip is measured with
what it remembers of the round before, and with an empty memory that meets every word for the first time.
"""

import argparse
import inspect
import random
import sys
from collections.abc import Callable

import numpy
import torch
import transformers
from transformers import CLIPTokenizer

from conversion.reference import load_reference_module
from hf_clip import HfClipTokenizer
from hf_clip.bpe_hf_clip import read_merges
from hf_clip.original.vocabulary import find_vocabulary

from .in_turn import OURS, at_least_one, print_rates, rates_in_turn


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
    rows = torch.zeros(len(texts), 77, dtype=torch.int)
    for row, text in enumerate(texts):
        ids = [49406, *encode(text)[:75], 49407]
        rows[row, : len(ids)] = torch.tensor(ids)
    return rows


def build_works(texts: list[str]) -> dict[str, Callable[[], object]]:
    vocabulary = find_vocabulary(offline=True)
    ours = HfClipTokenizer.from_vocabulary_file(vocabulary)
    merges = read_merges(vocabulary)
    stock = CLIPTokenizer(vocab=ours.get_vocab(), merges=merges, model_max_length=77)
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
        print("instant-clip-tokenizer is left out: pip install instant-clip-tokenizer", file=sys.stderr)
    else:
        instant = InstantTokenizer()
        works["instant-clip-tokenizer"] = lambda: torch.from_numpy(
            instant.tokenize_batch(texts, context_length=77).astype(numpy.int64)
        )
    return works


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenizer", description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=at_least_one, default=20_000, help="captions in the batch (default 20,000)")
    parser.add_argument("--rounds", type=at_least_one, default=5, help="rounds over all implementations (default 5)")
    options = parser.parse_args(arguments)
    print(f"transformers {transformers.__version__}, medians of {options.rounds} rounds, {options.captions:,} captions")
    for title, every in (("plain captions", None), ("a typographic apostrophe in every tenth caption", 10)):
        texts = make_captions(options.captions, every)
        works = build_works(texts)
        print_rates(title, rates_in_turn(works, dict.fromkeys(works, len(texts)), options.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
