"""Quantized scans: errors within their bounds, the best as the exact scan has them, and files that are whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_clip.commands.program import main
from hf_clip.search import quantized_scan
from hf_clip.search.embed_source import embed_source
from hf_clip.search.exact_scan import EmbeddingMatrix
from hf_clip.search.image_index import ImageIndex
from hf_clip.search.index_table import SearchIndexError
from hf_clip.search.quantized_files import quantize
from hf_clip.search.quantized_scan import (
    BitCodes,
    Int8Codes,
    QuantizedFileError,
    QuantizedMatrix,
    count_ones,
    count_ones_by_table,
    kept_recall,
)

from .test_image_index import TEXT

WIDTHS = [24, 64, 70, 128]


def embeddings(width: int, count: int = 500, seed: int = 0) -> Tensor:
    """Around a common direction, as CLIP's are, with some dimensions that are large in all of them."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(width, generator=generator) / width**0.5
    common[:2] *= 5
    return normalize(common + torch.randn(count, width, generator=generator) * 0.6 / width**0.5, dim=1).half()


@pytest.fixture(params=WIDTHS)
def matrix(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> EmbeddingMatrix:
    monkeypatch.setattr(quantized_scan, "ROWS_AT_ONCE", 64)
    monkeypatch.setattr(quantized_scan, "INT8_ROWS_AT_ONCE", 64)
    found = embeddings(request.param)
    return EmbeddingMatrix(torch.arange(len(found)) * 3 + 1, found, 7)


def queries_for(matrix: EmbeddingMatrix) -> Tensor:
    """Images of the matrix, and other directions, as texts are."""
    others = torch.randn(4, matrix.embeddings.shape[1], generator=torch.Generator().manual_seed(2))
    return torch.cat([matrix.embeddings[:4].float(), normalize(others, dim=1)])


def test_errors_of_int8_are_within_their_bound(matrix: EmbeddingMatrix):
    codes, queries = Int8Codes.encode(matrix.embeddings), queries_for(matrix)
    errors = (codes.similarities(queries) - queries @ matrix.embeddings.float().T).abs()
    bounds = queries.abs() @ codes.scales / 2
    assert (errors <= bounds[:, None] + 1e-5).all()
    assert (errors.amax(1) > bounds / 50).all()  # the bound is not loose beyond use


def test_bits_are_summed_as_the_formula_says(matrix: EmbeddingMatrix):
    codes, queries = BitCodes.encode(matrix.embeddings), queries_for(matrix)
    centred = matrix.embeddings.float() - codes.mean
    rotated = centred @ codes.rotation.T
    assert torch.allclose(codes.rotation @ codes.rotation.T, torch.eye(len(codes.mean)), atol=1e-5)
    rounded = np.random.default_rng(0).integers(0, 16, len(codes.mean))
    assert torch.equal(codes._sums(rounded), (rotated > 0).float() @ torch.from_numpy(rounded).float())
    share = queries @ codes.mean / codes.mean.square().sum()
    rest = (queries - share[:, None] * codes.mean) @ codes.rotation.T
    factors = centred.square().sum(1) / rotated.abs().sum(1)
    plain = (
        (rest @ rotated.sign().T) * factors + share[:, None] * (centred @ codes.mean) + (queries @ codes.mean)[:, None]
    )
    steps = (rest.amax(1) - rest.amin(1)) / 15
    bounds = steps[:, None] / 2 * len(codes.mean) * factors
    assert ((codes.similarities(queries) - plain).abs() <= bounds + 1e-5).all()
    # An embedding is its own estimate: the factor makes it exact along itself.
    own = (rest[:4] @ rotated[:4].sign().T).diagonal() * factors[:4]
    assert torch.allclose(own, (rotated[:4].abs().sum(1) * factors[:4]), rtol=0.3)


def test_estimates_of_bits_are_not_biased():
    found = embeddings(128, 4000)
    queries = normalize(torch.randn(8, 128, generator=torch.Generator().manual_seed(1)), dim=1)
    errors = BitCodes.encode(found).similarities(queries) - queries @ found.float().T
    assert (errors.mean(1).abs() < errors.std(1) / 5).all()


@pytest.mark.parametrize("kind", ["int8", "bits"])
def test_the_best_are_as_the_exact_scan_has_them(kind: str, matrix: EmbeddingMatrix):
    found, queries = QuantizedMatrix.quantize(matrix, kind), queries_for(matrix)
    exact = matrix.similarities(queries)
    scores, places = found.nearest(queries, 10, oversample=50)  # as many as there are
    assert torch.equal(places, exact.topk(10).indices)
    assert torch.allclose(scores, exact.topk(10).values, atol=1e-6)
    found.rescored = 60
    near = found.similarities(queries)
    best = near.topk(60)
    assert torch.allclose(best.values, exact.gather(1, best.indices), atol=1e-6)
    assert kept_recall(found) > {"int8": 0.99, "bits": 0.8}[kind]
    found.rescored = 10
    assert kept_recall(found) > {"int8": 0.95, "bits": 0.3}[kind]
    found.rescored = len(matrix)
    assert kept_recall(found) == 1
    assert found.code_bytes < {"int8": 0.6, "bits": 1}[kind] * matrix.embeddings.numel() * 2 + len(matrix) * 10 + 2**17


@pytest.mark.parametrize("kind", ["int8", "bits"])
def test_what_is_left_by_a_filter_is_compared_again(kind: str, matrix: EmbeddingMatrix):
    found, queries = QuantizedMatrix.quantize(matrix, kind), queries_for(matrix)
    found.rescored = 50
    is_out = torch.arange(len(matrix)) % 20 != 3  # 25 are left
    left = found.refine(found.similarities(queries).masked_fill(is_out, -torch.inf), queries)
    exact = matrix.similarities(queries).masked_fill(is_out, -torch.inf)
    assert torch.equal(left.isinf(), exact.isinf())
    assert torch.allclose(left[:, ~is_out], exact[:, ~is_out], atol=1e-6)
    assert torch.equal(matrix.refine(exact, queries), exact)


def test_ones_are_counted_by_table_as_by_numpy():
    words = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    expected = [bin(int(word)).count("1") for word in words]
    assert count_ones(words).tolist() == expected
    assert count_ones_by_table(words).tolist() == expected
    table = words.reshape(10, 100)  # as near duplicates are compared
    assert count_ones_by_table(table).tolist() == count_ones(table).tolist()


@pytest.mark.parametrize("kind", ["int8", "bits"])
@pytest.mark.parametrize("count", [1, 2])
def test_few_or_equal_embeddings(kind: str, count: int):
    same = EmbeddingMatrix(torch.arange(count), embeddings(64, 1).expand(count, 64).contiguous())
    found = QuantizedMatrix.quantize(same, kind)
    assert torch.allclose(found.similarities(same.embeddings.float()), torch.ones(count, count), atol=1e-3)
    assert found.nearest(same.embeddings.float(), 5)[0].shape == (count, count)
    assert kept_recall(found) == 1


@pytest.mark.parametrize("kind", ["int8", "bits"])
def test_file(kind: str, matrix: EmbeddingMatrix, tmp_path: Path):
    found = QuantizedMatrix.quantize(matrix, kind)
    found.save(tmp_path / "file", {"weights": "x"})
    opened = QuantizedMatrix.open(tmp_path / "file")
    queries = queries_for(matrix)
    assert torch.equal(opened.similarities(queries), found.similarities(queries))
    assert torch.equal(opened.ids, matrix.ids)
    assert (opened.kind, opened.version, opened.metadata["weights"]) == (kind, 7, "x")
    content = (tmp_path / "file").read_bytes()
    damaged = bytearray(content)
    name = {"int8": b'"codes"', "bits": b'"words"'}[kind]
    start = int(content[content.index(name) :].split(b'"data_offsets":[')[1].split(b",")[0])
    damaged[8 + int.from_bytes(content[:8], "little") + start] ^= 1
    for wrong, message in [
        (content[: len(content) // 2], "is no whole file of quantized embeddings"),
        (b"", "is no whole file of quantized embeddings"),
        (bytes(damaged), "is damaged: quantize again"),
        (content.replace(b'"format":"1"', b'"format":"9"'), "is of another version of hf_clip"),
    ]:
        (tmp_path / "file").write_bytes(wrong)
        with pytest.raises(QuantizedFileError, match=message) as caught:
            QuantizedMatrix.open(tmp_path / "file")
        assert caught.value.path == str(tmp_path / "file")
    with pytest.raises(QuantizedFileError, match="There is no file"):
        QuantizedMatrix.open(tmp_path / "missing")


@pytest.mark.parametrize("kind", ["int8", "bits"])
def test_index_is_searched_by_codes(kind: str, photos: Path, new_index: Callable[..., ImageIndex], tmp_path: Path):
    index = new_index()
    index.add(photos)
    expected = index.search(TEXT)
    with pytest.raises(QuantizedFileError, match=rf"was not quantized to {kind}: make it with `hf-clip quantize"):
        index.use_quantized(kind)
    done = quantize(tmp_path / "index", kind)
    assert (done.images, done.recall) == (6, 1)
    index.use_quantized(kind)
    assert isinstance(index.matrix(), QuantizedMatrix)
    found = index.search(TEXT)
    assert [result.path for result in found] == [result.path for result in expected]
    assert [result.score for result in found] == pytest.approx([result.score for result in expected], abs=1e-5)
    assert len(index.search(TEXT, where="path LIKE '%/inner/%'")) == 3
    (photos / "a.png").unlink()
    index.add(photos)
    with pytest.raises(
        SearchIndexError, match=rf"has changed since it was quantized: run `hf-clip .* --to {kind}` again"
    ):
        index.search(TEXT)
    index.use_quantized(None)
    assert len(index.search(TEXT)) == 5


def test_command(
    photos: Path,
    tmp_path: Path,
    small_model: tuple[Any, Any, str],
    new_index: Callable[..., ImageIndex],
    capsys: pytest.CaptureFixture[str],
):
    model, processor, _ = small_model
    place = str(tmp_path / "embeddings")
    embed_source(photos, place, model=model, processor=processor, layout="clip-retrieval")
    assert main(["quantize", place, "--to", "bits"]) == 0
    assert capsys.readouterr().out.startswith(
        f"6 embeddings in {place}/_quantized-bits.safetensors\nrecall@10 1.0000\n"
    )
    new_index().add(photos)
    index = str(tmp_path / "index")
    assert main(["quantize", index, "--to", "int8"]) == 0
    capsys.readouterr()
    assert main(["search", TEXT, "--index", index, "--quantized", "int8", "--top", "1"]) == 0
    quantized = capsys.readouterr().out
    assert main(["search", TEXT, "--index", index, "--top", "1"]) == 0
    assert capsys.readouterr().out == quantized
    for words, message in [
        (["quantize", index, "--to", "int3"], "Embeddings cannot be quantized to 'int3'; choose int8 or bits."),
        (["quantize", str(tmp_path / "missing"), "--to", "int8"], "There is no index and no folder of embeddings at"),
        (["quantize", str(photos), "--to", "int8"], "holds other files, and no index"),
        (["quantize", "s3://bucket/index", "--to", "int8"], "is no folder of this machine: name a file"),
        (["search", "x", "--index", index, "--quantized", "bits"], "was not quantized to bits"),
    ]:
        assert main(words) == 1
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
