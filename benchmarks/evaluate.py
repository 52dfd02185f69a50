"""How long a data set takes, from JPEG files on disk to a table of zero-shot figures.

Ours is `evaluate_zero_shot` on the model as it is loaded, and on an optimized one, as `hf-clip evaluate --optimize`
has it. The peer is a plain loop over transformers' own CLIPModel and CLIPProcessor with the same random weights: open
images with Pillow, prepare and encode them, compare with the encoded prompts, count what is right. It takes images in
batches, or one by one (fewer of them, since it is slow). All open the files anew in each round.

The features of the first images and the predictions of all are compared first.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPProcessor, CLIPTokenizer

from hf_clip import HfClipImageProcessor, HfClipProcessor, HfClipTokenizer, Variant
from hf_clip.checkpoints.vocabulary import find_vocabulary
from hf_clip.evaluation.embedder import Embedder, Unreadable
from hf_clip.evaluation.labelled_images import LabelledImages, open_labelled
from hf_clip.evaluation.zero_shot import ZeroShotResult, evaluate_zero_shot
from hf_clip.model.bpe import read_merges
from hf_clip.model.variants import get_variant

from .measuring import OURS, Check, Contender, Table, agrees_with, compare
from .peers import OPTIMIZED, load_ours, load_stock, weights_folder
from .settings import Settings
from .zero_shot import class_names, photographs

OPTIONS = ("variants",)
NEEDS_CEILING = False
IS_ON_CPU = True
VARIANTS = ("ViT-B/32",)
IMAGES, QUICK_IMAGES, ONE_BY_ONE = 500, 64, 64
SIZE, CLASSES, BATCH = (640, 480), 10, 32
ROUNDS = 3
TEMPLATE = "a photo of a {}."
MOST_DIFFERENT = 1
"""Images that may get another class, since two classes may be as near as float32 can tell."""


def write_images(folder: Path, count: int) -> Path:
    """Write class folders of JPEGs: photographs that ship with scikit-image, each at another crop."""
    names, sources = class_names(CLASSES), photographs(4)
    for place in range(count):
        source, step = sources[place % 4], place // 4
        left, top = 2 * (step % 20), 2 * (step // 20)
        image = source.crop((left, top, source.width - left, source.height - top)).resize(SIZE)
        path = folder / names[place % CLASSES] / f"{place:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)
    return folder


def stock_processor(processor: HfClipProcessor) -> CLIPProcessor:
    """transformers' own processor with the same settings and vocabulary."""
    merges = read_merges(find_vocabulary(offline=True))
    tokenizer = CLIPTokenizer(vocab=processor.tokenizer.get_vocab(), merges=merges, model_max_length=77)
    return CLIPProcessor(CLIPImageProcessorPil(**processor.image_processor.to_dict()), tokenizer)


@torch.inference_mode()
def plain_loop(model: Any, processor: CLIPProcessor, data: LabelledImages, count: int, batch: int) -> dict[str, Tensor]:
    """Return features (I, D) and predictions (I,) of the first images, and how often each class is taken for each."""
    prompts = processor.tokenizer([TEMPLATE.format(name) for name in data.labels], padding=True, return_tensors="pt")
    texts = nn.functional.normalize(model.get_text_features(**prompts).pooler_output, dim=-1)
    rows = list(data.rows())[:count]
    features = []
    for start in range(0, count, batch):
        images = [Image.open(row.image).convert("RGB") for row in rows[start : start + batch]]
        pixels = processor(images=images, return_tensors="pt")
        features.append(nn.functional.normalize(model.get_image_features(**pixels).pooler_output, dim=-1))
    found = torch.cat(features)
    predictions = (found @ texts.T).argmax(dim=1)
    confusion = torch.zeros(len(data.labels), len(data.labels), dtype=torch.int64)
    labels = torch.tensor([row.labels[0] for row in rows])
    confusion.index_put_((labels, predictions), torch.tensor(1), accumulate=True)
    return {"features": found, "predictions": predictions, "confusion": confusion}


def same_table(embedder: Embedder, data: LabelledImages, expected: dict[str, Tensor]) -> Check:
    """A check of a result's confusion matrix, and of the features of the first images."""
    same_features = agrees_with(expected["features"][:BATCH], "float32")

    def check(found: ZeroShotResult) -> str | None:
        assert found.confusion is not None
        different = int((found.confusion - expected["confusion"]).abs().sum()) // 2
        if different > MOST_DIFFERENT:
            return f"{different} images have another class"
        _, features = next(embedder.images(data.rows(), places=data.places, unreadable=Unreadable(data.name)))
        return same_features(features)

    return check


def same_predictions(expected: dict[str, Tensor]) -> Check:
    def check(found: dict[str, Tensor]) -> str | None:
        predictions = expected["predictions"][: len(found["predictions"])]
        different = int((found["predictions"] != predictions).sum())
        return None if different <= MOST_DIFFERENT else f"{different} images have another class"

    return check


def contenders_of(folder: Path, variant: Variant, data: LabelledImages, count: int) -> list[Contender]:
    vocabulary = find_vocabulary(offline=True)
    image_processor = HfClipImageProcessor.for_image_size(variant.image_size)
    processor = HfClipProcessor(image_processor, HfClipTokenizer.from_vocabulary_file(vocabulary))
    stock, their_processor = load_stock(variant, folder), stock_processor(processor)
    expected = plain_loop(stock, their_processor, data, count, BATCH)

    def ours(name: str, model: Any) -> Contender:
        work: Callable[[], Any] = lambda: evaluate_zero_shot(model, processor, data, templates=TEMPLATE)  # noqa: E731
        check = same_table(Embedder(model, processor, batch_size=BATCH), data, expected)
        return Contender(name, work, count, "float32", check)

    def theirs(name: str, count: int, batch: int) -> Contender:
        work: Callable[[], Any] = lambda: plain_loop(stock, their_processor, data, count, batch)  # noqa: E731
        return Contender(name, work, count, "float32", same_predictions(expected))

    optimized = load_ours(folder)
    optimized.optimize_for_inference()
    return [
        ours(OURS, load_ours(folder)),
        ours(OPTIMIZED, optimized),
        theirs(f"transformers, batches of {BATCH}", count, BATCH),
        theirs("transformers, one by one", min(count, ONE_BY_ONE), 1),
    ]


def run(settings: Settings) -> Iterator[Table]:
    count = settings.choose(IMAGES, QUICK_IMAGES)
    for name in settings.variants or VARIANTS:
        variant = get_variant(name)
        with weights_folder(variant) as folder, tempfile.TemporaryDirectory(prefix="hf_clip-benchmark-") as place:
            data = open_labelled(write_images(Path(place), count))
            title = f"{name}, {count} JPEGs of {SIZE[0]}x{SIZE[1]} pixels to a zero-shot table of {CLASSES} classes"
            table = Table(title, "images", ours=(OURS, OPTIMIZED))
            contenders = contenders_of(folder, variant, data, count)
            yield compare(table, contenders, rounds=settings.rounds or ROUNDS, seconds=settings.seconds)
