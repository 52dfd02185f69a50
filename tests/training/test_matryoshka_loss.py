"""The loss at several widths: against the plain formula in float64, by micro-batches, and in runs.

test_losses.py compares several processes with one.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoProcessor, CLIPModel

from hf_clip import ZeroShotClassifier
from hf_clip.data.images import open_content
from hf_clip.training.config import TrainingConfig
from hf_clip.training.losses import global_contrastive_loss
from hf_clip.training.matryoshka_loss import matryoshka_contrastive_loss
from hf_clip.training.run_data import open_data

from ..closeness import assert_same_gradients
from ..finetuning import LABELLED_CAPTION, largest_difference, options, records, train, weights
from ..largest_tensor import LargestTensor
from .plain_loss import differentiate, plain_loss
from .test_gradient_caching import batch_for, in_both_ways

DIMS, WEIGHTS = [16, 8, 3], [1.0, 0.5, 2.0]
IDS = {"local_image_ids": torch.arange(40) // 2, "local_text_ids": torch.arange(40) % 17}
KINDS: dict[str, dict[str, Any]] = {
    "softmax": {"label_smoothing": 0.1, **IDS},
    "sigmoid": {"kind": "sigmoid", "logit_bias": torch.tensor(-2.0), **IDS},
    "softmax with negative texts": {"local_negative_text_embeds": torch.randn(9, 16, generator=torch.Generator())},
}


def plain(images: Tensor, texts: Tensor, scale: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Each width normalised by itself, weighted and added up; the accuracy is the full width's."""
    found = []
    for width in DIMS:
        cut = {name: value[:, :width] for name, value in options.items() if name.endswith("_embeds")}
        more = options | {name: normalize(value, dim=-1) for name, value in cut.items()}
        both = (normalize(embeds[:, :width], dim=-1) for embeds in (images, texts))
        found.append(plain_loss(*both, scale, **more))
    loss = sum(weight * value for weight, (value, _) in zip(WEIGHTS, found, strict=True))
    assert isinstance(loss, Tensor)
    return loss, found[0][1]


