"""Results on their way into a repository's card, with the real client against a server of our own."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..hub.test_publish import run
from ..hub_server import HubServer, Repository
from .data_sets import write_class_folders
from .test_reports import zero_shot_record

PUSH = """
from hf_clip.commands.app import main
from hf_clip.evaluation.reports import push_card
from hf_clip.zero_shot.embedding_head import find_head
folder, record = sys.argv[1], json.loads(sys.argv[2])
measured = call(main, ["evaluate", "zero-shot", "--model", "org/tiny", "--dataset", folder, "--no-plots", "--push"])
head = find_head("score", "org/tiny").read_bytes().decode()
errors = {}
for repo in ["org/bare", "org/broken", "org/absent", "others/tiny"]:
    try:
        push_card(repo, [record])
    except (OSError, ValueError) as error:
        errors[repo] = str(error)
os.environ["HF_TOKEN"] = "somebodys-token"
try:
    push_card("org/tiny", [record])
except OSError as error:
    errors["token"] = str(error)
local = call(main, ["evaluate", "zero-shot", "--model", folder, "--dataset", folder, "--push"])
report(measured=measured, head=head, errors=errors, local=local)
"""

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


def test_results_go_into_the_card_on_the_hub(digits: Path, tmp_path: Path, rows: list[dict[str, Any]]):
    write_class_folders(tmp_path / "shapes", rows[:20])
    files = {file.name: file.read_bytes() for file in (digits / "vit").iterdir()}
    with HubServer() as server:
        repositories = server.hub.repositories
        for name, own in {
            "org/tiny": files | {"README.md": CARD.encode(), "heads/score.safetensors": b"a head"},
            "org/bare": {"config.json": b"{}"},
            "org/broken": {"README.md": b"---\nlicense: [mit\n---\n"},
            "others/tiny": {"README.md": CARD.encode()},
        }.items():
            repositories[name] = Repository()
            repositories[name].commit(own, "main", "initial commit")
        found = run(PUSH, server, tmp_path, tmp_path / "shapes", json.dumps(zero_shot_record()))
        status, out, err = found["measured"]
        assert status == 0, err
        assert out.splitlines()[-1].startswith(f"{server.url}/org/tiny/")
        assert repositories["org/tiny"].messages == ["initial commit", "Add results of hf-clip evaluate"]
        card = ModelCard(server.hub.uploaded("org/tiny")["README.md"].decode())
        assert card.text.strip() == "# Tiny\n\nText."
        entries = {(entry.dataset_type, entry.metric_type): entry.metric_value for entry in card.data.eval_results}
        assert entries["other", "acc1"] == 0.1
        assert (
            entries["shapes", "acc1"]
            == json.loads((tmp_path / "results" / "results.json").read_text())[0]["metrics"]["acc1"]
        )
        bare = ModelCard(server.hub.uploaded("org/bare")["README.md"].decode())
        assert (bare.data.model_name, len(bare.data.eval_results)) == ("bare", 2)
    assert found["head"] == "a head"
    errors = found["errors"]
    assert errors["org/broken"].startswith("The card of org/broken cannot be read (")
    assert "org/absent was not published: there is no such model repository" in errors["org/absent"]
    assert errors["others/tiny"].startswith("others/tiny was not published: ")
    assert errors["token"].startswith("org/tiny was not published: the Hub doesn't know your token")
    status, _, err = found["local"]
    assert status == 1
    assert "--push puts results into a repository on the Hub, but" in err
    assert err.endswith("is a local folder: take --update-card, and publish it with `hf-clip publish`.\n")
