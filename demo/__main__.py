"""Train a small CLIP from scratch on captioned digits and look at what it can do.

    make demo                    (ViT tower)
    make demo TOWER=resnet

Steps: make the data set, write a fresh model, `accelerate launch finetune.py`, load the result with
`pipeline`, measure top-1 on held-out images and on colour combinations that were never trained, draw a picture.
"""

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import transformers

import hf_clip  # noqa: F401  (registers the classes)

from .digits import make_dataset
from .model import TOWERS, write_fresh_model
from .report import CAPTIONS, report

TRAINING = {
    "vit": {"max_steps": 800, "learning_rate": 2e-3},
    "resnet": {"max_steps": 1000, "learning_rate": 1e-3},
}
TRAIN_SIZE = {"vit": 60_000, "resnet": 60_000}


def launch_training(fresh: Path, data: Path, trained: Path, tower: str) -> None:
    """The command that a user would type, in a process of its own."""
    flags = {"variant": fresh, "dataset": data, "output_dir": trained, "weight_decay": 0.1, "augmentation": "none"}
    # Its figures are of batches in which a caption that comes twice is a negative of itself.
    flags |= {"validation": "held_out_images", "mask_duplicates": "off", **TRAINING[tower]}
    program = Path(__file__).resolve().parent.parent / "finetune.py"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--num_cpu_threads_per_process", str(min(os.cpu_count() or 1, 8))]
    command = [*launcher, str(program), *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
    print("$ accelerate launch finetune.py", *command[command.index(str(program)) + 1 :], flush=True)
    subprocess.run(command, check=True)


def run(tower: str, output: Path, seed: int) -> dict[str, float]:
    """The whole demo. Everything is written below `output`; an earlier run's results there are replaced."""
    started = time.perf_counter()
    fresh, data, trained = (output / name for name in ("fresh-model", "data", f"clip-digits-{tower}"))
    for folder in (fresh, data, trained):
        shutil.rmtree(folder, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)

    print("Drawing digits ...", flush=True)
    pairs = make_dataset(TOWERS[tower].image_size, TRAIN_SIZE[tower], seed)
    pairs.save_to_disk(data)
    for row in pairs["train"].select(range(3)):
        print(f"  {row['caption']!r}")
    write_fresh_model(fresh, tower, pairs["train"]["caption"][:], seed)
    launch_training(fresh, data, trained, tower)

    print("Classifying with the zero-shot pipeline ...", flush=True)
    picture = output / f"demo-{tower}.png"
    splits = {name: pairs[name] for name in ("held_out_images", "unseen_combinations")}
    scores = report(trained, splits, picture)
    (output / f"demo-{tower}.json").write_text(json.dumps(scores, indent=2) + "\n")

    print(f"\n{'top-1 among ' + str(len(CAPTIONS)) + ' captions':34}{'measured':>10}{'chance':>10}")
    for name, score in scores.items():
        print(f"{name.replace('_', ' '):34}{score:>10.1%}{1 / len(CAPTIONS):>10.1%}")
    print(f"\nmodel    {trained}\npicture  {picture}\n{time.perf_counter() - started:.0f} s")
    return scores


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__.splitlines()[0])
    parser.add_argument("--tower", choices=sorted(TOWERS), default="vit")
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    try:
        run(options.tower, options.output, options.seed)
    except subprocess.CalledProcessError as error:
        print(f"error: training ended with status {error.returncode}; its message stands above.", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"error: the demo writes into {options.output}, but {error}; name another with --output.", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
