"""Small models that are trained for a measurement: captions and images go in, a folder with a model comes out."""

import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from datasets import Dataset, DatasetDict, Features, Image, Value

from demo.digits import encode_png
from demo.model import TOWERS, write_fresh_model
from hf_clip import HfClipViTConfig

IMAGE_SIZE = 24
TRAINING = {"learning_rate": 2e-3, "weight_decay": 0.1, "augmentation": "none", "mask_duplicates": "on"}


def pairs_of(images: Iterable, captions: Sequence[str]) -> Dataset:
    """A data set of images (arrays) and captions."""
    rows = {"image": [{"bytes": encode_png(image), "path": None} for image in images], "caption": list(captions)}
    return Dataset.from_dict(rows, features=Features({"image": Image(), "caption": Value("string")}))


def train_model(folder: Path, images: Iterable, captions: Sequence[str], steps: int) -> Path:
    """Train the demo's ViT on pairs with the package's own trainer, once: what is there is taken.

    Args:
        folder: Where everything is written.
        images: (N, 24, 24, 3) uint8.
        captions: N texts.
        steps: Batches of 256 pairs.

    Returns:
        The model's folder.
    """
    trained = folder / "model"
    if (trained / "model.safetensors").is_file():
        return trained
    data, fresh = folder / "data", folder / "fresh-model"
    DatasetDict(train=pairs_of(images, captions)).save_to_disk(data)
    TOWERS["larger"] = HfClipViTConfig(**{**TOWERS["vit"].to_dict(), "image_size": IMAGE_SIZE, "patch_size": 6})
    write_fresh_model(fresh, "larger", captions, seed=0)
    flags = {"model": fresh, "dataset": data, "output_dir": trained, "max_steps": steps, **TRAINING}
    program = Path(__file__).resolve().parents[2] / "finetune.py"
    command = [
        sys.executable,
        str(program),
        *(str(word) for name, value in flags.items() for word in (f"--{name}", value)),
    ]
    subprocess.run(command, check=True)
    return trained
