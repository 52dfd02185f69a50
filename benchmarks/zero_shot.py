"""How fast pictures are classified zero-shot, beside the stock pipeline and open_clip's recipe.

    python -m benchmarks.zero_shot

Our pipeline runs on our model, the stock one on transformers' own model, tokenizer and image processor; both hold the
same random weights in float32 and get the same pictures and labels through the same call. Before anything is timed
their scores are compared. Ours makes its labels anew in every round, as a first call does; a row beside it shows the
calls after that. Then a classifier of 1,000 labels and 7 templates is built: by us, and by open_clip's recipe, which
pads every prompt to 77 tokens and encodes label by label, on OpenAI's own model with the same weights (a part of the
labels, since it is slow).
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.pipelines import ZeroShotImageClassificationPipeline

from conversion.reference import build_reference, reference_dimensions
from hf_clip import HfClipConfig, HfClipImageProcessor, HfClipModel, HfClipProcessor, HfClipTokenizer, tokenize
from hf_clip.bpe_hf_clip import read_merges
from hf_clip.original import convert_names
from hf_clip.original.vocabulary import find_vocabulary
from hf_clip.pipeline import HfClipZeroShotPipeline
from hf_clip.prompts import TEMPLATE_SETS
from hf_clip.variants import get_variant
from hf_clip.zero_shot import build_matrix

from .in_turn import OURS, at_least_one, print_rates, rates_in_turn

PICTURES, LABELS = 32, 100
CLASSES, CLASSES_BY_RECIPE = 1000, 20
STOCK_BATCHES = (1, 8)


def photographs(count: int) -> list[Image.Image]:
    """Real pictures that ship with scikit-image, at 640x480."""
    from skimage import data

    names = ("astronaut", "chelsea", "coffee", "rocket")
    pictures = [Image.fromarray(getattr(data, name)()).resize((640, 480)) for name in names]
    return [pictures[index % len(pictures)] for index in range(count)]


def class_names(count: int) -> list[str]:
    """Different names of one to three real words: the modules and functions of torch."""
    words = sorted({name.strip("_").replace("_", " ") for name in dir(torch) if name.islower() and len(name) > 3})
    names = [word for word in words if len(word.split()) <= 3]
    names += [f"{first} {second}" for first in names for second in names[:3] if first != second]
    return list(dict.fromkeys(names))[:count]


def stock_model(model: HfClipModel) -> nn.Module:
    """transformers' own model with the same weights; for a ResNet, which it doesn't have, ours."""
    if model.config.vision_config.model_type != "hf_clip_vit":
        return model
    stock = CLIPModel(CLIPConfig(**model.config.to_dict())).eval()
    stock.load_state_dict(model.state_dict())
    return stock


def openclip_recipe(encode: Callable[[Tensor], Tensor], names: list[str], templates: tuple[str, ...]) -> Tensor:
    """Label by label: all its prompts, padded to 77, as one batch."""
    columns = []
    for name in names:
        features = encode(tokenize([template.format(name) for template in templates]))
        mean = nn.functional.normalize(features, dim=-1).mean(dim=0)
        columns.append(mean / mean.norm())
    return torch.stack(columns, dim=1)


def compare_pipelines(ours: HfClipZeroShotPipeline, stock: ZeroShotImageClassificationPipeline, rounds: int) -> None:
    pictures, labels = photographs(PICTURES), class_names(LABELS)
    for found, expected in zip(
        ours(pictures, candidate_labels=labels),
        stock(pictures, candidate_labels=labels, batch_size=8),
        strict=True,
    ):
        theirs = {entry["label"]: entry["score"] for entry in expected}
        if max(abs(entry["score"] - theirs[entry["label"]]) for entry in found) > 1e-5:
            raise AssertionError("the two pipelines give different scores")

    def first_call() -> object:
        ours._matrices.clear()
        return ours(pictures, candidate_labels=labels)

    works: dict[str, Callable[[], object]] = {
        f"{OURS}, first call": first_call,
        f"{OURS}, labels known": lambda: ours(pictures, candidate_labels=labels),
    }
    for size in STOCK_BATCHES:
        works[f"stock, batch {size}"] = partial(stock, pictures, candidate_labels=labels, batch_size=size)
    rates = rates_in_turn(works, dict.fromkeys(works, PICTURES), rounds)
    print_rates(f"pictures, {PICTURES} of 640x480 pixels, {LABELS} labels, one template", rates)


def compare_classifiers(
    model: HfClipModel, processor: HfClipProcessor, encode: Callable[[Tensor], Tensor], rounds: int
) -> None:
    templates, names = TEMPLATE_SETS["imagenet_7"], class_names(CLASSES)
    found = build_matrix(model, processor, names, templates).weights
    expected = openclip_recipe(encode, names[:CLASSES_BY_RECIPE], templates)
    if (found[:, :CLASSES_BY_RECIPE] - expected).abs().max() > 1e-5:
        raise AssertionError("the two recipes give different classifiers")
    works: dict[str, Callable[[], object]] = {
        OURS: lambda: build_matrix(model, processor, names, templates),
        "open_clip's recipe": lambda: openclip_recipe(encode, names[:CLASSES_BY_RECIPE], templates),
    }
    amounts = {OURS: CLASSES, "open_clip's recipe": CLASSES_BY_RECIPE}
    print_rates(f"labels of a classifier, {CLASSES} labels x 7 templates", rates_in_turn(works, amounts, rounds))


@torch.no_grad()
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zero_shot", description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="ViT-B/32", help="one of the nine (default ViT-B/32)")
    parser.add_argument("--rounds", type=at_least_one, default=3, help="rounds over all implementations (default 3)")
    options = parser.parse_args(arguments)
    try:
        variant = get_variant(options.variant)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    reference = build_reference(reference_dimensions(variant), seed=0)
    model = HfClipModel(HfClipConfig.from_variant(variant.name)).eval()
    model.load_state_dict(convert_names(reference.state_dict(), model.config))
    image_processor = HfClipImageProcessor.for_image_size(variant.image_size)
    tokenizer = HfClipTokenizer.from_vocabulary_file(find_vocabulary(offline=True))
    merges = read_merges(find_vocabulary(offline=True))
    peer = stock_model(model)
    print(f"{variant.name}, float32, torch {torch.__version__}, transformers {transformers.__version__}, ", end="")
    print(f"{torch.get_num_threads()} threads, medians of {options.rounds} rounds")
    ours = HfClipZeroShotPipeline(model=model, tokenizer=tokenizer, image_processor=image_processor)
    stock = ZeroShotImageClassificationPipeline(
        model=peer,
        tokenizer=CLIPTokenizer(vocab=tokenizer.get_vocab(), merges=merges, model_max_length=77),
        image_processor=CLIPImageProcessorPil(**image_processor.to_dict()),
    )
    compare_pipelines(ours, stock, options.rounds)
    compare_classifiers(model, HfClipProcessor(image_processor, tokenizer), reference.encode_text, options.rounds)  # type: ignore[arg-type]
    return 0


if __name__ == "__main__":
    sys.exit(main())
