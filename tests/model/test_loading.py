"""Saving and loading as transformers does it: dtypes, devices, shards, towers alone, the Auto classes."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    pipeline,
)

from hf_clip import (
    HfClipForImageClassification,
    HfClipModel,
    HfClipResNetModel,
    HfClipTextModel,
    HfClipTextModelWithProjection,
    HfClipVisionModelWithProjection,
    HfClipViTModel,
)

from ..closeness import assert_same_features
from ..small import random_images, texts


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def test_auto_classes_find_ours(repository: Path):
    assert type(AutoModel.from_pretrained(repository)) is HfClipModel
    assert type(AutoModelForZeroShotImageClassification.from_pretrained(repository)) is HfClipModel


def test_saved_model_loads_equal_whole_and_in_shards(model: HfClipModel, tower: str, tmp_path: Path):
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="500KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    for folder in ("whole", "shards"):
        assert_same_weights(AutoModel.from_pretrained(tmp_path / folder), model)


def test_no_key_is_missing_or_unexpected(repository: Path):
    _, info = AutoModel.from_pretrained(repository, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@torch.no_grad()
def test_bfloat16_keeps_batch_norm_in_float32(repository: Path, tower: str, model: HfClipModel):
    half = AutoModel.from_pretrained(repository, dtype=torch.bfloat16).eval()
    for name, tensor in half.state_dict().items():
        module = half.get_submodule(name.rpartition(".")[0])
        if name.endswith("num_batches_tracked"):
            assert tensor.dtype == torch.int64, name
        else:
            kept = isinstance(module, nn.BatchNorm2d)
            assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name
    assert half.dtype == torch.bfloat16
    features, exact = (
        half.encode_image(random_images(tower).bfloat16()).float(),
        model.encode_image(random_images(tower)),
    )
    assert ((features - exact).norm() / exact.norm()) < 0.05
    features, exact = half.encode_text(texts()).float(), model.encode_text(texts())
    assert ((features - exact).norm() / exact.norm()) < 0.05


def test_bfloat16_statistics_go_on_moving(repositories: dict[str, Path]):
    model = AutoModel.from_pretrained(repositories["resnet"], dtype=torch.bfloat16).train()
    before = model.vision_model.bn1.running_mean.clone()
    model.encode_image(random_images("resnet").bfloat16())
    assert model.vision_model.bn1.running_mean.dtype == torch.float32
    assert not torch.equal(model.vision_model.bn1.running_mean, before)


def test_bfloat16_model_saves_and_loads(repository: Path, tmp_path: Path):
    half = AutoModel.from_pretrained(repository, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same_weights(AutoModel.from_pretrained(tmp_path), half)


@torch.no_grad()
def test_device_map_auto(repository: Path, tower: str, model: HfClipModel):
    placed = AutoModel.from_pretrained(repository, device_map="auto").eval()
    assert_same_features(placed.encode_image(random_images(tower)), model.encode_image(random_images(tower)))
    assert_same_features(placed.encode_text(texts()), model.encode_text(texts()))


@pytest.mark.filterwarnings(
    "ignore:The following device_map keys do not match"
)  # accelerate's, about any root parameter
@torch.no_grad()
def test_device_map_auto_where_memory_is_short(repository: Path, tower: str, model: HfClipModel, tmp_path: Path):
    """What doesn't fit is left on disk and brought in block by block; blocks are never split."""
    split = AutoModel.from_pretrained(
        repository, device_map="auto", max_memory={"cpu": "2MB"}, offload_folder=tmp_path
    ).eval()
    assert set(split.hf_device_map.values()) == {"cpu", "disk"}
    inputs = {"input_ids": texts(), "pixel_values": random_images(tower)}
    torch.testing.assert_close(split(**inputs).logits_per_image, model(**inputs).logits_per_image)


@torch.no_grad()
def test_modules_can_be_offloaded_one_by_one(repository: Path, tower: str, model: HfClipModel):
    """As diffusers' sequential offloading does it: a module's weights are there only while it is called."""
    from accelerate import cpu_offload

    inputs = {"input_ids": texts(), "pixel_values": random_images(tower)}
    expected = model(**inputs).logits_per_image
    offloaded = cpu_offload(AutoModel.from_pretrained(repository).eval(), execution_device="cpu")
    assert offloaded.vision_model.get_input_embeddings().weight.is_meta
    assert_same_features(offloaded(**inputs).logits_per_image, expected)


def test_no_split_modules_name_classes_of_the_model(model: HfClipModel, tower: str):
    classes = {type(module).__name__ for module in model.modules()}
    expected = {"vit": "HfClipViTEmbeddings", "resnet": "HfClipBottleneck"}[tower]
    assert expected in classes & set(model._no_split_modules)
    assert {"HfClipTextEmbeddings", "HfClipEncoderLayer"} <= classes & set(model._no_split_modules)


def test_meta_device_model_takes_a_state_dict(repository: Path, tower: str, model: HfClipModel):
    with torch.device("meta"):
        empty = HfClipModel(model.config)
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    empty.load_state_dict(model.state_dict(), assign=True)
    assert_same_features(empty.eval().encode_image(random_images(tower)), model.encode_image(random_images(tower)))


