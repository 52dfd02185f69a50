"""ONNX graphs: their names, their numbers in every precision, what lies beside them, and what is refused."""

import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conversion.export_onnx import main
from hf_clip import VARIANTS, HfClipConfig, HfClipModel, HfClipVisionModelWithProjection, convert
from hf_clip.checkpoints import onnx_export as program
from hf_clip.checkpoints import onnx_graphs
from hf_clip.checkpoints.onnx_export import export_onnx
from hf_clip.checkpoints.onnx_graphs import GRAPHS, Graph, random_inputs
from hf_clip.checkpoints.onnx_precision import Comparison, Deviation, open_session

from ..small import CONTEXT_LENGTH, random_images, texts

pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
import onnx

DESCRIPTIONS = {
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
STOCK = {
    "model": (
        ["input_ids", "pixel_values", "attention_mask"],
        ["logits_per_image", "logits_per_text", "text_embeds", "image_embeds"],
    ),
    "text_model": (["input_ids"], ["text_embeds"]),
    "vision_model": (["pixel_values"], ["image_embeds"]),
}


@pytest.fixture(scope="module")
def repositories(shallow_repositories: dict[str, Path]) -> dict[str, Path]:
    return shallow_repositories


@pytest.fixture
def exported(tower: str, exports: dict[str, Path]) -> Path:
    return exports[tower]


def run(path: Path, **inputs: Tensor) -> dict[str, Tensor]:
    session = open_session(path)
    results = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return {out.name: torch.from_numpy(result) for out, result in zip(session.get_outputs(), results, strict=True)}


def listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_files_and_names_are_those_that_transformers_js_looks_for(exported: Path):
    graphs = {f"onnx/{name}{end}.onnx" for name in STOCK for end in ("", "_fp16", "_quantized")}
    assert listing(exported) == graphs | DESCRIPTIONS
    for path in (exported / "onnx").iterdir():
        session = open_session(path)
        kind = path.stem.removesuffix("_fp16").removesuffix("_quantized")
        assert ([i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()]) == STOCK[kind]
        types = {i.name: i.type for i in [*session.get_inputs(), *session.get_outputs()]}
        integers = {"input_ids", "attention_mask"}
        assert types == {n: "tensor(int64)" if n in integers else "tensor(float)" for n in types}


@torch.no_grad()
@pytest.mark.parametrize(("count", "length"), [(1, 1), (1, 2), (5, 7), (2, CONTEXT_LENGTH)])
def test_text_graph_equals_the_model_at_any_batch_size_and_length(
    exported: Path, model: HfClipModel, count: int, length: int
):
    ids = random_inputs(model.config, count, length, 1)["input_ids"]
    found = run(exported / "onnx" / "text_model.onnx", input_ids=ids)["text_embeds"]
    torch.testing.assert_close(found, model.encode_text(ids), rtol=1e-4, atol=1e-5)


def test_random_texts_hold_the_start_and_the_end_where_texts_have_them():
    config = HfClipConfig(text_config={"vocab_size": 9, "bos_token_id": 7, "eos_token_id": 8})
    ids = random_inputs(config, 50, 20, 1)["input_ids"]
    assert 7 not in ids[:, 1:]
    ends = (ids == 8).int().argmax(dim=1)
    assert ends.tolist() == [19 - row % 20 for row in range(50)]


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 5])
def test_image_graph_equals_the_model_at_any_batch_size(exported: Path, model: HfClipModel, tower: str, count: int):
    batch = random_images(tower, count)
    found = run(exported / "onnx" / "vision_model.onnx", pixel_values=batch)["image_embeds"]
    torch.testing.assert_close(found, model.encode_image(batch), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("count", "images"), [(1, 1), (4, 1), (2, 3)])
def test_whole_graph_equals_the_model(exported: Path, model: HfClipModel, tower: str, count: int, images: int):
    inputs = random_inputs(model.config, count, 9, images)
    found, expected = run(exported / "onnx" / "model.onnx", **inputs), model(**inputs)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-4, msg=name)


