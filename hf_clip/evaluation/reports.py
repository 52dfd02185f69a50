"""What is written of measurements: records in CLIP_benchmark's keys, tables, and entries of a model card.

A record is a dictionary with `dataset`, `model`, `pretrained`, `task`, `metrics` and `language`, as CLIP_benchmark
writes it, and with `split`, `metric`, `count`, `unreadable`, `protocol`, `precision` and `processor`. Where features
were truncated, `widths` has the name of the metric at each width. Figures are fractions from 0 to 1, but for median
ranks, correlations and errors of scores.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
)
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from ..checkpoints.whole_file import whole_file
from ..hub.model_card import markdown_table, name_of
from ..hub.upload import PublishingError, check_repo_id, explain
from ..model.checked_files import one_line
from .few_shot import LP_PLUS_PLUS
from .linear_probe import PREFIX, LinearProbeResult
from .paper_data_sets import find_paper_data_set
from .retrieval import CORRECTED
from .widths import by_names, name_at, names_at, split_name

TASKS = {
    "zero-shot": "zeroshot_classification",
    "retrieval": "zeroshot_retrieval",
    "linear-probe": "linear_probe",
    "compose": "image_caption_selection",
    "interpolate": "zeroshot_classification",
    "score-head": "image_scoring",
    "label-head": "image_head_classification",
}
"""Our tasks, and CLIP_benchmark's names."""

CARD_TASKS = {
    "zeroshot_classification": "zero-shot-image-classification",
    "zeroshot_retrieval": "image-text-retrieval",
    "linear_probe": "image-classification",
    "image_caption_selection": "image-text-matching",
    "image_scoring": "image-regression",
    "image_head_classification": "image-classification",
}

NOT_FRACTIONS = ("median_rank",)
CORRELATIONS = ("spearman", "pearson")
"""Metrics from -1 to 1, which are not shown in per cent."""

IN_ITS_UNIT = ("mean_absolute_error",)


def published_figure(dataset: str, architecture: str, task: str) -> float | None:
    """Return the paper's figure in per cent for OpenAI's model of this architecture. None if there is none."""
    found = find_paper_data_set(dataset)
    if found is None or task not in ("zero-shot", "linear-probe"):
        return None
    return (found.zero_shot if task == "zero-shot" else found.linear_probe).get(architecture)


def is_record(value: Any) -> bool:
    """Whether a value from a file is a record: all tables can be made of it."""
    try:
        return isinstance(value, dict) and bool(text_table(*table_rows([value])) and markdown_report([value]))
    except (KeyError, TypeError, AttributeError, ValueError):
        return False


def _linear_probe_fields(result: LinearProbeResult) -> dict[str, Any]:
    """Make what a record of a linear probe has besides: its metrics under CLIP_benchmark's names, and few-shot ones."""
    metrics = {f"{PREFIX}{name}": value for name, value in result.metrics.items()}
    few_shot = []
    for row in result.few_shot:
        name = f"{'lp_plus_plus_' if row.head == LP_PLUS_PLUS else PREFIX}{result.metric}_{row.shots}_shot"
        metrics |= {name: row.mean, f"{name}_std": row.spread}
        few_shot.append(
            {"head": row.head, "shots": row.shots, "mean": row.mean, "std": row.spread} | {"values": row.values}
        )
    found = {"metrics": metrics, "metric": f"{PREFIX}{result.metric}", "strength": result.strength}
    found |= {"protocol_name": result.protocol_name}
    return found | {"tried": result.tried} | ({"few_shot": few_shot} if few_shot else {})


def record_of(
    result: Any,
    *,
    task: str,
    model: str,
    dataset: str,
    split: str | None = None,
    architecture: str = "",
    language: str = "en",
) -> dict[str, Any]:
    """Make the record of a measurement.

    Args:
        result: What an `evaluate_...` function returned.
        task: One of `TASKS`.
        model: Name of the model, as the user named it.
        dataset: Name of the data set, as the user named it.
        split: The split that was asked for.
        architecture: See `architecture_of`.
        language: Language of the texts.

    Returns:
        The record, which JSON can hold.
    """
    metrics = dict(result.metrics)
    metrics |= {f"{name}{CORRECTED}": value for name, value in getattr(result, "corrected", {}).items()}
    metric, widths = result.metric, getattr(result, "widths", {})
    if widths:
        metrics = by_names(widths, result.embedding_dim)
        metric = names_at(metric, widths, result.embedding_dim)[0]
    record = {
        "dataset": dataset,
        "model": architecture or model,
        "pretrained": model,
        "task": TASKS[task],
        "metrics": metrics,
        "language": language,
        "split": result.split or split,
        "metric": metric,
        "count": result.count,
        "unreadable": len(result.unreadable),
        "protocol": result.protocol,
        "precision": result.precision,
        "processor": result.processor,
    }
    if isinstance(result, LinearProbeResult):
        record |= _linear_probe_fields(result)
    if widths:
        record["widths"] = dict(zip(widths, names_at(result.metric, widths, result.embedding_dim), strict=True))
    if (figure := published_figure(dataset, architecture, task)) is not None and metric == result.metric:
        record["published"] = figure
    return json.loads(json.dumps(record, default=str))


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def shown_figure(name: str, value: float) -> str:
    """Write a figure for a table: a fraction in per cent; a rank, a correlation and an error as they are."""
    name = split_name(name)[0].removesuffix(CORRECTED)
    if name in CORRELATIONS + IN_ITS_UNIT:
        return f"{value:.3f}" if name in CORRELATIONS else f"{value:.3g}"
    return f"{value:.1f}" if name.endswith(NOT_FRACTIONS) else f"{100 * value:.1f} %"


