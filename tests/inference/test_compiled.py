"""`optimize_for_inference(compile=True)`: the same results by torch's compiler, and errors where it cannot work."""

from functools import wraps
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from hf_clip import HfClipModel, HfClipTextModel
from hf_clip.inference import compiled
from hf_clip.model.optimized import OptimizedModelError
from hf_clip.model.text_ends import EndOfTextError

from ..small import random_images, texts


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def check_same(model: HfClipModel, tower: str) -> list[str]:
    images, ids = random_images(tower), texts()
    with torch.no_grad():
        expected = model.encode_image(images), model.encode_text(ids), model.encode_text(ids[:1, :5])
        done = model.optimize_for_inference(compile=True)
        found = model.encode_image(images), model.encode_text(ids), model.encode_text(ids[:1, :5])
    for ours, theirs in zip(found, expected, strict=True):
        assert distance(ours, theirs) < 1e-5
    return done


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets graphs be run as they are, which needs no C++ compiler; the number of calls of each."""
    counts: list[int] = []
    compile = torch.compile

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        counts.append(len(list(graph.graph.nodes)))
        return graph.forward

    @wraps(compile)
    def compile_as_is(function: Any, **settings: Any) -> Any:
        return compile(function, fullgraph=True, backend=count, **settings)

    monkeypatch.setattr(torch, "compile", compile_as_is)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: f"/usr/bin/{name}")
    torch.compiler.reset()
    return counts


def test_compiled_towers_compute_the_same(repositories: dict[str, Path], graphs: list[int]):
    model, tower = AutoModel.from_pretrained(repositories["vit"]).eval(), "vit"
    done = check_same(model, tower)
    assert len(graphs) >= 2
    assert any("towers of texts and images are compiled" in line for line in done)
    assert model.optimize_for_inference(compile=True) == done == model.optimize_for_inference()
    with torch.no_grad():
        hidden = model.text_model(texts(), output_hidden_states=True).hidden_states
    assert len(hidden) == model.config.text_config.num_hidden_layers + 1
    for empty in (model.encode_image(random_images(tower)[:0]), model.encode_text(texts()[:0])):
        assert empty.shape == (0, model.config.projection_dim)
    with pytest.raises(EndOfTextError, match="row 1"):
        model.encode_text(torch.where(torch.arange(4)[:, None] == 1, 5, texts()))
    with pytest.raises(OptimizedModelError, match="gives no gradients"):
        model.encode_image(random_images(tower).requires_grad_())
    with pytest.raises(OptimizedModelError, match="cannot be trained any more"):
        model.train()


@pytest.mark.skipif("isolate_recompiles" not in signature(torch.compile).parameters, reason="torch lacks it")
def test_every_model_of_a_process_is_compiled(repositories: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    graphs, compile = [], torch.compile

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    @wraps(compile)
    def compile_once(function: Any, **settings: Any) -> Any:
        return compile(function, backend=keep, recompile_limit=1, **settings)

    monkeypatch.setattr(torch, "compile", compile_once)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: f"/usr/bin/{name}")
    torch.compiler.reset()
    for count in (1, 2):
        model = HfClipTextModel.from_pretrained(repositories["vit"]).eval()
        model.optimize_for_inference(compile=True)
        model(texts((4,)))
        assert len(graphs) == count


def test_model_that_is_optimized_without_refuses(repositories: dict[str, Path]):
    model = AutoModel.from_pretrained(repositories["vit"]).eval()
    model.optimize_for_inference()
    with pytest.raises(OptimizedModelError, match="cannot be optimized with compile=True any more; load it again"):
        model.optimize_for_inference(compile=True)


@pytest.mark.parametrize(("name", "wanted"), [(None, r"no (g|clang)\+\+ here"), ("icpx", "no icpx here")])
def test_compiler_that_is_missing(
    repositories: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str | None, wanted: str
):
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", name) if name else monkeypatch.delenv("CXX", raising=False)
    model = AutoModel.from_pretrained(repositories["vit"]).eval()
    with pytest.raises(OptimizedModelError, match=f"needs a C.. compiler, and there is {wanted}: install it .* CXX"):
        model.optimize_for_inference(compile=True)
    assert model.optimizations is None
    model.train()  # it is as before


def test_triton_that_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "find_spec", lambda name: None)
    with pytest.raises(OptimizedModelError, match="needs Triton on a GPU, .* pip install triton, or leave"):
        compiled.check_compiler("cuda")


@pytest.mark.slow
def test_real_compiler_computes_the_same(model: HfClipModel, tower: str):
    torch.compiler.reset()
    done = check_same(model, tower)
    assert any("BatchNorm folded" in line for line in done) == (tower == "resnet")
