"""What a model forgets while it learns something new, by each recipe of `recipes/`.

    python -m benchmarks.forgetting --output forgetting/ --json forgetting.json --picture benchmarks/forgetting.png

A small CLIP learns the handwritten digits zero to four, in ink and on paper of eight colours: the old task. From there
each recipe learns five to nine, through the command that a user types: the new task. Both are measured zero-shot among
all 560 classes of digit, ink and paper, by handwriting that neither training nor the choice of an α has seen. Each seed
has drawings and an order of its own; the pretrained model is the same.

Rates and weights are the toy's own, since its model is a thousandth of CLIP; all else is the recipe's.

A pretrained model that is there is taken as it is, and so is the result of a command: remove its folder to measure it
anew.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from datasets import ClassLabel, Dataset, DatasetDict
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from demo.digits import COMBINATIONS, DIGITS, PHRASES, load_split_digits, make_split
from demo.model import TOWERS, write_fresh_model
from hf_clip.commands import finetune as finetune_command
from hf_clip.evaluation import evaluate_interpolation, evaluate_zero_shot
from hf_clip.training.recipes import recipe_names

from .machine import describe, headline
from .measuring import say
from .ratio_chart import import_pyplot, save
from .reporting import write_json

TOWER = "vit"
OLD, NEW = range(5), range(5, 10)
OLD_PAIRS, NEW_PAIRS = 20_000, 8_000
"""Of the old task each handwritten image is drawn in many colours, of the new task once."""

EVALUATED = 360
ALPHAS = "0:1:0.1"
NAME = "{ink} {digit} on {paper} paper"
CLASSES = [NAME.format(ink=c.ink, digit=DIGITS[c.digit], paper=c.paper) for c in COMBINATIONS]
"""What zero-shot classification chooses from: all digits in all colours, 280 old and 280 new."""

CAPTIONS = [f"a photo of a {NAME}.", *PHRASES[1:]]
"""Phrases of the old task's captions. The first one is what zero-shot classification asks with, and the new task's."""

PRETRAINING: dict[str, Any] = {"max_steps": 400, "learning_rate": "2e-3", "weight_decay": 0.1, "augmentation": "none"}
SHARED = {"dataset": "new", "validation": "validation", "guard_dataset": "../guard", "output_dir": "result"}
ALIKE = {"dataloader_num_workers": 0}
BATCH = {"max_steps": 100, "per_device_train_batch_size": 128}

ALL_RATE, LORA_RATE, PROJECTIONS_RATE = "5e-4", "5e-3", "1e-3"
AVERAGED = {"average_with_pretrained": ALPHAS}
REPLAYED = {"replay": "../old=0.5"}
PENALIZED = {"l2_to_pretrained": 1 / 144}
"""1 / N, where there are about 144 images by hand of each new digit."""


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        recipe: Its name.
        rate: The learning rate.
        options: What is given beside the recipe and `SHARED`.
        name: The row's name. Empty: the recipe's.
    """

    recipe: str
    rate: str = ALL_RATE
    options: dict[str, Any] = field(default_factory=dict)
    name: str = ""

    @property
    def title(self) -> str:
        return self.name or self.recipe

    @property
    def slug(self) -> str:
        return self.title.replace(", ", "-").replace(" ", "-")


ROWS = (
    Row("full"),
    Row("flyp"),
    Row("lit"),
    Row("lit", options=AVERAGED, name="lit, averaged"),
    Row("lora", LORA_RATE),
    Row("projections", PROJECTIONS_RATE, PENALIZED),
    Row("projections", "1e-2", PENALIZED, "projections, ten times the rate"),
    Row("wise-ft"),
    Row("ema"),
    Row("distillation", options={"teacher": "../pretrained"}),
    Row("replay", options=REPLAYED),
    Row("replay", options=REPLAYED | AVERAGED, name="replay, averaged"),
)
FULL = "full"
"""The row on the way to which the curve of WiSE-FT lies."""

Figures = dict[str, float]
"""`new` and `old`: accuracies from 0 to 1."""


# --- data and the pretrained model ------------------------------------------------------------------------------------


def draw_split(
    digits: tuple[Tensor, Tensor],
    classes: Sequence[int],
    size: int,
    seed: int,
    phrases: Sequence[str] = CAPTIONS[:1],
) -> Dataset:
    """Images of some digits in any colours, with captions and labels."""
    kept = torch.isin(digits[1], torch.tensor(list(classes)))
    allowed = [combination for combination in COMBINATIONS if combination.digit in classes]
    image_size = TOWERS[TOWER].image_size
    drawn = make_split((digits[0][kept], digits[1][kept]), allowed, size, image_size, seed, list(phrases))
    return drawn.rename_column("target", "label").cast_column("label", ClassLabel(names=CLASSES))


