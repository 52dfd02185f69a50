"""How fast pictures and texts are encoded, beside the original implementation and transformers' CLIP.

    make bench
    python -m benchmarks.encode --variant RN50 --rounds 10

All of them hold the same random weights, float32, and get the same input in turn, round after round; the figures
are medians over the rounds. Texts are padded as each project pads them by default: the original to 77 tokens,
the others to the longest of the batch. Also printed: what importing hf_clip costs beyond transformers' base classes.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
import transformers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from conversion.parity import random_texts
from conversion.reference import build_reference, reference_dimensions
from hf_clip import HfClipConfig, HfClipModel, Variant
from hf_clip.original import convert_names
from hf_clip.variants import get_variant

from .in_turn import OURS, at_least_one, print_rates, rates_in_turn

CAPTION_TOKENS = 10
IMPORT = """
import time
from transformers import PreTrainedModel, ProcessorMixin
start = time.perf_counter()
import hf_clip
print(time.perf_counter() - start)
"""

Encoder = Callable[[Tensor], Tensor]


def build_encoders(variant: Variant) -> dict[str, tuple[Encoder, Encoder]]:
    """Image and text encoder of each implementation that has this variant, all with the same weights."""
    config = HfClipConfig.from_variant(variant.name)
    reference = build_reference(reference_dimensions(variant), seed=0)
    weights = convert_names(reference.state_dict(), config)
    models: dict[str, nn.Module] = {OURS: HfClipModel(config), "openai-clip": reference}
    if variant.patch_size is not None:
        models["transformers"] = CLIPModel(CLIPConfig(**config.to_dict()))
    encoders: dict[str, tuple[Encoder, Encoder]] = {}
    for name, model in models.items():
        if model is not reference:
            model.load_state_dict(weights)
        encoders[name] = _encoders_of(model.eval())
    return encoders


def _encoders_of(model: nn.Module) -> tuple[Encoder, Encoder]:
    if isinstance(model, CLIPModel):
        return (
            lambda images: model.get_image_features(images).pooler_output,
            lambda texts: model.get_text_features(texts).pooler_output,
        )
    return model.encode_image, model.encode_text  # type: ignore[return-value]


def check_equal(encoders: dict[str, tuple[Encoder, Encoder]], kind: int, inputs: dict[str, Tensor]) -> None:
    """Speed of something else would say nothing: all features agree to 1e-4 before anything is timed."""
    expected = encoders[OURS][kind](inputs[OURS])
    for name, pair in encoders.items():
        error = (pair[kind](inputs[name]) - expected).norm() / expected.norm()
        if error > 1e-4:
            raise AssertionError(f"{name} computes other features: relative error {error:.1e}")


def measure(encoders: dict[str, tuple[Encoder, Encoder]], kind: int, inputs: dict[str, Tensor], rounds: int) -> dict:
    """Median rows per second of each implementation; `kind` is 0 for images and 1 for texts."""
    check_equal(encoders, kind, inputs)
    works = {name: partial(pair[kind], inputs[name]) for name, pair in encoders.items()}
    return rates_in_turn(works, {name: len(rows) for name, rows in inputs.items()}, rounds)


def import_seconds(repeats: int = 5) -> float:
    command = [sys.executable, "-c", IMPORT]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(repeats)]
    return statistics.median(map(float, runs))


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encode", description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="ViT-B/32", help="one of the nine (default ViT-B/32)")
    parser.add_argument("--images", type=at_least_one, default=16, help="pictures per batch (default 16)")
    parser.add_argument(
        "--texts", type=at_least_one, default=64, help="texts per batch, of about ten tokens (default 64)"
    )
    parser.add_argument("--rounds", type=at_least_one, default=7, help="rounds over all implementations (default 7)")
    options = parser.parse_args(arguments)
    try:
        variant = get_variant(options.variant)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    encoders = build_encoders(variant)
    images = torch.randn(options.images, 3, variant.image_size, variant.image_size)
    lengths = tuple(CAPTION_TOKENS + offset % 5 - 2 for offset in range(options.texts))
    longest = random_texts(lengths, 49408, max(lengths))
    padded = nn.functional.pad(longest, (0, 77 - longest.shape[1]))
    texts = {name: padded if name == "openai-clip" else longest for name in encoders}
    print(f"{variant.name}, float32, torch {torch.__version__}, transformers {transformers.__version__}, ", end="")
    print(f"{torch.get_num_threads()} threads, medians of {options.rounds} rounds")
    print_rates("images", measure(encoders, 0, dict.fromkeys(encoders, images), options.rounds))
    print_rates("texts", measure(encoders, 1, texts, options.rounds))
    print(
        f"\nimport hf_clip: {import_seconds():.2f} s beyond `from transformers import PreTrainedModel, ProcessorMixin`"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
