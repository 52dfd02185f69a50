"""`hf_clip.convert`, `read` and `write` as functions: what goes in, what comes out, and what is read on the way."""

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hf_clip
from hf_clip import HfClipModel, HfClipProcessor
from hf_clip.checkpoints.read import read
from hf_clip.checkpoints.write import LAYOUTS, write
from hf_clip.commands import convert as convert_command
from hf_clip.commands import publish as publish_command
from hf_clip.commands.export_onnx import split_words
from hf_clip.commands.program import main
from hf_clip.hub import stage

OPENED: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def _watch_files() -> None:
    """Count every file that is opened, by whichever library. Such a hook cannot be removed."""

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str):
            OPENED[arguments[0]] += 1

    sys.addaudithook(count)


@pytest.mark.parametrize(
    ("layout", "name"),
    [("hf_clip", "config.json"), ("transformers", "config.json"), ("open_clip", "open_clip_config.json")],
)
def test_configuration_is_read_once(layout: str, name: str, repositories: dict[str, Path], tmp_path: Path):
    hf_clip.convert(repositories["vit"], tmp_path / "source", layout)
    OPENED.clear()
    model, processor = read(tmp_path / "source")
    assert OPENED[str(tmp_path / "source" / name)] == 1
    assert model.config.vision_config.image_size == processor.image_processor.crop_size["height"] == 48


def test_what_was_read_is_what_was_written(repository: Path, tmp_path: Path):
    model, processor = read(repository)
    write(model, processor, tmp_path / "out")
    for path in repository.iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_model_in_memory_is_written_in_any_layout(repository: Path, tmp_path: Path):
    model = HfClipModel.from_pretrained(repository, dtype=torch.bfloat16)
    write(model, HfClipProcessor.from_pretrained(repository), tmp_path / "ours")
    write(model, HfClipProcessor.from_pretrained(repository), tmp_path / "theirs", "open_clip")
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert stored["text_projection.weight"].dtype == torch.bfloat16
    again, _ = read(tmp_path / "theirs")
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in stored.items())
    assert model.config.architectures == HfClipModel.from_pretrained(repository).config.architectures


def test_layout_is_checked_before_anything_is_read(tmp_path: Path):
    with pytest.raises(ValueError, match="format is 'onnx', but must be one of hf_clip, transformers, open_clip"):
        hf_clip.convert(tmp_path / "missing", tmp_path / "out", "onnx")


def test_commands_offer_all_layouts():
    assert tuple(convert_command.Layout.__members__) == LAYOUTS
    assert tuple(publish_command.Layout.__members__) == stage.LAYOUTS


@pytest.mark.parametrize("flag", ["--remote-code", "--remote_code"])
def test_options_are_read_in_both_spellings(flag: str, repositories: dict[str, Path], tmp_path: Path):
    assert main(["convert", str(repositories["vit"]), str(tmp_path / "out"), flag]) == 0
    assert (tmp_path / "out" / "modeling_hf_clip.py").is_file()


@pytest.mark.parametrize(
    ("words", "precisions", "found"),
    [
        (["clip"], [], ("clip", None, ["fp32"])),
        (["clip", "web"], ["fp16"], ("clip", "web", ["fp16"])),
        (["clip", "web", "fp16", "int8"], ["fp32"], ("clip", "web", ["fp32", "int8", "fp16"])),
        (["clip", "fp16"], ["fp32"], ("clip", None, ["fp32", "fp16"])),
        (["clip", "fp16"], [], ("clip", "fp16", ["fp32"])),
        (["clip"], ["fp32,int8"], ("clip", None, ["fp32", "int8"])),
    ],
)
def test_precisions_may_follow_each_other(words: list[str], precisions: list[str], found: tuple):
    assert split_words(words, precisions) == found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["clip", "--precision", "fp64"], "--precision has 'fp64', which is none of fp32, fp16, int8"),
        (["clip", "web", "more"], "a source and a folder to write to are taken, but there is 'more' as well"),
    ],
)
def test_words_of_the_export_that_mean_nothing(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["export-onnx", *words]) == 1
    assert message in capsys.readouterr().err


def test_model_in_memory_is_no_source(repositories: dict[str, Path], tmp_path: Path):
    with pytest.raises(TypeError, match=r"^source is a HfClipModel, but the name .* save_pretrained first, and name"):
        hf_clip.convert(HfClipModel.from_pretrained(repositories["vit"]), tmp_path / "out")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_device_is_no_source(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="is no file and no folder, but a pipe or a device"):
        hf_clip.convert(os.devnull, tmp_path / "out")
