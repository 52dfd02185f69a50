"""`hf-clip info`: every layout that is read or met is named, and who would load it, from headers alone."""

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel

import hf_clip
from hf_clip import HfClipTextModel
from hf_clip.checkpoints import describe as describing
from hf_clip.checkpoints.conversion import convert
from hf_clip.commands.program import main

from ..hub_server import HubServer, Repository
from ..small import DIMENSIONS

WITH_PACKAGE, STOCK, OPEN_CLIP = "transformers with hf_clip", "transformers alone", "open_clip"
WITH_CODE = "transformers with trust_remote_code"


def info(source: object, capsys: pytest.CaptureFixture) -> dict[str, Any]:
    assert main(["info", str(source), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def loaders(found: dict[str, Any]) -> dict[str, bool]:
    return {loader["name"]: loader["loads"] for loader in found["loaders"]}


def check_sizes(found: dict[str, Any], tower: str, reference: nn.Module) -> None:
    """What tensors and configuration say of the reduced models, compared with how they were made."""
    given = DIMENSIONS[tower]
    assert found["embedding"] == given["embed_dim"]
    assert found["text"]["layers"] == given["transformer_layers"]
    assert found["text"]["width"] == given["transformer_width"]
    assert found["text"]["tokens"] == given["context_length"]
    assert found["text"]["vocabulary"] == given["vocab_size"]
    assert found["image"]["pixels"] == given["image_resolution"]
    assert found["image"]["kind"] == {"vit": "ViT", "resnet": "ResNet"}[tower]
    counts = {name: parameter.numel() for name, parameter in reference.named_parameters()}
    image = sum(count for name, count in counts.items() if name.startswith("visual."))
    assert found["parameters"] == {"all": sum(counts.values()), "image": image}
    assert found["loss"] == "softmax"
    assert found["variant"] is None


def test_folder_of_ours(tower: str, repository: Path, reference: nn.Module, capsys: pytest.CaptureFixture):
    for source in (repository, repository / "model.safetensors"):
        found = info(source, capsys)
        assert found["layout"] == "hf_clip"
        check_sizes(found, tower, reference)
        assert found["dtypes"].keys() <= {"float32", "float16"}
        assert found["activation"] == "quick_gelu"
        assert found["tokenizer"] == "1,000 tokens, texts of at most 20"
        assert found["images"]["resample"] == "bicubic"
        assert found["problems"] == []
        assert loaders(found)[WITH_PACKAGE]
        assert not loaders(found)[STOCK]


def test_text_for_people(repositories: dict[str, Path], capsys: pytest.CaptureFixture):
    assert main(["info", str(repositories["resnet"])]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{repositories['resnet']}\n")
    for part in (
        "layout",
        "a CLIP with a ResNet",
        "1-2-1-1 blocks",
        "no: its image tower is a ResNet",
        "AutoModel.from",
    ):
        assert part in shown


def test_archive_of_openai(tower: str, archives: dict[str, Path], reference: nn.Module, capsys: pytest.CaptureFixture):
    found = info(archives[tower], capsys)
    assert found["layout"] == "OpenAI, TorchScript archive"
    check_sizes(found, tower, reference)
    assert found["activation"] == "quick_gelu"
    assert loaders(found) == {WITH_PACKAGE: False, "hf_clip.load": True, "OpenAI's clip": True}
    assert f"hf-clip convert {archives[tower]} FOLDER" in found["loaders"][0]["how"]


def test_name_of_openai_needs_no_file(capsys: pytest.CaptureFixture):
    found = info("ViT-L/14@336px", capsys)
    assert found["variant"] == "ViT-L/14@336px"
    assert found["parameters"]["all"] == 427_944_193
    assert "not downloaded" in found["layout"]


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("flat.pt", "OpenAI, state dict"),
        ("flat.safetensors", "OpenAI, safetensors file"),
        ("training.pt", "OpenAI, training checkpoint"),
    ],
)
def test_state_dicts(kind: str, layout: str, references: dict[str, nn.Module], tmp_path: Path, capsys: Any):
    state = {name: tensor.clone() for name, tensor in references["vit"].state_dict().items()}
    path = tmp_path / kind
    if kind.startswith("training"):
        torch.save({"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    else:
        torch.save(state, path) if path.suffix == ".pt" else save_file(state, path)
    found = info(path, capsys)
    assert found["layout"] == layout
    check_sizes(found, "vit", references["vit"])
    assert found["activation"] is None  # no tensor tells it
    assert loaders(found)[WITH_PACKAGE] is False
    assert loaders(found).get("hf_clip.load") is (None if kind.startswith("training") else True)


CALLS = {
    "hf_clip": {WITH_PACKAGE: "HfClipModel", WITH_CODE: "HfClipModel"},
    "transformers": {WITH_PACKAGE: "HfClipModel", STOCK: "CLIPModel"},
    "open_clip": {WITH_PACKAGE: "HfClipModel"},
    "archive": {"hf_clip.load": "tuple"},
}
"""Layout → who loads it → what its call returns."""


@pytest.mark.parametrize("layout", CALLS)
def test_call_that_is_named_loads_it(
    layout: str, archives: dict[str, Path], tmp_path: Path, capsys: Any, vocabulary: Path
):
    source = archives["vit"]
    if layout != "archive":
        source = tmp_path / "out"
        convert(archives["vit"], source, layout, remote_code=layout == "hf_clip")
    found = info(source, capsys)
    calls = {loader["name"]: loader["how"] for loader in found["loaders"] if loader["loads"]}
    for name in ("OpenAI's clip", OPEN_CLIP):  # these need torchvision
        calls.pop(name, None)
    assert calls.keys() == CALLS[layout].keys()
    for name, call in calls.items():
        *statements, expression = call.split("; ")
        space: dict[str, Any] = {"AutoModel": AutoModel, "hf_clip": hf_clip}
        for statement in statements:
            exec(statement, space)
        assert type(eval(expression, space)).__name__ == CALLS[layout][name]


@pytest.mark.parametrize(("layout", "who"), [("transformers", STOCK), ("open_clip", OPEN_CLIP)])
def test_layouts_of_others(
    layout: str, who: str, repositories: dict[str, Path], references: dict[str, nn.Module], tmp_path: Path, capsys: Any
):
    convert(repositories["vit"], tmp_path / "out", layout)
    found = info(tmp_path / "out", capsys)
    assert found["layout"] == layout
    check_sizes(found, "vit", references["vit"])
    assert found["problems"] == []
    assert loaders(found)[WITH_PACKAGE]
    assert loaders(found)[who]


def test_code_that_travels_is_noticed(repositories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture):
    convert(repositories["vit"], tmp_path / "out", remote_code=True)
    assert loaders(info(tmp_path / "out", capsys))["transformers with trust_remote_code"]
    (tmp_path / "out" / "modeling_hf_clip.py").unlink()
    found = info(tmp_path / "out", capsys)
    assert not loaders(found)["transformers with trust_remote_code"]
    assert "modeling_hf_clip.py" in found["loaders"][1]["how"]


def test_tower_alone(repositories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture):
    HfClipTextModel.from_pretrained(repositories["vit"]).save_pretrained(tmp_path)
    found = info(tmp_path, capsys)
    assert found["model"] == "a text tower alone (HfClipTextModel)"
    assert found["image"] == {}
    assert found["problems"] == ["It has no tokenizer: neither tokenizer.json nor vocab.json and merges.txt."]
    assert loaders(found)[WITH_PACKAGE]  # the model alone


def test_damage_and_contradictions_are_problems(repositories: dict[str, Path], tmp_path: Path, capsys: Any):
    folder = shutil.copytree(repositories["vit"], tmp_path / "out")
    values = json.loads((folder / "config.json").read_text())
    values["text_config"]["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(values))
    found = info(folder, capsys)
    assert "holds tensors that its configuration has no place for" in found["problems"][0]
    assert loaders(found) == {WITH_PACKAGE: False}
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    assert main(["info", str(folder), "--json"]) == 1
    shown = capsys.readouterr()
    problem = json.loads(shown.out)["problems"][0]
    assert "truncated or damaged" in problem
    assert shown.err == f"error: {problem}\n"
    (folder / "model.safetensors").unlink()
    assert "It has no weights" in info(folder, capsys)["problems"][0]


STRANGERS = {
    "timm": (
        {"config.json": {"architecture": "vit_base_patch16_clip_224"}},
        "an image model, vit_base_patch16_clip_224",
    ),
    "PEFT": ({"adapter_config.json": {"base_model_name_or_path": "x"}}, "an adapter, which needs its base model"),
    "transformers": ({"config.json": {"model_type": "siglip"}}, "a model of the type 'siglip'"),
    "diffusers": ({"model_index.json": {}}, "a diffusion pipeline, whose text tower lies in text_encoder/"),
    "unknown": ({"config.json": {"notes": 1}}, None),
}


@pytest.mark.parametrize("layout", STRANGERS)
def test_strangers_are_named(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    files, model = STRANGERS[layout]
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values))
    found = info(tmp_path, capsys)
    assert found["layout"] == layout
    assert found["model"] == model
    assert loaders(found) == {WITH_PACKAGE: False}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("blocks.0.attn.qkv.weight", "timm, safetensors file"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "transformers, safetensors file"),
        ("conditioner.embedders.0.transformer.weight", "Stable Diffusion, safetensors file"),
        ("anything", "unknown, safetensors file"),
    ],
)
def test_files_of_strangers_are_told_by_their_names(name: str, layout: str, tmp_path: Path, capsys: Any):
    save_file({name: torch.zeros(2, 3)}, tmp_path / "file.safetensors")
    found = info(tmp_path / "file.safetensors", capsys)
    assert found["layout"] == layout
    assert found["parameters"]["all"] == 6
    assert loaders(found) == {WITH_PACKAGE: False}


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("nowhere.pt", "There is no checkpoint file or folder nowhere.pt"),
        ("./nowhere", "check the path"),
        ("PHOTOS", "photos holds no model: it has neither config.json nor open_clip_config.json. Name a checkpoint"),
        ("~no-such-user/model", "check the path"),
        (os.devnull, "is no file and no folder, but a link to nowhere, a pipe or a device"),
    ],
)
def test_what_is_not_there_is_one_line(source: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.json").write_text("{}")
    assert main(["info", source.replace("PHOTOS", str(tmp_path / "photos"))]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert line in shown


def test_folder_whose_weights_are_missing_is_not_asked_for_on_the_hub(
    repositories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(repositories["vit"], tmp_path / "org" / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("nowhere")
    monkeypatch.setattr(describing, "hub_headers", lambda *_: pytest.fail("the Hub was asked"))
    found = info("org/model", capsys)
    assert found["problems"] == ["There is no checkpoint file org/model/model.safetensors; check the path."]


def test_repository_on_the_hub_is_read_without_its_weights(
    repositories: dict[str, Path],
    references: dict[str, nn.Module],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    with HubServer() as server:
        repository = Repository()
        repository.commit({path.name: path.read_bytes() for path in repositories["vit"].iterdir()}, "main", "all")
        server.hub.repositories["org/small"] = repository
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        snapshot = partial(huggingface_hub.snapshot_download, endpoint=server.url, cache_dir=tmp_path)
        monkeypatch.setattr(describing, "snapshot_download", snapshot)
        api = partial(huggingface_hub.HfApi, endpoint=server.url)
        monkeypatch.setattr(describing, "HfApi", api)
        monkeypatch.setattr("hf_clip.checkpoints.headers.HfApi", api)
        found = info("org/small", capsys)
        check_sizes(found, "vit", references["vit"])
        assert found["problems"] == []
        assert loaders(found)[WITH_PACKAGE]
        assert not list(tmp_path.rglob("*.safetensors"))
        files = dict(repository.commits[repository.refs["main"]])
        files["pytorch_model.bin"] = files.pop("model.safetensors")
        repository.commit(files, "main", "pickled")
        found = info("org/small", capsys)
        assert "pickled" in found["problems"][0]
        assert loaders(found)[WITH_PACKAGE]
