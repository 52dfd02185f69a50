"""Distillation from a teacher: its loss and gradients against the plain formula, and its part in runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax, normalize
from transformers import AutoModel

from hf_clip import HfClipModel, HfClipProcessor
from hf_clip.training.distillation import distillation_loss
from hf_clip.training.feature_store import FOLDER

from ..finetuning import largest_difference, options, records, train, weights, words
from ..largest_tensor import LargestTensor
from ..two_processes import TwoProcesses
from .loss_scenarios import small_tiles

RUN = {"optim": "SGD", "learning_rate": "0.05", "weight_decay": 0.0, "max_steps": 3, "logging_steps": 1}
RUN |= {"augmentation": "none", "per_device_train_batch_size": 32}


def plain(images: Tensor, texts: Tensor, scale: Tensor, teacher: list[Tensor], teacher_scale: float) -> Tensor:
    z, y = scale.exp() * images @ texts.T, teacher_scale * teacher[0] @ teacher[1].T
    both = ((z, y), (z.T, y.T))
    parts = [
        kl_div(log_softmax(ours, 1), log_softmax(theirs, 1), reduction="sum", log_target=True) for ours, theirs in both
    ]
    return sum(parts) / (2 * len(images))  # type: ignore[return-value]


@pytest.mark.parametrize("teacher_scale", [5.0, 100.0])
@pytest.mark.parametrize("scale", [1.0, 4.6])
def test_loss_and_gradients_are_those_of_the_formula(scale: float, teacher_scale: float):
    torch.manual_seed(0)
    student = [normalize(torch.randn(70, 16), dim=-1).requires_grad_() for _ in range(2)]
    student.append(torch.tensor(scale, requires_grad=True))
    teacher = [normalize(torch.randn(70, 9), dim=-1) for _ in range(2)]
    wide = [tensor.detach().double().requires_grad_() for tensor in student]
    expected = plain(*wide, [each.double() for each in teacher], teacher_scale)
    gradients = torch.autograd.grad(expected, wide)
    given: dict[str, Any] = {"local_teacher_images": teacher[0], "local_teacher_texts": teacher[1]}
    with small_tiles(16, 20):
        found = distillation_loss(*student, **given, teacher_scale=teacher_scale)
        found.local_loss_to_backpropagate.backward()
    torch.testing.assert_close(found.global_loss.double(), expected, rtol=2e-6, atol=0)
    for tensor, gradient in zip(student, gradients, strict=True):
        assert (tensor.grad.double() - gradient).norm() <= 2e-6 * gradient.norm()


def test_second_derivative_is_refused():
    images, texts = (normalize(torch.randn(5, 4), dim=-1).requires_grad_() for _ in range(2))
    given: dict[str, Any] = {"local_teacher_images": images, "local_teacher_texts": texts}
    loss = distillation_loss(images, texts, torch.tensor(2.0), **given, teacher_scale=1.0).local_loss_to_backpropagate
    with pytest.raises(NotImplementedError, match="The distillation loss was differentiated with create_graph=True"):
        torch.autograd.grad(loss, images, create_graph=True)


def test_student_that_agrees_has_nothing_to_learn():
    torch.manual_seed(0)
    embeds = [normalize(torch.randn(20, 16), dim=-1).requires_grad_() for _ in range(2)]
    images, texts = (each.detach() for each in embeds)
    scale = torch.tensor(3.0, requires_grad=True)
    given: dict[str, Any] = {"local_teacher_images": images, "local_teacher_texts": texts}
    found = distillation_loss(*embeds, scale, **given, teacher_scale=torch.tensor(3.0).double().exp().item())
    found.local_loss_to_backpropagate.backward()
    assert abs(found.global_loss.item()) < 1e-9
    assert max(each.grad.abs().max().item() for each in (*embeds, scale)) < 1e-6


def test_no_tensor_is_as_large_as_all_logits():
    embeds = [torch.randn(100, 4, requires_grad=True) for _ in range(2)]
    teacher = torch.randn(100, 4)
    with small_tiles(10, 10), LargestTensor() as largest:
        given: dict[str, Any] = {"local_teacher_images": teacher, "local_teacher_texts": teacher}
        distillation_loss(*embeds, torch.tensor(1.0), **given, teacher_scale=9.0).local_loss_to_backpropagate.backward()
    assert largest.elements == 100 * 8  # the texts of both models


def test_embeddings_of_other_pairs_are_refused():
    given = torch.ones(3, 4), torch.ones(3, 4), torch.tensor(1.0)
    with pytest.raises(ValueError, match="Process 0 has 3, 3, 2, 3 images, texts, teacher's images and teacher's te"):
        distillation_loss(
            *given, local_teacher_images=torch.ones(2, 4), local_teacher_texts=torch.ones(3, 4), teacher_scale=9.0
        )


# --- runs ------------------------------------------------------------------------------------------------------------


def test_student_begins_where_the_pretrained_model_is_and_the_card_names_it(digits: Path, tmp_path: Path):
    """The loss of the first step is that without a teacher."""
    free = train(digits, tmp_path / "free", **RUN)
    out = train(digits, tmp_path / "taught", teacher=str(digits / "vit"), teacher_weight=2.0, **RUN)
    lines = records(out)
    assert lines[0]["loss"] == records(free)[0]["loss"]
    assert abs(lines[0]["distillation"]) < 1e-6 < lines[1]["distillation"]
    assert json.loads((out / "training_config.json").read_text())["teacher_weight"] == 2.0
    card = (out / "README.md").read_text()
    assert "| teacher | vit |" in card
    assert "| teacher weight | 2.0 |" in card


def distilled_step(model: HfClipModel, batch: dict[str, Tensor], teacher: list[Tensor]) -> dict[str, Tensor]:
    """The weights after one step of SGD on the plain formula, in float64."""
    outputs = model(**batch, return_loss=True)
    distance = plain(outputs.image_embeds, outputs.text_embeds, model.logit_scale, teacher, 1 / 0.02)
    (outputs.loss + 0.5 * distance).backward()
    return {n: (p - 0.05 * p.grad).detach().float() for n, p in model.named_parameters() if p.grad is not None}


def test_step_is_that_of_the_formula_and_a_teacher_may_be_another_model(digits: Path, tmp_path: Path):
    """A ResNet of 32 pixels teaches a ViT of 16. All 32 pairs are one batch, so their order does not matter."""
    from datasets import load_from_disk

    rows = load_from_disk(str(digits / "pairs"))["train"].select(range(32))
    rows.save_to_disk(str(tmp_path / "rows"))
    chosen = RUN | {"dataset": [str(tmp_path / "rows")], "max_steps": 1, "mask_duplicates": "off"}
    out = train(
        digits, tmp_path / "run", teacher=str(digits / "resnet"), teacher_weight=0.5, teacher_temperature=0.02, **chosen
    )
    inputs = {}
    for tower in ("vit", "resnet"):
        processor = HfClipProcessor.from_pretrained(digits / tower)
        inputs[tower] = processor(text=rows["caption"][:], images=rows["image"][:], return_tensors="pt")
    with torch.no_grad():
        taught = AutoModel.from_pretrained(digits / "resnet")(**inputs["resnet"])
    teacher = [taught.image_embeds.double(), taught.text_embeds.double()]
    student = AutoModel.from_pretrained(digits / "vit").double()
    batch = dict(inputs["vit"]) | {"pixel_values": inputs["vit"]["pixel_values"].double()}
    expected, found = distilled_step(student, batch, teacher), weights(out)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-6, msg=name)


def test_micro_batches_stored_towers_and_resuming_change_nothing(digits: Path, tmp_path: Path):
    chosen = RUN | {"teacher": str(digits / "resnet"), "lock": "text", "max_steps": 4}
    whole = train(digits, tmp_path / "whole", **chosen)
    parts = train(digits, tmp_path / "parts", micro_batch_size=8, cache_frozen_features=True, save_steps=3, **chosen)
    expected, lines = weights(parts), records(parts)
    assert largest_difference(weights(whole), expected) < 2e-6
    for ours, theirs in zip(lines, records(whole), strict=True):
        assert ours["distillation"] == pytest.approx(theirs["distillation"], rel=1e-4)
    train(
        digits,
        parts,
        micro_batch_size=8,
        cache_frozen_features=True,
        save_steps=3,
        resume_from_checkpoint="latest",
        **chosen,
    )
    assert largest_difference(weights(parts), expected) == 0
    assert records(parts)[-1]["distillation"] == lines[-1]["distillation"]
    kinds = {path.name.rpartition("-")[0] for path in (parts / FOLDER).iterdir()}
    assert kinds == {"text", "text-tower", "teacher-image", "teacher-text"}


@pytest.mark.slow
def test_processes_learn_what_one_does(digits: Path, tmp_path: Path, two_processes: TwoProcesses):
    chosen = RUN | {"teacher": str(digits / "vit"), "max_steps": 2}
    one = train(digits, tmp_path / "one", **chosen)
    flags = chosen | {"per_device_train_batch_size": 16, "micro_batch_size": 8}
    two_processes.run(words(options(digits, tmp_path / "two", **flags)))
    assert largest_difference(weights(one), weights(tmp_path / "two")) < 2e-6


def test_missing_teacher_is_refused_before_anything_is_loaded(digits: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="There is no teacher folder ./nowhere; check the path"):
        train(digits, tmp_path / "run", teacher="./nowhere", **RUN)
    assert not (tmp_path / "run").exists()
