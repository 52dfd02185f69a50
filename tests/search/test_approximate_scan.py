"""A part of the images is compared, and what is found is nearly what comparing all finds, with the same scores."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_clip.commands.program import main
from hf_clip.search import approximate_scan
from hf_clip.search.approximate_scan import EmbeddingsOfTables, build, candidates, forget, read_scan
from hf_clip.search.image_index import ImageIndex
from hf_clip.search.index_table import IndexDescription, IndexTables, SearchIndexError

WIDTH, COUNT = 64, 3000


def embeddings_of(ids: list[int]) -> Tensor:
    """Of ids, in 40 clusters that lie in one direction of space, as those of a model do; (ids, D)."""
    centres = torch.from_numpy(np.random.default_rng(0).standard_normal((40, WIDTH)).astype(np.float32))
    own = np.array([np.random.default_rng(id + 1).standard_normal(WIDTH) for id in ids], dtype=np.float32)
    return normalize(1.0 + centres[torch.tensor(ids) % 40] + 0.6 * torch.from_numpy(own), dim=1)


def rows_of(ids: list[int], moved: int = 0) -> list[dict[str, Any]]:
    """Rows of ids; `moved` gives them the embeddings of other ids."""
    vectors = embeddings_of([id + moved for id in ids]).numpy().astype(np.float16)
    return [
        {"id": id, "path": f"/photos/{id % 10}/{id}.jpg", "path_bytes": f"/photos/{id}.jpg".encode(), "size": 1}
        | {"mtime_ns": 1, "content": "", "width": 8, "height": 8, "perceptual_hash": id * 0x9E3779B97F4A7C15 % 2**63}
        | {"embedding": vector, "thumbnail": b""}
        for id, vector in zip(ids, vectors, strict=True)
    ]


@pytest.fixture(scope="module")
def texts() -> Tensor:
    """Directions (20, D) that are of no image."""
    return normalize(0.5 + torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(0)), dim=1)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, texts: Tensor) -> IndexTables:
    """An index with an approximate scan; tests copy it before they change it."""
    tables = IndexTables.create(
        str(tmp_path_factory.mktemp("built") / "index"), IndexDescription(WIDTH, "weights", {}, "")
    )
    tables.add(rows_of(list(range(COUNT))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(approximate_scan, "IMAGES_OF_A_PARTITION", 100)
        build(tables, texts)
    return tables


@pytest.fixture
def changing(built: IndexTables, tmp_path: Path) -> ImageIndex:
    import shutil

    shutil.copytree(built.place, tmp_path / "index")
    return ImageIndex(IndexTables.open(str(tmp_path / "index")))


def test_recall_is_that_of_the_settings_that_are_kept(built: IndexTables, texts: Tensor):
    scan = read_scan(built)
    assert scan is not None
    assert scan.images == COUNT
    assert scan.probes < 30  # of 30 partitions
    assert scan.recall.keys() == {"images", "texts"}
    assert min(scan.recall.values()) >= 0.95
    stored = embeddings_of(list(range(COUNT))).half().float()
    found = [set(candidates(built, scan, text, 10).ids.tolist()) for text in texts]
    best = [set((stored @ text).topk(10).indices.tolist()) for text in texts]
    assert np.mean([len(one & other) / 10 for one, other in zip(found, best, strict=True)]) == pytest.approx(
        scan.recall["texts"], abs=0.02
    )


def test_scores_are_exact_and_all_that_is_asked_for_is_found(built: IndexTables, texts: Tensor):
    index = ImageIndex(built)
    for text in texts[:5]:
        found = index.search(text, top=30, folded=False)
        exact = {result.id: result.score for result in index.search(text, top=COUNT, folded=False, exact=True)}
        assert len(found) == 30
        assert [result.score for result in found] == pytest.approx([exact[result.id] for result in found], abs=1e-6)


def test_cutoff_is_nearly_that_of_all_scores(built: IndexTables, texts: Tensor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(approximate_scan, "SAMPLE", 600)
    monkeypatch.setattr(approximate_scan, "HIGHEST", 100)
    index = ImageIndex(built)
    for direction in (*texts[:5], *embeddings_of([3, 8])):
        exact = index.search(direction, top=5, cutoff="auto", exact=True)
        found = index.search(direction, top=5, cutoff="auto")
        assert found.least_score == pytest.approx(exact.least_score, abs=0.03)
        assert found.best_score == pytest.approx(exact.best_score, abs=0.01)


def test_no_matrix_of_all_images_is_read(built: IndexTables, texts: Tensor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ImageIndex, "matrix", lambda self: pytest.fail("all embeddings were read"))
    index = ImageIndex(built)
    assert index.search(texts[0], top=3)
    assert index.search([part(5), part(7, -0.5)], top=3)[0].id % 40 == 5


def part(id: int, weight: float = 1.0) -> Any:
    from hf_clip.search.query import QueryPart

    return QueryPart("id", str(id), weight)


def test_filters(built: IndexTables, texts: Tensor, monkeypatch: pytest.MonkeyPatch):
    index = ImageIndex(built)
    few = "path LIKE '/photos/3/%'"
    expected = [result.id for result in index.search(texts[0], top=20, where=few, folded=False, exact=True)]
    assert [result.id for result in index.search(texts[0], top=20, where=few, folded=False)] == expected
    monkeypatch.setattr(approximate_scan, "FILTERED_EXACTLY", 10)  # LanceDB filters
    found = [result.id for result in index.search(texts[0], top=20, where=few, folded=False)]
    assert all(id % 10 == 3 for id in found)
    assert len({*found} & {*expected}) >= 18
    assert len(index.search(texts[0], top=20, where="id IN (1, 2, 3)", folded=False)) == 3
    with pytest.raises(SearchIndexError, match="The filter 'colour = 3' cannot be used"):
        index.search(texts[0], where="colour = 3")


def test_updates_are_seen_at_once_and_after_they_were_joined(changing: ImageIndex):
    tables = changing.tables
    new = 9_000_001
    for _ in range(2):
        tables.add(rows_of([new]))
        tables.put(rows_of([7], moved=500_000))
        tables.remove([11])
        for _ in range(2):
            direction = embeddings_of([new, 500_007, 11])
            assert changing.search(direction[0], top=1)[0].id == new
            assert changing.search(direction[1], top=1)[0].id == 7
            assert changing.search(direction[2], top=1)[0].id != 11
            assert {result.id for result in changing.search(embeddings_of([7])[0], top=3)}.isdisjoint({7})
            tables.tidy()
        tables.remove([new])
        tables.put(rows_of([7]))
        tables.add(rows_of([11]))
        assert changing.search(embeddings_of([11])[0], top=1)[0].id == 11


def test_sample_is_of_rows_that_are_there(changing: ImageIndex):
    changing.tables.remove(list(range(0, COUNT, 2)))
    found = EmbeddingsOfTables(changing.tables).sampled(200)
    assert len(set(found.ids.tolist())) == 200
    assert (found.ids % 2 == 1).all()
    assert torch.equal(found.embeddings, embeddings_of(found.ids.tolist()).half())


def test_near_duplicates_are_folded(changing: ImageIndex):
    (copy,) = rows_of([12])
    changing.tables.add([copy | {"id": 9_000_000}])
    found = changing.search(embeddings_of([12])[0], top=5)
    assert ({found[0].id, len(found[0].duplicates)}, len(found)) in [({12, 1}, 5), ({9_000_000, 1}, 5)]


def test_too_low_a_recall_is_refused(changing: ImageIndex, texts: Tensor, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(approximate_scan, "IMAGES_OF_A_PARTITION", 30)
    monkeypatch.setattr(approximate_scan, "PROBES", (1,))
    monkeypatch.setattr(approximate_scan, "RESCORED", (1,))
    with pytest.raises(
        SearchIndexError, match=r"would not find enough: recall@10 0\.\d+ for images.* 0\.95 is needed. The index is "
    ):
        build(changing.tables, texts)
    assert read_scan(changing.tables) is None
    assert list(changing.tables.images.list_indices()) == []
    assert changing.search(embeddings_of([12])[0], top=1)[0].id == 12


def test_searcher_sees_that_a_scan_was_built_and_forgotten(changing: ImageIndex):
    reader = ImageIndex(IndexTables.open(changing.tables.place))
    assert reader.approximate_scan() is not None
    forget(changing.tables)
    assert reader.approximate_scan() is None


def test_commands(
    photos: Path,
    tmp_path: Path,
    small_model: tuple[Any, Any, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def run(*words: object) -> tuple[int, str, str]:
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    place = tmp_path / "index"
    assert run("index", photos, "--model", small_model[2], "--into", place, "--approximate") == (
        1,
        f"{photos}: 6 added\n6 images in {place}\n",
        f"error: The index {place} has 6 images. An approximate scan is built for 1,000 at least: fewer are compared "
        f"one by one in milliseconds.\n",
    )
    monkeypatch.setattr(approximate_scan, "LEAST_IMAGES", 6)
    (photos / "broken.png").unlink()
    status, out, err = run("index", "--into", place, "--approximate")
    assert (status, err) == (0, "")
    assert out.splitlines()[2] == (
        "approximate scan: recall@10 1.000 for images, 1.000 for texts; 1 partitions and 64 images per query"
    )
    status, out, _ = run("search", "three", "--index", place, "--json")
    found = json.loads(out)
    assert found["scan"] == {"kind": "approximate", "recall": {"images": 1.0, "texts": 1.0}}
    status, out, _ = run("search", "three", "--index", place, "--json", "--exact")
    assert json.loads(out) == {"results": found["results"]}
