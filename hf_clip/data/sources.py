"""One source of pairs: what a user names → a table or stream of `datasets` with images left undecoded.

A source is a repository on the Hub, a folder, or files: CSV, JSON, parquet, arrow, webdataset tars. Everything is
opened by `datasets`, which is imported when it is first needed.
"""

import glob
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from ..extras import require
from .columns import describe_feature

BUILDERS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
}
PACKED = (".gz", ".zst", ".xz", ".bz2")

SEPARATORS = (";", "\t", "|")
"""What stands in place of commas in a CSV file whose first line has none."""

LONGEST_HEAD = 1 << 20

FIRST_ROWS = 16
"""Rows of a stream that are looked at where its columns' types aren't declared."""


def import_datasets() -> Any:
    """The package `datasets`, for training and evaluation. Raises ImportError with the way to install it."""
    require("Reading data", "train", ["datasets"])
    import datasets

    return datasets


ONLY_SPLIT = "train"


@dataclass(frozen=True)
class Source:
    """Where pairs come from.

    Attributes:
        path: A repository (`name`, or `name:configuration`), a folder, a file, or a pattern of files.
        weight: Its share of the pairs in proportion to the other sources' weights, or None.
    """

    path: str
    weight: float | None = None

    @classmethod
    def parse(cls, text: str) -> "Source":
        """`path` or `path=weight`. What exists under its whole name, like `data/year=2020`, is a path."""
        path, equals, number = text.rpartition("=")
        if not equals or not path or os.path.exists(text):
            return cls(text)
        try:
            weight = float(number)
        except ValueError:
            if re.fullmatch(r"[\w.,+-]*", number):
                raise ValueError(
                    f"{text}: there is no such file, and {number!r} is no weight: write path=weight with a number."
                ) from None
            return cls(text)
        if not 0 < weight < float("inf"):
            raise ValueError(f"{text}: the weight of a source must be above 0; leave the source out, or its weight.")
        return cls(path, weight)


AnySource = str | os.PathLike | Source


def parse_sources(sources: AnySource | Iterable[AnySource]) -> list[Source]:
    """One or several sources, of which all have weights or none has."""
    given = [sources] if isinstance(sources, (str, os.PathLike, Source)) else list(sources)
    parsed = [source if isinstance(source, Source) else Source.parse(os.fspath(source)) for source in given]
    if not parsed:
        raise ValueError("There is no data set to read; name at least one.")
    without = [source.path for source in parsed if source.weight is None]
    if without and len(without) < len(parsed):
        raise ValueError(
            f"{', '.join(without)} has no weight, but others have; write path=weight for all, or for none."
        )
    return parsed


def _builder_of(path: str) -> str | None:
    """The builder for a file's or a pattern's name, or None where that isn't a data file's."""
    name = path.lower()
    for ending in PACKED:
        name = name.removesuffix(ending)
    return BUILDERS.get(os.path.splitext(name)[1])


_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_braces(path: str) -> list[str]:
    """The names that a shell makes of `shards/{000..012}.tar` or `{train,extra}-{0..3}.tar`, nested ones too.

    Numbers are filled up with zeros to the length of the longer one where either begins with a zero, as in a shell.
    A name without braces stays as it is, and so does what exists under its whole name.
    """
    return [path] if os.path.exists(path) else _expand(path)


def _expand(text: str) -> list[str]:
    start = text.find("{")
    if start < 0:
        return [text]
    depth, pieces, begin = 0, [], start + 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0 or (depth == 1 and text[place] == ","):
            pieces.append(text[begin:place])
            begin = place + 1
        if depth == 0:
            break
    else:
        return [text]
    parts = _numbers(pieces[0], text) if len(pieces) == 1 else [part for piece in pieces for part in _expand(piece)]
    tails = _expand(text[begin:])
    return [text[:start] + part + tail for part in parts for tail in tails]


def _numbers(inner: str, text: str) -> list[str]:
    found = _RANGE.fullmatch(inner)
    if found is None:
        raise ValueError(f"{text}: {{{inner}}} is no range {{000..012}} and no list {{a,b}}; write one, or no braces.")
    first, last = int(found[1]), int(found[2])
    is_filled = any(len(number) > 1 and number[0] == "0" for number in found.groups())
    width = max(map(len, found.groups())) if is_filled else 0
    step = 1 if first <= last else -1
    return [str(number).zfill(width) for number in range(first, last + step, step)]


def names_a_source(text: str) -> bool:
    """Whether a text names a repository, a folder or files, and not a split: it has a slash or a data file's ending."""
    return "/" in text or os.sep in text or is_pattern(text) or _builder_of(text) is not None


def is_pattern(path: str) -> bool:
    """Whether a name stands for several."""
    return glob.has_magic(path) or "{" in path


