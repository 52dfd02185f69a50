"""Compare the converted models with the reference implementation, stage by stage.

    python -m conversion.parity ViT-B/32
    python -m conversion.parity --all

For each variant the reference is built at full size with seeded random weights, written in the original
archive format (float16 matrices, float32 gains), converted, loaded by `AutoModel` and run in float32 beside the
reference on the same input. Printed are relative errors, ‖ours − theirs‖ / ‖theirs‖.

Needs openai-clip and no weights. RN50x64 takes about 12 GB of memory.
"""

import argparse
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModel

from hf_clip import VARIANTS, HfClipModel, Variant, convert
from hf_clip.model.variants import get_variant

from .reference import build_reference, halve, reference_dimensions, write_archive

TEXT_LENGTHS = (3, 9, 20, 77)
IMAGES = 2
IMAGES_OF_LARGE_MODELS = 1
LARGE = 100.0
"""GFLOPs of one image from which on one is enough; smaller models show that images do not mix."""


@dataclass
class Errors:
    """Relative errors of one variant, in the order in which an image and a text pass through the model."""

    image_tower: float
    image_features: float
    text_tower: float
    text_features: float
    logits: float

    @property
    def largest(self) -> float:
        return max(getattr(self, stage.name) for stage in fields(self))


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖ over all elements, summed in float64."""
    ours, theirs = ours.double(), theirs.double()
    return ((ours - theirs).norm() / theirs.norm()).item()


def random_texts(lengths: tuple[int, ...], vocab_size: int, context_length: int) -> Tensor:
    """Token ids (T, context_length) as the original makes them: start, words, end, then zeros."""
    texts = torch.zeros(len(lengths), context_length, dtype=torch.long)
    for row, length in zip(texts, lengths, strict=True):
        row[0], row[length - 1] = vocab_size - 2, vocab_size - 1
        row[1 : length - 1] = torch.randint(1, vocab_size - 2, (length - 2,))
    return texts


@torch.no_grad()
def compare(ours: HfClipModel, theirs: Any, pixel_values: Tensor, input_ids: Tensor) -> Errors:
    """Run both models on pixel_values (I, 3, Y, X) and input_ids (T, L) and compare each stage."""
    stages: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        return lambda module, inputs, output: stages.__setitem__(name, output)

    def keeping(name: str) -> Callable:
        encode = getattr(theirs, name)
        return lambda batch: stages.setdefault(name, encode(batch))

    is_resnet = hasattr(theirs.visual, "layer4")
    last = theirs.visual.layer4 if is_resnet else theirs.visual.transformer
    hooks = [last.register_forward_hook(keep("image")), theirs.ln_final.register_forward_hook(keep("text"))]
    methods = ("encode_image", "encode_text")
    for name in methods:  # each tower runs once: at full size it is what takes the time
        setattr(theirs, name, keeping(name))
    try:
        their_logits, _ = theirs(pixel_values, input_ids)
    finally:
        for name in methods:
            delattr(theirs, name)
        for hook in hooks:
            hook.remove()
    outputs = ours(input_ids=input_ids, pixel_values=pixel_values)
    image_states = outputs.vision_model_output.last_hidden_state
    their_image_states = stages["image"] if is_resnet else stages["image"].transpose(0, 1)
    return Errors(
        image_tower=relative_error(image_states, their_image_states),
        image_features=relative_error(outputs.vision_model_output.pooler_output, stages["encode_image"]),
        text_tower=relative_error(outputs.text_model_output.last_hidden_state, stages["text"]),
        text_features=relative_error(outputs.text_model_output.pooler_output, stages["encode_text"]),
        logits=relative_error(outputs.logits_per_image, their_logits),
    )


def check_variant(variant: Variant, seed: int = 0) -> Errors:
    """Build, write, convert, load and compare one variant at full size."""
    reference = build_reference(reference_dimensions(variant), seed)
    halve(reference)
    with tempfile.TemporaryDirectory() as folder:
        archive, converted = Path(folder) / "reference.pt", Path(folder) / variant.slug
        write_archive(reference, archive, variant.image_size)
        config = convert(archive, converted)
        if config.to_dict()["vision_config"]["image_size"] != variant.image_size:
            raise AssertionError(f"{variant.name} was converted as another model: {config}")
        ours = AutoModel.from_pretrained(converted)
        count = IMAGES_OF_LARGE_MODELS if variant.image_gflops > LARGE else IMAGES
        images = torch.randn(count, 3, variant.image_size, variant.image_size)
        texts = random_texts(TEXT_LENGTHS, 49408, 77)
        return compare(ours.eval(), reference.float(), images, texts)


def table(results: dict[str, Errors]) -> str:
    """The results as a Markdown table."""
    stages = [stage.name for stage in fields(Errors)]
    lines = ["| model | " + " | ".join(stage.replace("_", " ") for stage in stages) + " |"]
    lines.append("|---" * (len(stages) + 1) + "|")
    for name, errors in results.items():
        lines.append(f"| {name} | " + " | ".join(f"{getattr(errors, stage):.1e}" for stage in stages) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m conversion.parity", description="Compare converted models with the reference implementation."
    )
    parser.add_argument("variant", nargs="?", help="one of the nine, e.g. ViT-B/32")
    parser.add_argument("--all", action="store_true", help="all nine, one after the other")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    options = parser.parse_args(arguments)
    if options.all == bool(options.variant):
        parser.error("name one variant, or pass --all")
    try:
        variants = list(VARIANTS.values()) if options.all else [get_variant(options.variant)]
        results = {}
        for variant in variants:
            results[variant.name] = check_variant(variant, options.seed)
            print(f"{variant.name}: largest error {results[variant.name].largest:.1e}", file=sys.stderr, flush=True)
    except (ModuleNotFoundError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(results))
    print(
        f"\n{date.today()}, float32, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()}, {torch.get_num_threads()} threads, seed {options.seed}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
