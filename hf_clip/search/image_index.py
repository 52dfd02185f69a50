"""An index of images from Python: open it, add folders, search, and find near duplicates.

Example::

    from hf_clip.search.image_index import ImageIndex

    index = ImageIndex.open("photos-index", model="clip-vit-b32")  # made if there is none
    index.add("~/Pictures")
    for result in index.search("a dog on a beach"):
        print(result.score, result.path)

Dimensions: I images, D embedding.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..evaluation.feature_cache import processor_settings, weights_hash
from ..zero_shot.features import progress_bar
from .data_set_rows import update_data_set
from .exact_scan import EmbeddingMatrix, sample_places
from .folder_scan import scan_folder
from .index_table import IndexDescription, IndexTables, SearchIndexError, default_index, is_address, only_writer
from .index_update import IndexChanges, apply_recognised, encode_planned, forget_missing, plan_update
from .near_duplicates import LEAST_SIMILARITY, MOST_BITS, fold, group_duplicates
from .query import QueryPart, combine_parts, encode_parts, parse_query

SAMPLE = 4096
"""Images of the index by which the spread of similarities is measured."""

SHOWN_COLUMNS = ("id", "path", "path_bytes", "width", "height", "caption", "metadata", "thumbnail", "perceptual_hash")

MODEL_FILES = "model files"
"""The note by which a model is known without a hash of its weights."""

EXTRA_RESULTS = 4
"""How many times as many images are looked at as are shown, for near duplicates that take no place of their own."""


@dataclass(frozen=True)
class SearchResult:
    """An image that was found.

    Attributes:
        id: Its number in the index.
        path: Its file, or row of a data set.
        score: Cosine similarity with the query.
        width: In pixels.
        height: In pixels.
        caption: Of the data set, or None.
        metadata: Other columns of the data set, as JSON, or None.
        thumbnail: A small JPEG.
        duplicates: Paths of its near duplicates among the results, which are not shown by themselves.
    """

    id: int
    path: str
    score: float
    width: int
    height: int
    caption: str | None = None
    metadata: str | None = None
    thumbnail: bytes = field(default=b"", repr=False)
    duplicates: list[str] = field(default_factory=list)


class ImageIndex:
    """An index of images.

    Args:
        tables: Its tables.
        model: HfClipModel. None: loaded when it is first needed.
        processor: Its processor.
        name: Where the model is. None: where the index was made of it.
    """

    def __init__(self, tables: IndexTables, model: Any = None, processor: Any = None, name: str | None = None):
        self.tables = tables
        self._model, self._processor = model, processor
        self._model_place = name or tables.description.model
        self._matrix: EmbeddingMatrix | None = None

    @classmethod
    def open(
        cls, place: str | Path | None = None, *, model: Any = None, processor: Any = None, make: bool = True
    ) -> "ImageIndex":
        """Open an index, or make one.

        Args:
            place: Its folder, or an address on object storage. None: the user's own, see `default_index`.
            model: HfClipModel, or where one is: a folder, a repository on the Hub, a checkpoint file. None: the one of
                which the index was made.
            processor: HfClipProcessor, if `model` is a model.
            make: Whether to make an index if there is none.

        Raises:
            SearchIndexError: There is no index and no model to make one of; or it is of another model or version.
            ImportError: LanceDB is not installed.
        """
        place = default_index() if place is None else os.path.expanduser(place)
        name = str(model) if isinstance(model, (str, os.PathLike)) else getattr(model, "name_or_path", "") or ""
        is_named = isinstance(model, (str, os.PathLike))
        if model is not None and not is_named and processor is None:
            raise ValueError("A model was given without its processor: pass processor=, or where the model is.")
        try:
            tables = IndexTables.open(str(place))
        except SearchIndexError:
            if not make or model is None or _holds_an_index(str(place)):
                raise
            model, processor = _load(name) if is_named else (model, processor)
            tables = IndexTables.create(str(place), _describe(model, processor, name))
            tables.note(MODEL_FILES, model_files(name))
            return cls(tables, model, processor)
        if not is_named:
            if model is not None:
                _check_model(tables, _describe(model, processor, name))
            return cls(tables, model, processor)
        found = cls(tables, name=name)
        if not _is_same_model(tables, name):
            found.load_model()
        return found

    def __len__(self) -> int:
        return int(self.tables.images.count_rows())

    @property
    def model(self) -> Any:
        """The model, loaded when it is first needed."""
        self.load_model()
        return self._model

    @property
    def processor(self) -> Any:
        """The model's processor."""
        self.load_model()
        return self._processor

    def load_model(self) -> None:
        """Load the model if it is not in memory.

        Raises:
            SearchIndexError: It is another model than that of the index, or nobody knows where it is.
        """
        if self._model is not None:
            return
        name = self._model_place
        if not name:
            raise SearchIndexError(
                f"The index {self.tables.place} was made of a model in memory, and does not know where that is: pass "
                f"model=.",
                self.tables.place,
            )
        model, processor = _load(name)
        if not _is_same_model(self.tables, name):
            _check_model(self.tables, _describe(model, processor, name))
            self.tables.note(MODEL_FILES, model_files(name))
        self._model, self._processor = model, processor

    def add(
        self,
        folder: str | Path,
        *,
        batch_size: int = 16,
        exact: bool = False,
        keep_missing: bool = False,
        threads: int | None = None,
        progress: bool | None = False,
    ) -> IndexChanges:
        """Bring the index up to date with a folder and its folders.

        Args:
            folder: The folder.
            batch_size: Images encoded at once.
            exact: Whether to decode large JPEGs in full. By default they are decoded at a half, a quarter or an eighth
                of their size, but at twice the model's at least, which is several times as fast.
            keep_missing: Whether images whose files are gone stay in the index.
            threads: How many open images. None: one for each core, at most 8.
            progress: Whether to show progress bars. None: if standard error is a terminal.

        Returns:
            What changed.

        Raises:
            SearchIndexError: Another process writes to the index.
            OSError: The folder is missing or cannot be read.
        """
        progress = sys.stderr.isatty() if progress is None else progress
        scan = scan_folder(folder)
        with only_writer(self.tables.place):
            self.tables.refresh()
            with progress_bar("Comparing files", "file", len(scan.files), progress) as advance:
                plan = plan_update(self.tables, scan, advance)
            _refuse_to_empty(scan.folder, len(scan.files), len(plan.missing), keep_missing)
            moved = apply_recognised(self.tables, plan)
            changes = IndexChanges()
            if plan.to_encode:
                with progress_bar("Indexing images", "image", len(plan.to_encode), progress) as advance:
                    changes = encode_planned(
                        self.tables,
                        plan,
                        self.model,
                        self.processor,
                        batch_size=batch_size,
                        exact=exact,
                        threads=threads,
                        advance=advance,
                    )
            changes.removed = forget_missing(self.tables, plan, keep_missing, changes.problems)
            changes.kept = len(plan.missing) if keep_missing else 0
            changes.unchanged, changes.moved = plan.unchanged, moved
            changes.problems = {**plan.problems, **scan.unread, **changes.problems}
            folders = self.tables.noted("folders", [])
            if scan.folder not in folders:
                self.tables.note("folders", sorted([*folders, scan.folder]))
            if self.tables.commits:
                self.tables.tidy()
        return changes

    def add_data_set(
        self,
        source: str,
        *,
        split: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
        image_folders: Sequence[str] = (),
        batch_size: int = 16,
        exact: bool = False,
        keep_missing: bool = False,
        threads: int | None = None,
        progress: bool | None = False,
    ) -> IndexChanges:
        """Bring the index up to date with a data set, whose rows are named `source#number`.

        Args:
            source: A repository on the Hub, a saved data set, CSV, JSON lines, parquet or webdataset files.
            split: The split. None: "train".
            image_column: The column that holds the images. None: the only one that can be it.
            caption_column: The column of captions, or a template over columns. None: the only one that can be it, if
                there is one.
            image_folders: Folders outside of the data set's own whose images its rows may name.
            batch_size: Images encoded at once.
            exact: Whether to decode large JPEGs in full.
            keep_missing: Whether images whose rows are gone stay in the index.
            threads: How many open images. None: one for each core, at most 8.
            progress: Whether to show a progress bar. None: if standard error is a terminal.

        Returns:
            What changed.

        Raises:
            SearchIndexError: Another process writes to the index.
            OSError: There is no such data set.
            ValueError: It has no such split or column.
        """
        progress = sys.stderr.isatty() if progress is None else progress
        with only_writer(self.tables.place), progress_bar("Indexing images", "image", None, progress) as advance:
            self.tables.refresh()
            changes = update_data_set(
                self.tables,
                source,
                lambda: (self.model, self.processor),
                split=split,
                image_column=image_column,
                caption_column=caption_column,
                image_folders=image_folders,
                batch_size=batch_size,
                exact=exact,
                keep_missing=keep_missing,
                threads=threads,
                advance=advance,
            )
            if self.tables.commits:
                self.tables.tidy()
        return changes

    def matrix(self) -> EmbeddingMatrix:
        """All embeddings in memory, read again where the index has changed."""
        self.tables.images.checkout_latest()
        if self._matrix is None or self._matrix.version != self.tables.images.version:
            self._matrix = EmbeddingMatrix.read(self.tables)
        return self._matrix

    def direction(self, query: str | Sequence[QueryPart], templates: Any = None) -> Tensor:
        """Encode a query as one direction (D,) of length one; see `query`."""
        parts = parse_query(query) if isinstance(query, str) else query
        matrix = self.matrix()
        of_ids = all(part.kind == "id" for part in parts)  # then no model is needed
        vectors = encode_parts(
            None if of_ids else self.model, None if of_ids else self.processor, parts, matrix.of, templates
        )
        sample = matrix.embeddings[sample_places(len(matrix), SAMPLE)]
        return combine_parts(vectors, [part.weight for part in parts], sample)

    def search(
        self,
        query: str | Sequence[QueryPart] | Tensor,
        *,
        top: int = 20,
        where: str | None = None,
        templates: Any = None,
        folded: bool = True,
    ) -> list[SearchResult]:
        """Find images.

        Args:
            query: A text, the path of an image, an expression such as `2:"a beach" - "people"`; parts of a query; or a
                direction (D,).
            top: Largest number of results.
            where: A condition on the index's columns, such as `path LIKE '%2023%'`.
            templates: What a text is put into, see `encode_text_query`.
            folded: Whether near duplicates are shown once.

        Returns:
            Results, best first.

        Raises:
            QueryError: The query is empty or cannot be read.
            SearchIndexError: `where` is no condition.
        """
        if top < 1:
            raise ValueError(f"top is {top}, but must be at least 1.")
        direction = query if isinstance(query, Tensor) else self.direction(query, templates)
        matrix = self.matrix()
        if len(matrix) == 0:
            return []
        scores = matrix.similarities(direction[None])[0]
        if where is not None:
            allowed = self.tables.rows(["id"], where)["id"].to_pylist()
            mask = torch.ones(len(matrix), dtype=torch.bool)
            mask[matrix.places_of(allowed)] = False
            scores = scores.masked_fill(mask, -torch.inf)
        found = scores.topk(min(len(scores), top * (EXTRA_RESULTS if folded else 1)))
        places = found.indices[found.values > -torch.inf]
        return self._results(matrix, places, scores, folded)[:top]

    def _results(self, matrix: EmbeddingMatrix, places: Tensor, scores: Tensor, folded: bool) -> list[SearchResult]:
        ids = matrix.ids[places].tolist()
        if not ids:
            return []
        stored = self.tables.rows(SHOWN_COLUMNS, f"id IN ({', '.join(map(str, ids))})").to_pylist()
        by_id = {row["id"]: row for row in stored}
        hashes = np.array([by_id[id]["perceptual_hash"] for id in ids], dtype=np.int64)
        shown: list[tuple[int, list[int]]] = [(position, []) for position in range(len(ids))]
        if folded:
            shown = fold(places, matrix.embeddings[places], hashes)
        found = []
        for position, others in shown:
            row = by_id[ids[position]]
            names = ("width", "height", "caption", "metadata", "thumbnail")
            found.append(
                SearchResult(
                    id=row["id"],
                    path=os.fsdecode(row["path_bytes"]),
                    score=float(scores[places[position]]),
                    duplicates=[os.fsdecode(by_id[ids[other]]["path_bytes"]) for other in others],
                    **{name: row[name] for name in names},
                )
            )
        return found

    def duplicates(self, *, similarity: float = LEAST_SIMILARITY, bits: int = MOST_BITS) -> list[list[SearchResult]]:
        """Group near duplicates, the largest image of each group first.

        Args:
            similarity: Least cosine similarity of two near duplicates.
            bits: Most bits, of 64, in which their perceptual hashes differ.
        """
        matrix = self.matrix()
        stored = self.tables.rows(["id", "perceptual_hash"])
        by_id = dict(zip(stored["id"].to_pylist(), stored["perceptual_hash"].to_pylist(), strict=True))
        hashes = np.array([by_id[id] for id in matrix.ids.tolist()], dtype=np.int64)
        groups = group_duplicates(matrix.embeddings, hashes, similarity, bits)
        found = []
        for group in groups:
            places = torch.tensor(group)
            first = matrix.embeddings[places[:1]].float()
            scores = torch.zeros(len(matrix))
            scores[places] = (matrix.embeddings[places].float() @ first.T)[:, 0]
            results = self._results(matrix, places, scores, folded=False)
            found.append(sorted(results, key=lambda result: (-result.width * result.height, result.path)))
        return found


