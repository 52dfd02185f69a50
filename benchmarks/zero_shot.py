"""How fast images are classified zero-shot, beside the stock pipeline and OpenAI's recipe.

Our pipeline runs on our model, the stock one on transformers' own model, tokenizer and image processor; both hold the
same random weights in float32 and get the same images and labels through the same call. Ours encodes its labels in
every call of the first row; in the second it gets them encoded, as a ZeroShotClassifier. Then a classifier of 1,000
labels and 7 templates is built: by us, and by OpenAI's recipe, which pads every prompt to 77 tokens and encodes label
by label, on OpenAI's own model with the same weights (a part of the labels, since it is slow).
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.pipelines import ZeroShotImageClassificationPipeline

from conversion.reference import build_reference, reference_dimensions
from hf_clip import (
    HfClipConfig,
    HfClipImageProcessor,
    HfClipModel,
    HfClipProcessor,
    HfClipTokenizer,
    Variant,
    tokenize,
)
from hf_clip.checkpoints.keys import convert_names
from hf_clip.checkpoints.vocabulary import find_vocabulary
from hf_clip.model.bpe import read_merges
from hf_clip.model.variants import get_variant
from hf_clip.zero_shot.classifier import ZeroShotClassifier
from hf_clip.zero_shot.label_matrix import build_matrix
from hf_clip.zero_shot.pipeline import STOCK_TEMPLATE, HfClipZeroShotPipeline
from hf_clip.zero_shot.prompts import TEMPLATE_SETS

from .measuring import OURS, Check, Contender, Table, agrees_with, compare
from .settings import Settings

OPTIONS = ("variants",)
NEEDS_CEILING = False
IS_ON_CPU = False
VARIANTS = ("ViT-B/32",)
IMAGES, QUICK_IMAGES, LABELS = 32, 16, 100
CLASSES, QUICK_CLASSES, CLASSES_BY_RECIPE = 1000, 100, 20
ROUNDS, QUICK_ROUNDS = 3, 2
LARGEST_DIFFERENCE_OF_SCORES = 1e-5
STOCK_BATCHES = (1, 8)


def photographs(count: int) -> list[Image.Image]:
    """Real images that ship with scikit-image, at 640x480."""
    from skimage import data

    names = ("astronaut", "chelsea", "coffee", "rocket")
    images = [Image.fromarray(getattr(data, name)()).resize((640, 480)) for name in names]
    return [images[index % len(images)] for index in range(count)]


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


def openai_recipe(encode: Callable[[Tensor], Tensor], names: list[str], templates: tuple[str, ...]) -> Tensor:
    """Label by label: all its prompts, padded to 77, as one batch."""
    columns = []
    for name in names:
        features = encode(tokenize([template.format(name) for template in templates]))
        mean = nn.functional.normalize(features, dim=-1).mean(dim=0)
        columns.append(mean / mean.norm())
    return torch.stack(columns, dim=1)


def same_scores(expected: list[list[dict[str, Any]]]) -> Check:
    """A check of a pipeline's answers: every label's score."""

    def check(found: list[list[dict[str, Any]]]) -> str | None:
        for row, known in zip(found, expected, strict=True):
            theirs = {entry["label"]: entry["score"] for entry in known}
            difference = max(abs(entry["score"] - theirs[entry["label"]]) for entry in row)
            if not difference <= LARGEST_DIFFERENCE_OF_SCORES:
                return f"its scores are {difference:.1e} off"
        return None

    return check


def pipelines(
    ours: HfClipZeroShotPipeline, stock: ZeroShotImageClassificationPipeline, title: str, count: int
) -> tuple[Table, list[Contender]]:
    images, labels = photographs(count), class_names(LABELS)
    check = same_scores(stock(images, candidate_labels=labels, batch_size=8))

    known = ZeroShotClassifier(ours.model, ours.tokenizer, labels, STOCK_TEMPLATE, progress=False)
    works: dict[str, Callable[[], object]] = {
        f"{OURS}, first call": lambda: ours(images, candidate_labels=labels),
        f"{OURS}, labels known": lambda: ours(images, candidate_labels=known),
    }
    for size in STOCK_BATCHES:
        works[f"stock, batch {size}"] = partial(stock, images, candidate_labels=labels, batch_size=size)
    title = f"{title}, pipeline, {count} images of 640x480 pixels, {LABELS} labels"
    contenders = [Contender(name, work, count, check=check) for name, work in works.items()]
    return Table(title, "images", ours=tuple(works)[:2]), contenders


def classifiers(
    model: HfClipModel, processor: HfClipProcessor, encode: Callable[[Tensor], Tensor], title: str, count: int
) -> tuple[Table, list[Contender]]:
    templates, names = TEMPLATE_SETS["imagenet_7"], class_names(count)
    few = names[:CLASSES_BY_RECIPE]
    same = agrees_with(openai_recipe(encode, few, templates).T, "float32")
    contenders = [
        Contender(
            OURS,
            lambda: build_matrix(model, processor, names, templates).weights.T,
            len(names),
            check=lambda found: same(found[: len(few)]),
        ),
        Contender("OpenAI's recipe", lambda: openai_recipe(encode, few, templates).T, len(few), check=same),
    ]
    return Table(f"{title}, classifier of {count:,} labels x {len(templates)} templates", "labels"), contenders


def tables_of(variant: Variant, device: str, settings: Settings) -> Iterator[tuple[Table, list[Contender]]]:
    reference = build_reference(reference_dimensions(variant), seed=0)
    model = HfClipModel(HfClipConfig.from_variant(variant.name)).eval()
    model.load_state_dict(convert_names(reference.state_dict(), model.config))
    peer = stock_model(model).to(device)
    reference, model = reference.to(device), model.to(device)
    image_processor = HfClipImageProcessor.for_image_size(variant.image_size)
    tokenizer = HfClipTokenizer.from_vocabulary_file(find_vocabulary(offline=True))
    merges = read_merges(find_vocabulary(offline=True))
    ours = HfClipZeroShotPipeline(model=model, tokenizer=tokenizer, image_processor=image_processor, device=device)
    stock = ZeroShotImageClassificationPipeline(
        model=peer,
        tokenizer=CLIPTokenizer(vocab=tokenizer.get_vocab(), merges=merges, model_max_length=77),
        image_processor=CLIPImageProcessorPil(**image_processor.to_dict()),
        device=device,
    )
    title = variant.name if device == "cpu" else f"{variant.name} on the GPU"
    yield pipelines(ours, stock, title, settings.choose(IMAGES, QUICK_IMAGES))
    processor = HfClipProcessor(image_processor, tokenizer)
    encode: Any = reference.encode_text
    count = settings.choose(CLASSES, QUICK_CLASSES)
    yield classifiers(model, processor, lambda ids: encode(ids.to(device)), title, count)


@torch.no_grad()
def run(settings: Settings) -> Iterator[Table]:
    rounds = settings.rounds or settings.choose(ROUNDS, QUICK_ROUNDS)
    for name in settings.variants or VARIANTS:
        for device in settings.devices:
            for table, contenders in tables_of(get_variant(name), device, settings):
                table.device = device
                yield compare(table, contenders, rounds=rounds, seconds=settings.seconds)
