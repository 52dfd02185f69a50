"""The 27 data sets that the paper measures on, with its metric for each and its figures, as a table.

Of 23 the Hub holds a copy, most of them in `clip-benchmark`'s layout, with class names and templates. A copy may differ
in its classes, its templates or its split from what the paper used; the figures are compared with that in mind.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class PaperDataSet:
    """A data set of the paper.

    Attributes:
        name: Its short name, which `--dataset` takes.
        title: Its name in the paper.
        metric: The metric that the paper reports, one of `hf_clip.evaluation.zero_shot.METRICS`.
        repository: A copy on the Hub. None if there is none that is read as it is.
        split: The split to measure on.
        templates: Templates, where they do not come with the copy.
        zero_shot: Model → the paper's zero-shot figure, in per cent.
        linear_probe: Model → the paper's linear probe, in per cent.
    """

    name: str
    title: str
    metric: str
    repository: str | None
    split: str | None
    templates: list[str] | None
    zero_shot: dict[str, float]
    linear_probe: dict[str, float]


@cache
def paper_data_sets() -> list[PaperDataSet]:
    """Return the 27 data sets, in the paper's order."""
    found: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))["data_sets"]
    return [PaperDataSet(**values) for values in found]


def figures_source() -> str:
    """Return where the figures come from."""
    return json.loads(FILE.read_text(encoding="utf-8"))["source"]


def find_paper_data_set(source: str) -> PaperDataSet | None:
    """Find the data set that a name, a repository or a folder of the same name stands for. None for any other."""
    last = Path(source).name.lower()
    for data_set in paper_data_sets():
        repository = (data_set.repository or "").lower()
        if source.lower() in (data_set.name.lower(), repository) or last == repository.rpartition("/")[2] != "":
            return data_set
    return None