def model_files(name: str) -> list[list[Any]]:
    """The files of a model with their sizes and times, or where they lie in the Hub's cache. Empty if nothing is known.

    They change whenever the model does, and are much faster to look at than its weights.
    """
    place = Path(os.path.expanduser(name))
    if not name or not place.exists():
        from huggingface_hub import try_to_load_from_cache

        try:
            cached = try_to_load_from_cache(name, "config.json")
        except ValueError:  # no name of a repository
            return []
        return [[os.path.realpath(cached)]] if isinstance(cached, str) else []
    files = [place] if place.is_file() else sorted(path for path in place.iterdir() if path.is_file())
    return [[str(path.resolve()), (state := path.stat()).st_size, state.st_mtime_ns] for path in files]


def _load(name: str) -> tuple[Any, Any]:
    from ..checkpoints.in_memory import load_model
    from ..zero_shot.pipeline import default_device

    model, processor = load_model(name)
    return model.to(default_device()), processor


def _holds_an_index(place: str) -> bool:
    """Whether a folder holds an index, of another version perhaps."""
    return not is_address(place) and (Path(place) / "images.lance").exists()


def _describe(model: Any, processor: Any, name: str) -> IndexDescription:
    settings = json.loads(json.dumps(processor_settings(processor), default=str))
    where = os.path.abspath(os.path.expanduser(name)) if name and os.path.exists(os.path.expanduser(name)) else name
    return IndexDescription(model.config.projection_dim, weights_hash(model), settings, where)


