"""ONNX graphs: their names, their numbers in every precision, what lies beside them, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conversion import export_onnx as program
from conversion import onnx_graphs
from conversion.export_onnx import export_onnx, main
from conversion.onnx_graphs import GRAPHS, check_packages, random_inputs
from conversion.onnx_precision import Comparison, Deviation, open_session
from hf_clip import HfClipConfig, HfClipModel

from ..small import CONTEXT_LENGTH, pictures, texts

pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
import onnx  # noqa: E402

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
def exports(repositories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both reduced models in all precisions. Tests must not write there."""
    folder = tmp_path_factory.mktemp("exports")
    for tower, repository in repositories.items():
        export_onnx(repository, folder / tower, precisions=["fp32", "fp16", "int8"])
    return {tower: folder / tower for tower in repositories}


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


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 5])
def test_image_graph_equals_the_model_at_any_batch_size(exported: Path, model: HfClipModel, tower: str, count: int):
    batch = pictures(tower, count)
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
    whole, masked = (run(graph, input_ids=ids, attention_mask=m, pixel_values=pictures(tower)) for m in masks)
    torch.testing.assert_close(whole["text_embeds"], masked["text_embeds"], rtol=1e-4, atol=1e-5)
    alone = run(exported / "onnx" / "text_model.onnx", input_ids=ids)["text_embeds"]
    normalised = torch.nn.functional.normalize(alone, dim=-1)
    torch.testing.assert_close(normalised, whole["text_embeds"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("end", ["", "_fp16"])
def test_text_padded_on_the_left_and_text_of_padding_alone_are_numbers(exported: Path, tower: str, end: str):
    """Rows in which nothing may be attended to: -inf for every score would make them NaN."""
    ids = texts()
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1] = 0, 0
    found = run(exported / "onnx" / f"model{end}.onnx", input_ids=ids, attention_mask=mask, pixel_values=pictures(tower))
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
    pictures = json.loads((exported / "preprocessor_config.json").read_text())
    assert pictures["image_processor_type"] == "CLIPImageProcessor"
    assert pictures["crop_size"] == json.loads((repository / "processor_config.json").read_text())["image_processor"][
        "crop_size"
    ]
