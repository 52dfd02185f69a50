"""Do hard negatives teach a model to tell captions apart that are nearly the same?

    python -m benchmarks.hard_negatives

A small ViT is trained from scratch on the demo's digits, inked in one of four colours on paper of another. From there
it goes on for some steps: without negatives; with captions whose two colours are swapped (as in ARO); with captions
of the same colours and another digit, drawn at random; and with those that `hf-clip mine-negatives` finds. What is
measured is on held-out images: how often the right caption is more similar than the one with swapped colours, than
all nine with another digit, and retrieval of images and captions.

Every step is a command of `hf-clip`, as a user would type it, and is printed.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from datasets import Dataset

from demo.digits import COMBINATIONS, PHRASES, Combination, load_split_digits, make_split
from hf_clip.commands.program import main as hf_clip

IMAGE_SIZE, TRAIN_SIZE, TEST_SIZE = 16, 4000, 720
SHOWN = [one for one in COMBINATIONS if {one.ink, one.paper} <= {"red", "green", "blue", "yellow"}]
TEXT: dict[str, Any] = {"vocab_size": 600, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 24, "hidden_act": "gelu"}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # the learned vocabulary's take their place
VISION: dict[str, Any] = {"model_type": "hf_clip_vit", "patch_size": 4, "hidden_size": 64, "intermediate_size": 256}
VISION |= {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu", "image_size": IMAGE_SIZE}
VARIANT = {"model_type": "hf_clip", "projection_dim": 32, "text_config": TEXT, "vision_config": VISION}

SHARED = "--per_device_train_batch_size 64 --augmentation none --dataloader_num_workers 0 --weight_decay 0.1"
PRETRAINING = f"--learning_rate 3e-3 --max_steps 400 {SHARED}"
FINETUNING = f"--learning_rate 3e-3 --max_steps 200 {SHARED}"
MINING = "--negatives 2 --max_share 2"
RECIPES = ("pretrained", "no negatives", "swapped colours", "another digit", "mined")
MEASURES = ("swapped colours", "another digit", "recall@1")


def run(*words: object) -> None:
    """One command. Raises SystemExit where it ends with an error."""
    command = [str(word) for word in words]
    print(f"$ hf-clip {' '.join(command)}", flush=True)
    if status := hf_clip(command):
        raise SystemExit(status)


def with_wrong_captions(pairs: Dataset, most: int, seed: int) -> Dataset:
    """The pairs with a caption of swapped colours, and with so many of other digits.

    All captions have the words of one phrase, so what is not equal is wrong.
    """
    draw = random.Random(seed)
    shown = [COMBINATIONS[target] for target in pairs["target"]]
    colours = [Combination(one.digit, one.paper, one.ink).caption() for one in shown]
    others = [[Combination(digit, one.ink, one.paper) for digit in range(10) if digit != one.digit] for one in shown]
    digits = [[other.caption() for other in draw.sample(of_one, most)] for of_one in others]
    return pairs.add_column("swapped_colours", colours).add_column("another_digit", digits)


def measure(model: Path, test: Path, output: Path) -> dict[str, float]:
    """The figures of a model, by `MEASURES`."""
    found = {}
    for name in MEASURES[:2]:
        column = name.replace(" ", "_")
        run(
            "evaluate",
            "compose",
            "--model",
            model,
            "--dataset",
            test,
            "--wrong-column",
            column,
            "--output",
            output / column,
        )
        (record,) = json.loads((output / column / "results.json").read_text())
        found[name] = record["metrics"]["text_score"]
    run(
        "evaluate",
        "retrieval",
        "--model",
        model,
        "--dataset",
        test,
        "--caption-column",
        "caption",
        "--output",
        output / "r",
    )
    (record,) = json.loads((output / "r" / "results.json").read_text())
    return found | {"recall@1": record["metrics"]["mean_recall@1"]}


def run_seed(seed: int, folder: Path) -> dict[str, dict[str, float]]:
    """Train and measure all recipes. Returns figures by recipe and measure."""
    train, test = folder / "train", folder / "test"
    for place, digits, size, most in zip(
        (train, test), load_split_digits(seed), (TRAIN_SIZE, TEST_SIZE), (2, 9), strict=True
    ):
        pairs = make_split(digits, SHOWN, size, IMAGE_SIZE, seed, PHRASES[:1])
        with_wrong_captions(pairs, most, seed).save_to_disk(place)
    (folder / "variant.json").write_text(json.dumps(VARIANT))
    models = {name: folder / name.replace(" ", "-") for name in RECIPES}
    columns = ("--caption_column", "caption", "--seed", seed)
    start = ("finetune", "--variant", folder / "variant.json", "--dataset", train, "--output_dir", models["pretrained"])
    run(*start, *PRETRAINING.split(), *columns)
    mined = folder / "mined.parquet"
    run(
        "mine-negatives",
        "--model",
        models["pretrained"],
        "--dataset",
        train,
        "--output",
        mined,
        "--caption_column",
        "caption",
        *MINING.split(),
    )
    more: dict[str, tuple[object, ...]] = {
        "no negatives": (train,),
        "mined": (mined, "--negative_caption_column", "negative_caption"),
    }
    for name in ("swapped colours", "another digit"):
        more[name] = (train, "--negative_caption_column", name.replace(" ", "_"))
    for name, given in more.items():
        base = ("finetune", "--model", models["pretrained"], "--output_dir", models[name], "--dataset", *given)
        run(*base, *FINETUNING.split(), *columns)
    return {name: measure(model, test, folder / f"results-{model.name}") for name, model in models.items()}


def table(found: Sequence[dict[str, dict[str, float]]]) -> str:
    """Means over the seeds in percent, and the lowest and the highest."""
    lines = [f"| from the pretrained | {' | '.join(MEASURES)} |", "|---|" + "---|" * len(MEASURES)]
    for name in RECIPES:
        cells = []
        for measured in MEASURES:
            values = [100 * figures[name][measured] for figures in found]
            cells.append(f"{mean(values):.0f} ({min(values):.0f}-{max(values):.0f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hard_negatives", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="how many times all is done (default 3)")
    options = parser.parse_args(arguments)
    started, found = time.perf_counter(), []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            found.append(run_seed(seed, Path(folder)))
    print(f"\n{table(found)}\n\n{options.seeds} seeds, {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
