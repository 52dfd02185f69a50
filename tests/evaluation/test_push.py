"""Results on their way into a repository's card, with the real client against a server of our own."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants, hf_api

from hf_clip.commands.program import main
from hf_clip.evaluation import grid
from hf_clip.evaluation.reports import push_card
from hf_clip.hub.upload import PublishingError
from hf_clip.zero_shot.embedding_head import find_head

from ..hub_server import TOKEN, HubServer, Repository
from .data_sets import write_class_folders
from .test_reports import zero_shot_record

CARD = """---
license: mit
model-index:
- name: tiny
  results:
  - task: {type: image-classification}
    dataset: {type: other, name: other}
    metrics: [{type: acc1, value: 0.1}]
---

# Tiny

Text.
"""


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The Hub of this process, with three repositories."""
    with HubServer() as running:
        address = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, running.url)
        settings = {"ENDPOINT": running.url, "HUGGINGFACE_CO_URL_TEMPLATE": address, "HF_HUB_OFFLINE": False}
        for name, value in (settings | {"HF_HUB_CACHE": str(tmp_path / "cache")}).items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(hf_api.api, "endpoint", running.url)  # that of `upload_file`, which was made at import
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for name, files in {
            "org/tiny": {"README.md": CARD.encode(), "heads/score.safetensors": b"a head"},
            "org/bare": {"config.json": b"{}"},
            "org/broken": {"README.md": b"---\nlicense: [mit\n---\n"},
        }.items():
            running.hub.repositories[name] = Repository()
            running.hub.repositories[name].commit(files, "main", "initial commit")
        yield running


def card_of(server: HubServer, name: str) -> ModelCard:
    return ModelCard(server.hub.uploaded(name)["README.md"].decode())


def test_results_go_into_the_card_on_the_hub(
    server: HubServer,
    small_clip: Any,
    tmp_path: Path,
    rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(grid, "load_model", lambda *given: small_clip)
    words = ["evaluate", "zero-shot", "--dataset", str(write_class_folders(tmp_path / "shapes", rows[:20]))]
    words += ["--output", str(tmp_path / "results"), "--no-plots", "--push", "--model"]
    assert main([*words, "org/tiny"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{server.url}/org/tiny/")
    assert server.hub.repositories["org/tiny"].messages == ["initial commit", "Add results of hf-clip evaluate"]
    card = card_of(server, "org/tiny")
    assert card.text.strip() == "# Tiny\n\nText."
    entries = {(entry.dataset_type, entry.metric_type): entry.metric_value for entry in card.data.eval_results}
    assert entries["other", "acc1"] == 0.1
    (record,) = json.loads((tmp_path / "results" / "results.json").read_text())
    assert entries["shapes", "acc1"] == pytest.approx(record["metrics"]["acc1"], abs=1e-4)
    assert find_head("score", "org/tiny").read_bytes() == b"a head"
    # A local model is refused before it is measured.
    assert main([*words, str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "error: --push puts results into a repository on the Hub, but" in error
    assert error.endswith("is a local folder: take --update-card, and publish it with `hf-clip publish`.\n")


def test_repository_without_a_card_gets_one(server: HubServer):
    push_card("org/bare", [zero_shot_record(value=0.7)])
    push_card("org/bare", [zero_shot_record(value=0.9)])
    card = card_of(server, "org/bare")
    assert card.data.model_name == "bare"
    assert {entry.metric_type: entry.metric_value for entry in card.data.eval_results} == {"acc1": 0.9, "ece": 0.05}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a temporary folder of the client's
def test_what_the_hub_refuses_is_one_line(server: HubServer, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"The card of org/broken cannot be read \("):
        push_card("org/broken", [zero_shot_record()])
    with pytest.raises(
        PublishingError, match="org/absent was not published: there is no such repository, or your token may not see it"
    ):
        push_card("org/absent", [zero_shot_record()])
    monkeypatch.setenv("HF_TOKEN", "somebodys-token")
    with pytest.raises(PublishingError, match="org/tiny was not published: the Hub doesn't know your token"):
        push_card("org/tiny", [zero_shot_record()])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PublishingError, match="org/tiny was not published: HF_HUB_OFFLINE=1 forbids all traffic"):
        push_card("org/tiny", [zero_shot_record()])
    assert all(repository.messages == ["initial commit"] for repository in server.hub.repositories.values())
