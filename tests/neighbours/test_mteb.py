"""mteb: its image tasks give the figures that ours give, through the wrapper."""

from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset
from transformers import AutoModel, AutoProcessor

from demo.digits import DIGITS
from hf_clip.evaluation.mteb_encoder import mteb_model
from hf_clip.evaluation.retrieval import evaluate_retrieval
from hf_clip.evaluation.zero_shot import evaluate_zero_shot

from ..evaluation.data_sets import TEMPLATES, captioned, stored_rows

mteb = pytest.importorskip("mteb", reason="evaluation through mteb needs the package mteb")

from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # its own


def metadata(name: str, kind: str, category: str, score: str) -> Any:
    return TaskMetadata(
        name=name,
        description="Digits.",
        reference="https://archive.ics.uci.edu/dataset/80",
        dataset={"path": "none/none", "revision": "0"},
        type=kind,
        category=category,
        modalities=["image", "text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=score,
    )


@pytest.fixture(scope="module")
def rows(digits: Path) -> list[dict[str, Any]]:
    return list({row["caption"]: row for row in stored_rows(digits)}.values())


@pytest.fixture(scope="module")
def clip(digits: Path) -> tuple[Any, Any]:
    return AutoModel.from_pretrained(digits / "vit").eval(), AutoProcessor.from_pretrained(digits / "vit")


def run(task: Any, clip: tuple[Any, Any]) -> dict[str, Any]:
    result = mteb.evaluate(mteb_model(*clip), task, cache=None, co2_tracker=False, show_progress_bar=False)
    return result.task_results[0].scores["test"][0]


def test_zero_shot_accuracy_is_ours(rows: list[dict[str, Any]], clip: tuple[Any, Any]):
    table = captioned(rows).add_column("label", [row["label"] for row in rows]).remove_columns("caption")
    table = table.cast_column("label", ClassLabel(names=DIGITS))

    class Digits(AbsTaskZeroShotClassification):
        metadata = metadata("DigitsZeroShot", "ZeroShotClassification", "i2t", "accuracy")

        def load_data(self, **settings: Any) -> None:
            self.dataset = {"test": table}
            self.data_loaded = True

        def get_candidate_labels(self) -> list[str]:
            return [TEMPLATES[0].format(name) for name in DIGITS]

    ours = evaluate_zero_shot(*clip, table, templates=TEMPLATES[0])
    assert run(Digits(), clip)["accuracy"] == pytest.approx(ours.metrics["acc1"])


def test_retrieval_is_ours(rows: list[dict[str, Any]], clip: tuple[Any, Any]):
    table = captioned(rows)
    names = [str(place) for place in range(len(rows))]

    class Search(AbsTaskRetrieval):
        metadata = metadata("DigitsT2IRetrieval", "Any2AnyRetrieval", "t2i", "recall_at_1")

        def load_data(self, **settings: Any) -> None:
            corpus = table.remove_columns("caption").add_column("id", names)
            queries = Dataset.from_dict({"id": names, "text": [row["caption"] for row in rows]})
            relevant = {name: {name: 1} for name in names}
            split = {"corpus": corpus, "queries": queries, "relevant_docs": relevant, "top_ranked": None}
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    ours = evaluate_retrieval(*clip, table).metrics
    theirs = run(Search(), clip)
    for k in (1, 5, 10):
        assert theirs[f"recall_at_{k}"] == pytest.approx(ours[f"image_retrieval_recall@{k}"], abs=1e-4)
