"""Folders for Immich, used as Immich's machine-learning service uses them: its files, its pixels, its token ids."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from tokenizers import Tokenizer

from hf_clip import HfClipModel, HfClipProcessor
from hf_clip.checkpoints import immich_folder
from hf_clip.checkpoints.onnx_precision import Comparison, Deviation, open_session
from hf_clip.commands.program import main
from hf_clip.zero_shot.features import encode_images, encode_texts

from .conftest import known_graph

pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")

FILES = {
    *("config.json", "textual/model.onnx", "textual/tokenizer.json", "textual/tokenizer_config.json"),
    *("textual/vocab.json", "textual/merges.txt", "visual/model.onnx", "visual/preprocess_cfg.json"),
}
TEXTS = ["a photo of a cat", "  two   spaces\n", "it's a DOG!", "a cat " * 60, ""]


@pytest.fixture(scope="session")
def folders(shallow_repositories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both reduced models as folders for Immich, written once for all workers. Tests must not write there."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "immich"
    text_graph = folder / "vit" / "textual" / "model.onnx"
    with FileLock(f"{folder}.lock"), known_graph(immich_folder.ImmichText, text_graph):
        for tower, repository in shallow_repositories.items():
            if not (folder / tower).exists():
                immich_folder.export_immich(repository, folder / tower)
    return {tower: folder / tower for tower in shallow_repositories}


class ImmichModel:
    """What Immich does with a folder, from its source code: one text or image at a time, with nothing of ours."""

    def __init__(self, folder: Path):
        def read(name: str) -> Any:
            return json.loads((folder / name).read_text())

        length = read("config.json")["text_cfg"].get("context_length", 77)
        padding = read("textual/tokenizer_config.json")["pad_token"]
        self.tokenizer = Tokenizer.from_file(str(folder / "textual" / "tokenizer.json"))
        self.tokenizer.enable_padding(length=length, pad_token=padding, pad_id=self.tokenizer.token_to_id(padding))
        self.tokenizer.enable_truncation(max_length=length)
        self.images = read("visual/preprocess_cfg.json")
        self.textual, self.visual = (open_session(folder / kind / "model.onnx") for kind in ("textual", "visual"))

    def text(self, text: str) -> np.ndarray:
        ids = self.tokenizer.encode(" ".join(text.split())).ids
        return self.textual.run(None, {"text": np.array([ids], dtype=np.int32)})[0][0]

    def pixels(self, image: Image.Image) -> np.ndarray:
        size, resampling = self.images["size"], Image.Resampling[self.images["interpolation"].upper()]
        size = size[0] if isinstance(size, list) else size
        if self.images["resize_mode"] == "squash":
            image = image.resize((size, size), resampling)
        else:
            width, height = image.size
            image = image.resize(
                (int(width / min(image.size) * size), int(height / min(image.size) * size)), resampling
            )
            left, top = int(image.width / 2 - size / 2), int(image.height / 2 - size / 2)
            image = image.crop((left, top, left + size, top + size))
        mean, std = (np.array(self.images[name], dtype=np.float32) for name in ("mean", "std"))
        values = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
        return ((values - mean) / std).transpose(2, 0, 1)[None]

    def image(self, image: Image.Image) -> np.ndarray:
        return self.visual.run(None, {"image": self.pixels(image)})[0][0]


@pytest.fixture
def immich(tower: str, folders: dict[str, Path]) -> ImmichModel:
    return ImmichModel(folders[tower])


@pytest.fixture
def ours(tower: str, shallow_repositories: dict[str, Path]) -> tuple[HfClipModel, HfClipProcessor]:
    repository = shallow_repositories[tower]
    return HfClipModel.from_pretrained(repository).eval(), HfClipProcessor.from_pretrained(repository)


def test_texts_in_immich_have_our_embeddings(immich: ImmichModel, ours):
    found = np.stack([immich.text(text) for text in TEXTS])
    np.testing.assert_allclose(found, encode_texts(*ours, TEXTS, truncation=True), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


def test_images_in_immich_have_our_embeddings(immich: ImmichModel, ours, photographs: dict[str, Image.Image]):
    """In sizes that it rounds as we do: its crop may lie one pixel beside ours."""
    size = ours[0].config.vision_config.image_size
    images = [photograph.resize((2 * size, 3 * size)) for photograph in photographs.values()][:2]
    images += [images[0].rotate(90, expand=True), images[0].convert("L")]
    for image in images:
        pixels = ours[1].image_processor(image, return_tensors="np")["pixel_values"]
        np.testing.assert_allclose(immich.pixels(image), pixels, rtol=0, atol=1e-5)
    found = np.stack([immich.image(image) for image in images])
    np.testing.assert_allclose(found, encode_images(*ours, images), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-5)


def test_files_names_types_and_shapes_are_immichs(folders: dict[str, Path], immich: ImmichModel, ours, tower: str):
    folder = folders[tower]
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == FILES
    config = ours[0].config
    size, length = config.vision_config.image_size, config.text_config.max_position_embeddings
    expected = {
        "text": ([1, length], "tensor(int32)"),
        "image": ([1, 3, size, size], "tensor(float)"),
    }
    for session, name in ((immich.textual, "text"), (immich.visual, "image")):
        assert {node.name: (node.shape, node.type) for node in session.get_inputs()} == {name: expected[name]}
        [output] = session.get_outputs()
        assert (output.name, output.shape, output.type) == ("embedding", [1, config.projection_dim], "tensor(float)")


def test_squashing_is_said(shallow_repositories: dict[str, Path], folders: dict[str, Path]):
    processor = HfClipProcessor.from_pretrained(shallow_repositories["vit"])
    assert json.loads((folders["vit"] / "visual" / "preprocess_cfg.json").read_text()) == {
        "size": [48, 48],
        "mode": "RGB",
        "mean": list(processor.image_processor.image_mean),
        "std": list(processor.image_processor.image_std),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }
    values = immich_folder.preprocess_config({"resize_mode": "squash"}, 32)
    assert values == {"size": [32, 32], "mode": "RGB", "resize_mode": "squash", "fill_color": 0}


@pytest.fixture
def copied_graphs(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports that follow write the ViT model's graphs, which were exported before."""
    towers = {kind: folders["vit"] / kind.folder / "model.onnx" for kind in immich_folder.TOWERS}
    monkeypatch.setattr(
        "hf_clip.checkpoints.onnx_export.write_graph", lambda graph, path: shutil.copy(towers[type(graph)], path)
    )