def folder_of(path: str) -> Path | None:
    """Where relative paths of images begin: the folder itself, that of a data file, or what a pattern's files share."""
    if "://" in path:
        return None
    place = Path(os.path.expanduser(path))
    if place.is_dir():
        return place
    if _builder_of(expand_braces(path)[0]) is None:
        return None
    for parent in place.parents:
        if parent.is_dir() or not is_pattern(str(parent)):
            return parent
    return None


def _check_files(names: list[str], builder: str) -> None:
    """Refuse a list of files of which one is missing: of a range, nobody would miss it."""
    for name in names:
        if _builder_of(name) != builder:
            raise ValueError(f"{name} and {names[0]} are files of different kinds; name them apart")
        if "://" in name:
            continue
        files = glob.glob(name, recursive=True)
        if not files:
            raise FileNotFoundError(f"no file has this name: {name}")
        if empty := [file for file in files if os.path.isfile(file) and not os.path.getsize(file)]:
            raise ValueError(f"{empty[0]} is empty")


def _separator_of(name: str) -> str | None:
    """What stands between the columns of a CSV file where that is no comma; None where it is, or isn't known."""
    if ".tsv" in name.lower():
        return "\t"
    import fsspec  # type: ignore[import-untyped]

    try:
        path = name if "://" in name else sorted(glob.glob(name, recursive=True))[0]
        with fsspec.open(path, "rb", compression="infer") as file:
            head = file.readline(LONGEST_HEAD).decode("utf-8", errors="replace")
    except Exception:  # `datasets` will say what is wrong with it
        return None
    return None if "," in head else max((mark for mark in SEPARATORS if mark in head), key=head.count, default=None)


def _refuse_empty(folder: Path) -> None:
    """Raise ValueError for a saved data set without rows, of which `datasets` says "list index out of range"."""
    has_splits = (folder / "dataset_dict.json").is_file()
    for file in sorted(folder.glob("*/state.json")) if has_splits else [folder / "state.json"]:
        if json.loads(file.read_text(encoding="utf-8")).get("_data_files") == []:
            raise ValueError(f"its split {file.parent.name!r} has no rows" if has_splits else "it has no rows")


def _load(path: str, names: list[str], streaming: bool) -> Any:
    """Whatever `datasets` makes of it: a table or stream, or a mapping of splits to them."""
    datasets = import_datasets()
    place = Path(os.path.expanduser(path))
    if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
        _refuse_empty(place)
        saved = datasets.load_from_disk(str(place))
        if not streaming:
            return saved
        if isinstance(saved, dict):
            return {split: table.to_iterable_dataset() for split, table in saved.items()}
        return saved.to_iterable_dataset()
    if place.is_dir():
        return datasets.load_dataset(str(place), streaming=streaming)
    if builder := _builder_of(names[0]):
        _check_files(names, builder)
        separator = _separator_of(names[0]) if builder == "csv" else None
        more = {} if separator is None else {"sep": separator}
        return datasets.load_dataset(builder, data_files=names, streaming=streaming, **more)
    name, _, configuration = path.partition(":") if "://" not in path else (path, "", "")
    return datasets.load_dataset(name, configuration or None, streaming=streaming)


EVALUATION_SPLITS = ("validation", "test")


def _find_evaluation_split(path: str, splits: list[str], preferred: Sequence[str] = EVALUATION_SPLITS) -> str:
    """The split that a source is evaluated on where none is named: its only one, or the one that is for this."""
    found = splits if len(splits) == 1 else [name for name in preferred if name in splits]
    if not found:
        raise ValueError(
            f"{path} has the splits {', '.join(splits)}, of which none is called {' or '.join(preferred)}: "
            f"name the files to evaluate on."
        )
    return found[0]


