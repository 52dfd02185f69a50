"""int8 weights by `quantization_config`: matrices are quantised, convolutions and embeddings stay as they are."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig, TorchAoConfig

from hf_clip import HfClipModel

from .stock import pairs


@torch.no_grad()
def assert_close_to(quantized: Any, model: HfClipModel, tower: str) -> None:
    found, expected = quantized.eval()(**pairs(tower)), model(**pairs(tower))
    for name in ("image_embeds", "text_embeds"):
        assert torch.cosine_similarity(found[name].float(), expected[name]).min() >= 0.99, name
    assert not torch.equal(found.image_embeds, expected.image_embeds)


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao_int8(repository: Path, model: HfClipModel, tower: str, kind: str):
    quantization = pytest.importorskip("torchao.quantization", reason="int8 by torchao needs the package torchao")
    quantized = AutoModel.from_pretrained(
        repository, quantization_config=TorchAoConfig(getattr(quantization, kind)())
    ).eval()
    plain = {name for name, m in quantized.named_modules() if isinstance(m, nn.Linear) and is_plain(m.weight)}
    assert plain == {"text_projection"}  # transformers leaves the last matrix of a model alone
    assert_close_to(quantized, model, tower)


def is_plain(weight: torch.Tensor) -> bool:
    return type(weight) is nn.Parameter


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
def test_bitsandbytes_int8(repository: Path, model: HfClipModel, tower: str):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="int8 by bitsandbytes needs the package bitsandbytes")
    quantized = AutoModel.from_pretrained(
        repository, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    )
    in_int8 = {name for name, m in quantized.named_modules() if isinstance(m, bitsandbytes.nn.Linear8bitLt)}
    matrices = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert in_int8 == matrices - {"text_projection"}
    assert_close_to(quantized, model, tower)


@pytest.mark.filterwarnings("ignore")  # torch says that it will go
def test_dynamic_quantization_reaches_every_linear_map(model: HfClipModel, tower: str):
    """torch's own asks for the exact type `nn.Linear`."""
    matrices = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    in_int8 = {n for n, m in quantized.named_modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)}
    assert in_int8 == matrices
    assert_close_to(quantized, model, tower)


def test_layers_with_weights_have_torchs_own_types(model: HfClipModel):
    """What looks for exact types finds them: pruning, counting of operations, quantisation."""
    holders = {type(m) for m in model.modules() if list(m.parameters(recurse=False)) and not list(m.children())}
    holders -= {type(model)}
    assert holders <= {nn.Linear, nn.Conv2d, nn.BatchNorm2d, nn.LayerNorm, nn.Embedding}


def test_other_layers_in_the_place_of_linear_maps_are_called(model: HfClipModel, tower: str):
    """Adapters, wrappers and hooks are not passed by."""
    expected, calls = model(**pairs(tower)), []

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Linear):
            super().__init__()
            self.inner = inner

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return self.inner(input)

    for number, (name, linear) in enumerate(list(model.named_modules())):
        if not isinstance(linear, nn.Linear):
            continue
        parent, _, last = name.rpartition(".")
        if number % 2:
            setattr(model.get_submodule(parent), last, Wrapped(linear))
        else:
            linear.register_forward_hook(lambda *_: calls.append(1))
    found = model(**pairs(tower))
    assert len(calls) == sum(isinstance(module, nn.Linear) for module in model.modules())
    torch.testing.assert_close(found.logits_per_image, expected.logits_per_image, rtol=1e-4, atol=1e-4)
