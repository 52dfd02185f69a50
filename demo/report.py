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
    """The share of pictures whose best caption is the true one, word for word."""
    hits = [scores[0]["label"] == CAPTIONS[target] for scores, target in zip(results, split["target"], strict=True)]
    return sum(hits) / len(hits)


@torch.no_grad()
def similarities(folder: Path, split: Dataset) -> torch.Tensor:
    """Cosine similarity of every picture of a split with every one of their true captions, by `AutoModel`."""
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    captions = [CAPTIONS[target] for target in split["target"]]
    outputs = model(**processor(text=captions, images=split["image"][:], return_tensors="pt"))
    return outputs.image_embeds @ outputs.text_embeds.T


def draw_picture(path: Path, folder: Path, splits: dict[str, Dataset], results: dict[str, Any], scores: dict) -> None:
    """A grid of test pictures with the caption chosen for each, and the similarity matrix of twelve of them."""
    figure = plt.figure(figsize=(17, 11.5), layout="constrained")
    grids, matrix = figure.subfigures(1, 2, width_ratios=[1.15, 1])
    for part, name in zip(grids.subfigures(2, 1), splits, strict=True):
        chance = f"chance {1 / len(CAPTIONS):.1%}"
        part.suptitle(f"{name.replace('_', ' ')}: top-1 {scores[name]:.1%} of {len(CAPTIONS)} captions ({chance})")
        for axes, row in zip(part.subplots(3, 4).flat, range(12), strict=True):
            best = results[name][row][0]
            right = best["label"] == CAPTIONS[splits[name][row]["target"]]
            axes.imshow(splits[name][row]["image"])
            label = best["label"].removeprefix("a photo of ").replace(" on ", "\non ")
            axes.set_title(f"{label}\n{best['score']:.2f}", fontsize=9, color="darkgreen" if right else "crimson")
            axes.axis("off")
    split = splits["unseen_combinations"].select(range(12))
    values = similarities(folder, split)
    matrix.suptitle("cosine similarity of twelve pictures of unseen combinations with their captions")
    axes = matrix.subplots()
    shown = axes.imshow(values.numpy(), cmap="viridis")
    labels = [CAPTIONS[target].removeprefix("a photo of ") for target in split["target"]]
    axes.set_xticks(range(12), labels, rotation=45, ha="right", fontsize=9)
    axes.set_yticks(range(12), labels, fontsize=9)
    axes.set_xlabel("caption")
    axes.set_ylabel("picture of")
    for row in range(12):
        for column in range(12):
            colour = "black" if values[row, column] > values.mean() else "white"
            axes.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", fontsize=7, color=colour)
    matrix.colorbar(shown, shrink=0.6)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(folder: Path, splits: dict[str, Dataset], picture: Path) -> dict[str, float]:
    """Evaluate the model in `folder` on each split, draw the picture, and return top-1 by split."""
    classifier = pipeline("zero-shot-image-classification", model=str(folder))
    results = {name: classify(classifier, split) for name, split in splits.items()}
    scores = {name: top1(results[name], split) for name, split in splits.items()}
    draw_picture(picture, folder, splits, results, scores)
    return scores