@pytest.mark.usefixtures("copied_graphs")
def test_command_writes_one_precision_and_reports_it(
    shallow_repositories: dict[str, Path], folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["export-onnx", str(shallow_repositories["vit"]), str(tmp_path / "out"), "--layout", "immich"]
    assert main([*words, "--precision", "int8", "--force"]) == 0
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()[2:]] == [
        "textual/model.onnx",
        "visual/model.onnx",
    ]
    small, plain = (folder / "textual" / "model.onnx" for folder in (tmp_path / "out", folders["vit"]))
    assert small.stat().st_size < 0.75 * plain.stat().st_size
    cosines = [ImmichModel(tmp_path / "out").text(text) @ ImmichModel(folders["vit"]).text(text) for text in TEXTS]
    assert all(0.98 < cosine < 1 for cosine in cosines)
    assert main(words) == 0  # over an earlier export
    assert {path.relative_to(tmp_path / "out").as_posix() for path in tmp_path.rglob("*.onnx")} == {
        "textual/model.onnx",
        "visual/model.onnx",
    }


@pytest.mark.usefixtures("copied_graphs")
def test_what_is_refused(
    shallow_repositories: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    source = str(shallow_repositories["vit"])

    def error(*words: str) -> str:
        assert main(["export-onnx", *words, "--layout", "immich"]) != 0
        return capsys.readouterr().err

    assert f"a folder of its own; name it: hf-clip export-onnx {source} OUT --layout immich" in error(source)
    copied = shutil.copytree(source, tmp_path / "model")
    assert "holds other files than an export for Immich, whose config.json would" in error(source, str(copied))
    two = error(source, str(tmp_path / "out"), "--precision", "fp16", "int8")
    assert "Immich loads one graph for each tower; choose one of fp16, int8" in " ".join(two.replace("│", "").split())
    processor = HfClipProcessor.from_pretrained(copied)
    processor.image_processor.fit = "pad"
    processor.save_pretrained(copied)
    assert "so that images would be others there; choose fit='crop'" in error(str(copied), str(tmp_path / "out"))
    monkeypatch.setattr(Comparison, "measure", lambda self, path: Deviation(1e-3, 0.99))
    assert "model.onnx differs from the model by 1.0e-03" in error(source, str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
