"""Weights stay in the file that they are mapped from, and what nobody uses any more does not stay resident."""

import mmap
import os
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_clip import HfClipModel, HfClipTokenizer
from hf_clip.inference import mapped_weights
from hf_clip.inference.mapped_weights import addresses_of, let_go_of
from hf_clip.model import freed_memory

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/self/smaps")


def mapping_of(path: Path, model: HfClipModel) -> tuple[int, int, int]:
    """Where a model's file is mapped: first address, last, and its resident bytes.

    Another model of the same file may be mapped elsewhere, of an earlier test that nobody uses any more.
    """
    own = model.text_model.embeddings.token_embedding.weight.data_ptr()
    found: tuple[int, int] | None = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):
            start, end = (int(address, 16) for address in fields[0].split("-"))
            found = (start, end) if line.endswith(str(path)) and start <= own < end else None
        elif found and fields[0] == "Rss:":
            return *found, int(fields[1]) * 1024
    raise AssertionError(f"{path} is not mapped")


@pytest.fixture
def weights(repositories: dict[str, Path]) -> Path:
    return (repositories["vit"] / "model.safetensors").resolve()


@pytest.fixture
def model(weights: Path) -> HfClipModel:
    model = HfClipModel.from_pretrained(weights.parent).eval()
    for parameter in model.parameters():  # all pages of the file are read
        parameter.sum()
    return model


def linear_maps(model: HfClipModel) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module.weight.nbytes > 1 << 15]


def test_all_large_weights_lie_in_the_file(model: HfClipModel, weights: Path):
    start, end, resident = mapping_of(weights, model)
    large = [parameter for parameter in model.parameters() if parameter.nbytes > 1 << 15]
    assert model.text_model.embeddings.token_embedding.weight.nbytes > 1 << 15
    assert all(start <= parameter.data_ptr() < end for parameter in large)
    assert resident >= 0.9 * sum(parameter.nbytes for parameter in large)


def test_replaced_weights_are_no_longer_resident(model: HfClipModel, weights: Path):
    before, old = addresses_of(model), [module.weight for module in linear_maps(model)]
    expected = [weight.sum() for weight in old]
    kept = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for module in linear_maps(model):
        module.weight = nn.Parameter(module.weight.detach().clone())
    *_, resident = mapping_of(weights, model)
    dropped = let_go_of(before, addresses_of(model))
    *_, left = mapping_of(weights, model)
    assert dropped > 0.5 * sum(weight.nbytes for weight in old)
    assert left <= resident - 0.9 * dropped
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, kept[name]), name
    assert [weight.sum() for weight in old] == expected  # whoever still holds one reads it from the file


def test_nothing_is_dropped_that_was_changed_in_memory(model: HfClipModel):
    before, changed = addresses_of(model), linear_maps(model)[0].weight
    with torch.no_grad():
        changed.add_(1)
    expected = changed.clone()
    for module in linear_maps(model):
        module.weight = nn.Parameter(module.weight.detach().clone())
    assert let_go_of(before, addresses_of(model)) == 0
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("place", ["memory", "swap"])
def test_a_mapping_that_was_written_to_is_told_by_its_changed_pages(place: str, monkeypatch: pytest.MonkeyPatch):
    changed = {"memory": (4, 0), "swap": (0, 4)}[place]
    lines: list[str] = []
    for start, (in_memory, in_swap) in ((0x1000, (0, 0)), (0x3000, changed)):
        lines += [f"{start:x}-{start + 0x2000:x} r--p 00000000 08:01 42 /a/file"]
        lines += [f"Rss: 8 kB\nAnonymous: {in_memory} kB\nSwap: {in_swap} kB\nVmFlags: rd mr"]
    monkeypatch.setattr("builtins.open", lambda *_, **__: StringIO("\n".join(lines)))
    assert mapped_weights._unchanged_files() == [(0x1000, 0x3000)]


def test_a_mapped_file_may_have_a_name_in_another_encoding(tmp_path: Path):
    path = os.fsencode(tmp_path) + b"/\xff"
    with open(path, "wb+") as file:
        file.write(bytes(mmap.PAGESIZE))
        file.flush()
        with mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE):
            assert mapped_weights._unchanged_files()


def test_weights_that_stay_are_not_touched(model: HfClipModel, weights: Path):
    *_, resident = mapping_of(weights, model)
    assert let_go_of(addresses_of(model), addresses_of(model)) == 0
    assert mapping_of(weights, model)[2] >= 0.9 * resident


def test_optimizing_lets_go_of_what_it_replaces(model: HfClipModel, monkeypatch: pytest.MonkeyPatch):
    def replace(changed: HfClipModel, *_: object) -> list[str]:
        for module in linear_maps(changed):
            module.weight = nn.Parameter(module.weight.detach().clone())
        return ["replaced"]

    dropped = []
    monkeypatch.setattr("hf_clip.inference.optimize.optimize_", replace)
    monkeypatch.setattr(
        "hf_clip.inference.optimize.let_go_of", lambda *given: dropped.append(let_go_of(*given)) or dropped[-1]
    )
    assert model.optimize_for_inference() == ["replaced"]
    assert dropped[0] > 0


def test_memory_that_reading_a_tokenizer_took_is_returned(weights: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(
        "hf_clip.model.tokenization_hf_clip.return_freed_memory",
        lambda: asked.append(freed_memory.return_freed_memory()),
    )
    HfClipTokenizer.from_pretrained(weights.parent)
    assert asked == [None]