@torch.no_grad()
def test_towers_alone_load_from_a_whole_models_folder(repository: Path, tower: str, model: HfClipModel, tmp_path: Path):
    image_tower = {"vit": HfClipViTModel, "resnet": HfClipResNetModel}[tower]
    for kind, part in [(image_tower, model.vision_model), (HfClipTextModel, model.text_model)]:
        alone, info = kind.from_pretrained(repository, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]  # or every load would print a report of the other tower
        assert_same_weights(alone, part)
        alone.save_pretrained(tmp_path / kind.__name__)
        assert_same_weights(kind.from_pretrained(tmp_path / kind.__name__), part)
        assert type(AutoModel.from_pretrained(tmp_path / kind.__name__)) is kind


@torch.no_grad()
def test_towers_with_projection_equal_the_whole_models_features(
    repository: Path, tower: str, model: HfClipModel, tmp_path: Path
):
    image = HfClipVisionModelWithProjection.from_pretrained(repository).eval()
    text = HfClipTextModelWithProjection.from_pretrained(repository).eval()
    assert_same_features(image(random_images(tower)).image_embeds, model.encode_image(random_images(tower)))
    assert_same_features(text(texts()).text_embeds, model.encode_text(texts()))
    for alone in (image, text):
        alone.save_pretrained(tmp_path / type(alone).__name__)
        assert_same_weights(type(alone).from_pretrained(tmp_path / type(alone).__name__), alone)


@torch.no_grad()
def test_stock_image_feature_extraction_pipeline(repository: Path, tower: str, model: HfClipModel, photographs: dict):
    extract = pipeline("image-feature-extraction", model=str(repository))
    found = extract([photographs["astronaut"], photographs["coffee"]], return_tensors=True)
    pixels = extract.image_processor([photographs["astronaut"]], return_tensors="pt").pixel_values
    torch.testing.assert_close(found[0], model(pixel_values=pixels).image_embeds, rtol=1e-5, atol=1e-5)
    assert len(found) == 2


# --- the image classifier -------------------------------------------------------------------------------------------


def classifier(repository: Path, **options: object) -> HfClipForImageClassification:
    return AutoModelForImageClassification.from_pretrained(repository, **options)


def test_classifier_takes_over_the_tower_and_starts_a_new_head(repository: Path, model: HfClipModel):
    torch.manual_seed(0)
    found = classifier(repository, num_labels=50)
    assert type(found) is HfClipForImageClassification
    assert_same_weights(found.vision_model, model.vision_model)
    expected = found.config.vision_config.hidden_size**-0.5
    assert abs(found.classifier.weight.std().item() / expected - 1) < 0.05
    assert torch.equal(found.classifier.bias, torch.zeros(50))


@pytest.mark.parametrize(
    ("problem", "labels", "loss"),
    [
        ("single_label_classification", torch.tensor([0, 2, 1, 2]), nn.CrossEntropyLoss()),
        ("multi_label_classification", torch.tensor([[0.0, 1, 1]] * 4), nn.BCEWithLogitsLoss()),
        ("regression", torch.tensor([[0.5, -1, 2]] * 4), nn.MSELoss()),
    ],
)
def test_classifier_loss_follows_the_problem_type(
    repository: Path, tower: str, problem: str, labels: torch.Tensor, loss: nn.Module
):
    model = classifier(repository, num_labels=3, problem_type=problem).eval()
    outputs = model(random_images(tower), labels=labels)
    assert outputs.logits.shape == (4, 3)
    torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))


def test_problem_type_is_inferred_when_unset(repository: Path, tower: str):
    model = classifier(repository, num_labels=3).eval()
    labels = torch.tensor([0, 2, 1, 2])
    outputs = model(random_images(tower), labels=labels)
    torch.testing.assert_close(outputs.loss, nn.functional.cross_entropy(outputs.logits, labels))


def test_classifier_learns_saves_and_classifies(repository: Path, tower: str, tmp_path: Path, photographs: dict):
    torch.manual_seed(0)
    model = classifier(repository, id2label={0: "left", 1: "right"}, label2id={"left": 0, "right": 1}).train()
    images, labels = random_images(tower, 8), torch.tensor([0, 1] * 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        loss = model(images, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4
    assert all(parameter.grad is None for parameter in model.parameters())

    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert_same_weights(loaded, model)
    assert_same_features(loaded(images).logits, model.eval()(images).logits)

    from transformers import AutoImageProcessor

    AutoImageProcessor.from_pretrained(repository).save_pretrained(tmp_path)
    (answer,) = pipeline("image-classification", model=str(tmp_path))([photographs["chelsea"]])
    assert {entry["label"] for entry in answer} == {"left", "right"}


@pytest.mark.filterwarnings("ignore")
def test_trainer_accumulates_gradients_as_one_batch_would_have_them(repository: Path, tower: str, tmp_path: Path):
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    rows = Dataset.from_dict({"pixel_values": random_images(tower, 8).tolist(), "labels": [0, 1] * 4}).with_format(
        "torch"
    )
    norms = []
    for batch, steps in [(8, 1), (2, 4)]:
        torch.manual_seed(0)
        model = classifier(repository, num_labels=2)
        for module in model.modules():  # whose training mode would make the batch's size matter
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.0
                module.eval = module.train = lambda mode=True, module=module: module
                module.training = False
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(batch)),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            max_steps=1,
            learning_rate=0.0,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            max_grad_norm=1e9,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_loading_draws_no_random_weights(repository: Path):
    """Every tensor comes from the file, so nothing needs initialising; a random draw would be wasted work."""
    state = torch.random.get_rng_state()
    AutoModel.from_pretrained(repository)
    assert torch.equal(torch.random.get_rng_state(), state)