def table_rows(records: Iterable[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Make header and rows of a table of records."""
    header = ["model", "dataset", "metric", "count", "value", "published"]
    rows = []
    for record in records:
        name = record["metric"]
        published = f"{record['published']:.1f} %" if "published" in record else ""
        what, count = [record["pretrained"], record["dataset"]], str(record["count"])
        shown = f"{name}, {record['protocol_name']}" if "protocol_name" in record else name
        rows.append([*what, shown, count, shown_figure(name, record["metrics"][name]), published])
        for at_width in record["widths"].values() if "widths" in record else [name]:
            value = record["metrics"][at_width]
            if at_width != name:
                rows.append([*what, at_width, count, shown_figure(at_width, value), ""])
            plain, width = split_name(at_width)
            if (corrected := name_at(f"{plain}{CORRECTED}", width)) in record["metrics"]:
                value = record["metrics"][corrected]
                rows.append([*what, f"{at_width}, hubs corrected", count, shown_figure(corrected, value), ""])
        for few in record.get("few_shot", ()):
            metric = f"{few['shots']}-shot {few['head']}"
            value = f"{100 * few['mean']:.1f} ± {100 * few['std']:.1f} %"
            rows.append([*what, metric, count, value, ""])
    if not any(row[-1] for row in rows):
        return header[:-1], [row[:-1] for row in rows]
    return header, rows


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table for a terminal."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def markdown_report(records: Sequence[dict[str, Any]]) -> str:
    """Write a table of the reported metrics, then all metrics and the protocol of each measurement."""
    header, rows = table_rows(records)
    parts = ["# Results", markdown_table(header, rows)]
    for record in records:
        parts.append(f"## {record['pretrained']} on {record['dataset']}: {record['task']}")
        figures = [[name, shown_figure(name, value)] for name, value in record["metrics"].items()]
        parts.append(markdown_table(["metric", "value"], figures))
        parts.append(f"{record['protocol']}. {record['precision']}, {record['count']} rows.")
        if record["unreadable"]:
            parts.append(f"{record['unreadable']} images could not be opened and were left out.")
    if any("published" in record for record in records):
        parts.append(
            "Published figures are those of OpenAI's model of the same architecture (arXiv:2103.00020, table 10 for "
            "linear probes and table 11 for zero-shot)."
        )
    return "\n\n".join(parts) + "\n"


def card_results(record: dict[str, Any]) -> list[EvalResult]:
    """Make the entries of a record for the model-index of a card."""
    dataset = record["dataset"].rstrip("/")
    place = Path(os.path.expanduser(dataset))
    is_repository = dataset.count("/") == 1 and not place.exists()
    shown = dataset if is_repository else Path(dataset).name
    # Folders of one last name are different data. A card is published, and says nothing of this machine's folders.
    mark = None
    if not is_repository and (place.exists() or "/" in dataset):
        whole = str(place.resolve()) if place.exists() else dataset
        mark = f"local-{hashlib.blake2b(whole.encode(), digest_size=4).hexdigest()}"
    return [
        EvalResult(
            task_type=CARD_TASKS[record["task"]],
            task_name=record["task"] + (f" ({record['protocol_name']})" if "protocol_name" in record else ""),
            dataset_type=shown,
            dataset_name=shown,
            dataset_config=mark,
            dataset_split=record["split"],
            metric_type=name.replace("@", "_at_"),
            metric_name=f"{name} ({record['protocol']}, {record['precision']})",
            metric_value=round(value, 4),
        )
        for name, value in record["metrics"].items()
    ]


def _is_of_same(one: EvalResult, other: EvalResult) -> bool:
    names = ("task_type", "task_name", "dataset_type", "dataset_config", "dataset_split", "metric_type")
    return all(getattr(one, name) == getattr(other, name) for name in names)


class _CardData(ModelCardData):
    """A card's metadata whose model-index stays as it was read, with several models and their tasks' names."""

    def __init__(self, **given: Any):
        index = given.pop("model-index", None) or []
        super().__init__(**given)
        if not isinstance(index, list) or not all(isinstance(model, dict) for model in index):
            raise ValueError("its model-index is no list of models")
        self["model-index"] = index


class _Card(ModelCard):
    card_data_class = _CardData


def check_card(folder: str | Path) -> Path:
    """Return the card of a local repository. Raises FileNotFoundError if there is none."""
    path = Path(folder) / "README.md"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there, so results have no place: --update-card takes a local repository with a card. "
            f"Write one first; `hf-clip publish` and the trainer do."
        )
    return path


def update_card(folder: str | Path, records: Iterable[dict[str, Any]]) -> Path:
    """Put measurements into the model-index of a local repository's card. Entries of the same kind are replaced.

    Args:
        folder: The repository.
        records: What was measured of its model.

    Returns:
        The card.

    Raises:
        FileNotFoundError: The folder has no README.md.
        ValueError: Its metadata cannot be read.
    """
    path = check_card(folder)
    try:
        card = _Card.load(path)
    except Exception as error:  # whatever YAML's reader says
        raise ValueError(f"The metadata of {path} cannot be read ({str(error).splitlines()[0]}).") from error
    _add_results(card, records, Path(folder).resolve().name)
    write_text(path, str(card))
    return path


def _add_results(card: Any, records: Iterable[dict[str, Any]], name: str) -> None:
    """Put results into a card's only model, else into the one of this name. All other models stay as they are."""
    index = card.data["model-index"]
    own = next((model for model in index if len(index) == 1 or model.get("name") == name), None)
    try:
        before = model_index_to_eval_results([own])[1] if own is not None else []
    except (KeyError, TypeError) as error:
        raise ValueError(f"The model-index of the card of {name} cannot be read ({one_line(repr(error))}).") from error
    added = [entry for record in records for entry in card_results(record)]
    kept = [entry for entry in before if not any(_is_of_same(entry, new) for new in added)]
    shown = name if own is None else own["name"]
    made = {"name": shown, "results": _results_of(shown, kept + added)}
    card.data["model-index"] = [*index, made] if own is None else [made if it is own else it for it in index]


def _results_of(name: str, entries: Iterable[EvalResult]) -> list[dict[str, Any]]:
    """Write entries as results of a model-index, those of a task's name and data set together.

    huggingface_hub puts tasks of one type together, and gives all the first one's name.
    """
    groups: dict[Any, list[EvalResult]] = {}
    for entry in entries:
        groups.setdefault((entry.task_name, entry.unique_identifier), []).append(entry)
    return [result for group in groups.values() for result in eval_results_to_model_index(name, group)[0]["results"]]


def check_repository(model: str) -> str:
    """Return the name of a model that is a repository on the Hub.

    Raises:
        ValueError: It is a local folder, or no name of a repository.
    """
    if Path(os.path.expanduser(model)).exists():
        raise ValueError(
            f"--push puts results into a repository on the Hub, but {model} is a local folder: take --update-card, and "
            f"publish it with `hf-clip publish`."
        )
    return check_repo_id(model)


def push_card(repo_id: str, records: Iterable[dict[str, Any]]) -> str:
    """Put measurements into the model-index of a repository on the Hub. Entries of the same kind are replaced.

    A repository without a card gets one.

    Args:
        repo_id: The repository, such as "org/clip-vit-b32".
        records: What was measured of its model.

    Returns:
        The address of the commit.

    Raises:
        PublishingError: The card was not changed. An OSError.
        ValueError: Its metadata cannot be read.
    """
    name = name_of(repo_id)
    try:
        try:
            card = _Card.load(repo_id)
        except RemoteEntryNotFoundError:  # and not LocalEntryNotFoundError, which a failed connection raises too
            card = _Card(f"---\n{{}}\n---\n\n# {name}\n")
        except (HTTPError, OSError):  # of the Hub or the connection
            raise
        except Exception as error:  # whatever YAML's reader says
            raise ValueError(f"The card of {repo_id} cannot be read ({str(error).splitlines()[0]}).") from error
        _add_results(card, records, name)
        try:
            return str(card.push_to_hub(repo_id, commit_message="Add results of hf-clip evaluate"))
        except ValueError as error:  # a card that the Hub does not accept
            raise PublishingError(f"{repo_id} was not published: {' '.join(str(error).split())}.") from error
    except PublishingError:
        raise
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, HTTPError, OSError) as error:
        raise explain(error, repo_id) from error
