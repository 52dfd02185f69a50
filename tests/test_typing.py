"""What a user's type checker sees of the package."""

import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
from torch import Tensor

import hf_clip

OTHERS = (
    "PIL",
    "ftfy",
    "huggingface_hub",
    "numpy",
    "regex",
    "safetensors",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
)
ROOT = Path(__file__).resolve().parents[1]

PROGRAM = """
import hf_clip
from hf_clip import HfClipConfig, HfClipImageProcessor, HfClipModel, HfClipProcessor, HfClipTokenizer, HfClipViTModel
from hf_clip import ZeroShotClassifier

model = HfClipModel.from_pretrained("org/clip-vit-b32", device_map="auto")
reveal_type(model)
reveal_type(HfClipViTModel.from_pretrained("org/clip-vit-b32"))
processor = HfClipProcessor.from_pretrained("org/clip-vit-b32")
reveal_type(processor)
reveal_type(HfClipTokenizer.from_pretrained("org/clip-vit-b32"))
reveal_type(HfClipImageProcessor.from_pretrained("org/clip-vit-b32", fit="pad"))
reveal_type(HfClipConfig.from_variant("ViT-B/32"))
classifier = ZeroShotClassifier(model, processor, ["a cat", "a dog"], templates="imagenet_7")
reveal_type(classifier.labels)
reveal_type(ZeroShotClassifier.load("classifier.safetensors", model, processor))
reveal_type(hf_clip.VARIANTS["RN50"].sha256)
wrong: int = classifier.labels
"""

REVEALED = """
hf_clip.model.modeling_hf_clip.HfClipModel
hf_clip.model.vit_tower.HfClipViTModel
hf_clip.model.processing_hf_clip.HfClipProcessor
hf_clip.model.tokenization_hf_clip.HfClipTokenizer
hf_clip.model.image_processing_hf_clip.HfClipImageProcessor
hf_clip.model.configuration_hf_clip.HfClipConfig
list[str]
hf_clip.zero_shot.classifier.ZeroShotClassifier
str
"""


def test_a_users_program_is_typed(tmp_path: Path):
    """Other libraries are left out: to read torch's and transformers' types takes mypy long."""
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\n"
        f"mypy_path = {ROOT}\n"
        f"cache_dir = {tmp_path / 'cache'}\n"
        "[mypy-hf_clip.*]\n"
        "follow_imports = silent\n"
        f"[mypy-{','.join(f'{name}.*' for name in OTHERS)}]\n"
        "follow_imports = skip\n"
        "ignore_missing_imports = True\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "program.py"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert re.findall(r'Revealed type is "(.*)"', done.stdout) == REVEALED.split(), done.stdout
    assert re.findall(r"error: (.*)", done.stdout) == [
        'Incompatible types in assignment (expression has type "list[str]", variable has type "int")  [assignment]',
    ]


def test_encoding_is_typed_as_tensors():
    for function in (hf_clip.encode_images, hf_clip.encode_texts):
        assert get_type_hints(function)["return"] is Tensor
