"""Evaluation while training: what is right, what counts once, and that figures are those of the saved model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoProcessor

from hf_clip import ZeroShotClassifier
from hf_clip.data.images import open_content
from hf_clip.training.config import TrainingConfig
from hf_clip.training.evaluating import group_pairs, retrieval
from hf_clip.training.run_data import open_data

from ..finetuning import LABELLED_CAPTION, options, records, train


def same(groups: torch.Tensor) -> list[set[int]]:
    numbers = groups.tolist()
    return sorted(({i for i, number in enumerate(numbers) if number == n} for n in set(numbers)), key=min)


@pytest.mark.parametrize(
    ("images", "texts", "groups"),
    [
        ([1, 2, 3], [4, 5, 6], [{0}, {1}, {2}]),
        ([1, 1, 2], [4, 5, 6], [{0, 1}, {2}]),  # two captions of an image
        ([1, 2, 3], [4, 5, 4], [{0, 2}, {1}]),  # two images of a caption
        ([1, 1, 2, 3, 3], [4, 5, 5, 6, 4], [{0, 1, 2, 3, 4}]),  # through others, whatever their order
        ([1, 2, 3, 1], [9, 8, 7, 7], [{0, 2, 3}, {1}]),
    ],
)
def test_pairs_that_share_something_are_in_one_group(images: list[int], texts: list[int], groups: list[set[int]]):
    assert same(group_pairs(torch.tensor(images), torch.tensor(texts))) == groups


def test_retrieval_by_hand():
    """Three images, the first with two captions; text 2 looks most like image 0."""
    images = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    texts = torch.tensor([[0.9, 0.1, 0], [0, 0.2, 0.8], [0.8, 0.6, 0], [0, 0.4, 0.5]])
    figures = retrieval(images, texts, torch.tensor([7, 7, 8, 9]), torch.tensor([1, 2, 3, 4]))
    # Image 0 finds text 0, image 1 its text 2 with 0.6, and image 2 text 1 before its own.
    assert figures["image_to_text_recall@1"] == pytest.approx(2 / 3)
    # Text 0 finds image 0, text 1 image 2 and text 2 image 0, both wrong, and text 3 its own.
    assert figures["text_to_image_recall@1"] == pytest.approx(2 / 4)
    assert figures["recall@1"] == pytest.approx((2 / 3 + 2 / 4) / 2)
    assert figures["recall@5"] == figures["recall@10"] == 1


def test_equal_images_and_captions_count_once():
    images, texts = torch.eye(3)[[0, 0, 1, 2]], torch.eye(3)[[0, 0, 1, 0]]
    figures = retrieval(images, texts, torch.tensor([1, 1, 2, 3]), torch.tensor([1, 1, 2, 3]))
    # Of three captions the first and the last look alike, so each is beaten by the other: a tie counts as wrong.
    assert figures["text_to_image_recall@1"] == pytest.approx(2 / 3)
    assert figures["image_to_text_recall@1"] == pytest.approx(1 / 3)


def test_zero_shot_accuracy_is_that_of_the_saved_model(digits: Path, tmp_path: Path):
    chosen = {"dataset": [str(digits / "labelled")], "caption_column": LABELLED_CAPTION, "validation": "100"}
    out = train(digits, tmp_path / "out", max_steps=12, **chosen)
    (_, figures) = records(out, "zero_shot_top1")
    assert figures.keys() >= {"recall@1", "zero_shot_top1", "zero_shot_top5"}

    data = open_data(TrainingConfig(**options(digits, out, **chosen)))
    assert data.class_prompts is not None
    assert data.class_prompts[7] == "the digit seven"
    rows = [data.validation.read(draw) for draw in data.validation.draws(0, shuffle=False)]
    assert len(rows) == 100
    classifier = ZeroShotClassifier(
        AutoModel.from_pretrained(out), AutoProcessor.from_pretrained(out), data.class_prompts, ["{}"], progress=False
    )
    logits = classifier.logits([open_content(row.image["bytes"]) for row in rows])
    expected = (logits.argmax(1) == torch.tensor([row.label for row in rows])).double().mean().item()
    assert figures["zero_shot_top1"] == pytest.approx(expected)
