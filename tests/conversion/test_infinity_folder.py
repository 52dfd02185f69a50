"""Folders for infinity, which runs transformers' CLIPModel and reads the greatest text length from config.json."""

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from hf_clip import HfClipModel
from hf_clip.commands.program import main

from ..small import CONTEXT_LENGTH, random_images, texts


@torch.no_grad()
def test_stock_clip_loads_the_folder_and_gives_our_embeddings(
    shallow_repositories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source, out = shallow_repositories["vit"], tmp_path / "out"
    assert main(["export-onnx", str(source), str(out), "--layout", "infinity"]) == 0
    assert "in the layout of transformers' CLIPModel, which infinity loads" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("clip", ["CLIPModel"])
    assert config["max_length"] == CONTEXT_LENGTH  # else infinity cuts texts at 20 ids
    stock, ours = CLIPModel.from_pretrained(out).eval(), HfClipModel.from_pretrained(source).eval()
    inputs = {"input_ids": texts(), "pixel_values": random_images("vit")}
    found, expected = stock(**inputs), ours(**inputs)
    for name in ("text_embeds", "image_embeds"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    names = {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"}
    assert {path.name for path in out.iterdir()} >= names


def test_what_is_refused(shallow_repositories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def error(*words: str) -> str:
        assert main(["export-onnx", *words, "--layout", "infinity"]) != 0
        return " ".join(capsys.readouterr().err.replace("│", "").split())

    vit, resnet, out = (str(path) for path in (*shallow_repositories.values(), tmp_path / "out"))
    assert (
        "infinity cannot serve this model: its image tower is a ResNet, and transformers' CLIPModel has ViTs only, "
        f"which infinity runs. `hf-clip serve {resnet}` serves it to infinity's clients." in error(resnet, out)
    )
    assert f"name it: hf-clip export-onnx {vit} OUT --layout infinity" in error(vit)
    assert "exists and is not empty; name a folder that is empty or new" in error(vit, vit)
    assert "--precision is of graphs, and infinity loads weights" in error(vit, out, "--precision", "fp16")
    assert list(tmp_path.iterdir()) == []
