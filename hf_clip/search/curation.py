"""Score the images of a data set, and keep those that are worth it.

1. Go through the source once: encode images and captions batch by batch, and write each row's scores to disk.
2. Compare all images with one another, if duplicates are asked for.
3. Say which rows are kept, by a condition over the scores and by a fraction of the best.
4. Write them. Only if images are written, the source is read a second time.

Only some batches of images are in memory at once. The scores lie on disk beside the result, in `.OUT-scores`, and so
do the embeddings if duplicates are looked for: 2 D bytes an image. The result appears when it is whole. Until then the
scores stay: a run that was interrupted goes on after the last row that is there, and another condition over the same
scores costs no second pass.

Dimensions: I images, D embedding.
"""

import io
import os
import re
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..checkpoints.whole_file import whole_file, write_json
from ..checkpoints.whole_folder import check_writable, held_folder, whole_folder
from ..extras import require
from ..model.checked_files import one_line
from ..zero_shot.embedding_head import EmbeddingHead
from ..zero_shot.progress import progress_bar
from .curated_files import TAR_ROWS, draw_scores, summary_of, write_parquet, write_tars
from .image_rows import ImageRows, open_image_rows, rows_from
from .index_model import describe, loaded, name_of
from .index_table import shown_path
from .interruption import interruption
from .row_encoding import EmbeddedRow, embed_captions, embed_rows
from .row_scorer import CLIP_SCORE, RowScorer, look
from .scored_rows import ScoredRows

CHUNK = 1024
"""Rows that are scored and written together."""

SUMMARY = "summary.json"


@dataclass(frozen=True)
class Curation:
    """What was done.

    Attributes:
        summary: What the summary says.
        summary_path: Where it is.
    """

    summary: dict[str, Any]
    summary_path: Path

    @property
    def images(self) -> int:
        """Number of images that were scored."""
        return self.summary["images"]

    @property
    def kept(self) -> int:
        """Number of those that were written."""
        return self.summary["kept"]

    @property
    def unreadable(self) -> int:
        """Number of images that could not be opened."""
        return self.summary["unreadable"]

    @property
    def duplicates(self) -> int | None:
        """Number of near duplicates of larger images; None if they were not looked for."""
        return self.summary.get("duplicates")

    @property
    def problems(self) -> list[tuple[str, str]]:
        """The images that could not be opened, and why; at most 1,000."""
        return [(one["path"], one["problem"]) for one in self.summary["problems"]]


