"""The wheel: what it holds, that the source distribution builds the same one, and that it works alone."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from PIL import Image

from .small import IMAGE_SIZES

ROOT = Path(__file__).resolve().parents[1]
BUILD = "import sys; from hatchling import build; print(getattr(build, sys.argv[1])(sys.argv[2]))"
EXTRAS = {
    "train",
    "lora",
    "convert",
    "eval",
    "search",
    "app",
    "serve",
    "ray",
    "images",
    "onnx",
    "demo",
    "docs",
    "test",
    "bench",
    "dev",
}


def build(kind: str, source: Path, out: Path) -> Path:
    """Build a distribution of the tree at `source`: "build_wheel" or "build_sdist"."""
    pytest.importorskip("hatchling")
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_wheel", ROOT, tmp_path_factory.mktemp("wheel"))


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(wheel: Path) -> Message:
    name = next(name for name in contents(wheel) if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(contents(wheel)[name].decode())


def test_wheel_has_the_package_its_types_and_its_program_and_nothing_else(wheel: Path):
    files = contents(wheel)
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "hf_clip").rglob("*.py")}
    assert package <= files.keys()
    assert "hf_clip/py.typed" in files
    recipes = {f"hf_clip/recipes/{path.name}": path.read_bytes() for path in (ROOT / "recipes").iterdir()}
    assert {name: content for name, content in files.items() if name.startswith("hf_clip/recipes/")} == recipes
    assert {name.split("/")[0] for name in files if ".dist-info/" not in name} == {"hf_clip"}
    scripts = next(content for name, content in files.items() if name.endswith("entry_points.txt"))
    assert "hf-clip = hf_clip.commands.program:main" in scripts.decode()
    assert any(name.endswith("licenses/LICENSE") for name in files)


def test_metadata_says_who_where_and_what_for(wheel: Path):
    told = metadata(wheel)
    assert told["Author"] == "The hf_clip developers"
    assert {line.split(",")[0] for line in told.get_all("Project-URL", [])} >= {"Documentation", "Source", "Changelog"}
    assert set(told.get_all("Provides-Extra", [])) == EXTRAS
    needs = {match[0] for line in told.get_all("Requires-Dist", []) if (match := re.match(r"[\w-]+", line))}
    assert {"torch", "transformers", "typer"} <= needs


def test_source_distribution_builds_the_same_wheel(wheel: Path, tmp_path: Path):
    sdist = build("build_sdist", ROOT, tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    again = build("build_wheel", tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path)
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)


@pytest.mark.slow
def test_wheel_alone_converts_fine_tunes_classifies_and_publishes(
    wheel: Path, archives: dict[str, Path], vocabulary: Path, tmp_path: Path
):
    """In a fresh environment, and outside of a checkout, by the commands alone."""
    venv, work = tmp_path / "venv", tmp_path / "work"
    work.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    binaries = venv / "bin"
    install = [binaries / "python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    subprocess.run([*map(str, install), f"{wheel}[train]"], check=True, cwd=work)
    images = work / "images"
    images.mkdir()
    for number in range(32):
        size = IMAGE_SIZES["vit"]
        Image.new("RGB", (size, size), (8 * number, 0, 255 - 8 * number)).save(images / f"{number:02}.png")
    captions = [f"{number:02}.png,{'red' if number > 15 else 'blue'}" for number in range(32)]
    (images / "metadata.csv").write_text("\n".join(["file_name,caption", *captions]) + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}

    def run(*words: object) -> str:
        done = subprocess.run(
            [str(binaries / str(words[0])), *map(str, words[1:])],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    listed = run("hf-clip", "--help")
    assert all(f" {name} " in listed for name in ("convert", "publish", "export-onnx", "finetune", "classify", "info"))
    run("hf-clip", "convert", archives["vit"], "converted", "--vocab", vocabulary)
    assert "hf_clip" in run("hf-clip", "info", "converted")
    launch = ["accelerate", "launch", "--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "-m", "hf_clip.commands.finetune"]
    options = ["--model", "converted", "--dataset", "images", "--output_dir", "tuned", "--max_steps", 2]
    run(*launch, *options, "--per_device_train_batch_size", 8, "--dataloader_num_workers", 0)
    run("hf-clip", "classify", "tuned", "images", "--labels", "red,blue", "--output", "scores.csv")
    assert len((work / "scores.csv").read_text().splitlines()) == 33
    assert "model.safetensors" in run("hf-clip", "publish", "tuned", "org/tuned", "--dry-run")