def write_splits(folder: Path, splits: dict[str, Dataset]) -> None:
    DatasetDict(splits).save_to_disk(folder)


def split_digits() -> tuple[tuple[Tensor, Tensor], ...]:
    """Handwriting to train on, to choose an α by, and to measure on."""
    train, held_out = load_split_digits(seed=0)
    return train, *((held_out[0][first::2], held_out[1][first::2]) for first in (0, 1))


def write_old_data(folder: Path) -> None:
    """Write `old`, and `guard` and `old-test`, which hold old digits out."""
    train, chosen_by, measured = split_digits()
    write_splits(folder / "old", {"train": draw_split(train, OLD, OLD_PAIRS, 1, CAPTIONS)})
    write_splits(folder / "guard", {"validation": draw_split(chosen_by, OLD, EVALUATED, 2)})
    write_splits(folder / "old-test", {"test": draw_split(measured, OLD, EVALUATED, 3)})


def write_new_data(folder: Path, seed: int) -> None:
    """Write `new` of one seed."""
    splits = zip(("train", "validation", "test"), split_digits(), (NEW_PAIRS, EVALUATED, EVALUATED), strict=True)
    drawn = {
        name: draw_split(digits, NEW, size, 10 + 3 * seed + place) for place, (name, digits, size) in enumerate(splits)
    }
    write_splits(folder / "new", drawn)


def words_of(command: str, options: dict[str, Any]) -> list[str]:
    """`command` may be empty."""
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [*([command] if command else []), *given]


def finetune(folder: Path, words: Sequence[str]) -> None:
    """`hf-clip finetune` in `folder`. Raises RuntimeError if it fails; it has said why."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        if finetune_command.main(words, prog="hf-clip finetune"):
            raise RuntimeError(f"hf-clip finetune {' '.join(words)} has failed")
    finally:
        os.chdir(before)


def pretrain(output: Path) -> None:
    """Make the old task's data and the pretrained model, unless they are there."""
    if (output / "pretrained" / "model.safetensors").is_file():
        return
    write_old_data(output)
    # All ten names are words of the vocabulary, as all words are of CLIP's.
    captions = [combination.caption(phrase) for combination in COMBINATIONS for phrase in CAPTIONS]
    write_fresh_model(output / "fresh", TOWER, captions, seed=0)
    options = {"variant": "fresh", "dataset": "old", "output_dir": "pretrained"}
    finetune(output, words_of("", options | PRETRAINING | ALIKE))


# --- measuring -------------------------------------------------------------------------------------------------------


def measured_sets(folder: Path) -> dict[str, Path]:
    return {"new": folder / "new", "old": folder.parent / "old-test"}


def figures_of(model: Path, folder: Path) -> Figures:
    """Zero-shot accuracy of a saved model on both tasks."""
    loaded, processor = AutoModel.from_pretrained(model).eval(), AutoProcessor.from_pretrained(model)
    sets = measured_sets(folder)
    return {name: evaluate_zero_shot(loaded, processor, data, split="test").value for name, data in sets.items()}


def curve(folder: Path, row: Row) -> list[Figures]:
    """Both tasks by the models between the pretrained one and a row's result."""
    pretrained = folder.parent / "pretrained"
    first, last = (AutoModel.from_pretrained(model).eval() for model in (pretrained, folder / row.slug))
    processor = AutoProcessor.from_pretrained(pretrained)
    sets = measured_sets(folder)
    found = evaluate_interpolation(first, last, processor, [*sets.values()], alphas=ALPHAS, split="test")
    points = zip(found.alphas, *(found.curves[str(data)] for data in sets.values()), strict=True)
    return [{"alpha": alpha, "new": new, "old": old} for alpha, new, old in points]


def run_row(folder: Path, row: Row, seed: int) -> dict[str, Any]:
    """Train by a recipe, unless that was done: the command, and the figures of its result."""
    options = {"model": "../pretrained", **SHARED, "output_dir": row.slug, "learning_rate": row.rate}
    words = words_of(row.recipe, options | row.options | BATCH | ALIKE | {"seed": seed})
    command, path = " ".join(["hf-clip finetune", *words]), folder / row.slug / "figures.json"
    if path.is_file() and (known := json.loads(path.read_text()))["command"] == command:
        return known
    finetune(folder, [*words, "--overwrite_output_dir"])
    found: dict[str, Any] = {"command": command, **figures_of(folder / row.slug, folder)}
    if row.title == FULL:
        found["curve"] = curve(folder, row)
    write_json(path, found)
    return found