def curate(
    source: str | Path,
    out: str | Path,
    *,
    model: Any,
    processor: Any = None,
    heads: Sequence[str | Path | EmbeddingHead] = (),
    duplicates: bool = False,
    labels: Any = None,
    keep: str | None = None,
    top_fraction: tuple[str, float] | None = None,
    images: bool = False,
    picture: str | Path | None = None,
    tar_rows: int = TAR_ROWS,
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    image_folders: Sequence[str] = (),
    batch_size: int = 16,
    exact: bool = False,
    threads: int | None = None,
    progress: bool = False,
) -> Curation:
    """Write the rows of a data set with columns of scores, and only those that are worth keeping.

    The columns are `id` (the row's number), `path`, `caption`, `metadata` (the other columns, as JSON), `width`,
    `height`, and as asked for: `clip_score`, the cosine similarity of image and caption, if there are captions; a
    column for each head; `tags`; `duplicate` and `duplicate_of`, the id of the image that it is a copy of.

    Args:
        source: A folder of images; a repository on the Hub, a saved data set, CSV, JSON lines, parquet or webdataset
            files, which are streamed.
        out: A file that ends in .parquet, or a new or empty folder, which is filled with webdataset tars.
        model: HfClipModel, or where one is: a folder, a repository on the Hub, a checkpoint file.
        processor: HfClipProcessor, if `model` is a model.
        heads: Heads of scores: the name of one beside the model, a file of `hf-clip evaluate head`, or the `.pth` file
            of a LAION-Aesthetics predictor.
        duplicates: Whether to look for near duplicates. All pairs are compared, which takes the square of the time.
        labels: Labels that may become tags, as for `ImageTagger`.
        keep: A condition in SQL over the columns. None: all rows.
        top_fraction: The name of a score, and which fraction with the highest scores is kept of the rows that `keep`
            leaves.
        images: Whether a parquet file has a column `image`. Tars always have images.
        picture: A file for histograms of the scores.
        tar_rows: Rows of a tar.
        split: The split of a data set. None: "train".
        image_column: The column that holds the images. None: the only one that can be it.
        caption_column: The column of captions, or a template over columns. None: the only one that can be it.
        image_folders: Folders outside of the data set's own whose images its rows may name.
        batch_size: Images encoded at once.
        exact: Whether to decode large JPEGs in full.
        threads: How many open images. None: one for each core, at most 8.
        progress: Whether to show a progress bar.

    If an earlier run was interrupted, this one goes on after the last row that was scored.

    Returns:
        What was done.

    Raises:
        OSError: There is no such source, model or head, or `out` cannot be written.
        FolderInUseError: Another process writes to `out`. An OSError.
        ValueError: A condition, a column, a head or `out` cannot be used, the source has no captions for a score that
            is asked for, or no image can be opened.
        ImportError: A package is missing.
    """
    out, source = Path(os.path.expanduser(out)), os.path.expanduser(source)
    _check_output(out, source, picture)
    columns = {"image_column": image_column, "caption_column": caption_column}
    rows = open_image_rows(source, split=split, **columns, image_folders=image_folders)
    asked = f"{keep or ''} {top_fraction[0] if top_fraction else ''}"
    duplicates = duplicates or re.search(r"\bduplicate(_of)?\b", asked, re.IGNORECASE) is not None
    _check_captions(rows, source, asked, has_others=bool(heads or duplicates or labels))
    name = name_of(model)
    model, processor = loaded(model, processor)
    scorer = RowScorer(model, processor, rows.has_captions, heads, labels, name)
    identity = describe(model, processor, name)
    made_of = {"weights": identity.weights, "processor": identity.processor, **scorer.made_of()}
    made_of |= {"source": rows.name, "data": rows.fingerprint, "exact": exact, **columns}
    made_of |= {"split": split, "image_folders": [os.path.abspath(folder) for folder in image_folders]}
    settings = {"source": rows.name, "model": name, "keep": keep, "top_fraction": list(top_fraction or ()) or None}
    encoding = {"batch_size": batch_size, "exact": exact, "threads": threads}
    place = out.resolve()
    with (
        _errors_of_disks(place),
        held_folder(place),  # what a killed run left there is removed
        _scores_beside(place, scorer, duplicates, made_of) as scored,
    ):
        _check_choice(scored, keep, top_fraction)
        if picture is not None and not scored.scores:
            raise ValueError(
                f"There is no score to draw into {picture}: {source} has no captions, and no head is given. Leave the "
                f"picture out, or give a head."
            )
        if not scored.is_complete:
            _score(rows, scored, scorer, encoding, progress)
        scored.mark_duplicates()
        scored.choose(keep, top_fraction)
        summary = summary_of(scored, settings)
        chosen = _with_images(scored, rows, progress) if images or not _is_table(out) else _without_images(scored)
        if _is_table(out):
            with whole_file(out) as unfinished:
                write_parquet(unfinished, scored, chosen, images)
            write_json(_summary_path(out), summary)
        else:
            with whole_folder(place, is_held=True) as folder:
                summary["tars"] = write_tars(folder, chosen, tar_rows)
                write_json(folder / SUMMARY, summary)
        if picture is not None:
            with whole_file(picture) as unfinished:
                draw_scores(unfinished, scored, f"{rows.name}: {summary['kept']:,} of {summary['images']:,} kept")
    return Curation(summary, _summary_path(out))


@contextmanager
def _scores_beside(place: Path, scorer: RowScorer, duplicates: bool, made_of: dict[str, Any]) -> Iterator[ScoredRows]:
    """The scores that an earlier run left beside its result, or none yet. They stay if this run does not end well."""
    folder = place.parent / f".{place.name}-scores"
    folder.mkdir(exist_ok=True)
    is_kept = False
    try:
        with closing(ScoredRows(folder, scorer.scores, duplicates, scorer.tagger is not None, made_of)) as scored:
            try:
                yield scored
            except BaseException:
                is_kept = scored.position.number > 0
                raise
    finally:
        if not is_kept:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _errors_of_disks(place: Path) -> Iterator[None]:
    """SQLite's errors, such as that of a full disk, are OSErrors."""
    try:
        yield
    except sqlite3.Error as error:
        raise OSError(
            f"The scores cannot be kept in {place.parent} ({one_line(error)}): make room there, or name another place."
        ) from error


def _is_table(out: Path) -> bool:
    return out.suffix.lower() == ".parquet"


def _summary_path(out: Path) -> Path:
    return out.with_suffix(f".{SUMMARY}") if _is_table(out) else out / SUMMARY


def _check_captions(rows: ImageRows, source: str, asked: str, has_others: bool) -> None:
    """Raise ValueError if captions are missed, or nothing else is asked for."""
    if rows.has_captions:
        return
    if re.search(rf"\b{CLIP_SCORE}\b", asked, re.IGNORECASE):
        raise ValueError(
            f"{CLIP_SCORE} compares an image with its caption, and {source} has no captions: name their column, or "
            f"leave that score out."
        )
    if not has_others:
        raise ValueError(
            f"There is nothing to score: {source} has no captions, and neither heads, labels nor duplicates are asked "
            f"for."
        )


