"""sentence-transformers: a repository as it is serves as a model for texts and images, with and without the package.

It finds a model's modalities by the return annotations of `get_*_features`, in remote code too.
"""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from hf_clip import HfClipModel, HfClipProcessor
from hf_clip.checkpoints.remote_code import TRAVELLING, add_remote_code
from hf_clip.training.gradient_caching import backpropagate
from hf_clip.training.losses import global_contrastive_loss
from hf_clip.training.trainable import freeze_batch_norm_

from ..closeness import assert_same_gradients
from ..without_hf_clip import BLOCK_HF_CLIP

sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason="encoding through sentence-transformers needs the package sentence-transformers"
)

TEXTS = ["a cat", "it’s a much longer caption of a dog", "two red &amp; green apples"]
CAPTIONS = {"astronaut": "an astronaut", "chelsea": "a cat", "coffee": "a cup of coffee", "rocket": "a rocket"}

WITHOUT_HF_CLIP = (
    BLOCK_HF_CLIP
    + """
import json
from PIL import Image
from sentence_transformers import SentenceTransformer

texts, folders = json.loads(sys.stdin.read())
results = []
for folder in folders:
    model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    model.save_pretrained(folder + "-saved")
    image = Image.open(folder + "/image.png")
    for found in (model, SentenceTransformer(folder + "-saved", trust_remote_code=True, device="cpu")):
        results.append([
            type(found[0].model).__module__.split(".")[0],
            found.modalities,
            found.encode(texts).tolist(),
            found.encode([image]).tolist(),
        ])
print("RESULT" + json.dumps(results))
"""
)