def measure(output: Path, seeds: Sequence[int], rows: Sequence[Row]) -> dict[str, Any]:
    """Measure all rows with all seeds.

    Returns:
        `before`, `rows` by title, and `curve`. Each is a list over the seeds.
    """
    output.mkdir(parents=True, exist_ok=True)
    say("the pretrained model")
    pretrain(output)
    found: dict[str, Any] = {"before": [], "rows": {row.title: [] for row in rows}, "curve": []}
    for seed in seeds:
        folder = output / f"seed-{seed}"
        folder.mkdir(exist_ok=True)
        if not (folder / "new").is_dir():
            write_new_data(folder, seed)
        found["before"].append(figures_of(output / "pretrained", folder))
        for row in rows:
            say(f"seed {seed}: {row.title}")
            found["rows"][row.title].append(run_row(folder, row, seed))
        found["curve"] += [run.pop("curve") for run in found["rows"].get(FULL, ()) if "curve" in run]
    say("")
    return found


# --- table and picture -----------------------------------------------------------------------------------------------


def summary(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, least and most, in percent."""
    return 100 * sum(values) / len(values), 100 * min(values), 100 * max(values)


def format_table(found: dict[str, Any]) -> str:
    """A row for each recipe, as Markdown: mean (least–most) of both tasks and their mean."""
    lines = ["| | new task | old task | mean |", "|---|---|---|---|"]
    for title, runs in {"before": found["before"], **found["rows"]}.items():
        both = [[run[name] for run in runs] for name in ("new", "old")]
        means = [(new + old) / 2 for new, old in zip(*both, strict=True)]
        cells = ("{:.1f} ({:.0f}–{:.0f})".format(*summary(values)) for values in (*both, means))
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path: Path, facts: dict[str, Any], found: dict[str, Any]) -> None:
    """Draw the new task against the old one: a point for each row, and the curve of WiSE-FT."""
    plt = import_pyplot()
    figure, axes = plt.subplots(figsize=(9, 6.5), layout="constrained")
    if found["curve"]:
        places = list(zip(*found["curve"], strict=True))  # by α, then by seed
        line = [[summary([run[name] for run in runs])[0] for runs in places] for name in ("old", "new")]
        axes.plot(*line, "-o", color="#9a9a9a", markersize=3.5, linewidth=1.2, zorder=1)
        place = round(0.6 * (len(places) - 1))
        axes.annotate(
            f"WiSE-FT's curve, α in steps of {places[1][0]['alpha']:g}",
            (line[0][place], line[1][place]),
            xytext=(0, 30),
            textcoords="offset points",
            ha="center",
            color="#6b6b6b",
            fontsize=8.5,
        )
    for title, runs in {"before": found["before"], **found["rows"]}.items():
        (x, *x_ends), (y, *y_ends) = (summary([run[name] for run in runs]) for name in ("old", "new"))
        # Rounding may put the mean of equal figures beyond them.
        spread = {
            f"{axis}err": [[max(0, mean - least)], [max(0, most - mean)]]
            for axis, mean, (least, most) in (("x", x, x_ends), ("y", y, y_ends))
        }
        axes.errorbar(x, y, **spread, fmt="o", color="#12355b", ecolor="#a8c8ec", markersize=6, zorder=2)
        axes.annotate(title, (x, y), xytext=(7, 5), textcoords="offset points", fontsize=9.5, zorder=3)
    axes.set_xlabel("old task: five digits that the model knew, top-1 in %")
    axes.set_ylabel("new task: five digits that it learned, top-1 in %")
    highest = max(summary([run["new"] for run in runs])[2] for runs in (found["before"], *found["rows"].values()))
    axes.set_xlim(-4, 104)
    axes.set_ylim(-3, highest + 8)
    axes.grid(color="#ececec", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    machine = f"{facts['machine']['processor']}, {facts['date'][:10]}"
    seeds = len(found["before"])
    axes.set_title(f"What is learned and what is kept, {seeds} seeds: mean, least, most   ({machine})", loc="left")
    save(figure, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forgetting",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("forgetting-output"), help="folder for data and models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", choices=recipe_names(), default=recipe_names(), help="only these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures and commands there")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the table there")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    facts = describe(torch.get_num_threads())
    print(headline(facts), end="\n\n", flush=True)
    try:
        rows = [row for row in ROWS if row.recipe in options.recipes]
        found = measure(options.output.resolve(), options.seeds, rows)
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(format_table(found))
    if options.json:
        write_json(options.json, facts | {"seeds": options.seeds} | found)
    if options.picture:
        draw(options.picture, facts, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
