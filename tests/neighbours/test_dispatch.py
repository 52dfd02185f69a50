"""accelerate's own loading and offloading, which know nothing of `from_pretrained`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload, init_empty_weights, load_checkpoint_and_dispatch
from transformers import AutoModel

from hf_clip import HfClipModel

from .stock import pairs

ON_DISK = {
    "text_model": "disk",
    "vision_model": "disk",
    "text_projection": "cpu",
    "visual_projection": "cpu",
    "logit_scale": "cpu",
}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "all in memory": {"device_map": "auto"},
    "by memory": {"device_map": "auto", "max_memory": {"cpu": "2MB"}},
    "towers on disk": {"device_map": ON_DISK},
}


@torch.no_grad()
def assert_same_outputs(placed: HfClipModel, model: HfClipModel, tower: str) -> None:
    found, expected = placed.eval()(**pairs(tower)), model(**pairs(tower))
    for name in ("logits_per_image", "image_embeds", "text_embeds"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings(
    "ignore:The following device_map keys do not match"
)  # accelerate's, about any root parameter
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_load_checkpoint_and_dispatch(repository: Path, model: HfClipModel, tower: str, placement: str, tmp_path: Path):
    """`offload_buffers`, because accelerate otherwise leaves BatchNorm's statistics on disk unread."""
    with init_empty_weights():
        empty = HfClipModel(model.config)
    placed = load_checkpoint_and_dispatch(
        empty,
        str(repository),
        no_split_module_classes=empty._no_split_modules,
        offload_folder=str(tmp_path),
        offload_buffers=True,
        **PLACEMENTS[placement],
    )
    if placement != "all in memory":
        assert set(placed.hf_device_map.values()) == {"cpu", "disk"}
        assert any(parameter.is_meta for parameter in placed.parameters())
    assert_same_outputs(placed, model, tower)


def test_checkpoint_in_shards_is_dispatched(model: HfClipModel, tower: str, tmp_path: Path):
    model.save_pretrained(tmp_path / "shards", max_shard_size="2MB")
    with init_empty_weights():
        empty = HfClipModel(model.config)
    placed = load_checkpoint_and_dispatch(empty, str(tmp_path / "shards"), device_map="auto")
    assert_same_outputs(placed, model, tower)


def test_disk_offload_of_a_whole_model(repository: Path, model: HfClipModel, tower: str, tmp_path: Path):
    placed = disk_offload(
        AutoModel.from_pretrained(repository).eval(), str(tmp_path), execution_device=torch.device("cpu")
    )
    assert all(parameter.is_meta for parameter in placed.parameters())
    assert_same_outputs(placed, model, tower)
    assert all(parameter.is_meta for parameter in placed.parameters())
