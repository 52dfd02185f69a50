"""Classification by exported graphs: the ids, pixels, scores and errors of torch, in a process without it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_clip import HfClipImageProcessor, HfClipModel, HfClipProcessor, HfClipTokenizer, TextTooLongError
from hf_clip.commands.program import main
from hf_clip.zero_shot.features import encode_pixels
from hf_clip.zero_shot.label_matrix import build_matrix
from hf_clip.zero_shot.onnx_classifier import OnnxClassifier
from hf_clip.zero_shot.plain_inputs import PlainTokenizer, read_image_steps
from hf_clip.zero_shot.tower_graphs import TowerGraphs

pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
import onnx

ROOT = Path(__file__).parents[2]
LABELS = {"cat": ["a cat", "Crème &amp; x"], "cup": ["a cup"], "moon": ["the moon", "luna", "schÃ¶n"]}
TEMPLATES = ["a {}.", "a photo of {}"]
STRINGS = [
    "a cat",
    "",
    "  A  Cat\n",
    "don't",
    "it’s “quoted” – 12",
    "&lt;b&gt;",
    "schÃ¶n",
    "ﬁne 日本",
    "<|endoftext|> x",
]


@pytest.fixture(scope="module")
def folder(shallow_repositories: dict[str, Path], exports: dict[str, Path]) -> Path:
    """A model's folder with its weights and its graphs in all precisions. Tests must not write there."""
    folder = exports["vit"].with_name("vit-with-weights")
    if not folder.exists():
        folder.mkdir()
        (folder / "onnx").symlink_to(exports["vit"] / "onnx")
        for path in shallow_repositories["vit"].iterdir():
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The same without weights, to do with as one likes."""
    copy = tmp_path / "copy"
    (copy / "onnx").mkdir(parents=True)
    for name in ("onnx/text_model.onnx", "onnx/vision_model.onnx", *(path.name for path in folder.glob("*.json"))):
        (copy / name).write_bytes((folder / name).read_bytes())
    return copy


@pytest.fixture(scope="module")
def images(photographs: dict[str, Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = tmp_path_factory.mktemp("images")
    for name in ("chelsea", "coffee", "camera"):
        photographs[name].resize((90, 60)).save(images / f"{name}.png")
    (images / "broken.png").write_bytes(b"no image")
    return images


def classify(*words: object) -> int:
    return main(["classify", *map(str, words)])


def test_table_equals_that_of_torch(folder: Path, images: Path, tmp_path: Path):
    (tmp_path / "labels.json").write_text(json.dumps(LABELS))
    templates = [word for template in TEMPLATES for word in ("--templates", template)]
    tables = []
    for more in ([], ["--onnx"]):
        out = tmp_path / f"scores{len(more)}.jsonl"
        assert classify(folder, images, "--labels", tmp_path / "labels.json", *templates, "--output", out, *more) == 2
        tables.append([json.loads(line) for line in out.read_text().splitlines()])
    assert [row["error"] is None for row in tables[0]] == [False, True, True, True]
    for expected, found in zip(*tables, strict=True):
        scores = [name for name in expected if name.startswith("score") and expected[name] is not None]
        assert found == expected | {name: pytest.approx(expected[name], abs=1e-5) for name in scores}


WITHOUT_TORCH = """
import sys
from hf_clip.commands.program import main
status = main()
print(sorted({"torch", "transformers", "datasets"} & set(sys.modules)), file=sys.stderr)
sys.exit(status)
"""


def test_process_without_torch_prints_the_same(
    folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    program = tmp_path / "hf-clip"  # as it is called where it is installed
    program.write_text(WITHOUT_TORCH)
    words = ["classify", str(folder), str(images), "--labels", "a cat,a cup,the moon", "--top_k", "2"]
    assert main(words) == 2
    expected = capsys.readouterr()
    done = subprocess.run(
        [sys.executable, str(program), *words, "--onnx"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == expected.out
    assert done.stderr == "1 of 4 images could not be opened\n[]\n"


def test_other_programs_get_everything_at_once():
    from hf_clip import _is_hf_clip_command

    assert _is_hf_clip_command(["/usr/bin/hf-clip", "classify", "m", "i", "--onnx"])
    assert _is_hf_clip_command(["hf-clip.exe", "--traceback", "finetune", "run.yaml"])
    for words in (["script.py", "classify", "--onnx"], ["/usr/lib/hf-clip/script.py", "--help"], ["-m"], [""], []):
        assert not _is_hf_clip_command(words)


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_scores_equal_those_of_the_matrix(scores: str, folder: Path, copy: Path):
    model, processor = HfClipModel.from_pretrained(folder).eval(), HfClipProcessor.from_pretrained(folder)
    matrix = build_matrix(model, processor, LABELS, TEMPLATES, scores=scores)
    matrix.logit_bias = -1.5 if scores == "sigmoid" else 0.0
    graph = onnx.load(copy / "onnx" / "text_model.onnx")
    facts = {entry.key: entry.value for entry in graph.metadata_props}
    facts |= {"hf_clip.scores": scores, "hf_clip.logit_bias": str(matrix.logit_bias)}
    onnx.helper.set_model_props(graph, facts)
    onnx.save(graph, copy / "onnx" / "text_model.onnx")
    classifier = OnnxClassifier(TowerGraphs(copy), LABELS, TEMPLATES, batch_size=3)
    torch.testing.assert_close(torch.from_numpy(classifier.weights), matrix.weights, rtol=0, atol=1e-5)
    pixels = np.random.default_rng(0).standard_normal((4, 3, 48, 48)).astype(np.float32)
    features = encode_pixels(model, torch.from_numpy(pixels))
    found, expected = torch.from_numpy(classifier.score(pixels)), matrix.score(features)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for row, other in zip(classifier.rank_pixels(list(pixels), 2), matrix.rank(features, 2), strict=True):
        assert [entry["label"] for entry in row] == [entry["label"] for entry in other]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_smaller_graphs_score_alike(precision: str, folder: Path):
    pixels = np.random.default_rng(0).standard_normal((2, 3, 48, 48)).astype(np.float32)
    plain, small = (OnnxClassifier(TowerGraphs(folder, name), LABELS) for name in ("fp32", precision))
    assert small.logit_scale == plain.logit_scale
    assert not np.array_equal(small.score(pixels), plain.score(pixels))
    np.testing.assert_allclose(small.score(pixels), plain.score(pixels), atol=0.05)


@pytest.mark.parametrize("added", [[], ["<new>", "cat"]], ids=["plain", "with added tokens"])
def test_ids_equal_those_of_the_tokenizer(added: list[str], folder: Path, tmp_path: Path):
    tokenizer = HfClipTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(tmp_path)
    plain, texts = PlainTokenizer(tmp_path), [*STRINGS, "a <new> cat", "cat " * 30]
    for settings in ({}, {"truncation": True, "max_length": 9}, {"add_special_tokens": False}):
        expected: Any = HfClipTokenizer.from_pretrained(tmp_path)(texts, return_tensors="np", **settings)
        found = plain(texts, **settings)
        for name in ("input_ids", "attention_mask"):
            np.testing.assert_array_equal(found[name], expected[name], err_msg=f"{name} {settings}")
    assert plain.model_max_length == tokenizer.model_max_length


@pytest.mark.parametrize(
    "values",
    [
        {"size": 40, "crop_size": 48, "resample": 2},
        {"size": {"shortest_edge": 60}, "fit": "pad", "crop_size": [48, 50]},
        {"size": {"height": 50, "width": 49}, "do_normalize": False, "do_convert_rgb": None},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5], "rescale_factor": 1 / 127, "unknown": 1},
    ],
    ids=["old sizes", "pad", "both sides", "colours"],
)
def test_pixels_equal_those_of_the_image_processor(
    values: dict[str, Any], photographs: dict[str, Image.Image], tmp_path: Path
):
    described = {"image_processor_type": "HfClipImageProcessor"} | values
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(described))
    steps, processor = read_image_steps(tmp_path), HfClipImageProcessor.from_pretrained(tmp_path)
    for name in ("chelsea", "camera", "portrait"):
        image = photographs[name].resize((150, 99))
        expected = processor(image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(steps.prepare(image)(None), expected)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["{folder}", "--head", "x"], "--head is applied by torch: leave --onnx out, or give --labels."),
        (["{folder}", "--device", "cuda"], "--onnx computes on the processor, but --device is cuda: leave one"),
        (["{folder}", "--dtype", "float16"], "--dtype float16 is for torch; with --onnx choose a graph by --precision"),
        (
            ["{plain}", "--precision", "int8"],
            "has no onnx/text_model_quantized.onnx: hf-clip export-onnx {plain} --pre",
        ),
        (["{plain}"], "{plain} has no onnx/text_model.onnx: hf-clip export-onnx {plain} writes it."),
        (["org/model"], "a folder, and org/model is none; write them from a repository of that name: hf-clip export-"),
        (["RN50"], "make one of it first: hf-clip convert RN50 FOLDER, then hf-clip export-onnx FOLDER."),
        (["{folder}", "--labels", "a,a"], "The label 'a' appears twice"),
        (["{folder}", "--labels", "long " * 30 + ",b"], "start and end included, but the model takes 20. Shorten"),
    ],
)
def test_refusals_are_one_line(
    words: list[str], line: str, folder: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    places = {"folder": folder, "plain": tmp_path}
    model, *others = [word.format(**places) for word in words]
    others += [] if {"--labels", "--head"} & {*others} else ["--labels", "a,b"]
    assert classify(model, images, "--onnx", *others) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
    assert line.format(**places) in shown


def test_precision_without_onnx_is_refused(folder: Path, images: Path, capsys: pytest.CaptureFixture):
    assert classify(folder, images, "--labels", "a,b", "--precision", "fp16") == 1
    assert "--precision fp16 chooses an ONNX graph: give --onnx too, or --dtype" in capsys.readouterr().err


def test_graphs_that_cannot_be_used_are_an_error(copy: Path):
    path = copy / "onnx" / "text_model.onnx"
    graph = onnx.load(path)
    graph.ClearField("metadata_props")
    onnx.save(graph, path)
    with pytest.raises(ValueError, match=r"text_model\.onnx does not say how its model scores, as hf-clip's exports"):
        OnnxClassifier(TowerGraphs(copy), ["a"])
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=rf"by ONNX Runtime \(.*\); export it again: hf-clip export-onnx {copy}\."):
        OnnxClassifier(TowerGraphs(copy), ["a"])
    (copy / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json; save the model's processor"):
        OnnxClassifier(TowerGraphs(copy), ["a"])


def test_graphs_of_other_towers_and_models_are_refused(copy: Path):
    text, vision = (copy / "onnx" / f"{name}_model.onnx" for name in ("text", "vision"))
    contents = {path: path.read_bytes() for path in (text, vision)}
    vision.write_bytes(contents[text])
    with pytest.raises(ValueError, match=r"computes text_embeds from input_ids, but image_embeds from pixel_v"):
        OnnxClassifier(TowerGraphs(copy), ["a"])
    text.write_bytes(contents[vision])
    with pytest.raises(ValueError, match=r"computes image_embeds from pixel_values, but text_embeds from inp"):
        OnnxClassifier(TowerGraphs(copy), ["a"])
    text.write_bytes(contents[text])
    vision.write_bytes(contents[vision])
    classifier = OnnxClassifier(TowerGraphs(copy), ["a"])
    classifier.weights = classifier.weights[:40]
    with pytest.raises(ValueError, match=r"embeds images in 48 numbers, and the graph .* in 40: .* two models"):
        classifier._check_size(vision)


def test_images_of_another_size_are_refused(copy: Path):
    (copy / "processor_config.json").unlink()
    HfClipImageProcessor.for_image_size(64).save_pretrained(copy)
    with pytest.raises(ValueError, match=r"makes images 64x64, but vision_model\.onnx takes 48x48: save the model's"):
        OnnxClassifier(TowerGraphs(copy), ["a"])


def test_label_that_is_too_long_has_its_place(folder: Path):
    length = len(HfClipTokenizer.from_pretrained(folder)(f"a photo of a {'word ' * 30}.")["input_ids"])
    with pytest.raises(TextTooLongError, match="The prompt 'a photo of a word word") as caught:
        OnnxClassifier(TowerGraphs(folder), ["a", "word " * 30])
    assert (caught.value.index, caught.value.length, caught.value.limit) == (1, length, 20)
