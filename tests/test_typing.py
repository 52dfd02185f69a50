"""What a user's type checker sees of the package."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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
reveal_type(hf_clip.encode_images(model, processor, ["cat.jpg"], batch_size=8))
reveal_type(hf_clip.encode_texts(model, processor, "a cat"))
reveal_type(hf_clip.VARIANTS["RN50"].sha256)
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
torch._tensor.Tensor
torch._tensor.Tensor
str
"""


def test_a_users_program_is_typed(tmp_path: Path):
    """Other libraries' types are left out, which would take mypy minutes; torch's are not."""
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM + 'wrong: int = HfClipModel.from_pretrained("org/clip-vit-b32")\n')
    settings = tmp_path / "mypy.ini"
    settings.write_text(
        "[mypy]\n"
        f"mypy_path = {ROOT}\n"
        f"cache_dir = {ROOT / '.mypy_cache'}\n"
        "[mypy-transformers.*,torch.*,huggingface_hub.*,numpy.*,PIL.*,tokenizers.*]\n"
        "follow_imports = skip\n"
        "ignore_missing_imports = True\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(settings), str(program)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert re.findall(r'Revealed type is "(.*)"', done.stdout) == REVEALED.split("\n")[1:-1], done.stdout
    assert "Found 1 error in 1 file" in done.stdout
    assert (
        'Incompatible types in assignment (expression has type "HfClipModel", variable has type "int")' in done.stdout
    )
