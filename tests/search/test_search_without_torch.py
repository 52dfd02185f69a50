"""A search of the command line without torch, transformers and LanceDB: the results that it has with them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from safetensors.torch import load_file, save_file

from hf_clip.commands.program import main
from hf_clip.search import known_text_tower, search_copy, updatable_index
from hf_clip.search.exact_scan import EmbeddingMatrix
from hf_clip.search.image_index import ImageIndex, SearchResults
from hf_clip.search.index_table import IndexTables
from hf_clip.search.plain_scan import PlainMatrix
from hf_clip.search.query import parse_queries
from hf_clip.search.result_cutoff import NOTE as LEVELS
from hf_clip.search.search_copy import NAME, CopiedTables, keep_copy

from .conftest import make_image
from .test_bad_input import error_of

SENTENCE = "a blue three on yellow paper."


@pytest.fixture(scope="module")
def model(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder. Tests must not write there."""
    return shutil.copytree(digits / "vit", tmp_path_factory.mktemp("model") / "vit")


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of 30 images, two of which are near duplicates, with its copy. Tests must not write there."""
    folder, place = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("index") / "index"
    for seed in range(29):
        make_image(seed, (24, 24)).save(folder / f"{seed:02}.png")
    make_image(3, (48, 48)).save(folder / "copy.png")
    assert main(["index", str(folder), "--model", str(model), "--into", str(place)]) == 0
    main(["search", SENTENCE, "--index", str(place)])
    main(["search", "--more-like", "1", "--index", str(place)])
    return place


@pytest.fixture(scope="module")
def by_torch(made: Path) -> ImageIndex:
    return ImageIndex(IndexTables.open(str(made)))


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """The same index, to do with as one likes."""
    place = shutil.copytree(made, tmp_path / "index")
    keep_copy(IndexTables.open(str(place)))  # times of files have changed
    return place


def test_numbers_of_a_part_of_a_table():
    """Arrow's parts of a table begin somewhere in the memory of the whole, and columns are of several pieces."""
    values = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float16)
    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.ravel()), 4)
    table = pyarrow.table({"id": np.arange(10), "embedding": column})
    pieces = pyarrow.concat_tables([table.slice(3, 2), table.slice(6, 3)])
    for rows, places in ((table.slice(4, 5), range(4, 9)), (pieces, [3, 4, 6, 7, 8]), (table.slice(2, 0), [])):
        found = PlainMatrix.of_table(rows)
        assert found.ids.tolist() == list(places)
        np.testing.assert_array_equal(found.embeddings, values[list(places)])
    assert PlainMatrix.of_table(table.slice(2, 3).to_batches()[0]).ids.tolist() == [2, 3, 4]


def agree(lines: list[str], others: list[str]) -> bool:
    """Whether two searches printed the same ids, and scores that differ by a rounding of the last digit at most."""
    rows, expected = ([line.split() for line in each] for each in (lines, others))
    scores = [abs(float(one[0]) - float(other[0])) for one, other in zip(rows, expected, strict=True)]
    return [row[1] for row in rows] == [row[1] for row in expected] and max(scores) < 1.1e-4