def _is_same_model(tables: IndexTables, name: str) -> bool:
    """Whether a model's files are those by which the index knows its model. Its weights need no hash then."""
    files = model_files(name)
    return bool(files) and files == tables.noted(MODEL_FILES)


def _check_model(tables: IndexTables, found: IndexDescription) -> None:
    """Raise SearchIndexError if an index was made of another model."""
    made_of = tables.description
    if found.weights != made_of.weights or found.width != made_of.width:
        raise SearchIndexError(
            f"The index {tables.place} was made of another model ({made_of.model or 'in memory'}) than "
            f"{found.model or 'the one that was given'}: their embeddings cannot be compared. Name that model, or "
            f"another index with --index.",
            tables.place,
        )
    if found.processor != made_of.processor:
        names = [
            name
            for name in {*found.processor, *made_of.processor}
            if found.processor.get(name) != made_of.processor.get(name)
        ]
        raise SearchIndexError(
            f"The index {tables.place} was made with other settings of the image processor "
            f"({', '.join(sorted(names))}): use the same, or another index.",
            tables.place,
        )


def _refuse_to_empty(folder: str, found: int, missing: int, keep_missing: bool) -> None:
    """Raise FileNotFoundError for a folder without images, which may be a disk that is not there."""
    if found:
        return
    stays = f" The {missing:,} images of it that the index has stay there." if missing else ""
    raise FileNotFoundError(
        f"The folder {folder} has no images: no file in it, or in its folders, is named as one, such as .jpg or "
        f".png.{stays} Name another folder."
    )


__all__ = ["ImageIndex", "SearchResult"]
