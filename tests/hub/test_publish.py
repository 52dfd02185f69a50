"""From a folder to the Hub and back, with the real client against a server of our own on this machine."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, pipeline

from conversion.publish import main
from hf_clip import VARIANTS, HfClipModel, convert
from hf_clip.checkpoints.read import PUBLISHED_KEY, published_weights, read
from hf_clip.checkpoints.remote_code import TRAVELLING
from hf_clip.checkpoints.write import write
from hf_clip.hub.stage import Publication, publish
from hf_clip.hub.upload import check_repo_id, list_uploads

from ..hub_server import TOKEN, HubServer
from ..warm_python import run_warm
from ..without_hf_clip import BLOCK_HF_CLIP

ROOT = Path(__file__).resolve().parents[2]
LABELS = ["a cat", "a dog"]

PRELUDE = """
import contextlib, io, json, os, sys
from pathlib import Path

def call(function, *arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = function(*arguments)
    return [status, out.getvalue(), err.getvalue()]

def report(**values):
    print("RESULT" + json.dumps(values))
"""


@pytest.fixture
def server():
    with HubServer() as running:
        yield running


def run(code: str, server: HubServer, home: Path, *arguments: object, **environment: str) -> dict[str, Any]:
    """Run a program in a process of its own, whose Hub is `server`; what it reports."""
    settings = {
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(home),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    done = run_warm(PRELUDE + code, *arguments, cwd=home, environment=settings | environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout.rpartition("RESULT")[2])


@pytest.fixture
def image(tmp_path: Path, photographs: dict[str, Image.Image]) -> Path:
    photographs["chelsea"].save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


PUSH = """
from conversion.publish import main
from huggingface_hub import HfApi
folder, repo = sys.argv[1:]
first = call(main, [folder, repo, "--private"])
again = call(main, [folder, repo])
api = HfApi()
api.create_tag(repo, tag="v1")
before = api.model_info(repo).sha
Path(folder, "notes.txt").write_text("new")
changed = call(main, [folder, repo])
report(first=first, again=again, changed=changed, before=before, after=api.model_info(repo).sha,
       files=api.list_repo_files(repo, revision="v1"), private=api.model_info(repo).private)
"""

PULL = """
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline
import hf_clip
repo, image, *revisions = sys.argv[1:]
results = []
for revision in revisions:
    model = AutoModel.from_pretrained(repo, revision=revision)
    processor = AutoProcessor.from_pretrained(repo, revision=revision)
    classify = pipeline("zero-shot-image-classification", model=model, tokenizer=processor.tokenizer,
                        image_processor=processor.image_processor)
    results.append(classify(image, candidate_labels=["a cat", "a dog"]))
report(results=results, classes=[type(model).__name__, type(processor).__name__])
"""

POISONED = """
from transformers import AutoModel
import hf_clip
from safetensors import SafetensorError
repo, cache = sys.argv[1:]
AutoModel.from_pretrained(repo)
blobs = [p for p in Path(cache, "hub").rglob("model.safetensors")]
blobs[0].resolve().write_bytes(b"not a model")
try:
    AutoModel.from_pretrained(repo)
    error = ""
except (SafetensorError, OSError) as found:
    error = str(found)
model = AutoModel.from_pretrained(repo, force_download=True)
report(error=error, parameters=model.num_parameters())
"""


def assert_same_scores(found: list[list[dict]], expected: list[list[dict]]) -> None:
    """Scores of the pipeline in two processes, which may have other numbers of threads."""
    for one, other in zip(found, expected, strict=True):
        assert [entry["label"] for entry in one] == [entry["label"] for entry in other]
        assert [entry["score"] for entry in one] == pytest.approx([entry["score"] for entry in other], abs=1e-5)


@pytest.mark.slow  # the next ones push and pull, too
@pytest.mark.parametrize("tower", ["resnet", "vit"], indirect=True)
def test_push_list_and_pull(server: HubServer, repository: Path, tmp_path: Path, image: Path):
    folder, home = tmp_path / "model", tmp_path / "home"
    home.mkdir()
    convert(repository, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    pushed = run(PUSH, server, home, folder, "org/tiny")

    status, out, err = pushed["first"]
    assert (status, err) == (0, ""), err
    assert out.startswith(f"{server.url}/org/tiny/commit/"), out
    expected = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(pushed["files"]) == expected | {"README.md"} | {f"{name}.py" for name in TRAVELLING}
    assert pushed["private"]
    assert server.hub.uploaded("org/tiny", "v1")["model.safetensors"] == before["model.safetensors"]
    assert pushed["again"][0] == 0
    assert server.hub.repositories["org/tiny"].messages == ["initial commit", "Upload tiny", "Upload tiny"]
    assert server.hub.uploads == 1  # the weights, once
    (folder / "notes.txt").unlink()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before  # no code, no card, no auto_map

    pulled = run(PULL, server, home, "org/tiny", image, "main", "v1", pushed["before"])
    local = pipeline("zero-shot-image-classification", model=str(folder))(str(image), candidate_labels=LABELS)
    assert pulled["classes"] == ["HfClipModel", "HfClipProcessor"]
    assert_same_scores(pulled["results"], [local] * 3)
    # Again without the server, from the cache.
    offline = run(PULL, server, home, "org/tiny", image, "main", HF_HUB_OFFLINE="1")
    assert_same_scores(offline["results"], [local])
    poisoned = run(POISONED, server, home, "org/tiny", home)
    assert poisoned["error"]
    assert poisoned["parameters"] == AutoModel.from_pretrained(folder).num_parameters()


WITH_FAULTS = """
from conversion.publish import main
from huggingface_hub import HfApi
folder, = sys.argv[1:]
HfApi().create_repo("org/public", private=False)
found = {}
for name, token, repo in [("none", "", "org/tiny"), ("unknown", "somebodys-token", "org/tiny"),
                          ("forbidden", None, "others/tiny"), ("taken", None, "org/taken"),
                          ("public", None, "org/public")]:
    kept = os.environ["HF_TOKEN"]
    os.environ["HF_TOKEN"] = kept if token is None else token
    found[name] = call(main, [folder, repo, *(["--private"] if name == "public" else [])])
    assert not token or token not in str(found[name])
    os.environ["HF_TOKEN"] = kept
report(**found)
"""

CUT = """
from huggingface_hub import lfs
from conversion.publish import main
from huggingface_hub.utils import _http
_http.time.sleep = lambda seconds: None  # between its own attempts
folder, = sys.argv[1:]
report(result=call(main, [folder, "org/tiny"]))
"""


def test_refusals_of_the_hub_are_one_line(server: HubServer, repositories: dict[str, Path], tmp_path: Path):
    found = run(WITH_FAULTS, server, tmp_path, repositories["vit"])
    messages = {
        "none": "org/tiny was not published: you are not logged in; run `hf auth login`, or set HF_TOKEN",
        "unknown": "org/tiny was not published: the Hub doesn't know your token; make a new one",
        "forbidden": "others/tiny was not published: your token may not write to others (",
        "taken": "org/taken was not published: the name is taken, and not by a model repository",
        "public": "org/public was not published: it is there already and public, though a private one was asked for. "
        "Make it private in its settings",
    }
    for name, message in messages.items():
        status, out, err = found[name]
        assert (status, out) == (1, ""), name
        assert err.startswith(f"error: {message}"), err
        assert err.count("\n") == 1
    assert list(server.hub.repositories) == ["org/public"]
    assert server.hub.repositories["org/public"].messages == ["initial commit"]


def test_retry_continues_where_the_network_failed(server: HubServer, repositories: dict[str, Path], tmp_path: Path):
    model = HfClipModel.from_pretrained(repositories["vit"])
    weights = model.state_dict()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="1MB")
    AutoProcessor.from_pretrained(repositories["vit"]).save_pretrained(tmp_path / "sharded")
    shards = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    server.hub.fail_after = 2
    status, _, err = run(CUT, server, tmp_path, tmp_path / "sharded")["result"]
    assert status == 1
    assert "the connection to http://127.0.0.1" in err
    assert "the same command goes on where it stopped" in err
    assert server.hub.repositories["org/tiny"].messages == ["initial commit"]  # nothing half-published
    assert server.hub.uploads == 2
    server.hub.fail_after = None
    status, _, err = run(CUT, server, tmp_path, tmp_path / "sharded")["result"]
    assert (status, err) == (0, "")
    assert server.hub.uploads == len(shards)  # none twice
    folder = tmp_path / "pulled"
    folder.mkdir()
    for name, content in server.hub.uploaded("org/tiny").items():
        (folder / name).write_bytes(content)
    again = HfClipModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


PUSH_TO_HUB = """
from transformers import AutoModel, AutoProcessor
import hf_clip
folder, saved = sys.argv[1:]
model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
processor.push_to_hub("org/pushed")
model.push_to_hub("org/pushed", commit_message="My model")
model.save_pretrained(saved)
report(saved=sorted(os.listdir(saved)))
"""

PULL_WITHOUT_HF_CLIP = (
    BLOCK_HF_CLIP
    + """
from transformers import AutoModel, AutoProcessor, pipeline
repo, image = sys.argv[1:]
classify = pipeline("zero-shot-image-classification", model=repo, trust_remote_code=True)
model = AutoModel.from_pretrained(repo, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
report(result=classify(image, candidate_labels=["a cat", "a dog"]),
       classes=[type(model).__name__, type(processor).__name__])
"""
)


def test_push_to_hub_of_model_and_processor(
    server: HubServer, repositories: dict[str, Path], tmp_path: Path, image: Path
):
    repository = repositories["resnet"]
    saved = run(PUSH_TO_HUB, server, tmp_path, repository, tmp_path / "saved")["saved"]
    assert saved == ["config.json", "model.safetensors"]  # a plain save copies no code
    pushed = server.hub.repositories["org/pushed"]
    assert pushed.messages == ["initial commit", "Upload processor", "My model"]
    files = server.hub.uploaded("org/pushed")
    assert {f"{name}.py" for name in TRAVELLING} <= files.keys()
    card = files["README.md"].decode()
    assert "pipeline_tag: zero-shot-image-classification" in card
    assert 'AutoModel.from_pretrained("org/pushed")' in card
    elsewhere = run(PULL_WITHOUT_HF_CLIP, server, tmp_path, "org/pushed", image)
    local = pipeline("zero-shot-image-classification", model=str(repository))(str(image), candidate_labels=LABELS)
    assert elsewhere["classes"] == ["HfClipModel", "HfClipProcessor"]
    assert [entry["label"] for entry in elsewhere["result"]] == [entry["label"] for entry in local]
    for found, expected in zip(elsewhere["result"], local, strict=True):
        assert found["score"] == pytest.approx(expected["score"], abs=1e-6)


# --- without a Hub --------------------------------------------------------------------------------------------------


def test_dry_run_shows_what_would_go(repository: Path, capsys: pytest.CaptureFixture):
    before = sorted(path.name for path in repository.iterdir())
    assert main([str(repository), "org/clip-tiny", "--private", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Would push to the private model repository org/clip-tiny, in one commit:\n")
    for name in ("config.json", "model.safetensors", "README.md", "modeling_hf_clip.py"):
        assert f"  {name} " in out
    assert f"{5 + 1 + len(TRAVELLING)} files" in out
    assert "# clip-tiny" in out
    assert sorted(path.name for path in repository.iterdir()) == before


def names_of(publication: Publication) -> set[str]:
    return {upload.name for upload in publication.uploads}


def test_card_of_openais_weights_has_their_figures(
    repositories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Weights that come from a published file say so; the same architecture alone doesn't."""
    model, processor = read(repositories["vit"])
    assert model.published is None
    model.published = "ViT-B/32"
    write(model, processor, tmp_path / "marked")
    assert published_weights(tmp_path / "marked") == "ViT-B/32"
    monkeypatch.setattr("hf_clip.hub.stage.identify_variant", lambda config: VARIANTS["ViT-B/32"])
    picture = "imagenet-against-gflops.png"
    assert picture in names_of(publish(tmp_path / "marked", "org/marked", dry_run=True))
    assert picture not in names_of(publish(repositories["vit"], "org/plain", dry_run=True))
    HfClipModel.from_pretrained(tmp_path / "marked").save_pretrained(tmp_path / "changed")
    assert published_weights(tmp_path / "changed") is None
    convert(tmp_path / "marked", tmp_path / "again")
    assert published_weights(tmp_path / "again") == "ViT-B/32"
    assert PUBLISHED_KEY not in load_file(tmp_path / "again" / "model.safetensors")


def test_a_card_of_ones_own_is_kept(repository: Path, tmp_path: Path):
    convert(repository, tmp_path / "mine")
    (tmp_path / "mine" / "README.md").write_text("# A card of my own\n")
    assert publish(tmp_path / "mine", "org/mine", dry_run=True).card == "# A card of my own\n"


def test_stock_layout_is_offered_for_vits(repositories: dict[str, Path]):
    found = publish(repositories["vit"], "org/stock", dry_run=True, layout="transformers")
    assert not [name for name in names_of(found) if name.endswith(".py")]
    assert "preprocessor_config.json" in names_of(found)
    assert found.address is None
    with pytest.raises(ValueError, match=r"cannot be published as --format transformers: its image tower is a ResNet"):
        publish(repositories["resnet"], "org/stock", dry_run=True, layout="transformers")


@pytest.mark.parametrize("name", ["tiny", "org/", "a/b/c", "org/bad name", "org/--x"])
def test_names_of_repositories_are_checked(name: str):
    with pytest.raises(ValueError, match="is no name of a repository"):
        check_repo_id(name)


def test_faults_of_the_folder(tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture):
    assert main([str(tmp_path), "org/x", "--dry-run"]) == 1
    assert "has no config.json; name a folder that convert or finetune.py has written" in capsys.readouterr().err
    assert main([str(repository), "org/x", "--dry-run", "--variant", "ViT-B/33"]) == 1
    assert "Did you mean 'ViT-B/32'" in capsys.readouterr().err
    assert main([str(repository), "org/x"]) == 1  # the tests run offline
    assert "HF_HUB_OFFLINE=1 forbids all traffic" in capsys.readouterr().err


def test_nothing_is_written_through_to_the_folder(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    convert(repository, tmp_path / "mine")
    (tmp_path / "mine" / "imagenet-against-gflops.png").write_text("my own image")
    monkeypatch.setattr("hf_clip.hub.stage.identify_variant", lambda config: VARIANTS["ViT-B/32"])
    publish(tmp_path / "mine", "org/mine", dry_run=True, variant_name="ViT-B/32")
    assert (tmp_path / "mine" / "imagenet-against-gflops.png").read_text() == "my own image"


def test_figures_of_another_architecture_are_refused(repository: Path):
    with pytest.raises(ValueError, match="is no RN50: its architecture is another"):
        publish(repository, "org/x", dry_run=True, variant_name="RN50")


def test_what_training_and_editors_leave_does_not_go(repository: Path, tmp_path: Path):
    convert(repository, tmp_path / "mine")
    for name in (
        ".env",
        ".git/config",
        "checkpoints/step-1/model.bin",
        "checkpoint-5/a",
        "__pycache__/x",
        "optimizer.pt",
    ):
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text("x")
    (tmp_path / "mine" / ".gitattributes").write_text("x")
    names = {upload.name for upload in list_uploads(tmp_path / "mine")}
    assert names == {path.name for path in repository.iterdir()} | {".gitattributes"}


def test_other_kinds_of_folders_are_named(repositories: dict[str, Path], tmp_path: Path):
    convert(repositories["vit"], tmp_path / "stock", layout="transformers")
    with pytest.raises(ValueError, match="stock holds a 'clip' model; pass --format transformers"):
        publish(tmp_path / "stock", "org/x", dry_run=True)
    publish(tmp_path / "stock", "org/x", dry_run=True, layout="transformers")
    (tmp_path / "stock" / "config.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"config\.json is no JSON"):
        publish(tmp_path / "stock", "org/x", dry_run=True)


REFUSED = """
import time
from conversion.convert import main
real, slept = time.sleep, []
time.sleep = slept.append  # what the client waits between its own tries
print_errors = {}
for name in sys.argv[2:]:
    print_errors[name] = call(main, [name, str(Path(sys.argv[1], "out"))])
report(found=print_errors, left=[path.name for path in Path(sys.argv[1]).iterdir() if path.name.startswith("out")])
"""

ANSWERS = {
    "org/answers-401": "is no public model of the Hub (401): check the name; a private one needs a token that may read",
    "org/answers-403": "forbids to read org/answers-403 with this token or from this address (403)",
    "org/answers-429": "was asked too often and refuses org/answers-429 for now (429): try again in some minutes",
    "org/answers-500": "failed to send org/answers-500 (500); try again later",
    "org/answers-503": "failed to send org/answers-503 (503); try again later",
    "org/missing": "There is no folder 'org/missing', and no model of that name could be loaded from the Hub",
}


def test_what_the_hub_answers_is_told_from_a_name_that_it_does_not_know(server: HubServer, tmp_path: Path):
    done = run(REFUSED, server, tmp_path, tmp_path, *ANSWERS)
    for name, message in ANSWERS.items():
        status, out, err = done["found"][name]
        assert (status, out) == (1, "")
        assert message in err
        assert err.count("\n") == 1
        assert ("There is no folder" in err) == (name == "org/missing")
    assert done["left"] == []
