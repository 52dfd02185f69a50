"""The Containerfile, read as a builder reads it: what it copies is there, and its command starts the server."""

import fnmatch
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from hf_clip.commands.program import main

from ..waiting import LONGEST_WAIT

ROOT = Path(__file__).resolve().parents[2]


def steps() -> list[tuple[str, str]]:
    """Instruction and words of each step; lines that go on are joined."""
    lines = [line for line in (ROOT / "Containerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]  # type: ignore[misc]


def one(instruction: str) -> str:
    [found] = [words for name, words in steps() if name == instruction]
    return found


def copied() -> list[tuple[list[str], str]]:
    """Sources and destination of each COPY."""
    parts = [words.split() for name, words in steps() if name == "COPY"]
    return [(words[:-1], words[-1]) for words in parts]


def test_what_is_copied_is_there_and_is_sent_to_the_builder():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    sources = {source for found, _ in copied() for source in found}
    assert sources == let_in
    tracked = subprocess.run(["git", "ls-files", *sources], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode == 0:  # a checkout, and no unpacked archive
        assert all(fnmatch.filter(tracked.stdout.splitlines(), f"{source}*") for source in sources)
    assert all((ROOT / source).exists() for source in sources)


def test_instructions_are_known_and_in_order():
    names = [name for name, _ in steps()]
    assert names[0] == "FROM"
    known = {
        "FROM",
        "ARG",
        "ENV",
        "COPY",
        "RUN",
        "USER",
        "WORKDIR",
        "EXPOSE",
        "HEALTHCHECK",
        "STOPSIGNAL",
        "ENTRYPOINT",
    }
    assert set(names) == known
    assert names.index("USER") > max(place for place, name in enumerate(names) if name == "RUN")
    assert one("USER") == "clip"
    arguments = {words.partition("=")[0] for name, words in steps() if name == "ARG"}
    assert arguments == {found for name, words in steps() if name == "RUN" for found in re.findall(r"\$(\w+)", words)}


def test_a_wheel_is_built_from_what_is_copied(tmp_path: Path):
    """Without the registry: the backend that pip would call, on the files that the builder has."""
    pytest.importorskip("hatchling")
    ignored = shutil.ignore_patterns("__pycache__")
    for sources, destination in copied():
        place = tmp_path / destination.strip("/")
        for source in sources:
            if (ROOT / source).is_dir():  # what is in it goes to the destination
                shutil.copytree(ROOT / source, place, ignore=ignored)
            else:
                place.mkdir(exist_ok=True)
                shutil.copy(ROOT / source, place)
    script = "from hatchling.build import build_wheel; print(build_wheel('.'))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "build", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.fullmatch(r"hf_clip-\S+\.whl", done.stdout.split()[-1])


def test_all_that_the_server_needs_is_pinned():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [extras] = [words.partition("=")[2] for name, words in steps() if name == "ARG" and words.startswith("EXTRAS=")]
    needed = project["dependencies"] + [
        line for extra in extras.split(",") for line in project["optional-dependencies"][extra]
    ]
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    assert {Requirement(line).name.lower().replace("_", "-") for line in needed} <= pinned
    assert all("--constraint /build/constraints.txt" in words for _, words in steps() if "pip install" in words)


def test_its_command_starts_the_server(
    digits: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The program reads the options, loads the model of `/model`, and comes as far as serving."""
    program, *words = json.loads(one("ENTRYPOINT"))
    assert program == "hf-clip"
    port = words[words.index("--port") + 1]
    assert one("EXPOSE") == port
    assert f"http://127.0.0.1:{port}/health" in one("HEALTHCHECK")
    served: list[Any] = []

    def serve(app: Any, taken: Any) -> None:
        served.append(({route.path for route in app.routes}, taken.getsockname()[0]))

    monkeypatch.setattr("hf_clip.serve.server_process.serve_forever", serve)
    words[words.index("--port") + 1] = "0"  # on this machine it may be taken
    assert main([str(digits / "vit") if word == "/model" else word for word in words]) == 0
    [(paths, host)] = served
    assert paths >= {"/health", "/v1/embeddings", "/predict"}
    assert host == "0.0.0.0"
    assert "without --api-key, everyone who reaches this address" in capsys.readouterr().out


def test_its_health_check_asks_the_server(served: Any):
    """Its line of Python fails where nothing answers, and ends well where a server does."""
    from hf_clip.serve.web_app import build_app

    from .test_clients import running

    words = json.loads(one("HEALTHCHECK").partition("CMD ")[2])
    assert words[:2] == ["python", "-c"]

    def ask(address: str) -> int:
        line = words[2].replace(f"http://127.0.0.1:{one('EXPOSE')}", address)
        assert address in line
        line = line.replace("timeout=4", f"timeout={LONGEST_WAIT}")  # for a machine that lets it stand still
        return subprocess.run([sys.executable, "-c", line], capture_output=True, check=False).returncode

    with running(build_app(served)) as address:
        assert ask(address) == 0
    assert ask(address) != 0
