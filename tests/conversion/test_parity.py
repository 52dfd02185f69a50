"""Numerical parity with the reference implementation: all nine at full size, and gradients at reduced size."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel

from conversion.parity import TEXT_LENGTHS, Errors, check_variant, compare, main, random_texts, relative_error, table
from hf_clip import VARIANTS, HfClipModel, Variant
from hf_clip.checkpoints.keys import config_from_shapes, convert_names

from ..small import random_images, texts

TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_published_size_equals_the_reference(name: str):
    """Features, mixed text lengths with one of 77, and logits, through the real file format and `AutoModel`."""
    errors = check_variant(VARIANTS[name])
    assert errors.largest <= TOLERANCE, table({name: errors})


def test_texts_have_mixed_lengths_up_to_the_longest():
    ids = random_texts(TEXT_LENGTHS, 49408, 77)
    assert [(row == 49407).nonzero()[0].item() + 1 for row in ids] == [3, 9, 20, 77]
    assert ((ids == 49407).sum(-1) == 1).all()
    assert (ids[:, 0] == 49406).all()


def test_relative_error_of_vectors_checked_by_hand():
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.0])) == 0
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


CHANGES: dict[str, Callable[[HfClipModel], Tensor]] = {
    "text gain": lambda model: model.text_model.encoder.layers[1].layer_norm2.weight,
    "text bias": lambda model: model.text_model.encoder.layers[2].self_attn.v_proj.bias,
    "text positions": lambda model: model.text_model.embeddings.position_embedding.weight,
    "projection": lambda model: model.visual_projection.weight,
    "scale": lambda model: model.logit_scale,
}


@pytest.mark.parametrize("change", CHANGES)
def test_comparison_sees_a_small_change_of_any_part(model: HfClipModel, reference: nn.Module, tower: str, change: str):
    """A yardstick that cannot fail would prove nothing: one tensor is moved by a thousandth."""
    images, ids = random_images(tower), texts()
    assert compare(model, reference, images, ids).largest <= TOLERANCE
    with torch.no_grad():
        tensor = CHANGES[change](model)
        tensor.add_(torch.randn_like(tensor), alpha=1e-3)  # a constant shift would vanish in a LayerNorm
    assert compare(model, reference, images, ids).largest > TOLERANCE


def test_comparison_sees_changed_batch_norm_statistics(repositories: dict[str, Path], references: dict):
    model = AutoModel.from_pretrained(repositories["resnet"]).eval()
    model.vision_model.layer2[1].bn2.running_var.mul_(1.01)
    assert compare(model, references["resnet"], random_images("resnet"), texts()).largest > TOLERANCE


def reference_loss(reference: nn.Module, images: Tensor, ids: Tensor) -> Tensor:
    per_image, per_text = reference(images, ids)
    targets = torch.arange(len(images))
    return (nn.functional.cross_entropy(per_image, targets) + nn.functional.cross_entropy(per_text, targets)) / 2


@pytest.mark.parametrize("training", [False, True])
def test_gradients_of_every_parameter_equal_the_references(
    model: HfClipModel, reference: nn.Module, tower: str, training: bool
):
    """In training mode BatchNorm normalises by the batch: another path through the ResNet, and its statistics."""
    reference = copy.deepcopy(reference).train(training)
    model.train(training)
    images, ids = random_images(tower), texts()
    expected = reference_loss(reference, images, ids)
    expected.backward()
    found = model(input_ids=ids, pixel_values=images, return_loss=True).loss
    found.backward()
    assert relative_error(found, expected) <= TOLERANCE

    config = config_from_shapes(reference.state_dict())
    # Buffers pass through the same table, so that running statistics are compared as well.
    theirs = dict(reference.state_dict())
    theirs |= {name: parameter.grad for name, parameter in reference.named_parameters()}
    theirs = convert_names(theirs, config)
    ours = dict(model.state_dict())
    ours |= {name: parameter.grad for name, parameter in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        if name.endswith("k_proj.bias"):
            # Softmax doesn't see a shift that all keys share: the exact gradient is zero, and both have rounding.
            scale = ours[name.replace("bias", "weight")].norm()
            assert tensor.norm() < 1e-4 * scale
            assert theirs[name].norm() < 1e-4 * scale
        else:
            assert relative_error(tensor, theirs[name]) <= GRADIENT_TOLERANCE, name


def test_command_prints_a_table_and_refuses_unknown_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """With the errors of a comparison that is not done again here."""
    asked: list[tuple[Variant, int]] = []

    def check(variant: Variant, seed: int) -> Errors:
        asked.append((variant, seed))
        return Errors(1e-7, 2e-7, 3e-7, 4e-7, 5e-7)

    monkeypatch.setattr("conversion.parity.check_variant", check)
    assert main(["ViT-B/32", "--seed", "3"]) == 0
    assert asked == [(VARIANTS["ViT-B/32"], 3)]
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "| model | image tower | image features | text tower | text features | logits |"
    assert out.splitlines()[2] == "| ViT-B/32 | 1.0e-07 | 2.0e-07 | 3.0e-07 | 4.0e-07 | 5.0e-07 |"
    assert f"torch {torch.__version__}" in out
    assert main(["ViT-B-32"]) == 1
    assert "Did you mean 'ViT-B/32'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([])
