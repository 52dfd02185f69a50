"""Several processes come to the figures of one, and an error in one of them is an error of all."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from demo.digits import DIGITS
from hf_clip.evaluation import feature_cache, grid
from hf_clip.evaluation.composition import evaluate_composition
from hf_clip.evaluation.embedder import Embedder
from hf_clip.evaluation.processes import OtherProcessError, ProcessEndedError, Processes, current
from hf_clip.evaluation.ranking import hub_bias, rank_both_ways
from hf_clip.evaluation.retrieval import evaluate_retrieval
from hf_clip.evaluation.zero_shot import evaluate_zero_shot

from .data_sets import TEMPLATES, captioned, write_class_folders
from .threads import in_processes

Clip = tuple[Any, Any]
ANY: dict[str, Any] = {"templates": TEMPLATES, "batch_size": 8, "mistakes": 5, "threads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> Path:
    """119 images, two of a kind, and one that cannot be opened. Tests must not write there."""
    folder = write_class_folders(tmp_path_factory.mktemp("folders") / "digits", (rows + rows)[:119])
    (folder / DIGITS[3] / "damaged.png").write_bytes(b"no image")
    return folder


def plain(value: Any) -> Any:
    """A result as values that are compared by ==."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [plain(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("count", [2, 3])
def test_zero_shot_is_that_of_one_process(count: int, small_clip: Clip, folder: Path):
    one = evaluate_zero_shot(*small_clip, folder, **ANY)
    assert (one.count, len(one.unreadable)) == (119, 1)
    several = in_processes(count, lambda _: evaluate_zero_shot(*small_clip, folder, **ANY))
    assert [plain(result) for result in several] == [plain(one)] * count


