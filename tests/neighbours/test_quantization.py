"""int8 weights by `quantization_config`: matrices are quantised, convolutions and embeddings stay as they are."""

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
