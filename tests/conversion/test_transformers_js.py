"""Exported folders in transformers.js, run by Node: its tokenizer, its image processor, its classes and pipeline.

`HF_CLIP_TRANSFORMERS_JS` names a folder with node_modules, for work without a registry.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from hf_clip import HfClipConfig, HfClipModel, convert
from hf_clip.checkpoints.onnx_export import export_onnx

PACKAGE = "@huggingface/transformers@4.3.1"
SCRIPT = Path(__file__).with_name("transformers_js.mjs")
TEXTS = ["a photo of a cat", "it’s a DOG, ﬁne!", "  two   spaces\n", "café 猫 😀", "don't 12345"]
LABELS = ["a cat", "a dog", "a rocket"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the script and the package that it imports."""
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    if shutil.which("node") is None:
        pytest.skip("Node is not installed")
    folder = tmp_path_factory.mktemp("node")
    shutil.copy(SCRIPT, folder)
    if installed := os.environ.get("HF_CLIP_TRANSFORMERS_JS"):
        (folder / "node_modules").symlink_to(Path(installed).resolve() / "node_modules")
        return folder
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed, and HF_CLIP_TRANSFORMERS_JS names no folder with node_modules")
    # The packages carry their binaries for Linux; what their scripts would fetch is for GPUs.
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", PACKAGE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        pytest.skip(f"npm could not install {PACKAGE}: {done.stderr.strip()[-200:]}")
    return folder


def ask(node: Path, folder: Path, photograph: Image.Image, dtype: str) -> dict[str, Any]:
    """What transformers.js makes of the texts and the image."""
    image = folder.parent / "image.png"
    photograph.save(image)
    question = {"texts": TEXTS, "image": str(image), "labels": LABELS, "dtype": dtype}
    done = subprocess.run(
        ["node", SCRIPT.name, str(folder.parent), folder.name],
        cwd=node,
        input=json.dumps(question),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.rpartition("ANSWER")[2])


def photograph_for(folder: Path, photographs: dict[str, Image.Image]) -> Image.Image:
    """In the model's size: transformers.js resizes otherwise than Pillow."""
    size = HfClipConfig.from_pretrained(folder).vision_config.image_size
    return photographs["chelsea"].resize((size, size))


@pytest.fixture(params=["vit", "resnet", "stock"])
def exported(request: pytest.FixtureRequest, repositories: dict[str, Path], tmp_path: Path) -> Path:
    """Both kinds of tower in our layout, and a ViT in transformers' own."""
    folder = tmp_path / request.param
    if request.param == "stock":
        convert(repositories["vit"], folder, layout="transformers")
        export_onnx(folder)
    else:
        export_onnx(repositories[request.param], folder)
    return folder


@torch.no_grad()
def test_transformers_js_gives_the_models_numbers(
    exported: Path, node: Path, repositories: dict[str, Path], photographs: dict[str, Image.Image]
):
    photograph = photograph_for(exported, photographs)
    answer = ask(node, exported, photograph, "fp32")

    source = exported if exported.name == "stock" else repositories[exported.name]
    model, processor = HfClipModel.from_pretrained(source).eval(), AutoProcessor.from_pretrained(source)
    assert answer["ids"] == [processor.tokenizer(text)["input_ids"] for text in TEXTS]
    expected = model.encode_text(processor.tokenizer(TEXTS, padding=True, return_tensors="pt")["input_ids"])
    torch.testing.assert_close(torch.tensor(answer["text_embeds"]).view(5, -1), expected, rtol=1e-4, atol=1e-4)

    ours = processor.image_processor(photograph, return_tensors="pt")["pixel_values"]
    theirs = torch.tensor(answer["pixel_values"]).view(ours.shape)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    expected = model.encode_image(theirs)
    torch.testing.assert_close(torch.tensor(answer["image_embeds"])[None], expected, rtol=1e-4, atol=1e-4)

    prompts = processor.tokenizer(
        [f"This is a photo of {label}" for label in LABELS], padding=True, return_tensors="pt"
    )
    scores = model(**prompts, pixel_values=theirs).logits_per_image.softmax(-1)[0].tolist()
    found = {entry["label"]: entry["score"] for entry in answer["scores"]}
    assert found == pytest.approx(dict(zip(LABELS, scores, strict=True)), abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "precision", "least"), [("fp16", "fp16", 0.9999), ("q8", "int8", 0.98)])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_smaller_graphs_run_in_transformers_js(
    repositories: dict[str, Path],
    node: Path,
    tmp_path: Path,
    photographs: dict[str, Image.Image],
    kind: str,
    dtype: str,
    precision: str,
    least: float,
):
    folder = tmp_path / kind
    export_onnx(repositories[kind], folder, precisions=[precision], force=True)  # so small a model may lose more
    answer = ask(node, folder, photograph_for(folder, photographs), dtype)
    model, processor = HfClipModel.from_pretrained(repositories[kind]), AutoProcessor.from_pretrained(folder)
    texts = model.eval().encode_text(processor.tokenizer(TEXTS, padding=True, return_tensors="pt")["input_ids"])
    size = model.config.vision_config.image_size
    image = model.encode_image(torch.tensor(answer["pixel_values"]).view(1, 3, size, size))
    for found, expected in ((answer["text_embeds"], texts), (answer["image_embeds"], image)):
        similarity = torch.cosine_similarity(torch.tensor(found).view(expected.shape), expected)
        assert similarity.min() > least
