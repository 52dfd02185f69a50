"""What makes a folder load without this package: the files that travel, and the entries that name their classes.

`trust_remote_code=True` then finds the classes in the folder or repository itself. Where hf_clip is imported its own
classes are taken, and nothing has to be trusted.

The Hub's loader copies flat files only and follows `from .file import name` alone, so the travelling files are the
`*_hf_clip.py` and `variants.py` beside this one, and import nothing else of the package.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

TRAVELLING = (
    "bpe_hf_clip",
    "configuration_hf_clip",
    "image_processing_hf_clip",
    "modeling_hf_clip",
    "pictures_hf_clip",
    "processing_hf_clip",
    "resizing_hf_clip",
    "resnet_hf_clip",
    "tokenization_hf_clip",
    "transformer_hf_clip",
    "variants",
)
"""The modules that a repository carries as remote code."""

MODEL_MAP = {
    "AutoConfig": "configuration_hf_clip.HfClipConfig",
    "AutoModel": "modeling_hf_clip.HfClipModel",
    "AutoModelForZeroShotImageClassification": "modeling_hf_clip.HfClipModel",
    "AutoModelForImageClassification": "modeling_hf_clip.HfClipForImageClassification",
}
PROCESSOR_MAP = {"AutoProcessor": "processing_hf_clip.HfClipProcessor"}
IMAGE_PROCESSOR_MAP = {"AutoImageProcessor": "image_processing_hf_clip.HfClipImageProcessor"}
TOKENIZER_MAP = {"AutoTokenizer": [None, "tokenization_hf_clip.HfClipTokenizer"]}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Replace a file by a whole one."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, path)


def add_remote_code(folder: str | Path) -> list[Path]:
    """Give a saved model and its processor the code that loads them; returns the files that were written.

    Raises FileNotFoundError or ValueError when the folder holds no model of this package's.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json; name a folder that save_pretrained or convert has written."
        )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "hf_clip":
        raise ValueError(
            f"{folder} holds a {config.get('model_type')!r} model; code is added to whole hf_clip models alone."
        )
    written = []
    for name in TRAVELLING:
        shutil.copyfile(Path(__file__).with_name(f"{name}.py"), folder / f"{name}.py")
        written.append(folder / f"{name}.py")
    _write_json(folder / "config.json", config | {"auto_map": MODEL_MAP})
    written.append(folder / "config.json")
    for name, own_map in [
        ("tokenizer_config.json", TOKENIZER_MAP),
        ("preprocessor_config.json", IMAGE_PROCESSOR_MAP),
        ("processor_config.json", PROCESSOR_MAP),
    ]:
        if not (path := folder / name).is_file():
            continue
        content = json.loads(path.read_text(encoding="utf-8")) | {"auto_map": own_map}
        if isinstance(nested := content.get("image_processor"), dict):
            content["image_processor"] = nested | {"auto_map": IMAGE_PROCESSOR_MAP}
        _write_json(path, content)
        written.append(path)
    return written
