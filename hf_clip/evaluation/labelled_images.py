"""Data sets of images with labels: what a user names becomes rows of an image and the places of its classes.

A data set is one of these:

- a folder with a folder of images for each class, or such folders below its splits `train/`, `val/`, `test/`;
- a data set in the layout of `clip-benchmark/wds_*`, see `hf_clip.data.benchmark_shards`;
- whatever the trainer opens: a repository on the Hub, a folder, CSV, JSON, parquet, webdataset tars;
- from Python, a `datasets.Dataset` or `IterableDataset`.

Everything but a folder that `datasets` has written is read as a stream, so nothing is stored twice. Images stay
undecoded until they are encoded.

Dimensions: I images, K classes.
"""

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..data.benchmark_shards import BenchmarkShards, find_benchmark_shards, image_of
from ..data.columns import column_of, describe_feature, find_image_column
from ..data.images import NOWHERE, ImagePlaces, find_image_places
from ..data.sources import (
    BUILDERS,
    EVALUATION_SPLITS,
    choose_split,
    folder_of,
    open_splits,
    split_names,
)
from ..zero_shot.prompts import LabelError
from .class_names import label_reader, read_class_names, resolve_names
from .fingerprint import fingerprint_of, fingerprint_of_files
from .numbered_row import describe_table, numbered_rows

PREFERRED = EVALUATION_SPLITS[::-1]
"""Splits to measure on where none is named, the best first: figures of papers are of `test`."""

SPLIT_FOLDERS = {"train": "train", "training": "train", "val": "validation", "valid": "validation"} | {
    "dev": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
"""Folders that are splits, and the split's name."""

LABEL_NAMES = ("label", "labels", "class", "classes", "target", "cls", "fine_label", "category", "categories")
"""Names under which a column of numbers or texts is taken for labels."""

WRITTEN_BY_DATASETS = ("dataset_dict.json", "state.json")


class LabelledRow(NamedTuple):
    """A row.   name: for messages   image: undecoded   labels: places of its classes, one or several"""

    name: str
    image: Any
    labels: tuple[int, ...]


@dataclass(frozen=True)
class LabelledImages:
    """A data set of images with labels.

    Attributes:
        name: As the user named it.
        split: The split's name.
        class_names: The K classes. Each is a list of names, whose first is the class's own.
        rows: A function that reads the rows from the first on.
        count: Number of rows. None if it isn't known.
        is_multi_label: Whether an image may have several classes, or none.
        places: Where paths in the rows may lead.
        templates: Templates that came with the data. None if none came.
        fingerprint: A text that changes with the data. None if it isn't known.
    """

    name: str
    split: str
    class_names: list[list[str]]
    rows: Callable[[], Iterator[LabelledRow]]
    count: int | None = None
    is_multi_label: bool = False
    places: ImagePlaces = NOWHERE
    templates: list[str] | None = None
    fingerprint: str | None = None

    @property
    def labels(self) -> list[str]:
        """The first name of each class."""
        return [names[0] for names in self.class_names]


def _image_endings() -> set[str]:
    Image.init()
    return set(Image.EXTENSION)


def _folders(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))


def _find_class_folders(place: Path) -> dict[str, Path] | None:
    """Return the splits of a folder of class folders. None for a folder of another kind."""
    if not place.is_dir() or any((place / name).is_file() for name in WRITTEN_BY_DATASETS):
        return None
    endings, folders = _image_endings(), _folders(place)
    # A table beside the folders says more of the images than the folders do.
    if not folders or any(path.suffix.lower() in {*BUILDERS} for path in place.iterdir() if path.is_file()):
        return None
    splits = {}
    for folder in folders:
        if (split := SPLIT_FOLDERS.get(folder.name.lower())) is not None and _folders(folder):
            splits[split] = folder
    if len(splits) == len(folders):
        return splits
    has_images = any(path.suffix.lower() in endings for folder in folders for path in folder.iterdir())
    return {"train": place} if has_images else None