def choose_split(
    path: str, splits: Sequence[str], split: str | None, preferred: Sequence[str] = EVALUATION_SPLITS, advice: str = ""
) -> str:
    """Find a split among those that a source has.

    Args:
        path: Name of the source, for an error.
        splits: Names of its splits.
        split: The one that is wanted; None takes the one to evaluate on.
        preferred: Names of the splits to evaluate on, the best first.
        advice: What an error adds.

    Raises:
        ValueError: There is no such split, or none to evaluate on.
    """
    names = list(map(str, splits))
    if split is None:
        return _find_evaluation_split(path, names, preferred)
    if split not in names:
        near = get_close_matches(split, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{path} has no split {split!r}; its splits are {', '.join(names)}.{hint}{advice}")
    return split


def open_source(path: str, split: str | None = "train", streaming: bool = False) -> Any:
    """Open a split of a source.

    Args:
        path: see `Source`.
        split: the split's name; None takes the one to evaluate on: the only one, or `validation`, or `test`.
        streaming: read the source as it comes, instead of preparing tables on disk first.

    Returns:
        A `datasets.Dataset`, or a `datasets.IterableDataset` when streaming.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: it cannot be read, or has no such split.
    """
    return open_splits(path, split, streaming)[1]


def open_splits(
    path: str, split: str | None = "train", streaming: bool = False, preferred: Sequence[str] = EVALUATION_SPLITS
) -> tuple[str, Any]:
    """Open a split of a source, as `open_source` does, and return the split's name with it.

    `preferred` holds the names of the splits to evaluate on, the best first.
    """
    names = [os.path.expanduser(name) for name in expand_braces(path)]
    with readable(path):
        loaded = _load(path, names, streaming)
    # What has no splits is named as `datasets` names the only split of a file.
    splits = loaded if isinstance(loaded, dict) else {ONLY_SPLIT: loaded}
    advice = ""
    if preferred == EVALUATION_SPLITS:  # the trainer's, which can do without
        if len(splits) == 1:
            advice += " To evaluate on rows of it, hold out a number (--validation 500) or a part (--validation 0.05)."
        if split is not None and os.path.exists(split):
            advice += f" To evaluate on the file or folder of that name, write ./{split}."
    chosen = choose_split(path, list(map(str, splits)), split, preferred, advice)
    return chosen, splits[chosen]


def split_names(path: str) -> list[str]:
    """Return the names of a source's splits. What has none is called `train`, as `datasets` calls a file's only split.

    Raises:
        FileNotFoundError: There is nothing of that name.
        ValueError: It cannot be read.
    """
    names = [os.path.expanduser(name) for name in expand_braces(path)]
    with readable(path):
        loaded = _load(path, names, streaming=True)
    return list(map(str, loaded)) if isinstance(loaded, dict) else [ONLY_SPLIT]


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Whatever goes wrong within, in `datasets` or below it, as one line that names the data set."""
    logger = logging.getLogger("datasets.packaged_modules")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it would say the same twice
    try:
        yield
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"There is no data set {path!r}{_near_file(path)}: name a repository on the Hub, a folder of images with "
            f"metadata.csv, .jsonl or .parquet, a CSV, JSON, parquet or webdataset (.tar) file, or a folder written by "
            f"Dataset.save_to_disk ({_first_line(error)})."
        ) from error
    except ImportError as error:
        if "pip install" in str(error):  # our own line
            raise
        cause = _first_line(error).rstrip(".")
        if "aiohttp" in cause:  # fsspec's, which `datasets` does not bring any more
            cause = (
                "an address needs aiohttp, which this Python does not have: pip install aiohttp, or download the data "
                "and name the file"
            )
        raise ImportError(f"The data set {path!r} cannot be read: {cause}.") from error
    except Exception as error:  # its builders raise what the libraries below them do
        cause = _first_line(error.__cause__ or error)
        if "corresponds to no data" in cause or "BatchSize must be greater than 0" in cause:  # parquet without a row
            cause = "it has no rows"
        if missing := re.match(r"BuilderConfig '(.*)' not found\. Available: \[(.*)\]", cause):
            names = missing[2].replace("'", "")
            raise ValueError(f"{path} has no configuration {missing[1]!r}; its configurations are {names}.") from error
        raise ValueError(
            f"The data set {path!r} cannot be read: {cause.rstrip('.')}. Check the file, or write it again."
        ) from error
    finally:
        logger.setLevel(level)


def _near_file(path: str) -> str:
    """A question that names the file or folder whose name is nearest, or an empty text."""
    folder, name = os.path.split(path.rstrip(os.sep))
    if is_pattern(path) or "://" in path or os.path.exists(path):
        return ""
    try:
        near = get_close_matches(name, os.listdir(os.path.expanduser(folder) or "."), n=1, cutoff=0.7)
    except OSError:
        return ""
    return f" (did you mean {os.path.join(folder, near[0])}?)" if near else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def describe_columns(table: Any) -> dict[str, Any]:
    """What each column holds, as a feature of `datasets`. If a stream declares none, its first rows tell.

    Without any row nothing is known, and the result is empty.
    """
    datasets = import_datasets()
    features = table.features
    is_known = features is not None and not all(getattr(kind, "dtype", "") == "null" for kind in features.values())
    if is_known:  # of a file without rows only the columns' names are
        return dict(features)
    rows = list(islice(iter(table), FIRST_ROWS))
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if row.get(name) is not None]
        found[name] = datasets.Dataset.from_dict({name: values}).features[name] if values else None
    return found


def leave_undecoded(table: Any, columns: Iterable[str]) -> Any:
    """The same table with images as bytes or a path.

    A stream that decodes by itself would end at its first broken image.
    """
    datasets = import_datasets()
    for column in columns:
        if describe_feature((table.features or {}).get(column)) == "image":
            table = table.cast_column(column, datasets.Image(decode=False))
    return table
