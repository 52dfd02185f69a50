"""A Space beside a model: what goes, what is never overwritten, and that its program runs."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import RepoCard

import hf_clip
from conversion.publish import main
from hf_clip.hub.space import GRADIO_VERSION, is_unchanged, requirement, signed, space_files

from ..hub_server import HubServer
from .test_publish import run

ROOT = Path(__file__).resolve().parents[2]

PUSH = """
import importlib.util, runpy, urllib.request
from conversion.publish import main
from huggingface_hub import HfApi
folder, = sys.argv[1:]
api, found = HfApi(), {}

def push(name, *arguments):
    found[name] = call(main, [folder, *arguments])

push("first", "org/tiny", "--space")
push("again", "org/tiny", "--space")
def upload(name, content):
    api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id="org/tiny", repo_type="space")

upload("examples.txt", b"mine")
path = api.hf_hub_download("org/tiny", "app.py", repo_type="space")
upload("app.py", Path(path).read_bytes() + b"print()\\n")
upload("README.md", b"# Mine")
push("changed", "org/tiny", "--space")
push("replaced", "org/tiny", "--space", "--replace-space")
push("public", "org/tiny", "--space", "--private")
push("hidden", "org/hidden", "--space-repo", "org/page", "--private")
api.create_repo("org/begun", repo_type="space", space_sdk="gradio")
push("begun", "org/begun", "--space")
push("forbidden", "org/other", "--space-repo", "others/tiny")
if importlib.util.find_spec("gradio"):
    import gradio

    launch = gradio.Blocks.launch
    here = {"prevent_thread_lock": True, "quiet": True, "server_name": "127.0.0.1"}
    gradio.Blocks.launch = lambda self, **settings: launch(self, **settings, **here)
    path = api.hf_hub_download("org/tiny", "app.py", repo_type="space")
    demo = runpy.run_path(path, run_name="__main__")["demo"]
    with urllib.request.urlopen(demo.local_url + "config") as answer:
        found["page"] = [part["props"].get("label") for part in json.loads(answer.read())["components"]]
    demo.close()