def _open_class_folders(source: str, splits: dict[str, Path], split: str | None, names: Any) -> LabelledImages:
    wanted = None if split is None else SPLIT_FOLDERS.get(split.lower(), split)
    chosen = choose_split(source, list(splits), wanted, PREFERRED)
    folder, endings = splits[chosen], _image_endings()
    classes = _folders(folder)
    own = [path.name for path in classes]
    files = [
        (path, place)
        for place, name in enumerate(classes)
        for path in sorted(name.rglob("*"))
        if path.suffix.lower() in endings and path.is_file()
    ]
    if not files:
        raise ValueError(f"{source} has no images in its split {chosen!r}.")

    def rows() -> Iterator[LabelledRow]:
        for path, place in files:
            yield LabelledRow(str(path.relative_to(folder)), str(path), (place,))

    return LabelledImages(
        name=source,
        split=chosen,
        class_names=resolve_names(source, own, names),
        rows=rows,
        count=len(files),
        places=ImagePlaces(folder, (folder.resolve(),)),
        fingerprint=fingerprint_of_files(folder, chosen),
    )


def _open_shards(source: str, shards: BenchmarkShards, split: str | None, names: Any) -> LabelledImages:
    if shards.kind == "retrieval":
        raise ValueError(
            f"{source} has captions and no labels (dataset_type.txt: retrieval); evaluate retrieval on it."
        )
    chosen = shards.find_split(split)
    class_names = resolve_names(source, shards.class_names, names)
    is_multi_label = shards.kind == "multilabel"
    ending = "npy" if is_multi_label else "cls"
    read_label = label_reader(class_names, is_multi_label)

    def rows() -> Iterator[LabelledRow]:
        for place, (name, entries) in enumerate(shards.rows(chosen)):
            if ending not in entries:
                raise ValueError(f"{name} has no label: its entries end in {', '.join(entries)}, and none in {ending}.")
            label: Any
            if is_multi_label:
                given = np.load(io.BytesIO(entries[ending]), allow_pickle=False)
                if given.shape != (len(class_names),):
                    raise LabelError(
                        f"{name} has labels of shape {given.shape}, but there are {len(class_names)} classes: a one or "
                        f"a zero for each is needed.",
                        place,
                    )
                label = given.nonzero()[0].tolist()
            else:
                text = entries[ending].decode("utf-8", errors="replace").strip()
                label = int(text) if text.lstrip("-").isdigit() else text
            yield LabelledRow(name, image_of(name, entries), read_label(name, label, place))

    return LabelledImages(
        name=source,
        split=chosen,
        class_names=class_names,
        rows=rows,
        is_multi_label=is_multi_label,
        templates=shards.templates,
        fingerprint=fingerprint_of(source, chosen),
    )


def find_label_column(source: str, features: Mapping[str, Any], named: str | None, image_column: str) -> str:
    """Find the column of labels: the one that is named, the only column of classes, or the only one with a usual name.

    Raises:
        ValueError: There is none, or there are several.
    """
    columns = ", ".join(features)
    if named is not None:
        if named not in features:
            raise ValueError(
                f"{source} has no column {named!r}; its columns are {columns}. Name the right one with --label-column."
            )
        return named
    others = {name: feature for name, feature in features.items() if name != image_column}
    found = [name for name, feature in others.items() if describe_feature(_inner(feature)) == "label"]
    found = found or [name for name in others if name.lower() in LABEL_NAMES]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{source}: {' and '.join(found)} could all be the labels; name one with --label-column.")
    raise ValueError(
        f"{source}: no column looks like the labels; its columns are {columns}. Name one with --label-column."
    )


def _distinct_texts(source: str, table: Any, column: str) -> list[str] | None:
    """Return the texts of a column in alphabetical order. None if there are none."""
    rows = table.select_columns([column])
    is_table = hasattr(rows, "__len__")
    values = rows.with_format(None)[column] if is_table else (row.values[column] for row in numbered_rows(source, rows))
    return sorted({value for value in values if isinstance(value, str) and value.strip()}) or None


def _inner(feature: Any) -> Any:
    """Return the feature of a list's items. Any other feature is returned as it is."""
    if isinstance(feature, list) and len(feature) == 1:
        return feature[0]
    return getattr(feature, "feature", feature)


