"""Names that look like those of OpenAI's models and are none: refused with the nine, and without asking the Hub."""

import socket
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from PIL import Image

from hf_clip import HfClipConfig, HfClipImageProcessor, HfClipModel, HfClipProcessor, HfClipTokenizer, convert, load
from hf_clip.checkpoints.in_memory import load_model
from hf_clip.commands import program
from hf_clip.model.variants import VARIANTS

NAMES = ["ViT-B/99", "RN51"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch):
    find = socket.getaddrinfo

    def look_up(host: Any, *given: Any, **named: Any) -> Any:
        assert host == "127.0.0.1", f"the network was asked for {host}"
        return find(host, *given, **named)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # set for all tests, and not for users


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "words",
    [
        ["info", "NAME"],
        ["convert", "NAME", "OUT"],
        ["classify", "NAME", "image.png", "--labels", "cat,dog"],
        ["classify", "NAME", "image.png", "--labels", "cat,dog", "--onnx"],
        ["app", "NAME", "--port", "0"],
        ["serve", "NAME", "--port", "0"],
        ["index", ".", "--model", "NAME", "--into", "OUT"],
        ["embed", ".", "OUT", "--model", "NAME"],
        ["evaluate", "zero-shot", "--model", "NAME", "--dataset", "."],
        ["evaluate", "retrieval", "--model", "NAME", "--dataset", "."],
        ["finetune", "--model", "NAME", "--dataset", "pairs", "--output_dir", "OUT", "--max_steps", "1"],
        ["export-onnx", "NAME", "OUT"],
    ],
    ids=" ".join,
)
def test_command_refuses_it_in_one_line(
    words: list[str], name: str, pairs_there: Path, capsys: pytest.CaptureFixture[str]
):
    assert program.main([{"NAME": name, "OUT": "out"}.get(word, word) for word in words]) == 1
    said = capsys.readouterr().err
    assert f"Unknown CLIP variant {name!r}; the nine are {', '.join(VARIANTS)}." in said
    assert said.count("\n") == 1
    assert not (pairs_there / "out").exists()


@pytest.fixture
def pairs_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image and a data set of pairs in the current folder."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("image.png")
    (tmp_path / "pairs").mkdir()
    Image.new("RGB", (8, 8)).save("pairs/image.png")
    (tmp_path / "pairs" / "metadata.csv").write_text("file_name,text\nimage.png,a cat\n")
    return tmp_path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "call",
    [
        HfClipModel.from_pretrained,
        HfClipProcessor.from_pretrained,
        HfClipTokenizer.from_pretrained,
        HfClipImageProcessor.from_pretrained,
        HfClipConfig.from_pretrained,
        load_model,
        load,
        lambda name: convert(name, "out"),
    ],
    ids=["model", "processor", "tokenizer", "image processor", "config", "load_model", "openai", "convert"],
)
def test_function_refuses_it(call: Any, name: str):
    with pytest.raises(ValueError, match=f"Unknown CLIP variant {name!r}; the nine are RN50, "):
        call(name)