def test_each_process_encodes_its_share(small_clip: Clip, folder: Path, monkeypatch: pytest.MonkeyPatch):
    images, texts = {}, {}
    real, real_texts = Embedder.encode, Embedder._text_features

    def encode(self: Embedder, pixels: torch.Tensor) -> torch.Tensor:
        images[self.processes.rank] = images.get(self.processes.rank, 0) + len(pixels)
        return real(self, pixels)

    def text_features(self: Embedder, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        texts[self.processes.rank] = texts.get(self.processes.rank, 0) + len(tokens["input_ids"])
        return real_texts(self, tokens)

    monkeypatch.setattr(Embedder, "encode", encode)
    monkeypatch.setattr(Embedder, "_text_features", text_features)
    in_processes(2, lambda _: evaluate_zero_shot(*small_clip, folder, **ANY))
    assert (sum(images.values()), sum(texts.values())) == (119, 20)
    assert min(images.values()) >= 119 - 64
    assert sorted(texts.values()) == [4, 16]


def test_stream_is_that_of_one_process(small_clip: Clip, rows: list[dict[str, Any]]):
    table = Dataset.from_list([{"image": {"bytes": row["bytes"], "path": None}, "label": row["label"]} for row in rows])

    def measure(_: Any = None) -> Any:
        stream = table.to_iterable_dataset(num_shards=4)  # its own for each, as processes have
        return plain(evaluate_zero_shot(*small_clip, stream, **ANY | {"class_names": DIGITS}))

    one = measure()
    assert one["count"] == 60
    assert in_processes(2, measure) == [one] * 2


def test_retrieval_and_composition_are_those_of_one_process(small_clip: Clip, rows: list[dict[str, Any]]):
    table, others = captioned((rows + rows)[:90]), captioned(rows[30:])
    wrong = table.add_column("negative_caption", [row["caption"] for row in (rows + rows)[1:91]])
    given: dict[str, Any] = {"batch_size": 4, "threads": 1}
    corrected = given | {"hub_correction": 0.5, "references": others, "hub_k": 7}

    def measure(_: Any = None) -> list[Any]:
        return [
            plain(evaluate_retrieval(*small_clip, table, **corrected)),
            plain(evaluate_composition(*small_clip, wrong, **given)),
        ]

    one = measure()
    assert (one[0]["images"], one[0]["texts"], one[1]["count"]) == (60, 90, 90)
    assert in_processes(2, measure) == [one] * 2


def test_ranks_are_found_by_blocks_of_several_processes():
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(50, 8, generator=generator), torch.randn(120, 8, generator=generator)
    ids, text_ids = torch.arange(50), torch.arange(120) % 50
    one = rank_both_ways(images, texts, ids, text_ids, sizes=(16, 32))
    bias = hub_bias(images, texts, k=5, chunk=16)
    for ranks, own_bias in in_processes(
        3,
        lambda own: (
            rank_both_ways(images, texts, ids, text_ids, sizes=(16, 32), processes=own),
            hub_bias(images, texts, k=5, chunk=16, processes=own),
        ),
    ):
        assert all(torch.equal(found, expected) for found, expected in zip(ranks, one, strict=True))
        assert torch.equal(own_bias, bias)


def test_cache_serves_any_number_of_processes(
    small_clip: Clip, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(feature_cache, "ROWS_AT_LEAST", 24)
    encoded: list[int] = []
    real = Embedder.encode
    monkeypatch.setattr(Embedder, "encode", lambda self, pixels: encoded.append(len(pixels)) or real(self, pixels))
    one = plain(evaluate_zero_shot(*small_clip, folder, **ANY))
    given = ANY | {"feature_cache": tmp_path}
    assert [plain(r) for r in in_processes(2, lambda _: evaluate_zero_shot(*small_clip, folder, **given))] == [one] * 2
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 5
    files[3].unlink()  # as after an interruption
    for count in (3, 1):
        encoded.clear()
        several = in_processes(count, lambda _: evaluate_zero_shot(*small_clip, folder, **given))
        assert [plain(result) for result in several] == [one] * count
        assert sum(encoded) == {3: 119 - 72, 1: 0}[count]
        assert sorted(tmp_path.rglob("*.safetensors")) == files


def test_error_of_one_is_raised_in_all(small_clip: Clip, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """And afterwards they measure on, in step."""
    real = Embedder.encode

    def encode(self: Embedder, pixels: torch.Tensor) -> torch.Tensor:
        if self.processes.rank == 1 and self.batch_size == 7:
            raise ValueError("the image is gone")
        return real(self, pixels)

    monkeypatch.setattr(Embedder, "encode", encode)

    def measure(own: Processes) -> tuple[Exception, float]:
        with pytest.raises(ValueError, match="gone") as caught, own.together("one cell"):
            evaluate_zero_shot(*small_clip, folder, **ANY | {"batch_size": 7})
        return caught.value, evaluate_zero_shot(*small_clip, folder, **ANY).value

    found = in_processes(3, measure)
    assert [str(error) for error, _ in found] == ["the image is gone"] * 3
    assert [isinstance(error, OtherProcessError) for error, _ in found] == [True, False, True]
    assert len({value for _, value in found}) == 1


def test_fault_of_one_ends_all():
    def work(own: Processes) -> None:
        with own.together("all"):
            try:
                with own.together("a cell"):
                    if own.rank == 0:
                        raise ValueError("mendable")
                    if own.rank == 1:
                        raise AttributeError("no such thing")
            except ValueError:
                raise AssertionError("goes on, though process 1 cannot") from None

    errors = in_processes(3, work)
    assert [type(error) for error in errors] == [ProcessEndedError, AttributeError, ProcessEndedError]
    assert str(errors[2]) == "Process 1 of 3 failed: AttributeError: no such thing"


def test_data_that_differ_are_an_error(small_clip: Clip, rows: list[dict[str, Any]]):
    def work(own: Processes) -> None:
        with own.together("a cell"):
            evaluate_retrieval(*small_clip, captioned(rows[: 16 + own.rank]), batch_size=4, threads=1)

    errors = in_processes(2, work)
    assert [type(error) for error in errors] == [OtherProcessError] * 2
    assert "The processes do not measure the same: one is at row 0 of the data set" in str(errors[0])


def test_grid_is_written_by_the_main_process(
    digits: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    writers: list[int] = []
    real = grid._keep
    monkeypatch.setattr(grid, "_keep", lambda *given: writers.append(current().rank) or real(*given))

    def measure(model: Any, processor: Any, name: str) -> Any:
        if name == "broken" and current().rank == 1:
            raise OSError("the disk is gone")
        return evaluate_zero_shot(model, processor, folder, **ANY | {"mistakes": 0})

    def work(own: Processes) -> tuple[grid.Outcome, list[str]]:
        said: list[str] = []
        names, output = ["good", "broken", "other"], tmp_path / f"{own.count}"
        given: dict[str, Any] = {"options": {}, "plots": False, "say": said.append}
        return grid.run_grid("zero-shot", [str(digits / "vit")], names, output, measure, **given), said

    (one, _), *_ = in_processes(1, work)
    several = in_processes(2, work)
    assert (len(one.records), writers) == (3, [0] * 5)
    for outcome, said in several:
        assert outcome.failures == [f"{digits / 'vit'} on broken: the disk is gone"]
        assert said == [f"error: {outcome.failures[0]}"]
        assert [record["metrics"] for record in outcome.records] == [one.records[0]["metrics"]] * 2
    assert len(json.loads((tmp_path / "2" / "results.json").read_text())) == 2
    # What is there is not measured again, by another number of processes neither.
    monkeypatch.setattr(grid, "load_model", lambda *given: pytest.fail("loaded again"))
    names = ["good", "other"]
    again = grid.run_grid("zero-shot", [str(digits / "vit")], names, tmp_path / "2", measure, options={}, plots=False)
    assert (again.skipped, again.records) == (2, several[0][0].records)
