"""torchmetrics' CLIPScore: it takes features for tensors, which `return_tensors_from_features` makes them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from hf_clip.zero_shot.features import encode_images, encode_texts

multimodal = pytest.importorskip("torchmetrics.multimodal", reason="CLIPScore needs the package torchmetrics")

CAPTIONS = ["a red four on white paper", "a blue seven on red paper"]


def test_clip_score_is_a_hundred_times_the_cosine(digits: Path):
    images = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    model = AutoModel.from_pretrained(digits / "vit", return_tensors_from_features=True).eval()
    processor = AutoProcessor.from_pretrained(digits / "vit")
    metric = multimodal.CLIPScore(model_name_or_path=lambda: (model, processor))
    metric.update(images, CAPTIONS)
    pictures = [Image.fromarray(np.asarray(image.permute(1, 2, 0))) for image in images]
    cosines = (encode_images(model, processor, pictures) * encode_texts(model, processor, CAPTIONS)).sum(1)
    assert metric.compute().item() == pytest.approx(max(100 * cosines.mean().item(), 0), abs=1e-3)


def test_features_of_transformers_5_are_what_it_cannot_take(digits: Path):
    model, processor = AutoModel.from_pretrained(digits / "vit"), AutoProcessor.from_pretrained(digits / "vit")
    metric = multimodal.CLIPScore(model_name_or_path=lambda: (model, processor))
    with pytest.raises(AttributeError):
        metric.update(torch.zeros(2, 3, 20, 20, dtype=torch.uint8), CAPTIONS)
