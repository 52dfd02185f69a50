"""An index that is opened and brought up to date. `ImageIndex` searches it, too.

torch and the model are loaded when the first image is to be encoded: an update that finds nothing new does without.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..zero_shot.progress import progress_bar
from .exact_folders import forget_exact, note_exact
from .folder_scan import FolderScan, refuse_to_empty, scan_folder
from .index_model import MODEL_FILES, MODEL_PLACE, check_model, describe, is_same_model, load, model_files, name_of
from .index_table import IndexTables, SearchIndexError, default_index, is_address
from .index_update import IndexChanges, apply_recognised, forget_missing, plan_update
from .index_writer import only_writer
from .known_text_tower import note_text_tower
from .unchanged_folders import remember_unchanged

if TYPE_CHECKING:
    from typing_extensions import Self

DRAFT_SIDE = "draft side"
"""The note of `_draft_side`."""

OPTIMIZED_FROM = 500
"""Images to encode from which on a model is optimized first: that takes seconds, and a fifth or so of each image's time
is saved (ViT-B/32 on 2 cores of an AMD EPYC: 5 s, and 10 to 15 ms of 65)."""


class UpdatableIndex:
    """An index of images.

    Args:
        tables: Its tables.
        model: HfClipModel. None: loaded when it is first needed.
        processor: Its processor.
        name: Where the model is. None: where the index was made of it.
        dtype: The name of the dtype in which a model computes that is loaded here.
    """

    def __init__(
        self,
        tables: IndexTables,
        model: Any = None,
        processor: Any = None,
        name: str | None = None,
        dtype: str = "float32",
    ):
        self.tables = tables
        self._model, self._processor = model, processor
        self._named_model, self._dtype = name, dtype
        self._is_own_model = False  # loaded here, and in nobody else's hands

    @classmethod
    def open(
        cls,
        place: str | Path | None = None,
        *,
        model: Any = None,
        processor: Any = None,
        make: bool = True,
        dtype: str = "float32",
    ) -> "Self":
        """Open an index, or make one.

        Args:
            place: Its folder, or an address on object storage. None: the user's own, see `default_index`.
            model: HfClipModel, or where one is: a folder, a repository on the Hub, a checkpoint file. None: the one of
                which the index was made.
            processor: HfClipProcessor, if `model` is a model.
            make: Whether to make an index if there is none.
            dtype: "float32", "bfloat16" or "float16": what the model computes in, if it is loaded here. The index is
                the same index in all of them, and its embeddings are stored in float16.

        Returns:
            The index.

        Raises:
            SearchIndexError: There is no index and no model to make one of; or it is of another model or version.
            ValueError: A model is given without its processor.
            ImportError: LanceDB is not installed.
        """
        place = default_index() if place is None else os.path.expanduser(place)
        name = name_of(model)
        is_named = isinstance(model, (str, os.PathLike))
        if model is not None and not is_named and processor is None:
            raise ValueError("A model was given without its processor: pass processor=, or where the model is.")
        try:
            tables = IndexTables.open(str(place))
        except SearchIndexError:
            if not make or model is None or holds_an_index(str(place)):
                raise
            model, processor = load(name) if is_named else (model, processor)
            tables = IndexTables.create(str(place), describe(model, processor, name))
            tables.note(MODEL_FILES, model_files(name))
            made = cls(tables, None if is_named else model, processor, name, dtype)
            if is_named:
                note_text_tower(tables, name, model, processor)
                made._keep(model, processor)
            return made
        if not is_named:
            if model is not None:
                check_model(tables, describe(model, processor, name))
            return cls(tables, model, processor, dtype=dtype)
        found = cls(tables, name=name, dtype=dtype)
        if not is_same_model(tables, name):
            found.load_model()
        return found

    def __len__(self) -> int:
        return self.tables.count()

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
        name = self._named_model or self.tables.noted(MODEL_PLACE) or self.tables.description.model
        if not name:
            raise SearchIndexError(
                f"The index {self.tables.place} was made of a model in memory, and does not know where that is: pass "
                f"model=.",
                self.tables.place,
            )
        try:
            model, processor = load(name)
        except FileNotFoundError as error:
            if self._named_model:
                raise
            raise SearchIndexError(
                f"The model of the index {self.tables.place} is no longer at {name}: say with --model where it is.",
                self.tables.place,
            ) from error
        if not is_same_model(self.tables, name):
            found = describe(model, processor, name)
            check_model(self.tables, found)
            with suppress(SearchIndexError):  # an index that may only be read; the model is then compared each time
                self.tables.note(MODEL_FILES, model_files(name))
                self.tables.note(MODEL_PLACE, found.model)
        note_text_tower(self.tables, name, model, processor)
        self._keep(model, processor)

    def _keep(self, model: Any, processor: Any) -> None:
        """Keep a model that was loaded here, once its weights are compared."""
        import torch

        self._model = model.to(getattr(torch, self._dtype))
        self._processor, self._is_own_model = processor, True

    def _optimize_model(self, count: int) -> None:
        """Optimize the model if it has many images to encode. Its embeddings stay the same up to rounding.

        Only a model that was loaded here, onto the CPU: whoever passed one may want to train it.
        """
        self.load_model()
        if self._is_own_model and count >= OPTIMIZED_FROM and self._model.device.type == "cpu":
            from ..evaluation.feature_cache import optimize_and_remember

            optimize_and_remember(self._model)

    def _draft_side(self) -> int | None:
        """The shorter side that the model needs; it is kept in the index, so that the model is loaded for it once."""
        side = self.tables.noted(DRAFT_SIDE)
        if side is None:
            from ..zero_shot.features import image_processor_of

            side = image_processor_of(self.processor).steps().draft_side() or 0
            self.tables.note(DRAFT_SIDE, side)
        return side or None

    def add(
        self,
        folder: str | Path | FolderScan,
        *,
        batch_size: int = 16,
        exact: bool = False,
        keep_missing: bool = False,
        threads: int | None = None,
        progress: bool | None = False,
    ) -> IndexChanges:
        """Bring the index up to date with a folder and its folders.

        Args:
            folder: The folder, or what a scan of it has just found.
            batch_size: Images encoded at once.
            exact: Whether to decode large JPEGs in full; those that the index has of a run without it are encoded
                again. By default they are decoded at a half, a quarter or an eighth of their size, but at twice the
                model's at least, which is several times as fast.
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
        scan = folder if isinstance(folder, FolderScan) else scan_folder(folder)
        with self.tables.writing():
            with progress_bar("Comparing files", "file", len(scan.files), progress) as advance:
                plan = plan_update(self.tables, scan, advance, draft_side=self._draft_side() if exact else None)
            refuse_to_empty(scan, len(plan.missing))
            if not exact and (plan.recognised or plan.to_encode):
                forget_exact(self.tables, scan.folder)
            moved = apply_recognised(self.tables, plan)
            changes = IndexChanges()
            if plan.to_encode:
                from .index_encoding import encode_planned

                self._optimize_model(len(plan.to_encode))
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
            if exact:
                note_exact(self.tables, scan.folder)
            changes.removed = forget_missing(self.tables, plan, keep_missing, changes.problems)
            changes.kept = len(plan.missing) if keep_missing else 0
            changes.unchanged, changes.moved = plan.unchanged, moved
            changes.unread += plan.unread
            changes.problems = {**plan.problems, **scan.unread, **changes.problems}
            folders = self.tables.noted("folders", [])
            if scan.folder not in folders:
                folders = sorted([*folders, scan.folder])
                self.tables.note("folders", folders)
            if self.tables.commits:
                self.tables.tidy()
            model = self.tables.noted(MODEL_FILES)
            remember_unchanged(self.tables.place, scan, changes, images=len(self), folders=folders, model=model)
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
        from .data_set_rows import update_data_set

        progress = sys.stderr.isatty() if progress is None else progress
        with self.tables.writing(), progress_bar("Indexing images", "image", None, progress) as advance:
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

    def add_embeddings(self, place: str | Path, *, progress: bool | None = False) -> IndexChanges:
        """Put embeddings of files into the index, without opening an image: it has no thumbnails of them.

        An image is known by its path: if it was put there from files before, it is replaced.

        Args:
            place: What `hf-clip embed` or clip-retrieval wrote: a folder or an address.
            progress: Whether to show a progress bar. None: if standard error is a terminal.

        Returns:
            What changed.

        Raises:
            SearchIndexError: The embeddings are of another model; or another process writes to the index.
            EmbeddingFilesError: There are none, they have another width, or a file is damaged. A ValueError; its
                `place` is the folder or file.
        """
        from .embedding_files import StoredEmbeddings
        from .index_from_embeddings import check_embeddings, update_from_embeddings

        stored = StoredEmbeddings(place)
        check_embeddings(self.tables, stored)
        progress = sys.stderr.isatty() if progress is None else progress
        with (
            self.tables.writing(),
            progress_bar("Reading embeddings", "image", stored.rows, progress) as advance,
        ):
            changes = update_from_embeddings(self.tables, stored, advance)
            if self.tables.commits:
                self.tables.tidy()
        return changes


@contextmanager
def without_an_empty_index(place: str) -> Iterator[None]:
    """Around making and filling an index: if that fails, an index that is new and has no image is removed.

    It would keep the place for a model that may have been named by mistake.
    """
    is_new = not is_address(place) and not os.path.lexists(place)
    try:
        yield
    except (ValueError, OSError, ImportError):
        if is_new and holds_an_index(place):
            with suppress(SearchIndexError), only_writer(place):  # nobody else fills it
                if IndexTables.open(place).count() == 0:
                    shutil.rmtree(place, ignore_errors=True)
        raise


def holds_an_index(place: str) -> bool:
    """Whether a folder holds an index, of another version perhaps."""
    return not is_address(place) and (Path(place) / "images.lance").exists()


__all__ = ["UpdatableIndex", "holds_an_index", "without_an_empty_index"]
