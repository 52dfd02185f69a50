"""The guide to the server, block by block as it is printed, against a server that its own command started.

Only the port is another one, since 7997 may be taken. Blocks for clients that are not installed are left out;
`HF_CLIP_OPENAI_JS` names a folder with node_modules that hold the package `openai`.
"""

import ast
import contextlib
import gc
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_clip import HfClipConfig, HfClipModel, HfClipProcessor

from ..doc_blocks import NUMBER, Block, commands_of, read_blocks
from ..search.conftest import make_image
from ..waiting import LONGEST_WAIT

pytest.importorskip("lancedb")

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = read_blocks(ROOT / "docs" / "guides" / "serving.md")
PROGRAM = """\
#!{python}
import sys
from hf_clip.commands.program import main
sys.exit(main(sys.argv[1:]))
"""


def is_start(block: Block) -> bool:
    return block.language == "bash" and block.text.startswith("hf-clip serve clip-vit-b32/")


def is_runnable(block: Block) -> bool:
    """Whether a block asks the server and its client is there."""
    if block.language == "javascript":
        return shutil.which("node") is not None and bool(os.environ.get("HF_CLIP_OPENAI_JS"))
    if block.language == "bash":
        return "curl" in block.text
    if block.language != "python" or "7997" not in block.text:
        return False
    imports = [node for node in ast.walk(ast.parse(block.text)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    return all(find_spec(name.partition(".")[0]) is not None for name in names)


@pytest.fixture(scope="module")
def folder(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader of the guide is: `clip-vit-b32`, a small model of 512 numbers, an index, and images."""
    from hf_clip.search.image_index import ImageIndex

    place = tmp_path_factory.mktemp("guide")
    config = HfClipConfig.from_pretrained(digits / "vit")
    for part in (config, config.text_config, config.vision_config):
        part.projection_dim = 512
    torch.manual_seed(0)
    model, processor = HfClipModel(config).eval(), HfClipProcessor.from_pretrained(digits / "vit")
    model.save_pretrained(place / "clip-vit-b32")
    processor.save_pretrained(place / "clip-vit-b32")
    (place / "photos").mkdir()
    for seed, name in enumerate(("cats.jpg", "photos/a.jpg", "photos/b.jpg")):
        make_image(seed, (1200, 800)).save(place / name)
    ImageIndex.open(place / "photos-index", model=str(place / "clip-vit-b32")).add(place / "photos")
    (place / "bin").mkdir()
    program = place / "bin" / "hf-clip"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    if installed := os.environ.get("HF_CLIP_OPENAI_JS"):
        (place / "node_modules").symlink_to(Path(installed).resolve() / "node_modules")
    return place


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[str]:
    """The server that the guide starts with an index, since every block is asked of it."""
    [command] = [line for block in BLOCKS if is_start(block) for line in commands_of(block) if "--index" in line]
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    started = subprocess.Popen(
        ["bash", "-c", f"exec {command} --port 0"],
        cwd=folder,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert started.stdout is not None
    line = started.stdout.readline()
    number = line.partition(" ")[0].rpartition(":")[2]
    [shown] = [block.output.text for block in BLOCKS if is_start(block) and block.output is not None]
    assert line.replace(number, "7997") == shown.replace("; see", ", and searches 2 images; see") + "\n"
    yield number
    started.send_signal(signal.SIGTERM)
    assert started.wait(LONGEST_WAIT) == 0
    started.stdout.close()


def outline(value: Any) -> Any:
    """The form of a value in JSON: names and kinds, and of a list the first entry."""
    if isinstance(value, dict):
        return {name: outline(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [outline(value[0])] if value else []
    return type(value).__name__


def read_shown(text: str) -> Any:
    """JSON as a page shows it, in which … stands for what is left out."""
    return json.loads(re.sub(r",?\s*…", "", text))


def run(block: Block, port: str, folder: Path) -> str:
    """What a block prints."""
    text = block.text.replace("7997", port)
    if block.language == "python":
        with contextlib.redirect_stdout(io.StringIO()) as printed, warnings.catch_warnings():
            exec(compile(text, block.place, "exec"), {"__name__": "__main__"})
            warnings.simplefilter("ignore", ResourceWarning)  # a reader's program ends here, and closes its client
            gc.collect()
        return printed.getvalue()
    if block.language == "bash":
        text = "\n".join(line for line in text.splitlines() if not line.startswith("hf-clip serve"))
        command = ["bash", "-euo", "pipefail", "-c", text]
    else:
        (folder / "block.mjs").write_text(text)
        command = ["node", "block.mjs"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LONGEST_WAIT, check=False)
    assert done.returncode == 0, f"{block.place}: {done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.parametrize("block", [block for block in BLOCKS if is_runnable(block)], ids=lambda block: block.place)
def test_block_works_as_it_is_printed(block: Block, port: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    printed = run(block, port, folder)
    assert '"error"' not in printed
    if block.output is None:
        assert printed
    elif block.language == "bash":  # curl prints JSON
        assert outline(json.loads(printed)) == outline(read_shown(block.output.text))
    else:
        assert NUMBER.sub("#", printed).strip() == NUMBER.sub("#", block.output.text).strip()


def test_commands_that_start_the_server_are_of_one_model():
    starts = [line for block in BLOCKS if is_start(block) for line in commands_of(block)[:1]]
    assert starts[0] == "hf-clip serve clip-vit-b32/"
    assert all(line.startswith(starts[0]) for line in starts)
