"""What the demo's model has learned: top-1 by the zero-shot pipeline, and a picture to look at."""

from pathlib import Path
from typing import Any

import matplotlib
import torch
from datasets import Dataset
from transformers import AutoModel, AutoProcessor, pipeline

from .digits import COMBINATIONS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CAPTIONS = [combination.caption() for combination in COMBINATIONS]
"""The candidates: every digit in every ink on every paper, trained or not."""


def classify(classifier: Any, split: Dataset) -> list[list[dict[str, Any]]]:
    """The zero-shot pipeline over a split, all 560 captions as candidates; scores from high to low."""
    return classifier(split["image"][:], candidate_labels=CAPTIONS, hypothesis_template="{}", batch_size=120)


def top1(results: list[list[dict[str, Any]]], split: Dataset) -> float:
    """The share of images whose best caption is the true one, word for word."""
    hits = [scores[0]["label"] == CAPTIONS[target] for scores, target in zip(results, split["target"], strict=True)]
    return sum(hits) / len(hits)


@torch.no_grad()
def similarities(folder: Path, split: Dataset) -> torch.Tensor:
    """Cosine similarity of every image of a split with every one of their true captions, by `AutoModel`."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    captions = [CAPTIONS[target] for target in split["target"]]
    outputs = model(**processor(text=captions, images=split["image"][:], return_tensors="pt"))
    return outputs.image_embeds @ outputs.text_embeds.T


RIGHT, WRONG = "darkgreen", "crimson"
SHOWN = 12
MEANING = (
    f"Green: of {len(CAPTIONS)} captions the model chose the true one.   "
    "Red: it chose another, and the true one stands below.   "
    "The number is the probability that it gives the caption it chose."
)


def short(caption: str) -> str:
    return caption.removeprefix("a photo of ")


def title_of(best: dict[str, Any], true_caption: str) -> tuple[str, str]:
    """The words above an image, and their colour: the caption chosen, its probability, the true one if it is wrong."""
    chosen = f"{short(best['label'])}: {best['score']:.2f}".replace(" on ", "\non ")
    if best["label"] == true_caption:
        return chosen, RIGHT
    return f"{chosen}\ntrue: {short(true_caption)}".replace(" on ", "\non "), WRONG


def draw_images(part: Any, split: Dataset, results: list[list[dict[str, Any]]]) -> None:
    """A grid of the first images of a split, each below the caption that was chosen for it."""
    for axes, row, scores in zip(part.subplots(3, 4).flat, split.select(range(SHOWN)), results, strict=False):
        title, colour = title_of(scores[0], CAPTIONS[row["target"]])
        axes.imshow(row["image"])
        axes.set_title(title, fontsize=9, color=colour)
        axes.axis("off")


def draw_similarities(part: Any, folder: Path, split: Dataset) -> None:
    """The similarity of the first images of a split with their captions, as a matrix."""
    split = split.select(range(SHOWN))
    values = similarities(folder, split)
    part.suptitle(f"cosine similarity of {SHOWN} images of unseen combinations with their captions")
    axes = part.subplots()
    shown = axes.imshow(values.numpy(), cmap="viridis")
    labels = [short(CAPTIONS[target]) for target in split["target"]]
    axes.set_xticks(range(SHOWN), labels, rotation=45, ha="right", fontsize=9)
    axes.set_yticks(range(SHOWN), labels, fontsize=9)
    axes.set_xlabel("caption")
    axes.set_ylabel("image of (the diagonal is its true caption)")
    for row in range(SHOWN):
        for column in range(SHOWN):
            colour = "black" if values[row, column] > values.mean() else "white"
            axes.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", fontsize=7, color=colour)
    part.colorbar(shown, shrink=0.6)


def draw_picture(path: Path, folder: Path, splits: dict[str, Dataset], results: dict[str, Any], scores: dict) -> None:
    """A grid of images of each split with the captions chosen, and the similarity matrix of twelve of them."""
    figure = plt.figure(figsize=(17, 13), layout="constrained")
    figure.suptitle(MEANING, fontsize=12)
    grids, matrix = figure.subfigures(1, 2, width_ratios=[1.15, 1])
    for part, name in zip(grids.subfigures(2, 1), splits, strict=True):
        chance = f"chance {1 / len(CAPTIONS):.1%}"
        part.suptitle(f"{name.replace('_', ' ')}: top-1 {scores[name]:.1%} of {len(splits[name])} images ({chance})")
        draw_images(part, splits[name], results[name])
    draw_similarities(matrix, folder, splits["unseen_combinations"])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(folder: Path, splits: dict[str, Dataset], picture: Path) -> dict[str, float]:
    """Evaluate the model in `folder` on each split, draw the picture, and return top-1 by split."""
    classifier = pipeline("zero-shot-image-classification", model=str(folder))
    results = {name: classify(classifier, split) for name, split in splits.items()}
    scores = {name: top1(results[name], split) for name, split in splits.items()}
    draw_picture(picture, folder, splits, results, scores)
    return scores