os.environ["HF_TOKEN"] = "somebodys-token"
push("unknown", "org/tiny", "--space")
report(**found)
"""


@pytest.fixture(scope="module")
def pushed(
    repositories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[HubServer, dict[str, Any]]]:
    """The server after all that `PUSH` does, and what each command returned and printed."""
    with HubServer() as server:
        home = tmp_path_factory.mktemp("home")
        yield server, run(PUSH, server, home, repositories["resnet"], GRADIO_ANALYTICS_ENABLED="False")


def test_space_is_pushed_and_never_overwrites_what_others_wrote(pushed: tuple[HubServer, dict[str, Any]]):
    server, found = pushed
    hub, space = server.hub, f"{server.url}/spaces/org/tiny"

    status, out, err = found["first"]
    assert (status, err) == (0, "")
    assert [line.rpartition("/commit/")[0] or line for line in out.splitlines()] == [f"{server.url}/org/tiny", space]
    assert found["again"][0] == 0
    assert hub.repositories["spaces/org/tiny"].messages[:2] == ["initial commit", "Show org/tiny"]
    files = hub.uploaded("spaces/org/tiny")
    assert set(files) == {"README.md", "app.py", "requirements.txt", "examples.txt"}

    assert found["changed"][:2] == [1, ""]
    assert found["changed"][2] == (
        "error: The Space org/tiny was not published: it has files that hf-clip publish did not write, or that were "
        "changed since: README.md, app.py. Name another Space with --space-repo, or overwrite them with "
        "--replace-space.\n"
    )
    assert found["replaced"][0] == 0, found["replaced"][2]
    texts = {name: content.decode() for name, content in files.items()}
    assert texts.pop("examples.txt") == "mine"  # a user's other files stay
    endpoint = {name: text.replace(server.url, "https://huggingface.co") for name, text in texts.items()}
    expected = space_files("org/tiny", "org/tiny", hf_clip.__version__)
    assert endpoint["app.py"] == expected["app.py"]
    assert endpoint["requirements.txt"] == expected["requirements.txt"]
    assert len(hub.repositories["spaces/org/tiny"].messages) == 6  # the second push changed nothing

    assert "is there already and public, though a private one was asked for" in found["public"][2]
    assert found["begun"][0] == 0, found["begun"][2]
    assert "app.py" in hub.uploaded("spaces/org/begun")


def test_private_models_and_refusals_of_the_hub(pushed: tuple[HubServer, dict[str, Any]]):
    server, found = pushed
    hub, page = server.hub, f"{server.url}/spaces/org/page"
    assert hub.repositories["spaces/org/page"].private
    status, out, err = found["hidden"]
    assert (status, err) == (0, "")
    assert out.splitlines()[1:] == [
        page,
        f"org/hidden is private, and the Space cannot load it yet: at {page}/settings add the secret HF_TOKEN, a token "
        f"that may read org/hidden.",
    ]
    refusals = {
        "forbidden": "others/tiny was not published: your token may not write to others (",
        "unknown": "org/tiny was not published: the Hub doesn't know your token",
    }
    for name, message in refusals.items():
        status, _, err = found[name]
        assert status == 1
        assert err.startswith(f"error: {message}"), err
        assert err.count("\n") == 1
    assert not [name for name in hub.repositories if name.startswith("spaces/others")]


def test_dry_run_shows_the_files_of_the_space(repository: Path, capsys: pytest.CaptureFixture):
    assert main([str(repository), "org/clip-tiny", "--dry-run", "--space-repo", "org/try-it"]) == 0
    out = capsys.readouterr().out.partition("Would push to the Space org/try-it, in one commit:\n")[2]
    for name in ("README.md", "app.py", "requirements.txt"):
        assert f"  {name} " in out
    assert '  demo = build_page(PageModel.load("org/clip-tiny"))' in out
    assert "sha256" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--replace-space"], "--replace-space says what becomes of a Space; give --space, too."),
        (["--space-repo", "tiny"], "'tiny' is no name of a repository"),
        (["--space"], "HF_HUB_OFFLINE=1 forbids all traffic"),
    ],
)
def test_what_is_refused(repository: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str):
    assert main([str(repository), "org/tiny", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_readme_tells_the_hub_what_to_run():
    texts = space_files("org/clip-tiny", "me/try-it", "1.2.3")
    card = RepoCard(texts["README.md"], ignore_metadata_errors=False)
    metadata = yaml.safe_load(texts["README.md"].split("---\n")[1])
    assert metadata["title"] == "try-it"
    assert (metadata["sdk"], metadata["app_file"], metadata["models"]) == ("gradio", "app.py", ["org/clip-tiny"])
    assert len(metadata["short_description"]) <= 60  # the Hub refuses more
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {metadata["colorFrom"], metadata["colorTo"]} <= colours
    assert "hf-clip app org/clip-tiny" in card.text
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert metadata["sdk_version"] == pinned["gradio"] == GRADIO_VERSION
    assert texts["requirements.txt"].startswith("hf-clip[app]==1.2.3\n")
    assert requirement("0.2.0.dev1") == "hf-clip[app]>=0.2.0.dev1"


def test_checksum_tells_own_files_from_changed_ones():
    for name in ("app.py", "README.md"):
        text = signed("a\nb\n", name)
        assert is_unchanged(text)
        assert not is_unchanged(text.replace("b", "c"))
        assert not is_unchanged(text + "more\n")
    assert not is_unchanged("a\nb\n")
    assert re.fullmatch(r"a\n\n# Written by hf-clip publish, sha256 \w{64}\n", signed("a\n", "app.py"))


def test_program_of_the_space_runs(pushed: tuple[HubServer, dict[str, Any]]):
    """As the Hub runs it, with the model from the Hub."""
    if "page" not in pushed[1]:
        pytest.skip("the extra `app` brings Gradio")
    assert {"Labels", "Threshold"} <= set(pushed[1]["page"])
