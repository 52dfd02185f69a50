"""Folders that carry their code: loaded in a process that has never heard of hf_clip, and by us without trust."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

from hf_clip import HfClipModel, HfClipProcessor
from hf_clip.checkpoints.remote_code import TRAVELLING, add_remote_code
from hf_clip.zero_shot.pipeline import HfClipZeroShotPipeline

from ..warm_python import run_warm
from ..without_hf_clip import BLOCK_HF_CLIP

LABELS = ["a cat", "it’s red"]

WITHOUT_HF_CLIP = (
    BLOCK_HF_CLIP
    + """
import json
from PIL import Image
from transformers import (
    AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoProcessor, AutoTokenizer, pipeline
)

folder, saved = sys.argv[1:]
labels = json.loads(sys.stdin.read())
trust = {"trust_remote_code": True}
model, processor = AutoModel.from_pretrained(folder, **trust), AutoProcessor.from_pretrained(folder, **trust)
names = [type(part).__name__ for part in (model, processor, processor.tokenizer, processor.image_processor)]
names += [type(auto.from_pretrained(folder, **trust)).__name__ for auto in (AutoTokenizer, AutoImageProcessor)]
names += [type(AutoModelForImageClassification.from_pretrained(folder, **trust)).__name__]
image = Image.open(folder + "/image.png")
model.save_pretrained(saved)
processor.save_pretrained(saved)
results = [
    pipeline("zero-shot-image-classification", model=path, **trust)(image, candidate_labels=labels)
    for path in (folder, saved)
]
print("RESULT" + json.dumps([names, results]))
"""
)


@pytest.fixture
def published(repository: Path, tmp_path: Path, photographs: dict[str, Image.Image]) -> Path:
    folder = tmp_path / "published"
    shutil.copytree(repository, folder)
    add_remote_code(folder)
    photographs["chelsea"].save(folder / "image.png")
    return folder


def test_folder_loads_where_hf_clip_is_not_installed(published: Path, tmp_path: Path):
    """At the other end of the supported range of transformers by PYTHONPATH: the child process takes this one's."""
    done = run_warm(
        WITHOUT_HF_CLIP,
        published,
        tmp_path / "saved",
        cwd=tmp_path,
        environment={"HF_HOME": str(tmp_path / "cache"), "HF_MODULES_CACHE": str(tmp_path / "modules")},
        given=json.dumps(LABELS),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    names, results = json.loads(done.stdout.rpartition("RESULT")[2])
    processors = ["HfClipProcessor", "HfClipTokenizer", "HfClipImageProcessor"]
    assert names == ["HfClipModel", *processors, *processors[1:], "HfClipForImageClassification"]
    expected = pipeline("zero-shot-image-classification", model=str(published))(
        Image.open(published / "image.png"), candidate_labels=LABELS
    )
    for found in results:
        assert [entry["label"] for entry in found] == [entry["label"] for entry in expected]
        assert [e["score"] for e in found] == pytest.approx([e["score"] for e in expected], abs=1e-6)
    saved = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {f"{name}.py" for name in TRAVELLING} <= saved


def test_with_the_package_nothing_needs_to_be_trusted(published: Path, repository: Path):
    model, processor = AutoModel.from_pretrained(published), AutoProcessor.from_pretrained(published)
    assert type(model) is HfClipModel
    assert type(processor) is HfClipProcessor
    assert type(pipeline("zero-shot-image-classification", model=str(published))) is HfClipZeroShotPipeline
    plain = AutoModel.from_pretrained(repository)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_plain_save_copies_no_code(model: HfClipModel, tmp_path: Path):
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


def test_code_can_be_added_twice_and_to_a_model_alone(model: HfClipModel, tmp_path: Path):
    model.save_pretrained(tmp_path)
    first = add_remote_code(tmp_path)
    assert add_remote_code(tmp_path) == first
    assert {path.name for path in first} == {f"{name}.py" for name in TRAVELLING} | {"config.json"}


def test_other_folders_get_no_code(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="has no config.json; name a folder that save_pretrained"):
        add_remote_code(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="holds a 'bert' model; code is added to models of hf_clip alone"):
        add_remote_code(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
