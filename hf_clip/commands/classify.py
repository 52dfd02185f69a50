"""`hf-clip classify`: the labels of many images, printed or written into a table."""

import os
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .image_results import end_by_failures, put_results
from .loaded_model import load_placed
from .program import Dtype
from .shared_options import (
    IMAGES_HELP,
    MODEL_HELP,
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    ImageColumnOption,
    ImageFoldersOption,
    LabelsOption,
    OfflineOption,
    OutputOption,
    SplitOption,
    TemplatesOption,
    read_given_templates,
)

if TYPE_CHECKING:
    from ..zero_shot.files import StreamClassifier


class Precision(str, Enum):
    """What `hf-clip export-onnx` writes graphs in."""

    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


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


def check_labels_or_head(labels: str | None, head: str | None, templates: list[str] | None) -> None:
    """Refuse neither and both, and templates for a head."""
    if (labels is None) == (head is None):
        raise ValueError("Images are classified by labels or by a head: give --labels or --head, and not both.")
    if head is not None and templates:
        raise ValueError("--templates are for labels, and a head has no use for them: leave them out.")


def load_by_torch(
    model: str, labels: Any, templates: Any, head: str | None, *, device: str | None, dtype: str, offline: bool
) -> "StreamClassifier":
    """Load a model and make its classifier of the labels, or of a head."""
    from ..zero_shot.classifier import ZeroShotClassifier
    from ..zero_shot.embedding_head import EmbeddingHead, HeadClassifier, find_head

    stored = None if head is None else EmbeddingHead.load(find_head(head, model, local_files_only=offline))
    loaded, processor = load_placed(model, device=device, dtype=dtype, offline=offline)
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
    from ..zero_shot.prompts import parse_labels, read_labels
    from ..zero_shot.tower_graphs import TowerGraphs

    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for `datasets`, which is not imported yet
    if onnx:
        check_for_onnx(head, device, dtype)
    else:
        check_for_torch(device, precision)
    check_labels_or_head(labels, head, templates)
    names = read_labels(parse_labels(labels)) if labels is not None else {}
    given = read_given_templates(templates)
    # The graphs are opened while the rest of the package is imported.
    graphs = TowerGraphs(model, precision.value) if onnx else None

    if output is not None:
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
    top_k = min(top_k, len(classifier.labels))
    done, failed = put_results(
        classify_stream(classifier, found.items, top_k=top_k, batch_size=batch_size, opener=found.opener),
        None if output is None else table_writer(output, top_k),
        total=found.total,
        name_width=found.longest_name,
        label_width=max(map(len, classifier.labels)),
    )
    end_by_failures(done, failed, "opened")