def labelled_table(
    table: Any,
    *,
    name: str = "the data set",
    split: str = "",
    class_names: Any = None,
    image_column: str | None = None,
    label_column: str | None = None,
    places: ImagePlaces = NOWHERE,
    reads_labels: bool = False,
) -> LabelledImages:
    """Find images, labels and class names in a table or stream of `datasets`.

    Args:
        table: A `datasets.Dataset` or `IterableDataset`.
        name: Its name, for messages and results.
        split: Name of its split, for results.
        class_names: See `read_class_names`. None: those of its `ClassLabel`, or the distinct texts of its labels in
            alphabetical order.
        image_column: The column of images. None: the only one that can be it.
        label_column: The column of labels. None: the only one that can be it.
        places: Where paths in the rows may lead.
        reads_labels: Whether a stream may be read for the texts of its labels. A table always is.

    Returns:
        The data set.

    Raises:
        ValueError: It has no rows; a column is missing or ambiguous; or its classes have no names.
    """
    table, features, count = describe_table(name, split, table)
    images = find_image_column(name, features, image_column)
    labels = find_label_column(name, features, label_column, images)
    feature = features[labels]
    inner = _inner(feature)
    own = list(inner.names) if describe_feature(inner) == "label" else None
    is_multi_label = inner is not feature
    if class_names is None and describe_feature(feature) == "text" and (count is not None or reads_labels):
        own = _distinct_texts(name, table, labels)
    names = resolve_names(name, own, class_names)
    read_label = label_reader(names, is_multi_label)
    chosen = table.select_columns([column_of(images, features), labels])

    def rows() -> Iterator[LabelledRow]:
        for row in numbered_rows(name, chosen):
            yield LabelledRow(row.title, row.field(images), read_label(row.title, row.values[labels], row.place))

    return LabelledImages(
        name=name, split=split, class_names=names, rows=rows, count=count, is_multi_label=is_multi_label, places=places
    )


def open_labelled(
    source: Any,
    split: str | None = None,
    *,
    class_names: Any = None,
    image_column: str | None = None,
    label_column: str | None = None,
    image_folders: Sequence[str] = (),
) -> LabelledImages:
    """Open a data set of images with labels.

    Args:
        source: See the module. A `LabelledImages` is returned as it is.
        split: Name of the split. None: the only one, or `test`, or `validation`.
        class_names: Names of the classes, see `read_class_names`. None: those that come with the data.
        image_column: The column of images. None: the only one that can be it.
        label_column: The column of labels. None: the only one that can be it.
        image_folders: Folders besides the source's own that paths in its rows may lead to.

    Returns:
        The data set.

    Raises:
        FileNotFoundError: There is nothing of that name.
        ValueError: A split, a column or the class names are missing; or the split is empty.
    """
    if isinstance(source, LabelledImages):
        return source if class_names is None else replace(source, class_names=read_class_names(class_names))
    columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
    if hasattr(source, "features") and hasattr(source, "select_columns"):
        return labelled_table(source, split=split or "", class_names=class_names, **columns)
    source = str(source)
    if (splits := _find_class_folders(Path(os.path.expanduser(source)))) is not None:
        refuse_columns(source, columns)
        return _open_class_folders(source, splits, split, class_names)
    if (shards := find_benchmark_shards(source)) is not None:
        refuse_columns(source, columns)
        return _open_shards(source, shards, split, class_names)
    chosen, table = open_source_of(source, split)
    places = find_image_places(source, folder_of(source), image_folders)
    is_here = folder_of(source) is not None  # a second reading of an address would be a second download
    found = labelled_table(
        table,
        name=source,
        split=chosen,
        class_names=class_names,
        places=places,
        reads_labels=is_here,
        **columns,
    )
    return replace(found, fingerprint=fingerprint_of(source, chosen))


def refuse_columns(source: str, columns: Mapping[str, str | None]) -> None:
    """Raise ValueError for a column that is named of a data set which has none.   columns: option → what is given"""
    for name, given in columns.items():
        if given is not None:
            raise ValueError(
                f"{source} has no columns, but a file for each image: leave --{name.replace('_', '-')} out."
            )


def splits_of(source: Any) -> list[str]:
    """Return the names of the splits that a data set has.

    Args:
        source: What `open_labelled` takes.

    Raises:
        FileNotFoundError: There is nothing of that name.
        ValueError: It cannot be read.
    """
    source = str(source)
    if (splits := _find_class_folders(Path(os.path.expanduser(source)))) is not None:
        return list(splits)
    if (shards := find_benchmark_shards(source)) is not None:
        return shards.splits
    return split_names(source)


def open_source_of(source: str, split: str | None) -> tuple[str, Any]:
    """Open what `datasets` opens: as a table if that was written by `datasets`, else as a stream."""
    place = Path(os.path.expanduser(source))
    is_stored = any((place / name).is_file() for name in WRITTEN_BY_DATASETS)
    return open_splits(source, split, streaming=not is_stored, preferred=PREFERRED)
