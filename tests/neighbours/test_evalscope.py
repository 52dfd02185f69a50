"""evalscope: its CLIP benchmark loads a folder of ours and gives the figures that ours give."""

import gc
import json
import shutil
import warnings
from pathlib import Path

import pytest
from transformers import AutoModel, AutoProcessor

from hf_clip.evaluation.retrieval import evaluate_retrieval
from hf_clip.evaluation.zero_shot import evaluate_zero_shot

from ..evaluation.data_sets import stored_rows, write_shards

for package in ("evalscope", "langchain_core", "webdataset"):
    pytest.importorskip(package, reason='its CLIP benchmark needs the package "evalscope[rag]"')

from evalscope.backend.rag_eval.clip_benchmark import ClipBenchmarkEvalConfig, evaluate  # noqa: E402


@pytest.fixture(scope="module")
def folder(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model, which says in its config.json that features are tensors. Tests must not write there."""
    folder = tmp_path_factory.mktemp("evalscope") / "model"
    shutil.copytree(digits / "vit", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"return_tensors_from_features": True}))
    return folder


def measured_by_evalscope(folder: Path, data: Path, task: str, output: Path) -> dict[str, float]:
    names = {"dataset_name": ["mine"], "task": task, "cache_dir": str(output / "cache")}
    settings = {"num_workers": 0, "verbose": False, "output_dir": str(output), "data_dir": str(data)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its tars open
        evaluate(ClipBenchmarkEvalConfig(models=[{"model_name": str(folder)}], **settings, **names))
        gc.collect()
    return json.loads((output / "model" / f"mine_{task}.json").read_text())["metrics"]


def test_retrieval_equals_ours(folder: Path, digits: Path, tmp_path: Path):
    rows = list({row["caption"]: row for row in stored_rows(digits)}.values())
    rows = [{**row, "captions": [row["caption"], f"{row['caption']} once more"]} for row in rows]
    data = write_shards(tmp_path / "wds", rows, "retrieval")
    ours = evaluate_retrieval(AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder), data)
    theirs = measured_by_evalscope(folder, data, "zeroshot_retrieval", tmp_path / "results")
    assert theirs.keys() == {"image_retrieval_recall@5", "text_retrieval_recall@5"}
    assert theirs == pytest.approx({name: ours.metrics[name] for name in theirs})


def test_zero_shot_equals_ours_as_far_as_bfloat16_allows(folder: Path, digits: Path, tmp_path: Path):
    """It computes in autocast. Of 60 images two may change their class."""
    data = write_shards(tmp_path / "wds", stored_rows(digits))
    ours = evaluate_zero_shot(AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder), data)
    theirs = measured_by_evalscope(folder, data, "zeroshot_classification", tmp_path / "results")
    assert theirs["acc1"] == pytest.approx(ours.metrics["acc1"], abs=2.1 / 60)
    assert theirs["mean_per_class_recall"] == pytest.approx(ours.metrics["mean_per_class_recall"], abs=0.05)
