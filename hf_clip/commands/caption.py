"""`hf-clip caption`: the captions of a bank that are nearest to an image, or a phrase composed of a vocabulary."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .image_results import end_by_failures
from .loaded_model import load_placed, place_model
from .program import Dtype
from .shared_options import MODEL_HELP, BatchSizeOption, DeviceOption, DtypeOption, OfflineOption

if TYPE_CHECKING:
    from ..search.caption_bank import CaptionedImage


def caption(
    images: Annotated[
        list[str],
        typer.Argument(help="Image files, addresses, or folders, of which all images are taken.", metavar="IMAGE..."),
    ],
    bank: Annotated[
        str | None, typer.Option(help="A file with a caption on each line.", metavar="FILE", show_default=False)
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(help="An index, whose captions are the bank, and which remembers its model.", show_default=False),
    ] = None,
    compose: Annotated[
        str | None,
        typer.Option(
            help="A file with a word or phrase on each line, of which a text is composed.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help=f"{MODEL_HELP} An index remembers its own.", show_default=False)
    ] = None,
    top_k: Annotated[int, typer.Option(help="How many captions to find for each image.", min=1)] = 3,
    template: Annotated[
        str, typer.Option(help="The text with {} in which --compose puts its phrases.")
    ] = "a photo of a {}.",
    margin: Annotated[
        float, typer.Option(help="Cosine similarity by which a further phrase of --compose must raise the text's.")
    ] = 0.005,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    batch_size: BatchSizeOption = 16,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    offline: OfflineOption = False,
) -> None:
    """Find the captions nearest to images in a bank, and compose a phrase of a vocabulary.

    It retrieves and composes; it does not describe. What stands in no bank and no vocabulary is never said.

    Exit status: 0, all images were captioned; 2, some could not be opened; 1, there is no result.

    Examples:

        hf-clip caption photo.jpg --bank captions.txt --model clip-vit-b32/

        hf-clip caption photos/ --index pairs-index --top-k 1 --json

        hf-clip caption photo.jpg --compose words.txt --model clip-vit-b32/
    """
    import os

    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    check_sources(bank, index, compose, model)
    if index is not None:
        from ..search.index_table import IndexTables

        IndexTables.open(os.path.expanduser(index))  # what is wrong with it is said before torch is imported
    from ..model.open_image import open_image
    from ..search import caption_bank
    from ..search.caption_output import as_json_text, format_captions
    from ..search.indexed_image import register_formats
    from ..zero_shot.files import find_images
    from ..zero_shot.pipeline import check_device
    from ..zero_shot.progress import progress_bar
    from ..zero_shot.prompts import format_template

    check_device(device)
    format_template(template)
    captions = [] if bank is None else caption_bank.read_lines(bank, "captions")
    words = [] if compose is None else caption_bank.read_lines(compose, "words")
    register_formats()
    names = find_images(images)
    loaded, processor, stored = _load(index, model, device, dtype.value, offline, compose is None)
    captions = captions or stored
    with progress_bar("Encoding images", "image", len(names), sys.stderr.isatty()) as advance:
        found, features = caption_bank.encode_image_files(
            loaded,
            processor,
            ((name, name) for name in names),
            opener=open_image,
            batch_size=batch_size,
            advance=advance,
        )
    good = [image for image in found if image.error is None]
    if captions and good:
        _add_nearest(good, features, captions, loaded, processor, top_k=top_k)
    if words and good:
        _add_composed(good, features, words, loaded, processor, template=template, margin=margin)
    print(as_json_text(found) if as_json else "\n".join(format_captions(found)))
    end_by_failures(len(found), len(found) - len(good), "opened")


def check_sources(bank: str | None, index: str | None, compose: str | None, model: str | None) -> None:
    """Refuse options that leave out what is needed, or say it twice."""
    if bank is None and index is None and compose is None:
        raise ValueError("There are no captions to choose from: give --bank, --index, or --compose with a vocabulary.")
    if bank is not None and index is not None:
        raise ValueError("Captions come from a file or from an index: leave out --bank or --index.")
    if model is None and index is None:
        raise ValueError("A model is needed to encode images: give --model, or --index, which remembers its model.")


def _add_nearest(
    images: "list[CaptionedImage]", features: Any, captions: list[str], model: Any, processor: Any, *, top_k: int
) -> None:
    """Give images, whose features are (I, D), the captions that are nearest to them."""
    from ..search.caption_bank import nearest_captions
    from ..zero_shot.progress import progress_bar

    with progress_bar("Encoding captions", "caption", len(captions), sys.stderr.isatty()) as advance:
        nearest = nearest_captions(model, processor, features, captions, top_k=top_k, advance=advance)
    for image, lines in zip(images, nearest, strict=True):
        image.captions = lines


def _add_composed(
    images: "list[CaptionedImage]", features: Any, words: list[str], model: Any, processor: Any, **how: Any
) -> None:
    """Give images, whose features are (I, D), a phrase that is composed of words."""
    from ..search.caption_bank import PhraseComposer
    from ..zero_shot.progress import progress_bar

    is_shown = sys.stderr.isatty()
    composer = PhraseComposer(model, processor, words, progress=is_shown, **how)
    with progress_bar("Composing", "image", len(images), is_shown) as advance:
        for image, feature in zip(images, features, strict=True):
            image.composed = composer.compose(feature)
            advance(1)


def _load(
    index: str | None, model: str | None, device: str | None, dtype: str, offline: bool, needs_captions: bool
) -> tuple[Any, Any, list[str]]:
    """The model, its processor, and the captions of the index."""
    if index is not None:
        from ..search.caption_bank import captions_of_index
        from ..search.image_index import ImageIndex

        opened = ImageIndex.open(index, model=model, make=False)
        captions = captions_of_index(opened)
        if not captions and needs_captions:
            raise ValueError(
                f"The index {index} has no captions: they come from data sets that have a column of them. Give a file "
                f"with --bank."
            )
        return place_model(opened.model, device, dtype), opened.processor, captions
    return *load_placed(str(model), device=device, dtype=dtype, offline=offline), []
