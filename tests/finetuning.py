"""Runs of finetune.py on a few hundred digits, with models small enough to be trained within a test."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from safetensors.torch import load_file
from torch import Tensor

from demo.digits import COMBINATIONS, DIGITS, PHRASES, make_dataset
from hf_clip.training import run_steps
from hf_clip.training.config import TrainingConfig
from hf_clip.training.scratch import build_from_scratch

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"vit": 16, "resnet": 32}
VISION = {
    "vit": {"model_type": "hf_clip_vit", "patch_size": 4, "hidden_size": 64, "intermediate_size": 256}
    | {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu"},
    "resnet": {"model_type": "hf_clip_resnet", "stem_width": 8, "depths": [1, 1, 1, 1], "num_attention_heads": 4},
}
TEXT = {"vocab_size": 600, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 2, "max_position_embeddings": 24, "hidden_act": "gelu"}
TEXT |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # the learned vocabulary's take their place
LABELLED_CAPTION = "the digit {label}"


def write_digits(folder: Path) -> None:
    """Below `folder`: `pairs`, `several` captions to an image, `labelled`, configurations and models of both kinds."""
    pairs = make_dataset(16, 640)
    pairs.save_to_disk(folder / "pairs")
    _several(pairs["train"]).save_to_disk(folder / "several")
    _labelled(pairs["train"]).save_to_disk(folder / "labelled")
    for tower, vision in VISION.items():
        values = {"model_type": "hf_clip", "projection_dim": 32, "text_config": TEXT}
        values["vision_config"] = vision | {"image_size": SIZES[tower]}
        (folder / f"{tower}.json").write_text(json.dumps(values))
        model, processor = build_from_scratch(folder / f"{tower}.json", captions=pairs["train"]["caption"][:])
        model.save_pretrained(folder / tower)
        processor.save_pretrained(folder / tower)
    shutil.copytree(folder / "vit", folder / "damaged")
    stored = (folder / "vit" / "model.safetensors").read_bytes()
    (folder / "damaged" / "model.safetensors").write_bytes(stored[: len(stored) // 2])
    (folder / "cut.json").write_text((folder / "vit.json").read_text()[:50])


def _stored(pairs: Dataset) -> Any:
    return pairs.cast_column("image", Image(decode=False))


def _several(pairs: Dataset) -> DatasetDict:
    """128 images with five captions each; two of them cannot be opened."""
    rows = [
        {"image": row["image"], "captions": [COMBINATIONS[row["target"]].caption(phrase) for phrase in PHRASES]}
        for row in _stored(pairs.select(range(128)))
    ]
    for place in (30, 70):
        rows[place]["image"] = {"bytes": b"no image", "path": None}
    features = Features({"image": Image(), "captions": List(Value("string"))})
    return DatasetDict(train=Dataset.from_list(rows, features=features))


def _labelled(pairs: Dataset) -> DatasetDict:
    rows = [{"image": r["image"], "label": COMBINATIONS[r["target"]].digit} for r in _stored(pairs.select(range(300)))]
    features = Features({"image": Image(), "label": ClassLabel(names=DIGITS)})
    return DatasetDict(train=Dataset.from_list(rows, features=features))


def options(digits: Path, output: Path, tower: str = "vit", **fields: Any) -> dict[str, Any]:
    """Flags of a run; what is None is left out."""
    chosen: dict[str, Any] = {"model": str(digits / tower), "dataset": [str(digits / "pairs")]}
    chosen |= {
        "output_dir": str(output),
        "learning_rate": "2e-3",
        "per_device_train_batch_size": 64,
        "max_steps": 6,
        "dataloader_num_workers": 0,
    }
    return {name: value for name, value in (chosen | fields).items() if value is not None}


@contextmanager
def as_in_a_new_process() -> Iterator[None]:
    """Within this block accelerate knows of no earlier run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def train(digits: Path, output: Path, tower: str = "vit", **fields: Any) -> Path:
    """Train in this process; returns the folder of the result."""
    with as_in_a_new_process():
        run_steps.train(TrainingConfig(**options(digits, output, tower, **fields)))
    return output


def words(flags: dict[str, Any]) -> list[str]:
    """Flags as a command line has them."""
    found = []
    for name, value in flags.items():
        if value is not False:
            given = value if isinstance(value, list) else [] if value is True else [value]
            found += [f"--{name}", *map(str, given)]
    return found


def launch(
    flags: dict[str, Any],
    *launcher: str,
    file: Path | None = None,
    processes: int = 1,
    timeout: float = 600,
    program: Path = ROOT / "finetune.py",
    **environment: str,
) -> subprocess.CompletedProcess:
    """`accelerate launch finetune.py`, on CPUs; without launcher's options in as many `processes`.

    `--cpu --num_processes 2` would run one process; `--multi_gpu` runs two, which find no GPU and talk through gloo.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    # Threads that wait for work in a loop would take the cores from the other process.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    if processes > 1 and not launcher:
        command.append("--multi_gpu")
    command += [*launcher, str(program), *([str(file)] if file else []), *words(flags)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": str(2 // processes), "ACCELERATE_USE_CPU": "true"} | environment,
    )


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


def records(folder: Path, key: str = "loss") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have `key`: "loss" those of training, "recall@1" those of evaluation."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if key in record]
