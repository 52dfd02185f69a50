"""Where results end: few for a query that few images fit, none for one that none fits, whatever the scores' scale."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_clip import HfClipModel, HfClipProcessor
from hf_clip.commands.program import main
from hf_clip.search.exact_scan import EmbeddingMatrix
from hf_clip.search.image_index import ImageIndex
from hf_clip.search.query import QueryPart, read_cutoff
from hf_clip.search.result_cutoff import (
    IMAGE_GATES,
    NOTE,
    TEXT_GATES,
    ResultCutoff,
    end_of_results,
    least_score,
    measure_references,
    tells_apart,
)

from .conftest import make_image

WIDTH, KINDS = 48, 12


class Notes:
    """What an index keeps under names, and the rows of its images."""

    def __init__(self, matrix: EmbeddingMatrix | None = None) -> None:
        self.kept: dict[str, Any] = {}
        self.matrix = matrix
        self.images = SimpleNamespace(version=1)

    def rows_of(self, columns: list[str], ids: list[int]) -> Any:
        assert self.matrix is not None
        places = torch.isin(self.matrix.ids, torch.tensor(ids)).nonzero()[:, 0]
        flat = pyarrow.array(self.matrix.embeddings[places].flatten().numpy())
        column = pyarrow.FixedSizeListArray.from_arrays(flat, WIDTH)
        return pyarrow.table({"id": self.matrix.ids[places].numpy(), "embedding": column}).select(columns)

    def noted(self, name: str, default: Any) -> Any:
        return self.kept.get(name, default)

    def note(self, name: str, value: Any) -> None:
        self.kept[name] = value


def encode_nothing(texts: Any) -> Any:
    raise AssertionError("no text has to be encoded")


def make_matrix(counts: list[int], gap: float = 0.0) -> tuple[EmbeddingMatrix, Tensor]:
    """Images of some kinds, so many of each, and the directions of all kinds: (KINDS, WIDTH).

    Args:
        counts: Of each kind.
        gap: What all images have of a direction that no kind has.
    """
    generator = torch.Generator().manual_seed(0)
    kinds = torch.linalg.qr(torch.randn(WIDTH - 1, KINDS, generator=generator)).Q.T
    rows = torch.cat([kinds[kind].expand(count, -1) for kind, count in enumerate(counts)])
    rows = rows + 0.02 * torch.randn(rows.shape, generator=generator)
    images = normalize(torch.cat([rows, torch.full((len(rows), 1), gap)], dim=1), dim=1)
    texts = torch.cat([kinds, torch.zeros(KINDS, 1)], dim=1)
    return EmbeddingMatrix(torch.arange(len(images)), images.half()), texts


def random_texts(count: int = 100) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    texts = normalize(torch.randn(count, WIDTH, generator=generator), dim=1)
    texts[:, -1] = 0
    return texts


@pytest.mark.parametrize("gap", [0.0, 1.5])
@pytest.mark.parametrize("counts", [[3, 40, 7], [3, 400, 1, 60, 7, 500, 29]])
def test_as_many_results_as_images_that_fit(counts: list[int], gap: float):
    matrix, texts = make_matrix(counts, gap)
    reference = measure_references(matrix, random_texts(), TEXT_GATES)
    found = [s >= least_score(s, reference, TEXT_GATES) for s in matrix.similarities(texts)]
    kinds = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    for kind, shown in enumerate(found):
        assert set(kinds[shown].tolist()) <= {kind}  # nothing else
        assert int(shown.sum()) >= 0.7 * sum(counts[kind : kind + 1])  # and not much less


def test_moved_and_stretched_scores_end_at_the_same_image():
    matrix, texts = make_matrix([3, 40, 7, 100])
    scores = matrix.similarities(texts[:4])
    spread = float(scores.std())
    for row in scores:
        shown = row >= end_of_results(row, spread)
        moved = 0.2 + 0.05 * row
        assert torch.equal(moved >= end_of_results(moved, 0.05 * spread), shown)


def test_an_image_that_is_unlike_all_others_finds_nothing_and_one_of_them_finds_its_kind():
    matrix, texts = make_matrix([30, 40, 50])
    places = torch.arange(0, 120, 4)
    reference = measure_references(matrix, matrix.embeddings[places].float(), IMAGE_GATES, places)
    for place, first, count in ((0, 0, 30), (50, 30, 40), (100, 70, 50)):
        scores = matrix.similarities(matrix.embeddings[place : place + 1].float())[0]
        shown = (scores >= least_score(scores, reference, IMAGE_GATES)).nonzero()[:, 0]
        assert set(shown.tolist()) <= set(range(first, first + count))
        assert len(shown) >= 0.7 * count
    assert least_score(matrix.similarities(texts[5:6])[0], reference, IMAGE_GATES) == math.inf


def test_sums_of_parts_fit_if_one_part_does(monkeypatch: pytest.MonkeyPatch):
    matrix, texts = make_matrix([30, 40, 50])
    monkeypatch.setattr("hf_clip.search.result_cutoff._is_put_into_templates", lambda *given: False)
    notes = Notes(matrix)
    cutoff = ResultCutoff(notes)  # type: ignore[arg-type]

    def least(parts: list[QueryPart], vectors: Tensor, direction: Tensor) -> float:
        scores = matrix.similarities(direction[None])[0]
        return cutoff.least_score(matrix, scores, parts, vectors, lambda texts: random_texts())

    here, elsewhere, away = QueryPart("text", "x"), QueryPart("text", "y"), QueryPart("text", "z", -0.5)
    total = normalize(texts[1] + 0.3 * texts[7], dim=0)
    scores = matrix.similarities(total[None])[0]
    for parts, rows in (([here, elsewhere], [1, 7]), ([elsewhere, here], [7, 1])):
        shown = (scores >= least(parts, texts[rows], total)).nonzero()[:, 0].tolist()
        assert set(shown) <= set(range(30, 70))
        assert len(shown) >= 28
    assert least([elsewhere, away], texts[[7, 1]], texts[7]) == math.inf
    assert least([QueryPart("id", "3"), elsewhere], texts[[1, 7]], total) < 1
    shown = (scores >= cutoff.least_score(matrix, scores, None, None, encode_nothing)).nonzero()[:, 0].tolist()
    assert set(shown) <= set(range(30, 70))
    assert len(shown) >= 28
    assert set(notes.kept[NOTE]) == {"texts", "images"}


def test_reference_scores_are_measured_anew_when_the_index_holds_other_images():
    calls: list[int] = []
    encode = lambda texts: calls.append(len(texts)) or random_texts()  # noqa: E731
    notes = Notes()

    def measured_anew(matrix: EmbeddingMatrix) -> bool:
        before, notes.matrix = len(calls), matrix
        first = ResultCutoff(notes).references("texts", matrix, encode)  # type: ignore[arg-type]
        assert ResultCutoff(notes).references("texts", matrix, encode).spread == first.spread  # type: ignore[arg-type]
        assert len(calls) <= before + 1
        return len(calls) > before

    whole, _ = make_matrix([60, 60])
    ids, embeddings = torch.arange(len(whole)), whole.embeddings
    assert measured_anew(EmbeddingMatrix(ids[:90], embeddings[:90]))
    assert not measured_anew(EmbeddingMatrix(ids[:98], embeddings[:98]))  # a few were added
    assert measured_anew(EmbeddingMatrix(ids[:100], embeddings[:100]))  # and a few more
    assert not measured_anew(EmbeddingMatrix(ids[5:100], embeddings[5:100]))  # a few were removed
    assert measured_anew(EmbeddingMatrix(ids[15:115], embeddings[15:115]))  # as many are others
    written_anew = embeddings[15:115].clone()
    written_anew[:20] = embeddings[100:120]
    assert measured_anew(EmbeddingMatrix(ids[15:115], written_anew))  # of the same files
    notes.kept[NOTE]["texts"].pop("rows")  # as an older version wrote it
    assert measured_anew(EmbeddingMatrix(ids[15:115], written_anew))


def test_what_scores_higher_than_any_reference_fits():
    matrix, texts = make_matrix([30, 40, 50])
    references = measure_references(matrix, random_texts(), TEXT_GATES)
    scores = matrix.similarities(texts[5:6])[0]
    assert references.highest == pytest.approx(float(matrix.similarities(random_texts()).max()))
    assert least_score(scores, references, TEXT_GATES) == math.inf
    scores[17] = references.highest + 1e-3
    hidden = replace(references, medians=[math.inf, math.inf])
    assert end_of_results(scores, references.spread) == least_score(scores, hidden, TEXT_GATES) <= scores[17]


def test_every_text_fits_where_a_model_does_not_tell_nouns_apart():
    """As one does that learned ten captions: nouns are then as near to its images as they are."""
    matrix, texts = make_matrix([30, 40, 50])
    generator = torch.Generator().manual_seed(2)
    few = texts[torch.randint(3, (100,), generator=generator)]
    few = normalize(few + 0.005 * torch.randn(few.shape, generator=generator), dim=1)
    references = measure_references(matrix, few, TEXT_GATES)
    assert not references.are_told_apart
    levels = replace(references, are_told_apart=True, highest=1.0)
    assert not all(levels.lets_through(row, TEXT_GATES) for row in matrix.similarities(texts[:3]))
    for kind, row in enumerate(matrix.similarities(texts[:3])):
        shown = (row >= least_score(row, references, TEXT_GATES)).nonzero()[:, 0].tolist()
        first = sum([30, 40, 50][:kind])
        assert set(shown) <= set(range(first, first + [30, 40, 50][kind]))
        assert len(shown) >= 0.7 * [30, 40, 50][kind]
    assert tells_apart(random_texts())
    assert not tells_apart(texts[:1].expand(5, -1))
    places = torch.arange(0, 120, 4)
    assert measure_references(matrix, matrix.embeddings[places].float(), IMAGE_GATES, places).are_told_apart


@pytest.mark.parametrize("count", [0, 1, 5, 19])
def test_of_few_or_of_equal_images_all_are_results(count: int):
    matrix, texts = make_matrix([count])
    cutoff = ResultCutoff(Notes())  # type: ignore[arg-type]
    parts = [QueryPart("text", "a long text that is no name.")]
    for few in (matrix, EmbeddingMatrix(torch.arange(50), texts[:1].half().expand(50, -1))):
        scores = few.similarities(texts[3:4])[0]
        assert cutoff.least_score(few, scores, parts, texts[3:4], encode_nothing) == -math.inf


def test_read_cutoff():
    assert [read_cutoff(word) for word in ("auto", "OFF", "0.25", "-1")] == ["auto", None, 0.25, -1.0]
    for word in ("", "nan", "some", "inf"):
        with pytest.raises(ValueError, match="must be auto, off, or a score"):
            read_cutoff(word)


def test_search_and_command(tmp_path: Path, digits: Path, capsys: pytest.CaptureFixture[str]):
    folder, place = tmp_path / "images", tmp_path / "index"
    folder.mkdir()
    for seed in range(24):
        make_image(seed, (24, 24)).save(folder / f"{seed:02}.png")
    model, processor = HfClipModel.from_pretrained(digits / "vit"), HfClipProcessor.from_pretrained(digits / "vit")
    index = ImageIndex.open(place, model=model, processor=processor)
    index.add(folder)
    everything = index.search("a blue three on yellow paper.", top=24, folded=False)
    assert len(everything) == 24
    assert (everything.least_score, everything.best_score) == (-math.inf, everything[0].score)
    middle = everything[9].score
    assert index.search("a blue three on yellow paper.", top=24, folded=False, cutoff=middle) == everything[:10]
    found = index.search(str(folder / "07.png"), top=24, cutoff="auto")
    assert found[0].path == str(folder / "07.png")
    assert 1 <= len(found) < 24
    assert all(result.score >= found.least_score for result in found)
    assert index.tables.noted(NOTE).keys() == {"images"}
    with pytest.raises(ValueError, match="cutoff is 'of', but must be \"auto\", a score, or None"):
        index.search("x", cutoff="of")
    words = ["search", "a blue three on yellow paper.", "--index", str(place)]
    assert main([*words, "--cutoff", str(middle), "--top", "24", "--all-copies"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 10
    by_id = ["search", "--more-like", "3", "--index", str(place)]
    assert main([*by_id, "--cutoff", "1.5"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "no image of the index fits: the nearest has a score of 1.0000, and --cutoff off shows it\n"
    assert main([*by_id, "--cutoff", "off", "--top", "24", "--all-copies"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 24
    assert main([*by_id, "--cutoff", "often"]) == 1
    assert capsys.readouterr().err.startswith("error: The cutoff is 'often', but must be auto, off, or a score")


def test_an_index_that_nobody_may_write_to_is_searched_all_the_same():
    class ReadOnly(Notes):
        def note(self, name: str, value: Any) -> None:
            raise OSError("read-only file system")

    matrix, _ = make_matrix([40, 40])
    cutoff = ResultCutoff(ReadOnly(matrix))  # type: ignore[arg-type]
    found = cutoff.references("images", matrix, encode_nothing)
    assert found.images == 80
    assert cutoff.references("images", matrix, encode_nothing) is found