def _check_output(out: Path, source: str, picture: str | Path | None) -> None:
    """Refuse what cannot be written, before anything is read."""
    if _is_table(out):
        require("A table of scores", "search", ["pyarrow"])
        if out.is_dir():
            raise IsADirectoryError(f"{out} is a folder; name a file in it, such as {out / 'scores.parquet'}.")
        if out.exists() and os.path.exists(source) and os.path.samefile(out, source):
            raise FileExistsError(f"{out} is the data set itself; name another file for the result.")
        check_writable(out.absolute().parent)
    else:
        if out.is_file():
            raise FileExistsError(f"{out} is a file, but tars go into a folder; a table's name ends in .parquet.")
        if out.is_dir() and any(out.iterdir()):
            raise FileExistsError(f"{out} holds files already; name a new or an empty folder.")
        check_writable(out.absolute().parent)
    if picture is not None:
        require("A picture of the scores", "eval", ["matplotlib"])
        if Path(picture).suffix.lower() != ".png":
            raise ValueError(f"The picture {picture} is written as PNG: let its name end in .png.")
        check_writable(Path(picture).absolute().parent)


def _check_choice(scored: ScoredRows, keep: str | None, top_fraction: tuple[str, float] | None) -> None:
    if keep is not None:
        scored.check_condition(keep)
    if top_fraction is None:
        return
    name, fraction = top_fraction
    if name not in scored.scores:
        known = f"the scores are {', '.join(scored.scores)}" if scored.scores else "there are no scores"
        raise ValueError(f"There is no score {name!r} to take the best of: {known}. A head adds one.")
    if not 0 < fraction <= 1:
        raise ValueError(f"The fraction of the best is {fraction}, but a number above 0 and up to 1 is needed.")


def _score(rows: ImageRows, scored: ScoredRows, scorer: RowScorer, encoding: dict[str, Any], progress: bool) -> None:
    """Go through what is left of the source, and commit each chunk of scores.

    Raises:
        KeyboardInterrupt: The user interrupted it. What was scored is kept.
    """
    found = embed_rows(
        rows_from(rows, scored.position), rows.content, scorer.model, scorer.processor, look=look, **encoding
    )
    if scorer.with_captions:
        found = embed_captions(found, scorer.model, scorer.processor)
    left = None if rows.total is None else max(0, rows.total - scored.position.number)
    chunk: list[EmbeddedRow] = []
    with progress_bar("Scoring images", "image", left, progress) as advance, interruption() as interrupted:
        for one in found:
            chunk.append(one)
            advance(1)
            if len(chunk) == CHUNK or interrupted.is_set():
                _add(chunk, scored, scorer)
                scored.commit(position=scored.position.after([one.row for one in chunk]))
                chunk = []
            if interrupted.is_set():
                raise KeyboardInterrupt(
                    f"interrupted after {scored.position.number:,} images, whose scores are kept; the same command "
                    f"goes on there"
                )
    _add(chunk, scored, scorer)
    scored.add_unreadable((shown_path(path), problem) for path, problem in rows.unread.items())
    if not len(scored):
        first = next(scored.problems(), None)
        problem = f": {first[0]}: {first[1]}" if first else ""
        raise ValueError(f"No image of {rows.name} can be opened{problem}")
    scored.commit(is_complete=True, position=scored.position.after([one.row for one in chunk]))


def _add(chunk: Sequence[EmbeddedRow], scored: ScoredRows, scorer: RowScorer) -> None:
    scored.add_unreadable((shown_path(one.row.path), one.problem) for one in chunk if one.problem is not None)
    if opened := [one for one in chunk if one.embedding is not None]:
        columns, embeddings = scorer.columns_of(opened)
        scored.add(columns, embeddings, [one.seen[0] for one in opened])


def _without_images(scored: ScoredRows) -> Iterator[tuple[dict[str, Any], None]]:
    return ((row, None) for row in scored.kept_rows())


def _with_images(
    scored: ScoredRows, rows: ImageRows, progress: bool
) -> Iterator[tuple[dict[str, Any], tuple[bytes, str]]]:
    """Read the images of the rows that are kept, in a second pass over the source."""
    kept = scored.kept_rows()
    row = next(kept, None)
    with progress_bar("Writing images", "image", rows.total, progress) as advance:
        for image in rows:
            advance(1)
            if row is None:
                return
            if image.number < row["id"]:
                continue
            if image.number != row["id"] or shown_path(image.path) != row["path"]:
                break
            try:
                data = rows.content(image.stored)
            except OSError as error:
                reason = error.strerror or one_line(error)
                raise OSError(
                    f"{rows.name} changed while it was read: {row['path']} cannot be read any more ({reason}). Start "
                    f"again."
                ) from error
            with Image.open(io.BytesIO(data)) as opened:
                ending = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}.get(
                    str(opened.format), str(opened.format).lower()
                )
            yield row, (data, ending)
            row = next(kept, None)
    if row is not None:
        raise ValueError(f"{rows.name} changed while it was read: {row['path']} is gone. Start again.")


__all__ = ["Curation", "curate"]