@torch.no_grad()
def our_vectors(folder: Path, image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """What `encode_text` and `encode_image` give for `TEXTS` and the image."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    ids = processor(text=TEXTS, return_tensors="pt").input_ids
    pixels = processor(images=[image], return_tensors="pt").pixel_values
    return model.encode_text(ids).numpy(), model.encode_image(pixels).numpy()


def assert_same_vectors(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_plugin_is_enough(repository: Path, photographs: dict[str, Image.Image], tmp_path: Path):
    image = photographs["chelsea"]
    image.save(tmp_path / "image.png")
    model = sentence_transformers.SentenceTransformer(str(repository), device="cpu")
    assert (type(model[0].model), type(model[0].processor)) == (HfClipModel, HfClipProcessor)
    assert model.modalities == ["text", "image"]
    assert (model.max_seq_length, model.get_embedding_dimension()) == (20, 48)
    of_texts, of_image = our_vectors(repository, image)
    assert_same_vectors(model.encode(TEXTS), of_texts)
    assert_same_vectors(model.encode([image]), of_image)
    assert_same_vectors(model.encode([str(tmp_path / "image.png")]), of_image)
    assert model.encode(["a cat " * 80]).shape == (1, 48)  # cut to the table's length
    assert_same_vectors(model.encode([image], truncate_dim=6), of_image[:, :6])
    norms = np.linalg.norm(of_texts, axis=1, keepdims=True), np.linalg.norm(of_image, axis=1)
    cosines = (of_texts / norms[0]) @ (of_image / norms[1]).T
    assert_same_vectors(model.similarity(model.encode(TEXTS), model.encode([image])).numpy(), cosines)


@pytest.mark.slow
def test_published_repositories_work_where_hf_clip_is_not_installed(
    repositories: dict[str, Path], photographs: dict[str, Image.Image], tmp_path: Path
):
    folders = []
    for tower, repository in repositories.items():
        folders.append(tmp_path / tower)
        shutil.copytree(repository, folders[-1])
        add_remote_code(folders[-1])
        photographs["coffee"].save(folders[-1] / "image.png")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_HF_CLIP],
        input=json.dumps([TEXTS, [str(folder) for folder in folders]]),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_MODULES_CACHE": str(tmp_path / "modules")},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.rpartition("RESULT")[2])
    assert len(results) == 2 * len(folders)  # each as published, and as saved again from there
    for number, (package, modalities, of_texts, of_image) in enumerate(results):
        assert package == "transformers_modules"
        assert modalities == ["text", "image"]
        expected = our_vectors(folders[number // 2], photographs["coffee"])
        assert_same_vectors(np.array(of_texts), expected[0])
        assert_same_vectors(np.array(of_image), expected[1])
    for folder in folders:
        saved = {path.name for path in folder.with_name(f"{folder.name}-saved").iterdir()}
        assert {f"{name}.py" for name in TRAVELLING} | {"modules.json"} <= saved


@pytest.mark.filterwarnings("ignore")  # the trainer's own, and those of what it tries to import
def test_trainer_takes_a_step(repository: Path, photographs: dict[str, Image.Image], tmp_path: Path):
    """Its ranking loss in both directions is the contrastive loss, so the first step's loss is known."""
    from datasets import Dataset
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    model = sentence_transformers.SentenceTransformer(str(repository), device="cpu")
    clip = model[0].model
    images, captions = [photographs[name] for name in CAPTIONS], list(CAPTIONS.values())
    inputs = model[0].processor(text=captions, images=images, return_tensors="pt")
    with torch.no_grad():
        expected = copy.deepcopy(clip).train()(**inputs, return_loss=True).loss.item()
    before = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model=model,
        args=sentence_transformers.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "log"),
            max_steps=1,
            per_device_train_batch_size=len(CAPTIONS),
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"text": captions, "image": images}),
        loss=MultipleNegativesRankingLoss(
            model,
            scale=clip.logit_scale.exp().item(),
            directions=("query_to_doc", "doc_to_query"),
            partition_mode="per_direction",
        ),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    untouched = {name for name, tensor in clip.state_dict().items() if torch.equal(tensor, before[name])}
    assert untouched == {"logit_scale"}  # which that loss takes as a number

    model.save_pretrained(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert again.modalities == ["text", "image"]
    assert_same_vectors(again.encode(TEXTS), model.encode(TEXTS))
    assert type(AutoModel.from_pretrained(tmp_path / "saved")) is HfClipModel
    assert type(AutoProcessor.from_pretrained(tmp_path / "saved")) is HfClipProcessor


def ranking(model: Any, **cached: int) -> Any:
    """Their ranking loss in both directions, by which the model's own contrastive loss is known."""
    losses = sentence_transformers.sentence_transformer.losses
    loss = losses.CachedMultipleNegativesRankingLoss if cached else losses.MultipleNegativesRankingLoss
    both = ("query_to_doc", "doc_to_query")
    scale = model[0].model.logit_scale.exp().item()
    return loss(model, scale=scale, directions=both, partition_mode="per_direction", **cached)


def guided(model: Any, **cached: int) -> Any:
    losses = sentence_transformers.sentence_transformer.losses
    guide = copy.deepcopy(model).eval()
    loss = losses.CachedGISTEmbedLoss if cached else losses.GISTEmbedLoss
    return loss(model, guide, **cached)


@pytest.mark.parametrize("loss_of", [ranking, guided])
def test_cached_losses_have_the_gradients_of_the_plain_ones(
    repository: Path, photographs: dict[str, Image.Image], loss_of: Any
):
    """Texts beside images, in parts of two; the ranking loss also has those of our own micro-batches."""
    model = sentence_transformers.SentenceTransformer(str(repository), device="cpu").train()
    clip = model[0].model
    norms = freeze_batch_norm_(clip)
    images, captions = (
        [photographs[name] for name in [*CAPTIONS, "camera"]],
        [*CAPTIONS.values(), "a man with a camera"],
    )

    def gradients(loss: Any) -> dict[str, torch.Tensor]:
        loss([model.preprocess(captions), model.preprocess(images)], None).backward()
        found = {name: p.grad for name, p in clip.named_parameters() if p.grad is not None}
        clip.zero_grad()
        return found

    expected = gradients(loss_of(model))
    assert len(expected) == len(list(clip.parameters())) - 1 - 2 * norms  # the temperature is a number
    cached = gradients(loss_of(model, mini_batch_size=2))
    assert cached.keys() == expected.keys()
    for name, gradient in expected.items():  # a small temperature makes much of rounding
        if not name.endswith("k_proj.bias"):
            assert (cached[name] - gradient).norm() < 1e-3 * gradient.norm(), name
    if loss_of is ranking:
        pairs = model[0].processor(text=captions, images=images, return_tensors="pt")
        backpropagate(
            clip, pairs, lambda image, text, scale, _: global_contrastive_loss(image, text, scale), micro_batch_size=2
        )
        ours = {name: p.grad for name, p in clip.named_parameters() if p.grad is not None}
        assert ours.pop("logit_scale") != 0
        assert_same_gradients(ours, expected)
