"""Data sets in the layout of `clip-benchmark/wds_*` on the Hub: a folder of tars for each split, beside text files.

    classnames.txt                          a class a line, in the order of the labels
    zeroshot_classification_templates.txt   a template a line, with {c} where the class belongs
    dataset_type.txt                        classification, multilabel or retrieval; without it, classification
    test/nshards.txt                        the number of tars
    test/0.tar, 1.tar, ...                  s0.jpg with s0.cls (a number), s0.npy (zeros and ones) or s0.txt (captions)

The tars are read as streams, from a folder or from the Hub, and nothing of them is stored.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .sources import EVALUATION_SPLITS, choose_split

COUNT_FILE = "nshards.txt"
KINDS = ("classification", "multilabel", "retrieval")
IMAGE_ENDINGS = ("webp", "png", "jpg", "jpeg")


@dataclass(frozen=True)
class BenchmarkShards:
    """A data set in this layout.

    Attributes:
        source: As the user named it.
        place: A folder, or the address of a repository.
        kind: One of `KINDS`.
        class_names: The lines of classnames.txt. None if there is no such file.
        templates: The lines of the templates' file, with `{}` for the class. None if there is no such file.
        splits: The splits that are there.
    """

    source: str
    place: str
    kind: str
    class_names: list[str] | None
    templates: list[str] | None
    splits: list[str]

    def find_split(self, split: str | None) -> str:
        """Return the split's name; for None the one to evaluate on. Raises ValueError for one that is missing."""
        return choose_split(self.source, self.splits, split, EVALUATION_SPLITS[::-1])

    def shards(self, split: str) -> list[str]:
        """Return the addresses of a split's tars, in order."""
        text = _read_text(self.place, f"{split}/{COUNT_FILE}") or ""
        if not text.strip().isdigit() or int(text) == 0:
            raise ValueError(
                f"{self.source}: {split}/{COUNT_FILE} says {text.strip()[:40]!r}, but the number of tars is needed, at "
                f"least 1."
            )
        return [f"{self.place}/{split}/{number}.tar" for number in range(int(text))]

    def rows(self, split: str) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Read the rows of a split, one after the other.

        Yields:
            The row's name, and its entries by their endings: `{"jpg": b"...", "cls": b"3"}`.

        Raises:
            FileNotFoundError: A tar is missing.
            ValueError: A tar is damaged.
        """
        for shard in self.shards(split):
            yield from _rows_of(shard)


def image_of(name: str, entries: dict[str, bytes]) -> bytes:
    """Return the image of a row. Raises ValueError if it has none."""
    for ending in IMAGE_ENDINGS:
        if ending in entries:
            return entries[ending]
    raise ValueError(
        f"{name} has no image: its entries end in {', '.join(entries)}, but one of "
        f"{', '.join(IMAGE_ENDINGS)} is needed."
    )


def _open(address: str) -> Any:
    import fsspec  # type: ignore[import-untyped]

    return fsspec.open(address, "rb")


def _read_text(place: str, name: str) -> str | None:
    """Return the content of a text file below a place. None if it is missing."""
    try:
        with _open(f"{place}/{name}") as file:
            return file.read().decode("utf-8")
    except FileNotFoundError:
        return None


def _lines(text: str | None) -> list[str] | None:
    return None if text is None else [line.strip() for line in text.splitlines() if line.strip()]


def _rows_of(shard: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Group a tar's files by their names up to the first dot, as webdataset does."""
    current, entries = "", dict[str, bytes]()
    try:
        with _open(shard) as file, tarfile.open(fileobj=file, mode="r|") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                name = f"{folder}/{stem}" if folder else stem
                if name != current and entries:
                    yield f"{current} of {shard}", entries
                    entries = {}
                content = tar.extractfile(member)
                assert content is not None  # of a file there is one
                current, entries[ending.lower()] = name, content.read()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"There is no {shard}, though {COUNT_FILE} counts it; download the data set again."
        ) from None
    except tarfile.TarError as error:
        raise ValueError(f"{shard} cannot be read to its end ({error}); download it again.") from error
    if entries:
        yield f"{current} of {shard}", entries


def _splits_of(place: str) -> list[str]:
    """Return the folders below a place that have a number of tars."""
    import fsspec

    system, path = fsspec.core.url_to_fs(place)
    found = [item["name"].rstrip("/") for item in system.ls(path, detail=True) if item["type"] == "directory"]
    return sorted(name.rpartition("/")[2] for name in found if system.exists(f"{name}/{COUNT_FILE}"))


def find_benchmark_shards(source: str) -> BenchmarkShards | None:
    """Find a data set in this layout.

    Args:
        source: A folder, or the name of a repository on the Hub. A repository's name begins with `wds_`.

    Returns:
        The data set. None if the source has another layout.

    Raises:
        ValueError: dataset_type.txt says something that is no kind.
        FileNotFoundError: The repository cannot be reached, or is not there.
    """
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        place = str(folder)
        splits = _splits_of(place) if next(folder.glob(f"*/{COUNT_FILE}"), None) else []
    elif source.count("/") == 1 and source.partition("/")[2].startswith("wds_") and not folder.exists():
        place = f"hf://datasets/{source}"
        try:
            splits = _splits_of(place)
        except Exception as error:  # whatever the Hub's client raises: no network, no such repository, no access
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise FileNotFoundError(
                f"The data set {source!r} cannot be read from the Hub ({reason[:200]}). Check the name and the "
                f"connection, or download it and name its folder."
            ) from error
    else:
        return None
    if not splits:
        return None
    kind = (_read_text(place, "dataset_type.txt") or KINDS[0]).strip().lower()
    if kind not in KINDS:
        raise ValueError(f"{source}: dataset_type.txt says {kind[:40]!r}, but must be one of {', '.join(KINDS)}.")
    templates = _lines(_read_text(place, "zeroshot_classification_templates.txt"))
    return BenchmarkShards(
        source=source,
        place=place,
        kind=kind,
        class_names=_lines(_read_text(place, "classnames.txt")),
        templates=None if templates is None else [template.replace("{c}", "{}") for template in templates],
        splits=splits,
    )
