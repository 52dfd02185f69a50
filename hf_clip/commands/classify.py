"""`hf-clip classify`: the labels of many images, printed or written into a table."""

import os
import sys
from collections.abc import Callable, Iterable
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .program import Dtype

if TYPE_CHECKING:
    from ..zero_shot.files import Classified, StreamClassifier


class Precision(str, Enum):
    """What `hf-clip export-onnx` writes graphs in."""

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


SOME_FAILED = 2
"""Exit status: there are results, but not of all images."""


MODEL_HELP = "A folder, a repository on the Hub, a checkpoint file, or one of OpenAI's nine names."
IMAGES_HELP = (
    "Folders, of which all images are taken, those in their folders too; files; addresses. Or one data set: a "
    "repository on the Hub, a CSV, JSON lines, parquet or webdataset file, a saved data set."
)

LabelsOption = Annotated[
    str | None,
    typer.Option(
        help="Labels with commas between them; or a file: a label on each line, or JSON with the names of labels.",
        metavar="A,B,C|FILE",
    ),
]
TemplatesOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A text with {} where the label belongs, given once or several times; the name of a set; or a file "
        "with a text on each line. By default: a photo of a {}.",
        show_default=False,
    ),
]
OutputOption = Annotated[
    str | None,
    typer.Option(
        help="A table to write, which ends in .csv, .jsonl or .parquet. Without it, results are printed.",
        metavar="FILE",
    ),
]
ImageColumnOption = Annotated[str | None, typer.Option(help="The column of a data set that holds the images.")]
SplitOption = Annotated[str | None, typer.Option(help="The split of a data set; by default train.")]
ImageFoldersOption = Annotated[
    list[str] | None,
    typer.Option(help="More folders whose images the rows of a data set may name; only for rows you trust."),
]
BatchSizeOption = Annotated[int, typer.Option(help="How many images to encode at once.", min=1)]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; by default a GPU if there is one.")]
DtypeOption = Annotated[Dtype, typer.Option(help="The dtype to compute in.")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Download nothing.")]


def format_line(result: "Classified", width: int, label_width: int) -> str:
    """One result for people to read: one line, whatever the names of files and labels hold."""
    if result.error is not None:
        said = f"error: {result.error}"
    else:
        said = "  ".join(f"{entry['label']:<{label_width}} {entry['score']:.4f}" for entry in result.labels) or "-"
    line = f"{result.name:<{width}}  {said}"
    return "".join(character if character.isprintable() else "�" for character in line)


def take_results(results: "Iterable[Classified]", take: "Callable[[Classified], Any]") -> tuple[int, int]:
    """Hand each result on; returns how many there were, and how many of them are errors."""
    done = failed = 0
    for result in results:
        take(result)
        done, failed = done + 1, failed + (result.error is not None)
    return done, failed


def end_by_failures(done: int, failed: int, what: str) -> None:
    """End with status 2 where some images failed, and with an error where all did. `what` could not be done to them."""
    if failed and failed == done:
        raise ValueError(f"none of {done:,} images could be {what}")
    if failed:
        print(f"{failed:,} of {done:,} images could not be {what}", file=sys.stderr)
        raise typer.Exit(SOME_FAILED)


def check_for_onnx(head: str | None, device: str | None, dtype: Dtype) -> None:
    """Refuse what ONNX Runtime does not do here."""
    if head is not None:
        raise ValueError("--head is applied by torch: leave --onnx out, or give --labels.")
    if device not in (None, "cpu"):
        raise ValueError(f"--onnx computes on the processor, but --device is {device}: leave one of the two out.")
    if dtype != Dtype.float32:
        raise ValueError(f"--dtype {dtype.value} is for torch; with --onnx choose a graph by --precision fp16 or int8.")


def check_for_torch(device: str | None, precision: Precision) -> None:
    """Refuse a device that is not there, and what is for ONNX Runtime alone."""
    from ..zero_shot.pipeline import check_device

    check_device(device)
    if precision != Precision.fp32:
        raise ValueError(f"--precision {precision.value} chooses an ONNX graph: give --onnx too, or --dtype for torch.")


def place_model(model: Any, device: str | None, dtype: str) -> Any:
    """Move a model that an index has loaded to where, and into what, a command line asks for."""
    import torch

    return model.to(device or model.device, getattr(torch, dtype))


def load_by_torch(
    model: str, labels: Any, templates: Any, head: str | None, *, device: str | None, dtype: str, offline: bool
) -> "StreamClassifier":
    """Load a model and make its classifier of the labels, or of a head."""
    from ..checkpoints.in_memory import load_model
    from ..registration import register
    from ..zero_shot.classifier import ZeroShotClassifier
    from ..zero_shot.embedding_head import EmbeddingHead, HeadClassifier, find_head
    from ..zero_shot.pipeline import default_device

    register()
    stored = None if head is None else EmbeddingHead.load(find_head(head, model, local_files_only=offline))
    loaded, processor = load_model(model, dtype=dtype, offline=offline)
    loaded.to(device or default_device())
    if stored is None:
        return ZeroShotClassifier(loaded, processor, labels, templates, progress=False)
    stored.check_model(loaded, processor, f"The head {head}")
    return HeadClassifier(loaded, processor, stored)


def classify(
    model: Annotated[str, typer.Argument(help=MODEL_HELP, metavar="MODEL")],
    images: Annotated[list[str], typer.Argument(help=IMAGES_HELP, metavar="IMAGES...")],
    labels: LabelsOption = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="Instead of labels a head that `hf-clip evaluate head` has trained: its name beside the model, or its "
            "file.",
            metavar="NAME|FILE",
        ),
    ] = None,
    templates: TemplatesOption = None,
    top_k: Annotated[int, typer.Option(help="How many labels to give for each image, best first.", min=1)] = 5,
    output: OutputOption = None,
    image_column: ImageColumnOption = None,
    split: SplitOption = None,
    image_folders: ImageFoldersOption = None,
    batch_size: BatchSizeOption = 16,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    offline: OfflineOption = False,
    onnx: Annotated[
        bool,
        typer.Option(
            "--onnx",
            help="Run the graphs that `hf-clip export-onnx` wrote into the folder MODEL, without torch: the first "
            "result comes much sooner.",
        ),
    ] = False,
    precision: Annotated[Precision, typer.Option(help="With --onnx, of which precision.")] = Precision.fp32,
) -> None:
    """Classify the images of folders, files or a data set by labels of your choice, or score them by a trained head.

    A table has a row for each image: `image`, its path or its number in the data set; `label` and `score`, then
    `label_2` and `score_2` and so on; and `error`, where it could not be opened. The table appears when it is whole.

    Exit status: 0, all images were classified; 2, some could not be opened; 1, there is no result.

    Examples:

        hf-clip classify clip-vit-b32/ photos/ --labels "cat,dog,a bird"

        hf-clip classify RN50 org/data --labels labels.txt --output scores.csv

        hf-clip classify clip-vit-b32/ photos/ --head aesthetic --output scores.csv

        hf-clip classify clip-vit-b32/ photo.jpg --labels cat,dog --onnx
    """
    from ..zero_shot.prompts import DEFAULT_TEMPLATE, parse_labels, read_labels, read_templates
    from ..zero_shot.tower_graphs import TowerGraphs

    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for `datasets`, which is not imported yet
    if onnx:
        check_for_onnx(head, device, dtype)
    else:
        check_for_torch(device, precision)
    if (labels is None) == (head is None):
        raise ValueError("Images are classified by labels or by a head: give --labels or --head, and not both.")
    if head is not None and templates:
        raise ValueError("--templates are for labels, and a head has no use for them: leave them out.")
    names = read_labels(parse_labels(labels)) if labels is not None else {}
    given = DEFAULT_TEMPLATE if not templates else templates[0] if len(templates) == 1 else templates
    read_templates(given)
    # The graphs are opened while the rest of the package is imported.
    graphs = TowerGraphs(model, precision.value) if onnx else None

    if output is not None:
        from tqdm import tqdm

        from ..zero_shot.tables import check_table, table_writer

        check_table(output)
    from ..training.data.image_stream import find_image_items
    from ..zero_shot.files import classify_stream

    found = find_image_items(images, split=split, image_column=image_column, image_folders=image_folders or ())
    classifier: StreamClassifier
    if graphs is not None:
        from ..zero_shot.onnx_classifier import OnnxClassifier

        classifier = OnnxClassifier(graphs, names, given)
    else:
        classifier = load_by_torch(model, names, given, head, device=device, dtype=dtype.value, offline=offline)
    top_k, width = min(top_k, len(classifier.labels)), max(map(len, classifier.labels))
    results = classify_stream(classifier, found.items, top_k=top_k, batch_size=batch_size, opener=found.opener)
    if output is None:
        done, failed = take_results(
            results, lambda result: print(format_line(result, found.longest_name, width), flush=True)
        )
    else:
        with table_writer(output, top_k) as write, tqdm(total=found.total, unit="image", disable=None) as bar:
            done, failed = take_results(results, lambda result: (write(result), bar.update()))
    end_by_failures(done, failed, "opened")