def tiled(images: Tensor, texts: Tensor, scale: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    result = matryoshka_contrastive_loss(images, texts, scale, dims=DIMS, weights=WEIGHTS, **options)
    assert result.global_loss.item() == pytest.approx(result.local_loss_to_backpropagate.item())
    return result.local_loss_to_backpropagate, result.global_accuracy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_normalised", [True, False])
def test_gradients_are_those_of_the_plain_formula(kind: str, is_normalised: bool):
    """Of embeddings before they are normalised, of the temperature and the bias. In float32, against float64."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (3 * torch.randn(40, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    texts = texts + images

    def of_raw(loss: Any) -> Any:
        def of(images: Tensor, texts: Tensor, scale: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
            if is_normalised:  # as a model returns them
                images, texts = normalize(images, dim=-1), normalize(texts, dim=-1)
            return loss(images, texts, scale, **options)

        return of

    is_float = {"logit_bias", "local_negative_text_embeds"}
    wide = {name: value.double() if name in is_float else value for name, value in KINDS[kind].items()}
    expected = differentiate(plain, images, texts, torch.tensor(2.0, dtype=torch.float64), **wide)
    found = differentiate(of_raw(tiled), images.float(), texts.float(), torch.tensor(2.0), **KINDS[kind])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm()) <= 2e-6 * float(value.norm()), name


def test_without_widths_it_is_the_plain_loss():
    images, texts = (normalize(torch.randn(6, 4), dim=-1) for _ in range(2))
    found = matryoshka_contrastive_loss(images, texts, torch.tensor(2.0))
    assert found == global_contrastive_loss(images, texts, torch.tensor(2.0))


def test_memory_grows_with_the_pairs_alone():
    embeds = [torch.randn(2000, 16, requires_grad=True) for _ in range(2)]
    with LargestTensor() as largest:
        matryoshka_contrastive_loss(*embeds, torch.tensor(1.0), dims=DIMS).local_loss_to_backpropagate.backward()
        once = largest.elements
    with LargestTensor() as largest:
        global_contrastive_loss(*embeds, torch.tensor(1.0)).local_loss_to_backpropagate.backward()
    assert once == largest.elements < 2000 * 2000


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dims": [16, 17]}, "matryoshka_dims has 17, but a feature has 16 numbers: widths from 1 to 16 are needed."),
        ({"dims": [16, 4], "weights": [1.0]}, "There are 1 weights for 2 widths: pass one for each."),
    ],
)
def test_impossible_widths_are_refused(given: dict[str, Any], message: str):
    embeds = torch.ones(3, 16)
    with pytest.raises(ValueError, match=re.escape(message)):
        matryoshka_contrastive_loss(embeds, embeds, torch.tensor(1.0), **given)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_gradients_by_micro_batches_are_those_of_the_whole_batch(repositories: dict[str, Path], kind: str):
    model = AutoModel.from_pretrained(repositories["vit"], contrastive_loss=kind).train()
    full = model.config.projection_dim

    def loss(images: Tensor, captions: Tensor, scale: Tensor, bias: Tensor | None) -> Any:
        return matryoshka_contrastive_loss(images, captions, scale, dims=[full, 5], logit_bias=bias, kind=kind)

    expected, found = in_both_ways(model, batch_for("vit"), loss)
    assert_same_gradients(found, expected)
    plain_gradients, _ = in_both_ways(
        model, batch_for("vit"), lambda i, t, s, b: global_contrastive_loss(i, t, s, logit_bias=b, kind=kind)
    )
    assert largest_difference(expected, plain_gradients) > 1e-3


# --- runs ------------------------------------------------------------------------------------------------------------

METRIC = "mean(recall@1, recall@1_dim4)"
CHOSEN = {"matryoshka_dims": "4,32,16", "matryoshka_weights": "2,1,1", "caption_column": LABELLED_CAPTION}


def test_run_trains_measures_keeps_and_tells_the_widths(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    chosen: dict[str, Any] = CHOSEN | {"dataset": [str(digits / "labelled")], "validation": "100"}
    out = train(digits, tmp_path / "out", eval_steps=3, metric_for_best_model=METRIC, **chosen)
    found = records(out, "recall@1")
    best = max(found, key=lambda record: record["recall@1"] + record["recall@1_dim4"])
    names = [f"{name}_dim{width}" for name in ("recall@1", "recall@10", "zero_shot_top1") for width in (16, 4)]
    assert all(record.keys() >= set(names) for record in found)
    assert not any("dim32" in name for name in found[0])
    assert [record["step"] for record in found] == [0, 3, 6]
    printed = capsys.readouterr().out
    assert f", recall@1_dim16 {found[1]['recall@1_dim16']:.3f}, zero_shot_top1_dim16 " in printed

    model, processor = AutoModel.from_pretrained(out), AutoProcessor.from_pretrained(out)
    assert model.config.matryoshka_dims == [32, 16, 4]
    data = open_data(TrainingConfig(**options(digits, out, **chosen)))
    assert data.validation is not None
    rows = [data.validation.read(draw) for draw in data.validation.draws(0, shuffle=False)]
    images = [open_content(row.image["bytes"]) for row in rows]
    classifier = ZeroShotClassifier(model, processor, data.class_prompts, ["{}"], progress=False, truncate_dim=4)
    is_right = classifier.logits(images).argmax(1) == torch.tensor([row.label for row in rows])
    assert best["zero_shot_top1_dim4"] == pytest.approx(is_right.double().mean().item())

    card = ModelCard.load(out / "README.md")
    assert "trained at the widths 32, 16, 4, see `truncate_dim`" in card.text
    assert "| widths of the loss (Matryoshka) | 4, 32, 16 |" in card.text
    assert "| weights of these widths | 2, 1, 1 |" in card.text
    before, after = (100 * record["recall@1_dim4"] for record in (found[0], best))
    assert f"| recall@1, first 4 numbers | {before:.1f} | {after:.1f} |" in card.text
    (result,) = (each for each in card.data.eval_results if each.metric_type == "recall_at_1_dim4")
    assert result.metric_value == pytest.approx(best["recall@1_dim4"], abs=1e-4)


def test_widths_go_on_unless_the_full_one_alone_is_named(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """The stock layout keeps the widths."""
    first = train(digits, tmp_path / "first", matryoshka_dims="32,4", max_steps=1, output_format="transformers")
    assert CLIPModel.from_pretrained(first).config.matryoshka_dims == [32, 4]
    chosen = {"model": str(first), "optim": "SGD", "learning_rate": "1e-2", "max_steps": 1}
    again = train(digits, tmp_path / "again", **chosen)
    assert "note: --matryoshka_dims is 32,4, at which the model was trained before; " in capsys.readouterr().err
    alone = train(digits, tmp_path / "alone", matryoshka_dims="32", **chosen)
    assert largest_difference(weights(again), weights(alone)) > 1e-5
    assert [AutoModel.from_pretrained(out).config.matryoshka_dims for out in (again, alone)] == [[32, 4], None]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"matryoshka_dims": "64,4"}, "--matryoshka_dims is 64,4, but this model's features have 32 numbers"),
        (
            {"metric_for_best_model": "recall@1_dim4"},
            "recall@1_dim4 cannot be measured: the full width alone is trained without --matryoshka_dims.",
        ),
        (
            {"metric_for_best_model": "recall@5_dim8", "matryoshka_dims": "32,16,4"},
            "recall@5_dim8 cannot be measured: there are recall@5, recall@5_dim16, recall@5_dim4.",
        ),
    ],
)
def test_widths_that_the_run_cannot_have_are_refused(digits: Path, tmp_path: Path, fields: dict, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        train(digits, tmp_path / "out", validation="60", eval_steps=2, **fields)
    assert not (tmp_path / "out").exists()
