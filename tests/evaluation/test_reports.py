"""Records, tables and cards; the paper's table."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, metadata_load

from hf_clip import VARIANTS, HfClipConfig
from hf_clip.evaluation.architecture import architecture_of
from hf_clip.evaluation.composition import CompositionResult
from hf_clip.evaluation.paper_data_sets import find_paper_data_set, paper_data_sets
from hf_clip.evaluation.reports import (
    is_record,
    markdown_report,
    record_of,
    table_rows,
    text_table,
    update_card,
)
from hf_clip.evaluation.retrieval import RetrievalResult
from hf_clip.evaluation.zero_shot import METRICS, ZeroShotResult

COMMON: dict[str, Any] = {"protocol": "by hand", "precision": "float32", "processor": {"size": 224}, "split": "test"}
CIFAR = "clip-benchmark/wds_vtab-cifar10"


def zero_shot_record(model: str = "clip-vit-b32", value: float = 0.9) -> dict[str, Any]:
    result = ZeroShotResult({"acc1": value, "ece": 0.05}, "acc1", 100, ["a", "b"], **COMMON)
    return record_of(result, task="zero-shot", model=model, dataset=CIFAR, architecture="ViT-B/32")


def test_record_has_the_keys_of_clip_benchmark(tmp_path: Path):
    """`clip_benchmark build` puts the metrics beside the other keys and writes a table of all files' keys."""
    row = dict(zero_shot_record())
    assert row["model"] + " " + row["pretrained"] == "ViT-B/32 clip-vit-b32"
    row = row.pop("metrics") | row
    with open(tmp_path / "benchmark.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=sorted(row))
        writer.writeheader()
        writer.writerow(row)
    with open(tmp_path / "benchmark.csv", newline="") as file:
        (read,) = csv.DictReader(file)
    assert (read["dataset"], read["task"], read["language"]) == (CIFAR, "zeroshot_classification", "en")
    assert (read["acc1"], read["protocol"], read["precision"]) == ("0.9", "by hand", "float32")


def test_figures_after_a_correction_stand_beside_those_before():
    metrics = {"mean_recall@1": 0.4, "text_retrieval_median_rank": 2.0}
    result = RetrievalResult(
        metrics, 10, 50, corrected={"mean_recall@1": 0.5, "text_retrieval_median_rank": 3.0}, **COMMON
    )
    record = record_of(result, task="retrieval", model="m", dataset="d")
    corrected = {"mean_recall@1_hub_corrected": 0.5, "text_retrieval_median_rank_hub_corrected": 3.0}
    assert record["metrics"] == metrics | corrected
    assert "| text_retrieval_median_rank_hub_corrected | 3.0 |" in markdown_report([record])
    lines = text_table(*table_rows([record])).splitlines()[1:]
    name = result.metric
    assert [line.split()[-3:] for line in lines] == [["10", "40.0", "%"], ["10", "50.0", "%"]]
    assert f"{name}, hubs corrected" in lines[1]
    assert "| text_retrieval_median_rank | 2.0 |" in markdown_report([record])


def test_published_figure_stands_beside_the_measured_one():
    composed = CompositionResult({"text_score": 0.25}, 4, **COMMON)
    other = record_of(composed, task="compose", model="mine", dataset="pairs.csv")
    lines = text_table(*table_rows([zero_shot_record(), other])).splitlines()
    assert [line.split() for line in lines] == [
        ["model", "dataset", "metric", "count", "value", "published"],
        ["clip-vit-b32", CIFAR, "acc1", "100", "90.0", "%", "91.3", "%"],
        ["mine", "pairs.csv", "text_score", "4", "25.0", "%"],
    ]
    assert "published" not in text_table(*table_rows([other]))
    assert "OpenAI's model of the same architecture" in markdown_report([zero_shot_record()])


def test_card_takes_results_and_replaces_older_ones(tmp_path: Path):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: mit\nlibrary_name: transformers\n---\n\n# My model\n\nText.\n")
    update_card(tmp_path, [zero_shot_record(value=0.7)])
    update_card(tmp_path, [zero_shot_record(value=0.9)])
    found = ModelCard.load(card)
    assert found.text.strip() == "# My model\n\nText."
    assert found.data.license == "mit"
    results = {entry.metric_type: entry for entry in found.data.eval_results}
    assert {name: entry.metric_value for name, entry in results.items()} == {"acc1": 0.9, "ece": 0.05}
    assert (results["acc1"].dataset_type, results["acc1"].dataset_split) == (CIFAR, "test")
    assert results["acc1"].metric_name == "acc1 (by hand, float32)"


def test_data_sets_of_one_last_name_and_protocols_stand_side_by_side(tmp_path: Path):
    """And so do the results of other models in the same card."""
    other = {"name": "other", "results": [{"task": {"type": "t"}, "any": "thing"}]}
    metadata = {"license": "mit", "model-index": [other, {"name": "mine", "results": []}]}
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{json.dumps(metadata)}\n---\n\n# Mine\n")

    def record(part: str, value: float, task: str = "zero-shot", **more: Any) -> dict[str, Any]:
        (tmp_path / part / "test").mkdir(parents=True, exist_ok=True)
        result = ZeroShotResult({"acc1": value}, "acc1", 100, ["a", "b"], **COMMON)
        return record_of(result, task=task, model="mine", dataset=str(tmp_path / part / "test")) | more

    for first, second in ((0.1, 0.2), (0.3, 0.4)):
        update_card(folder, [record("p", first)])
        update_card(folder, [record("q", second)])
        for name in ("paper", "openai"):
            update_card(folder, [record("p", first + second, "linear-probe", protocol_name=name)])
    kept, mine = metadata_load(folder / "README.md")["model-index"]
    assert kept == other
    found = [(one["task"]["name"], one["dataset"]["type"], one["metrics"][0]["value"]) for one in mine["results"]]
    assert sorted(found) == [
        ("linear_probe (openai)", "test", 0.7),
        ("linear_probe (paper)", "test", 0.7),
        ("zeroshot_classification", "test", 0.3),
        ("zeroshot_classification", "test", 0.4),
    ]
    assert str(tmp_path) not in (folder / "README.md").read_text()


@pytest.mark.parametrize("index", ["5", "[5]", '[{"name": "m", "results": 5}]', '[{"name": "m"}]'])
def test_model_index_that_is_none(index: str, tmp_path: Path):
    (tmp_path / "README.md").write_text(f"---\nmodel-index: {index}\n---\n\n# Mine\n")
    with pytest.raises(ValueError, match=r"The (metadata|model-index) of .* cannot be read \("):
        update_card(tmp_path, [zero_shot_record()])


@pytest.mark.parametrize("value", [[], 5, {"a": 1}, zero_shot_record() | {"metrics": {"acc1": "x"}}])
def test_what_is_no_record(value: Any):
    assert not is_record(value)
    assert is_record(zero_shot_record())


def test_folder_without_a_card_is_an_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"README\.md is not there, so results have no place: --update-card"):
        update_card(tmp_path, [zero_shot_record()])


def test_paper_table_is_whole():
    found = paper_data_sets()
    assert len(found) == 27
    assert sum(entry.repository is not None for entry in found) == 23
    assert {entry.metric for entry in found} <= set(METRICS)
    for entry in found:
        assert set(entry.zero_shot) | set(entry.linear_probe) <= set(VARIANTS)
    assert find_paper_data_set("ImageNet").zero_shot["ViT-L/14@336px"] == 76.2  # type: ignore[union-attr]


@pytest.mark.parametrize("source", ["CIFAR10", "cifar10", CIFAR, "/data/wds_vtab-cifar10/"])
def test_data_set_of_the_paper_is_found(source: str):
    found = find_paper_data_set(source)
    assert found is not None
    assert found.name == "CIFAR10"


def test_other_data_are_none_of_the_papers():
    assert find_paper_data_set("my/pictures") is None
    assert find_paper_data_set("") is None


def test_architecture_is_named():
    assert architecture_of(HfClipConfig.from_variant("RN50x4")) == "RN50x4"
    assert architecture_of(HfClipConfig(text_config={"hidden_size": 64})) == "hf_clip"
    assert json.dumps(zero_shot_record())
