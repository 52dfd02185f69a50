"""`hf-clip mine-negatives`: wrong captions that a model takes for nearly right, for fine-tuning against them."""

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Annotated, Any

import typer

from ..model.checked_files import one_line
from .loaded_model import load_placed
from .program import Dtype
from .shared_options import MODEL_HELP, BatchSizeOption, DeviceOption, DtypeOption

EXAMPLES_SHOWN = 3


class By(str, Enum):
    image = "image"
    text = "text"


def _examples(mined: Any) -> list[str]:
    """Some images with their negatives, at even distances."""
    found = [number for number, negatives in enumerate(mined.negatives) if negatives]
    places = range(0, len(found), -(-len(found) // EXAMPLES_SHOWN)) if found else ()
    lines = []
    for number in (found[place] for place in places):
        own = mined.negatives[number][0].own_score
        lines.append(f"{own:.3f}  {one_line(mined.captions[number][0], 80)}")
        lines += [f"  {negative.score:.3f}  not: {one_line(negative.text, 80)}" for negative in mined.negatives[number]]
    return lines


def _check_found(mined: Any, dataset: str, max_share: float) -> None:
    """Refuse to write a table without any negative."""
    if not any(mined.negatives):
        raise ValueError(
            f"{dataset}: none of {len(mined.negatives):,} images has a wrong caption whose similarity is at most "
            f"{max_share:g} of its own caption's, so nothing was written; raise --max-share, or lower --skip-first."
        )


def _report(mined: Any) -> None:
    """Print some examples, what was left out, and how many negatives there are."""
    for line in _examples(mined):
        print(line)
    for reason in mined.unusable:
        print(f"skipped: {reason}", file=sys.stderr)
    found = sum(map(len, mined.negatives))
    without = sum(not mined.of_row(row) for row in range(len(mined.of_rows)))
    print(
        f"{found / len(mined.negatives):.3g} negatives for each of {len(mined.negatives):,} images, of {mined.texts:,} "
        f"different captions; {without:,} of {len(mined.of_rows):,} rows have none."
    )


@contextmanager
def _held(output: str) -> Iterator[None]:
    """Keep others from the table until it is written. A signal removes what there is of it."""
    from ..training.data.mined_table import held_table
    from ..training.stopping import Signals, Stopped, heeded

    try:
        with heeded(Signals()), held_table(output):
            yield
    except Stopped as stop:
        print(f"\nended by {signal.Signals(stop.signum).name}: nothing was written", file=sys.stderr)
        raise typer.Exit(stop.status) from None


def mine_negatives(
    model: Annotated[str, typer.Option("--model", help=MODEL_HELP, metavar="MODEL")],
    dataset: Annotated[
        str, typer.Option("--dataset", help="Pairs of images and texts, as hf-clip finetune takes them.", metavar="D")
    ],
    output: Annotated[str, typer.Option("--output", help="A new parquet file.", metavar="FILE")],
    split: Annotated[str, typer.Option(help="The split of the data set.")] = "train",
    image_column: Annotated[str | None, typer.Option(help="Column of images, if not the only possible one.")] = None,
    caption_column: Annotated[
        str | None, typer.Option(help="Column of texts, or a template, if not the only possible one.")
    ] = None,
    image_folders: Annotated[
        list[str] | None,
        typer.Option(help="More folders whose images the rows may name; only for rows you trust."),
    ] = None,
    column: Annotated[str, typer.Option(help="Name of the new column.")] = "negative_caption",
    negatives: Annotated[int, typer.Option(help="How many for each image, at most.", min=1)] = 1,
    by: Annotated[
        By, typer.Option(help="Texts that are similar to the image, or to its caption; then no image is opened.")
    ] = By.image,
    max_share: Annotated[
        float,
        typer.Option(
            help="Leave out what is more similar than this part of the own caption's similarity: it probably is right "
            "too. 1 leaves out what is more similar than the own caption.",
        ),
    ] = 0.95,
    skip_first: Annotated[int, typer.Option(help="Leave out so many of the most similar that are left.", min=0)] = 0,
    batch_size: BatchSizeOption = 32,
    device: DeviceOption = None,
    dtype: DtypeOption = Dtype.float32,
    threads: Annotated[
        int | None, typer.Option(help="Threads that open images. Default: the number of processors.", min=1)
    ] = None,
) -> None:
    """Find wrong captions for images that the model takes for nearly right: hard negatives, to fine-tune against.

    The captions of all other images are compared, exactly and by blocks. Left out are captions that equal one of the
    image's own, and those that probably are right too, see --max-share. The table has the rows and columns of the data
    set, and a column of lists: a row may have fewer than --negatives, or none. Images that are files are not copied.

    Examples:

        hf-clip mine-negatives --model clip-vit-b32/ --dataset my/pairs --output mined.parquet

        hf-clip mine-negatives --model RN50 --dataset photos.csv --negatives 3 --by text --output photos/mined.parquet

        hf-clip finetune --model clip-vit-b32/ --dataset mined.parquet --negative_caption_column negative_caption
    """
    from ..data.columns import CAPTION_NAMES
    from ..data.sources import Source
    from ..extras import require
    from ..training.data.load_pairs import load_pairs
    from ..training.data.mined_table import check_table, open_whole, write_mined
    from ..training.data.mining import MiningOptions
    from ..training.data.mining import mine_negatives as mine
    from ..zero_shot.pipeline import check_device

    require("hf-clip mine-negatives", "train", ["datasets"])
    options = MiningOptions(negatives, by.value, max_share, skip_first)
    check_table(output, column)
    check_device(device)
    with _held(output):
        (source,) = load_pairs(
            Source(dataset),
            split=split,
            image_column=image_column,
            caption_column=caption_column,
            image_folders=image_folders or (),
        ).sources
        table = open_whole(source, split, column)
        loaded, processor = load_placed(model, device=device, dtype=dtype.value)
        mined = mine(
            loaded,
            processor,
            source,
            options,
            batch_size=batch_size,
            threads=threads,
            progress=sys.stderr.isatty(),
        )
        _check_found(mined, dataset, max_share)
        folders = write_mined(output, table, source, mined, column)
    _report(mined)
    if caption_column is None and column.lower() in CAPTION_NAMES:  # the trainer would not tell which is which
        caption_column = source.captions.column
    words = ["hf-clip", "finetune", "--model", model, "--dataset", output, "--negative_caption_column", column]
    for name, given in (("--image_column", image_column), ("--caption_column", caption_column)):
        words += [] if given is None else [name, given]
    words += ["--image_folders", *folders] if folders else []
    print(f"{output}: {shlex.join(words)} ...")