@torch.no_grad()
def test_masking_the_padding_changes_nothing(exported: Path, tower: str):
    ids = texts()
    masks = [torch.ones_like(ids), (ids != 0).long()]
    assert not torch.equal(*masks)
    graph = exported / "onnx" / "model.onnx"
    whole, masked = (run(graph, input_ids=ids, attention_mask=m, pixel_values=random_images(tower)) for m in masks)
    torch.testing.assert_close(whole["text_embeds"], masked["text_embeds"], rtol=1e-4, atol=1e-5)
    alone = run(exported / "onnx" / "text_model.onnx", input_ids=ids)["text_embeds"]
    normalised = torch.nn.functional.normalize(alone, dim=-1)
    torch.testing.assert_close(normalised, whole["text_embeds"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("end", ["", "_fp16"])
def test_text_padded_on_the_left_and_text_of_padding_alone_are_numbers(exported: Path, tower: str, end: str):
    """Rows in which nothing may be attended to: -inf for every score would make them NaN."""
    ids = texts()
    mask = torch.ones_like(ids)
    ids[0] = ids[0].roll(5)
    mask[0, :5], mask[1] = 0, 0
    found = run(
        exported / "onnx" / f"model{end}.onnx", input_ids=ids, attention_mask=mask, pixel_values=random_images(tower)
    )
    assert all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.parametrize(("end", "least"), [("_fp16", 0.9999), ("_quantized", 0.99)])
def test_smaller_graphs_are_smaller_and_near(exported: Path, model: HfClipModel, end: str, least: float):
    for kind in GRAPHS:
        plain, small = (exported / "onnx" / f"{kind.name}{suffix}.onnx" for suffix in ("", end))
        found = Comparison(kind(model)).measure(small)
        assert least < found.cosine <= 1.0 + 1e-6
        assert found.error > 1e-5  # the weights were rounded
        # A share of these small files is graph and not weights.
        assert small.stat().st_size < plain.stat().st_size * 0.75


def test_half_precision_keeps_sums_in_float32(exported: Path):
    graph = onnx.load(exported / "onnx" / "text_model_fp16.onnx").graph
    types = {tensor.data_type for tensor in graph.initializer if len(tensor.dims) == 2}
    assert types == {onnx.TensorProto.FLOAT16}
    made_by = {name: node for node in graph.node for name in node.output}
    sums = [node for node in graph.node if node.op_type in ("LayerNormalization", "Softmax")]
    assert sums
    for node in sums:
        cast = made_by[node.input[0]]
        assert cast.op_type == "Cast"
        assert [a.i for a in cast.attribute if a.name == "to"] == [onnx.TensorProto.FLOAT]


def test_quantized_weights_are_int8(exported: Path):
    graph = onnx.load(exported / "onnx" / "model_quantized.onnx").graph
    stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
    integers = {n.op_type for n in graph.node if any(stored.get(i) == onnx.TensorProto.INT8 for i in n.input)}
    assert integers == {"MatMulInteger", "Gather", "DequantizeLinear"}


def test_no_graph_carries_paths_of_the_machine_that_wrote_it(exported: Path):
    root = str(Path(onnx_graphs.__file__).parents[1]).encode()
    for path in (exported / "onnx").iterdir():
        content = path.read_bytes()
        assert root not in content
        assert b"stack_trace" not in content


def test_exported_folder_is_still_a_repository(exported: Path, repository: Path):
    for name in DESCRIPTIONS - {"preprocessor_config.json"}:
        assert (exported / name).read_bytes() == (repository / name).read_bytes()
    images = json.loads((exported / "preprocessor_config.json").read_text())
    assert images["image_processor_type"] == "CLIPImageProcessor"
    assert (
        images["crop_size"]
        == json.loads((repository / "processor_config.json").read_text())["image_processor"]["crop_size"]
    )


def export_tiny(monkeypatch: pytest.MonkeyPatch, graphs: Path | None = None) -> None:
    """Only the text tower, for tests of what happens around the graphs.

    graphs: A folder in which this tower's graph lies already. It is copied, and held against the model as any other.
    """
    monkeypatch.setattr(program, "GRAPHS", GRAPHS[1:2])

    def copy_graph(graph: Graph, path: Path) -> None:
        assert graphs is not None
        for file in graphs.glob(f"{graph.name}.onnx*"):  # and its weights, if they lie beside it
            shutil.copyfile(file, path.parent / file.name)

    if graphs is not None:
        monkeypatch.setattr(program, "write_graph", copy_graph)


@pytest.fixture
def text_graph(exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports that follow write the text tower's graph of the ViT model, which was exported before."""
    export_tiny(monkeypatch, exports["vit"] / "onnx")


@pytest.mark.usefixtures("text_graph")
def test_folder_itself_is_the_place_by_default_and_keeps_its_other_files(
    repositories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "model"
    shutil.copytree(repositories["vit"], folder)
    before = listing(folder)
    export_onnx(folder, precisions=["fp16"])
    assert listing(folder) == before | {"onnx/text_model_fp16.onnx", "preprocessor_config.json"}
    export_onnx(folder)
    assert listing(folder) > before | {"onnx/text_model_fp16.onnx", "onnx/text_model.onnx"}
    assert HfClipModel.from_pretrained(folder).config.vision_config.image_size == 48


@pytest.mark.usefixtures("text_graph")
def test_program_reports_sizes_and_deviations_and_what_is_older(
    repositories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model_fp16.onnx").write_text("older")
    assert main([str(repositories["vit"]), str(tmp_path), "--precision", "int8", "fp32"]) == 0
    out, err = capsys.readouterr()
    rows = [line.split() for line in out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["text_model.onnx", "text_model_quantized.onnx"]
    assert float(rows[0][3]) < 1e-4 < float(rows[1][3])
    assert "note: model_fp16.onnx are from an earlier export" in err


def test_large_weights_lie_beside_their_graph(
    repositories: dict[str, Path], exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    export_tiny(monkeypatch)
    monkeypatch.setattr(onnx_graphs, "LARGEST_FILE", 1000)
    out = tmp_path / "out"
    (written,) = export_onnx(repositories["vit"], out)
    assert written.external
    assert listing(out / "onnx") == {"text_model.onnx", "text_model.onnx_data"}
    settings = json.loads((out / "config.json").read_text())["transformers.js_config"]
    assert settings == {"use_external_data_format": {"text_model.onnx": 1}}
    HfClipConfig.from_pretrained(out).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["transformers.js_config"] == settings
    # The others fit one file, and are made from weights that lie elsewhere.
    export_tiny(monkeypatch, shutil.copytree(out / "onnx", tmp_path / "graphs"))
    export_onnx(repositories["vit"], out, precisions=["fp16", "int8"])
    names = {f"text_model{end}" for end in (".onnx", ".onnx_data", "_fp16.onnx", "_quantized.onnx")}
    assert listing(out / "onnx") == names
    assert json.loads((out / "config.json").read_text())["transformers.js_config"] == settings
    export_tiny(monkeypatch, exports["vit"] / "onnx")
    export_onnx(repositories["vit"], out)
    assert json.loads((out / "config.json").read_text())["transformers.js_config"] == {"use_external_data_format": {}}


@pytest.mark.usefixtures("text_graph")
@pytest.mark.parametrize("layout", ["transformers", "open_clip"])
def test_folders_of_other_layouts_are_exported(
    repositories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
):
    convert(repositories["vit"], tmp_path / "source", layout=layout)
    if layout == "open_clip":
        with pytest.raises(ValueError, match="has no config.json, which browsers read; name another folder"):
            export_onnx(tmp_path / "source")
        assert not (tmp_path / "source" / "onnx").exists()
    export_onnx(tmp_path / "source", tmp_path / "out")
    kind = json.loads((tmp_path / "out" / "config.json").read_text())["model_type"]
    assert kind == ("clip" if layout == "transformers" else "hf_clip")
    images = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert images["image_processor_type"] == "CLIPImageProcessor"
    assert listing(tmp_path / "out") >= {"onnx/text_model.onnx", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.usefixtures("text_graph")
@pytest.mark.parametrize(
    ("precision", "found", "message"),
    [
        ("fp32", Deviation(2e-4, 1.0), "text_model.onnx differs from the model by 2.0e-04, and only 1e-04"),
        ("fp32", Deviation(math.nan, math.nan), "differs from the model by nan"),
        ("int8", Deviation(0.2, 0.981), "text_model_quantized.onnx has a cosine of 0.9810 .* Leave int8 out, or pass"),
        ("fp16", Deviation(math.nan, math.nan), "text_model_fp16.onnx has a cosine of nan"),
    ],
)
def test_graph_too_far_from_the_model_is_refused_and_nothing_is_written(
    repositories: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    found: Deviation,
    message: str,
):
    end = program.PRECISIONS[precision]
    measure = Comparison.measure

    def measured(self: Comparison, path: Path) -> Deviation:
        return found if path.name == f"text_model{end}.onnx" else measure(self, path)

    monkeypatch.setattr(Comparison, "measure", measured)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=message):
        export_onnx(repositories["vit"], out, precisions=[precision])
    assert list(tmp_path.iterdir()) == []
    if precision != "fp32":
        export_onnx(repositories["vit"], out, precisions=[precision], force=True)
        assert listing(out / "onnx") == {f"text_model{end}.onnx"}


def test_fresh_model_whose_gains_are_all_equal_is_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Equal weights are stored once, and then used by layers of float16 and of float32."""
    export_tiny(monkeypatch)
    text = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 64}
    ids = {"vocab_size": 600, "bos_token_id": 1, "eos_token_id": 599, "pad_token_id": 1}
    config = HfClipConfig(text_config=text | ids, vision_config={"num_hidden_layers": 1})
    HfClipModel(config).save_pretrained(tmp_path)
    written = export_onnx(tmp_path, precisions=["fp16", "int8"])
    assert [file.name for file in written] == ["text_model_fp16.onnx", "text_model_quantized.onnx"]


def test_deviation_keeps_what_is_no_number():
    found = Deviation()
    found.add(math.nan, math.nan)
    found.add(0.1, 0.9)
    assert math.isnan(found.error)
    assert math.isnan(found.cosine)


def test_part_of_a_model_is_not_filled_up_with_random_numbers(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    part = tmp_path / "part"
    HfClipVisionModelWithProjection.from_pretrained(repository).save_pretrained(part)
    before = listing(part)
    assert main([str(part)]) == 1
    error = capsys.readouterr().err
    assert re.search(r"part has no weights for \S+ and \d+ more, which would be random numbers: it holds a", error)
    assert listing(part) == before


@pytest.mark.parametrize("kept", [0, 1000], ids=["empty", "cut off"])
def test_damaged_weights_are_one_line(
    repositories: dict[str, Path], kept: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = shutil.copytree(repositories["vit"], tmp_path / "folder")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    assert main([str(folder)]) == 1
    error = capsys.readouterr().err
    assert re.search(r"^error: The weights in \S+folder are damaged or cut off \(.+\); copy them again\.$", error, re.M)
    assert not (folder / "onnx").exists()


def test_what_cannot_be_exported_says_what_to_do(
    archives: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)

    def error(*arguments: str) -> str:
        assert main(list(arguments)) == 1
        return capsys.readouterr().err

    assert "one of OpenAI's checkpoints; make a folder of it first: hf-clip convert ViT-B/32" in error(
        "ViT-B/32", "out"
    )
    assert "vit.pt is a file; make a folder of it first" in error(str(archives["vit"]), "out")
    assert "org/name is no folder; name one to write to" in error("org/name")
    assert error("./nowhere", "out").startswith("error: ")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert error("ViT-B/32", "out") == (
        'error: Exporting to ONNX needs onnxscript, which this Python does not have: pip install "hf-clip[onnx]"\n'
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_model_is_exported_at_full_size(name: str, tmp_path: Path):
    """RN50x64 takes about 10 GB of memory and of disk."""
    HfClipModel(HfClipConfig.from_variant(name)).save_pretrained(tmp_path / "model")
    written = export_onnx(tmp_path / "model", precisions=["fp32", "fp16", "int8"])
    assert len(written) == 9
    assert {file.name for file in written if file.external} == ({"model.onnx"} if name == "RN50x64" else set())
