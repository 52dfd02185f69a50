"""A ViT that trains on some of the patches, and has all of them elsewhere."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_clip import HfClipModel
from hf_clip.training.patch_dropout import drop_patches_

from ..finetuning import train
from ..small import random_images


@pytest.mark.parametrize(("part", "kept"), [(0.5, 4), (0.3, 6), (0.99, 1)])
def test_some_patches_of_each_image_train_and_all_are_evaluated(repositories: dict[str, Path], part: float, kept: int):
    model = HfClipModel.from_pretrained(repositories["vit"])
    whole = model.vision_model.embeddings(random_images("vit"))  # (4, 1 + 9, W)
    expected = model.encode_image(random_images("vit"))
    drop_patches_(model, part)
    assert torch.equal(model.encode_image(random_images("vit")), expected)

    def places(tokens: Tensor) -> list[list[int]]:
        found = (tokens[:, :, None] == whole[:, None]).all(-1)  # (4, 1 + kept, 1 + 9)
        assert found.sum(-1).eq(1).all()
        return found.int().argmax(-1).tolist()

    model.train()
    drawn = [places(model.vision_model.embeddings(random_images("vit"))) for _ in range(3)]
    for image in (image for images in drawn for image in images):
        assert image[0] == 0, "the class token stays in front"
        assert len(image) == len(set(image)) == 1 + kept
    assert len({tuple(sorted(image)) for images in drawn for image in images}) > 1
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.train().vision_model.embeddings(random_images("vit")).shape[1] == 1 + kept
    torch.manual_seed(0)
    first = model.vision_model.embeddings(random_images("vit"))
    torch.manual_seed(0)
    assert torch.equal(model.vision_model.embeddings(random_images("vit")), first)


def test_resnet_has_no_patches_and_the_run_ends_before_it_begins(digits: Path, tmp_path: Path):
    message = "the image tower of this model is a ResNet, which has none; leave the option out"
    with pytest.raises(ValueError, match=message):
        train(digits, tmp_path / "out", "resnet", patch_dropout=0.5)
    assert not (tmp_path / "out").exists()


def test_run_drops_patches(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    forward = HfClipModel.forward

    def watched(model: HfClipModel, *args, **kwargs):
        hook = model.vision_model.encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))
        try:
            return forward(model, *args, **kwargs)
        finally:
            hook.remove()

    monkeypatch.setattr(HfClipModel, "forward", watched)
    out = train(digits, tmp_path / "out", max_steps=1, patch_dropout=0.5, per_device_train_batch_size=8)
    patches = HfClipModel.from_pretrained(out).config.vision_config.grid_size ** 2
    assert [shape[:2] for shape in seen] == [(8, 1 + patches // 2)]