def run(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    assert main(["search", *map(str, words)]) == 0
    return capsys.readouterr().out.splitlines()


def ids_of(found: SearchResults) -> list[tuple[int, list[str]]]:
    return [(result.id, result.duplicates) for result in found]


@pytest.mark.parametrize("tables", [IndexTables, CopiedTables])
@pytest.mark.parametrize(
    ("words", "minus", "more_like", "settings"),
    [
        ([SENTENCE], [], [], {}),
        (["three"], [], [], {}),
        (["three"], [], [], {"cutoff": None, "folded": False, "top": 30}),
        (["three"], [], [], {"templates": ["a {}.", "the {} on paper."]}),
        ([SENTENCE], ["green"], [], {"cutoff": None}),
        (['2:"a red eight" + "on green paper" - 0.5:"five"'], [], [], {}),
        (["three"], [], [4], {"cutoff": None}),
        ([], ["three"], [4, 7], {}),
        ([], [], [4], {"cutoff": 0.1}),
        ([SENTENCE], [], [], {"cutoff": 0.0, "top": 3}),
        (["seven " * 60], [], [], {"cutoff": None}),
    ],
)
def test_results_equal_those_of_torch(
    words: list[str],
    minus: list[str],
    more_like: list[int],
    settings: dict[str, Any],
    tables: type[IndexTables | CopiedTables],
    made: Path,
    by_torch: ImageIndex,
    monkeypatch: pytest.MonkeyPatch,
):
    parts = parse_queries(words, minus, more_like)
    settings = {"top": 10, "cutoff": "auto"} | settings
    expected = by_torch.search(parts, **settings)
    assert isinstance(by_torch.matrix(), EmbeddingMatrix)
    monkeypatch.setattr(updatable_index, "load", lambda name: pytest.fail("the model is loaded"))
    opened = tables.open(str(made))
    assert opened is not None
    index = ImageIndex(opened)  # type: ignore[arg-type]
    assert index.avoid_torch(parts)
    found = index.search(parts, **settings)
    assert isinstance(index.matrix(), PlainMatrix)
    assert ids_of(found) == ids_of(expected)
    assert [result.score for result in found] == pytest.approx([result.score for result in expected], abs=1e-5)
    assert found.least_score == pytest.approx(expected.least_score, abs=1e-4)
    assert found.best_score == pytest.approx(expected.best_score, abs=1e-5)


def test_filters_and_what_needs_the_model(made: Path, by_torch: ImageIndex):
    parts = parse_queries([SENTENCE])
    expected = by_torch.search(parts, where="id < 9")
    index = ImageIndex(IndexTables.open(str(made)))
    assert index.avoid_torch(parts)
    found = index.search(parts, where="id < 9")
    assert 0 < len(found) < 9
    assert ids_of(found) == ids_of(expected)
    assert not ImageIndex(IndexTables.open(str(made))).avoid_torch(parse_queries(["a.jpg"])), "an image needs the model"


def test_quantized_embeddings_and_texts_in_numpy(place: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["quantize", str(place), "--to", "int8"]) == 0
    capsys.readouterr()
    words = (SENTENCE, "--index", place, "--cutoff", "off")
    assert agree(run(capsys, *words, "--quantized", "int8"), run(capsys, *words))


def test_python_searches_by_torch(made: Path, model: Path):
    index = ImageIndex.open(made, model=model)
    index.search(SENTENCE)
    assert isinstance(index.matrix(), EmbeddingMatrix)
    assert not index.avoid_torch(parse_queries([SENTENCE])), "the model is in memory"


def counting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that are loaded from now on."""
    loaded: list[str] = []
    load = updatable_index.load
    monkeypatch.setattr(updatable_index, "load", lambda name: loaded.append(name) or load(name))
    return loaded


def test_model_that_has_changed_is_loaded_once_more(
    place: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A folder whose text tower was trained on, and whose image tower is that of the index."""
    other = shutil.copytree(model, tmp_path / "other")
    tensors = {name: tensor.clone() for name, tensor in load_file(other / "model.safetensors").items()}
    tensors["text_projection.weight"] = -tensors["text_projection.weight"]
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    words = (SENTENCE, "--index", place, "--cutoff", "off", "--top", "30", "--all-copies")
    loaded = counting(monkeypatch)
    before = run(capsys, *words)
    assert loaded == []
    turned = run(capsys, *words, "--model", other)
    assert loaded == [str(other)]
    assert [line.split()[1] for line in turned] == [line.split()[1] for line in reversed(before)]
    assert agree(run(capsys, *words), turned), "the new place is remembered"
    assert loaded == [str(other)]
    os.utime(other / "model.safetensors", ns=(0, 0))
    for _ in range(2):
        assert agree(run(capsys, *words), turned)
    assert loaded == 2 * [str(other)]

    (other / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes()[:-100])
    error = error_of(capsys, "search", SENTENCE, "--index", place)
    assert str(other) in error
    assert "damaged or cut off" in error


@pytest.mark.parametrize("wrong", ["embeddings", "layout"])
def test_text_tower_that_differs_is_not_used(
    wrong: str, place: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from hf_clip.zero_shot.plain_text_tower import PlainTextTower

    words = (SENTENCE, "--index", place, "--cutoff", "off")
    expected = run(capsys, *words)
    encode = PlainTextTower.encode

    def encode_wrongly(self: PlainTextTower, texts: Any) -> Any:
        if wrong == "layout":
            raise OSError("no such weight")
        return encode(self, texts)[:, ::-1]

    monkeypatch.setattr(PlainTextTower, "encode", encode_wrongly)
    IndexTables.open(str(place)).note(known_text_tower.NOTE, None)
    compared: list[Path] = []
    compare = known_text_tower._compare
    monkeypatch.setattr(
        known_text_tower, "_compare", lambda folder, *given: compared.append(folder) or compare(folder, *given)
    )
    loaded = counting(monkeypatch)
    for _ in range(3):
        assert agree(run(capsys, *words), expected)
    assert len(loaded) == 3, "by torch each time"
    assert compared == [model], "which is compared once"


def test_copy_is_of_the_index_as_it_is(place: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = (SENTENCE, "--index", place, "--cutoff", "off", "--top", "50", "--all-copies")
    assert CopiedTables.open(str(place)) is not None
    assert len(run(capsys, *words)) == 30
    more = tmp_path / "more"
    more.mkdir()
    make_image(77).save(more / "new.png")
    ImageIndex.open(place).add(more)
    assert CopiedTables.open(str(place)) is None
    assert len(run(capsys, *words)) == 31
    assert CopiedTables.open(str(place)) is not None
    IndexTables.open(str(place)).remove([1, 2])
    assert len(run(capsys, *words)) == 29
    assert run(capsys, *words) == run(capsys, *words, "--filter", "id > 0")
    page = tmp_path / "page.html"
    run(capsys, *words, "--html", page)
    assert page.read_text().count("data:image/jpeg") == 29, "thumbnails are those of the tables"
    rows = json.loads("\n".join(run(capsys, *words, "--json")))["results"]
    assert rows == json.loads("\n".join(run(capsys, *words, "--json", "--filter", "id > 0")))["results"]


def damage(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


@pytest.mark.parametrize(
    "spoil",
    [
        damage(lambda content: content[:-1]),
        damage(lambda content: content[:10]),
        damage(lambda content: b" "),
        damage(lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]),
        damage(lambda content: content.replace(b"copy 1", b"copy 2", 1)),
        Path.unlink,
    ],
    ids=["cut", "header", "blank", "one bit", "version", "gone"],
)
def test_copy_that_is_damaged_is_written_anew(
    spoil: Callable[[Path], None], place: Path, capsys: pytest.CaptureFixture[str]
):
    words = (SENTENCE, "--index", place, "--cutoff", "off")
    expected = run(capsys, *words)
    spoil(place / NAME)
    assert CopiedTables.open(str(place)) is None
    assert run(capsys, *words) == expected
    assert CopiedTables.open(str(place)) is not None


def test_notes_of_a_search_by_the_copy_are_kept(place: Path, capsys: pytest.CaptureFixture[str]):
    tables = IndexTables.open(str(place))
    tables.note(LEVELS, {"texts": tables.noted(LEVELS)["texts"]})
    keep_copy(tables)
    run(capsys, "--more-like", "4", "--index", place)  # measures images, and has to write that
    assert IndexTables.open(str(place)).noted(LEVELS).keys() == {"texts", "images"}
    copied = CopiedTables.open(str(place))
    assert copied is not None
    assert copied.noted(LEVELS).keys() == {"texts", "images"}


def test_where_no_copy_is_written(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    (place / NAME).unlink()
    words = (SENTENCE, "--index", place, "--cutoff", "off")
    monkeypatch.setattr(search_copy, "MOST_IMAGES", 29)
    expected = run(capsys, *words)
    assert not (place / NAME).exists()
    monkeypatch.undo()

    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(search_copy, "whole_file", refuse)
    assert run(capsys, *words) == expected
    assert sorted(path.name for path in place.glob("*search_copy*")) == []
