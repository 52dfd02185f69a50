"""How fast texts are encoded: 512 prompts of 5 to 20 tokens, unsorted, in one call, and one prompt alone.

Token ids are made beforehand, each project's padding as it comes: OpenAI's code and open_clip take 77 columns, ours and
transformers' the longest of the batch, both with the tokenizer's attention mask. The row of ZeroShotClassifier is the
whole way from 512 labels to a classifier matrix, tokenizing included; it sorts the texts by length.
"""

import random
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from hf_clip import HfClipTokenizer, Variant, ZeroShotClassifier
from hf_clip.checkpoints.vocabulary import find_vocabulary
from hf_clip.model.variants import get_variant

from .ceiling import text_flops
from .encoders import Extra, Workload, encoder_tables
from .measuring import Contender, Table, agrees_with
from .peers import CONTEXT, INT8, OPTIMIZED, OURS, Case, cast, load_ours, weights_folder
from .settings import Settings
from .tokenizer import prose

OPTIONS = ("variants", "precision", "prompts")
NEEDS_CEILING = True
IS_ON_CPU = False
VARIANTS = ("ViT-B/32",)
PROMPTS, QUICK_PROMPTS = 512, 128
SMALLER_ON_GPU = (256, 32)
ROUNDS, QUICK_ROUNDS = 5, 3
LENGTHS = (5, 20)
ALONE_LENGTH = 10
CLASSIFIER = f"{OURS}, ZeroShotClassifier"


def make_prompts(count: int, tokenizer: HfClipTokenizer, seed: int = 0) -> list[str]:
    """Different runs of real words whose numbers of tokens, start and end included, are spread over 5 to 20."""
    words, generator = prose(), random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        wanted, start = generator.randint(*LENGTHS), generator.randrange(len(words) - LENGTHS[1])
        for end in range(start + 1, start + LENGTHS[1]):
            prompt = " ".join(words[start:end])
            length = len(tokenizer(prompt)["input_ids"])
            if length >= wanted:
                if length == wanted:
                    found[prompt] = None
                break
    return list(found)


def make_workload(
    title: str, variant: Variant, prompts: list[str], tokenizer: HfClipTokenizer, *extras: Extra, is_main: bool = True
) -> Workload:
    tokens = tokenizer(prompts, return_tensors="pt")
    lengths = tokens["attention_mask"].sum(dim=1).tolist()
    ids = tokens["input_ids"] * tokens["attention_mask"]
    padded = pad(ids, (0, CONTEXT - ids.shape[1]))
    return Workload(title, {**tokens, "padded": padded}, text_flops(variant, lengths), is_main, extras)


def through_classifier(prompts: list[str], tokenizer: HfClipTokenizer, case: Case, expected: Tensor) -> Contender:
    """Each prompt as a label of its own."""
    model = cast(load_ours(case.folder), case)
    check = agrees_with(normalize(expected, dim=-1), case.precision)

    @torch.inference_mode()
    def work() -> Tensor:
        return ZeroShotClassifier(model, tokenizer, prompts, templates="{}", progress=False).weights.T

    return Contender(CLASSIFIER, work, len(prompts), case.precision, check)


def run(settings: Settings) -> Iterator[Table]:
    rounds = settings.choose(ROUNDS, QUICK_ROUNDS)
    tokenizer = HfClipTokenizer.from_vocabulary_file(find_vocabulary(offline=True))
    prompts = make_prompts(settings.prompts or settings.choose(PROMPTS, QUICK_PROMPTS), tokenizer)
    alone = [min(prompts, key=lambda prompt: abs(len(tokenizer(prompt)["input_ids"]) - ALONE_LENGTH))]
    for name in settings.variants or VARIANTS:
        variant = get_variant(name)
        title = f"{{}} prompts of {LENGTHS[0]} to {LENGTHS[1]} tokens"
        extra = partial(through_classifier, prompts, tokenizer)
        with weights_folder(variant) as folder:
            for device in settings.devices:
                counts = [count for count in SMALLER_ON_GPU if device == "cuda" and count < len(prompts)]
                workloads = [
                    make_workload(title.format(len(prompts)), variant, prompts, tokenizer, extra),
                    *(make_workload(title.format(n), variant, prompts[:n], tokenizer, is_main=False) for n in counts),
                    make_workload("one prompt", variant, alone, tokenizer, is_main=False),
                ]
                case = Case(variant, folder, "text", device=device)
                yield from encoder_tables(
                    case, "texts", workloads, settings, rounds, (OURS, OPTIMIZED, INT8, CLASSIFIER)
                )
