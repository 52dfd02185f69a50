"""The text tower in numpy: the embeddings of torch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.activations import ACT2FN

from hf_clip import HfClipConfig, HfClipModel, HfClipProcessor, encode_texts
from hf_clip.model.checked_files import DamagedWeightsError
from hf_clip.zero_shot.plain_text_tower import ACTIVATIONS, PlainTextTower, TextTowerSettings

TEXTS = [
    "a",
    "",
    "a photo of a three.",
    "don't &lt;b&gt; Crème 日本",
    "a blue three on yellow paper " * 20,
    "x <|endoftext|> y",
]
TEXTS += [f"a photo of number {number} on paper." for number in range(80)]  # more than one batch


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Not mapped, so that the file can be written anew."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def save_model(folder: Path, digits: Path, activation: str, has_end: bool = True) -> HfClipModel:
    """A model of random weights. Biases and gains, which begin as zeros and ones, are random too."""
    config = HfClipConfig.from_pretrained(digits / "vit")
    config.text_config.hidden_act = activation
    if not has_end:
        config.text_config.eos_token_id = None
    torch.manual_seed(0)
    model = HfClipModel(config).eval()
    with torch.no_grad():
        for parameter in model.text_model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    HfClipProcessor.from_pretrained(digits / "vit").save_pretrained(folder)
    return model


@pytest.mark.parametrize(("activation", "has_end"), [("quick_gelu", True), ("gelu", True), ("gelu", False)])
def test_embeddings_equal_those_of_torch(activation: str, has_end: bool, digits: Path, tmp_path: Path):
    model = save_model(tmp_path, digits, activation, has_end)
    settings = TextTowerSettings.of(model.config.text_config)
    assert settings is not None
    expected = encode_texts(model, HfClipProcessor.from_pretrained(tmp_path), TEXTS, truncation=True).numpy()
    found = PlainTextTower(tmp_path, settings).encode(TEXTS)
    assert (found.dtype, found.shape) == (np.float32, expected.shape)
    assert np.linalg.norm(found - expected, axis=1).max() < 5e-6
    assert np.linalg.norm(expected[0] - expected[2]) > 0.1
    alone = PlainTextTower(tmp_path, settings).encode(TEXTS[2:3])
    assert np.linalg.norm(alone - expected[2:3], axis=1).max() < 5e-6


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_any_value(activation: str):
    """Warnings are errors here: one of numpy would stand above the results of a search."""
    values = np.array([-1e4, -200, -60, -1, 0, 1, 60, 200, 1e4], dtype=np.float32)
    expected = ACT2FN[activation](torch.from_numpy(values)).numpy()
    assert np.allclose(ACTIVATIONS[activation](values), expected, rtol=1e-6, atol=1e-6)


def test_stored_halves_are_widened(digits: Path, tmp_path: Path):
    save_model(tmp_path, digits, "quick_gelu")
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in read_tensors(path).items()}, path, {"format": "pt"})
    model = HfClipModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    settings = TextTowerSettings.of(model.config.text_config)
    assert settings is not None
    expected = encode_texts(model, HfClipProcessor.from_pretrained(tmp_path), TEXTS, truncation=True).numpy()
    assert np.linalg.norm(PlainTextTower(tmp_path, settings).encode(TEXTS) - expected, axis=1).max() < 5e-6


def test_what_it_does_not_know_and_what_is_damaged(digits: Path, tmp_path: Path):
    model = save_model(tmp_path, digits, "quick_gelu")
    model.config.text_config.hidden_act = "silu"
    assert TextTowerSettings.of(model.config.text_config) is None
    model.config.text_config.hidden_act = "quick_gelu"
    settings = TextTowerSettings.of(model.config.text_config)
    assert settings is not None
    path = tmp_path / "model.safetensors"
    tensors = read_tensors(path)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path, {"format": "pt"})
    with pytest.raises(DamagedWeightsError, match="bfloat16|BF16"):
        PlainTextTower(tmp_path, settings).encode(["a"])
    tensors.pop("text_projection.weight")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(DamagedWeightsError, match="text_projection.weight"):
        PlainTextTower(tmp_path, settings).encode(["a"])
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedWeightsError, match="damaged or cut off"):
        PlainTextTower(tmp_path, settings)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="There is no file"):
        PlainTextTower(tmp_path, settings)
