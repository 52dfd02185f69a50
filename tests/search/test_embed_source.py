"""Embeddings as files: the same in every layout, whole after an interruption, and refused where they do not fit."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from hf_clip import encode_images, encode_texts
from hf_clip.commands.program import main
from hf_clip.search import embed_source as module
from hf_clip.search.embed_source import embed_source
from hf_clip.search.embedding_files import RECORD, StoredEmbeddings
from hf_clip.search.embedding_place import EmbeddingFilesError
from hf_clip.search.row_encoding import EmbeddedRow

from .conftest import make_image
from .test_data_set_rows import png, save

SEEDS = [1, 2, 3, 4, 5, 6, 7]
BROKEN = 2


@pytest.fixture
def source(tmp_path: Path) -> str:
    return save(tmp_path / "data", SEEDS, broken=BROKEN)


@pytest.fixture
def embed(tmp_path: Path, source: str, small_model: tuple[Any, Any, str]) -> Callable[..., Any]:
    model, processor, _ = small_model
    how = {"model": model, "processor": processor, "shard_rows": 3, "batch_size": 2}
    return lambda out="out", **more: embed_source(more.pop("source", source), tmp_path / out, **(how | more))


@pytest.fixture
def expected(small_model: tuple[Any, Any, str]) -> tuple[np.ndarray, np.ndarray]:
    model, processor, _ = small_model
    seeds = [seed for place, seed in enumerate(SEEDS) if place != BROKEN]
    images = encode_images(model, processor, [make_image(seed) for seed in seeds])
    return images.numpy(), encode_texts(model, processor, [f"image {seed}" for seed in seeds]).numpy()


def all_of(place: Path) -> dict[str, Any]:
    shards = list(StoredEmbeddings(place))
    texts = [shard.text_embeddings for shard in shards]
    return {
        "embeddings": np.concatenate([shard.embeddings for shard in shards]),
        "text_embeddings": None
        if None in [type(text) if text is None else 1 for text in texts]
        else np.concatenate(texts),
        "captions": [text for shard in shards for text in shard.captions],
        "metadata": [json.loads(text or "{}") for shard in shards for text in shard.metadata],
        "paths": [path for shard in shards for path in shard.paths],
    }


@pytest.mark.parametrize("layout", ["parquet", "safetensors", "clip-retrieval"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_layouts_hold_the_same(
    layout: str, dtype: str, tmp_path: Path, source: str, embed: Callable[..., Any], expected: Any
):
    done = embed(layout=layout, dtype=dtype, texts=True)
    assert (done.rows, done.added, done.problems, done.shards, done.is_complete) == (6, 6, 1, 3, True)
    found = all_of(tmp_path / "out")
    assert found["embeddings"].dtype == dtype
    assert np.allclose(found["embeddings"], expected[0], atol=1e-3 if dtype == "float16" else 1e-5)
    assert np.allclose(found["text_embeddings"], expected[1], atol=1e-3 if dtype == "float16" else 1e-5)
    numbers = [0, 1, 3, 4, 5, 6]
    assert found["captions"] == [f"image {SEEDS[number]}" for number in numbers]
    assert found["metadata"] == [
        {"kind": ["even", "odd"][SEEDS[number] % 2], "year": 2000 + SEEDS[number]} for number in numbers
    ]
    (problem,) = done.reasons
    assert problem[0] == f"{source}#2"
    assert problem[1].startswith("cannot be opened")
    if layout != "clip-retrieval":
        assert found["paths"] == [f"{source}#{number}" for number in numbers]


def test_files_are_as_other_programs_read_them(tmp_path: Path, source: str, embed: Callable[..., Any], expected: Any):
    from datasets import load_dataset

    embed("parquet")
    table = pq.read_table(tmp_path / "parquet")  # the whole folder
    assert table.column_names == ["id", "path", "caption", "metadata", "embedding"]
    assert str(table.schema.field("embedding").type).endswith(f"halffloat>[{expected[0].shape[1]}]")
    assert table["id"].to_pylist() == [0, 1, 3, 4, 5, 6]
    rows = load_dataset(
        "parquet", data_files=f"{tmp_path}/parquet/*.parquet", cache_dir=tmp_path / "cache", split="train"
    )
    assert np.allclose(rows.with_format("numpy")["embedding"][:], expected[0], atol=1e-3)
    embed("safetensors", layout="safetensors")
    assert load_file(tmp_path / "safetensors/embeddings-00000.safetensors")["embedding"].shape == (
        2,
        expected[0].shape[1],
    )
    embed("other", layout="clip-retrieval", texts=True)
    names = sorted(str(path.relative_to(tmp_path / "other")) for path in (tmp_path / "other").rglob("*.[np]*"))
    assert names[:3] == [f"img_emb/img_emb_0000{number}.npy" for number in range(3)]
    assert names[3:] == sorted(
        [
            f"{kind}_0000{number}.{ending}"
            for kind, ending in (("metadata/metadata", "parquet"), ("text_emb/text_emb", "npy"))
            for number in range(3)
        ]
    )
    assert np.load(tmp_path / "other" / names[0]).dtype == np.float16
    assert pq.read_table(tmp_path / "other/metadata/metadata_00000.parquet").column_names == [
        "image_path",
        "caption",
        "kind",
        "year",
    ]


load, table = np.load, pq.read_table


class KilledError(Exception):
    pass


@pytest.mark.parametrize("kill_at", [1, 3, 4, 5, 7])
@pytest.mark.parametrize("kind", ["folder", "data set"])
def test_run_that_goes_on_writes_the_same_files(
    kill_at: int, kind: str, tmp_path: Path, embed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    if kind == "folder":
        (tmp_path / "images").mkdir()
        for number in range(7):
            (tmp_path / "images" / f"{number}.png").write_bytes(b"no image" if number == BROKEN else png(number))
    more = {"source": tmp_path / "images"} if kind == "folder" else {"texts": True}
    monkeypatch.setattr("hf_clip.search.image_rows.UNIT_ROWS", 2)
    embed("whole", **more)
    real = module._embedded_here

    def killed(*arguments: Any) -> Iterator[EmbeddedRow]:
        for number, one in enumerate(real(*arguments)):
            if number == kill_at:
                raise KilledError
            yield one

    with monkeypatch.context() as patch:
        patch.setattr(module, "_embedded_here", killed)
        if kill_at < 7:
            with pytest.raises(KilledError):
                embed("out", **more)
        else:
            embed("out", **more)
    added = embed("out", **more).added
    assert added == 6 - [0, 0, 0, 2, 2, 2, 5, 6][kill_at]
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            assert (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()
    assert embed("out", **more).added == 0


def test_ctrl_c_ends_with_a_short_shard(tmp_path: Path, embed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    real = module._embedded_here

    def interrupted(*arguments: Any) -> Iterator[EmbeddedRow]:
        for number, one in enumerate(real(*arguments)):
            if number == 1:
                os.kill(os.getpid(), signal.SIGINT)
            yield one

    with monkeypatch.context() as patch:
        patch.setattr(module, "_embedded_here", interrupted)
        with pytest.raises(KeyboardInterrupt, match="interrupted after 2 images, which are written; the same command"):
            embed(shard_rows=100)
    done = embed(shard_rows=100)
    assert (done.added, done.rows, done.shards) == (4, 6, 2)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_address(embed: Callable[..., Any], source: str, small_model: Any, expected: Any):
    import fsspec

    model, processor, _ = small_model
    out = "memory://bucket/embeddings"
    how = {"model": model, "processor": processor, "shard_rows": 3, "layout": "clip-retrieval"}
    try:
        assert embed_source(source, out, **how).shards == 3
        assert embed_source(source, out, **how).added == 0
        found = np.concatenate([shard.embeddings for shard in StoredEmbeddings(out)])
        assert np.allclose(found, expected[0], atol=1e-3)
    finally:
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_what_does_not_fit_is_refused(
    tmp_path: Path, source: str, embed: Callable[..., Any], digits: Path, small_model: Any
):
    from hf_clip import HfClipModel

    embed()
    other = HfClipModel.from_pretrained(digits / "vit").eval()
    other.visual_projection.weight.data += 1
    before = (tmp_path / "out" / RECORD).read_bytes()
    for more, message in [
        ({"model": other}, rf"holds embeddings of another model \(.*vit\) than {digits / 'vit'}: name that model"),
        ({"dtype": "float32"}, r"begun with other settings \(dtype: float16, not float32\)"),
        ({"texts": True}, r"begun with other settings \(texts: False, not True\)"),
        ({"layout": "safetensors"}, r"\(format: parquet, not safetensors\)"),
        ({"exact": True}, r"\(exact: False, not True\)"),
        ({"image_folders": [str(tmp_path)]}, r"\(image_folders: None, not \['.*'\]\)"),
        ({"source": save(tmp_path / "other-data", [1])}, "holds embeddings of .*/data, and not of .*/other-data"),
        ({"out": "data"}, "data holds other files, such as data-00000-of-00001.arrow: name an empty or a new folder"),
        ({"out": "data/state.json"}, r"state\.json is a file, but a folder is needed"),
        ({"layout": "csv"}, "There is no format 'csv'; embeddings are written as parquet, safetensors, clip-retrieval"),
        ({"dtype": "int3"}, "There is no dtype 'int3'"),
    ]:
        with pytest.raises(ValueError, match=message):
            embed(more.pop("out", "out"), **more)
    assert (tmp_path / "out" / RECORD).read_bytes() == before
    save(tmp_path / "data", [*SEEDS, 8])
    with pytest.raises(EmbeddingFilesError, match=r"data changed since its embeddings in .*out were begun") as caught:
        embed()
    assert caught.value.place == str(tmp_path / "out")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(png(1))
    with pytest.raises(ValueError, match="captions of .*images are to be encoded, but it has none"):
        embed("texts", source=tmp_path / "images", texts=True)
    assert not (tmp_path / "texts").exists()


@pytest.mark.parametrize("layout", ["parquet", "safetensors", "clip-retrieval"])
def test_damaged_files_are_refused(layout: str, tmp_path: Path, embed: Callable[..., Any]):
    embed(layout=layout)
    for has_record in (True, False):
        if not has_record and layout == "safetensors":
            continue
        for path in sorted((tmp_path / "out").rglob("*0000[01]*")):
            if path.parent.name == "_problems":
                continue
            copy = tmp_path / "copy"
            shutil.copytree(tmp_path / "out", copy)
            if not has_record:
                (copy / RECORD).unlink()
            cut = copy / path.relative_to(tmp_path / "out")
            cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            reason = "is damaged: it has" if has_record else f"is no whole {path.suffix[1:]} file"
            with pytest.raises(EmbeddingFilesError, match=reason) as caught:
                list(StoredEmbeddings(copy))
            assert caught.value.place == str(cut)
            shutil.rmtree(copy)


@pytest.mark.parametrize("layout", ["parquet", "safetensors", "clip-retrieval"])
def test_files_are_read_once(
    layout: str, tmp_path: Path, embed: Callable[..., Any], new_index: Callable[..., Any], monkeypatch: Any
):
    """Their checksums are those of what becomes of them, and nothing opens them by their paths."""
    embed(layout=layout, texts=True)
    expected = all_of(tmp_path / "out")
    whole = sorted(str(path) for path in (tmp_path / "out").rglob("*0000*") if path.parent.name != "_problems")
    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (read.append(str(path)), read_bytes(path))[1])
    monkeypatch.setattr(
        np, "load", lambda file, **how: load(file, **how) if hasattr(file, "read") else pytest.fail("a path")
    )
    monkeypatch.setattr(
        pq, "read_table", lambda file, **how: pytest.fail("a path") if isinstance(file, str) else table(file)
    )
    found = all_of(tmp_path / "out")
    assert np.array_equal(found.pop("embeddings"), expected.pop("embeddings"))
    assert np.array_equal(found.pop("text_embeddings"), expected.pop("text_embeddings"))
    assert found == expected
    assert sorted(name for name in read if RECORD not in name) == whole
    read.clear()
    assert new_index().add_embeddings(tmp_path / "out").added == 6
    assert sorted(name for name in read if RECORD not in name) == whole


def test_damaged_records_are_refused(tmp_path: Path, embed: Callable[..., Any]):
    embed()
    path = tmp_path / "out" / RECORD
    whole = path.read_text()
    for old, new in [("[", ""), ('"rows"', '"row"'), ('"files": {', '"files": 3, "x": {'), ('"bytes"', '"byte"')]:
        path.write_text(whole.replace(old, new))
        for act in (lambda: StoredEmbeddings(tmp_path / "out"), embed):
            with pytest.raises(EmbeddingFilesError, match="is damaged: remove .*, and embed anew"):
                act()


def test_files_that_do_not_belong_together(tmp_path: Path, embed: Callable[..., Any]):
    embed(layout="clip-retrieval")
    (tmp_path / "out" / RECORD).unlink()
    shutil.copy(tmp_path / "out/img_emb/img_emb_00002.npy", tmp_path / "out/img_emb/img_emb_00001.npy")
    with pytest.raises(EmbeddingFilesError, match=r"img_emb_00001\.npy holds 1 embeddings, and the table .* 3 rows"):
        list(StoredEmbeddings(tmp_path / "out"))
    (tmp_path / "out/img_emb/img_emb_00001.npy").unlink()
    with pytest.raises(EmbeddingFilesError, match="has 2 files in img_emb, 0 in text_emb and 3 in metadata"):
        StoredEmbeddings(tmp_path / "out")
    with pytest.raises(EmbeddingFilesError, match="data holds no embeddings: neither what"):
        StoredEmbeddings(tmp_path / "data")


def test_names_of_broken_files_are_one_line_each(photos: Path, small_model: Any, capsys: pytest.CaptureFixture[str]):
    """Whatever they hold: ends of lines of all kinds, signs to a terminal, bytes that are no UTF-8."""
    (photos / "broken.png").unlink()
    for name in ("a\u2028b.png", "c\x85d.png", "e\nf.png", "g\x1b[2Jh.png", os.fsdecode(b"i\xff.png")):
        (photos / name).write_bytes(b"none")
    shown = [f"{photos}/{name}.png: cannot be opened (" for name in ("a�b", "c�d", "e�f", "g�[2Jh", "i�")]
    for words in (
        ["embed", str(photos), str(photos.parent / "out")],
        ["index", str(photos), "--into", f"{photos}-index"],
    ):
        assert main([*words, "--model", small_model[2], "--errors"]) == 2
        lines = [line.partition("cannot identify")[0] for line in capsys.readouterr().err.split("\n")]
        assert sorted(lines[:-2]) == sorted(shown), words


def test_command(tmp_path: Path, source: str, small_model: Any, capsys: pytest.CaptureFixture[str]):
    words = ["embed", source, str(tmp_path / "out"), "--model", small_model[2], "--shard-rows", "4"]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == f"{source}: 6 embedded; 2 shards in {tmp_path / 'out'}\n"
    assert err == "1 image could not be opened; --errors lists them\n"
    assert main([*words, "--errors"]) == 2
    out, err = capsys.readouterr()
    assert out == f"{source}: 0 embedded, 6 before; 2 shards in {tmp_path / 'out'}\n"
    assert err.startswith(f"{source}#2: cannot be opened")
    for wrong, message in [
        (["--format", "csv"], "error: There is no format 'csv'"),
        (["--split", "x"], "has no split 'x'"),
    ]:
        assert main([*words, *wrong]) == 1
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
