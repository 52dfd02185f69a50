"""Add the code to a folder by which it can be loaded without this package.

The files of the model are copied into the folder, and its JSON files get entries that name the classes. With
`trust_remote_code=True` transformers then finds the classes in the folder or repository itself. If hf_clip is imported,
its classes are used and no code has to be trusted.

All files of `hf_clip/model/` are copied, and no others. The Hub's loader copies only flat files that are imported as
`from .file import name`.
"""

import shutil
from pathlib import Path
from typing import Any

from ..model.checked_files import read_object
from .whole_file import write_json

MODEL_FOLDER = Path(__file__).parents[1] / "model"

TRAVELLING = tuple(sorted(path.stem for path in MODEL_FOLDER.glob("*.py") if path.stem != "__init__"))
"""Names of the modules that a repository contains as remote code."""

MODEL_MAPS = {
    "hf_clip": {
        "AutoConfig": "configuration_hf_clip.HfClipConfig",
        "AutoModel": "modeling_hf_clip.HfClipModel",
        "AutoModelForZeroShotImageClassification": "modeling_hf_clip.HfClipModel",
        "AutoModelForImageClassification": "modeling_hf_clip.HfClipForImageClassification",
    },
    "hf_clip_text": {
        "AutoConfig": "configuration_hf_clip.HfClipTextConfig",
        "AutoModel": "modeling_hf_clip.HfClipTextModel",
    },
    "hf_clip_vit": {
        "AutoConfig": "configuration_hf_clip.HfClipViTConfig",
        "AutoModel": "modeling_hf_clip.HfClipViTModel",
    },
    "hf_clip_resnet": {
        "AutoConfig": "configuration_hf_clip.HfClipResNetConfig",
        "AutoModel": "modeling_hf_clip.HfClipResNetModel",
    },
}
"""For each `model_type` the `auto_map` of its config.json."""

PROCESSOR_MAP = {"AutoProcessor": "processing_hf_clip.HfClipProcessor"}
IMAGE_PROCESSOR_MAP = {"AutoImageProcessor": "image_processing_hf_clip.HfClipImageProcessor"}
TOKENIZER_MAP = {"AutoTokenizer": [None, "tokenization_hf_clip.HfClipTokenizer"]}


def described_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Read the JSON files of a folder that name classes. Raises ValueError for a damaged file.

    Returns:
        The content of each file that exists, by its name.
    """
    described = {}
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file():
            described[name] = read_object(folder / name)
    return described


def add_remote_code(folder: str | Path) -> list[Path]:
    """Add the code that loads a saved model, its processor, or both to their folder.

    Args:
        folder: A folder that `save_pretrained` or the converter wrote.

    Returns:
        The files that were written.

    Raises:
        FileNotFoundError: The folder has no JSON file that describes a model or processor.
        ValueError: The folder holds a model of another library, or a damaged file.
    """
    folder = Path(folder)
    described = described_in(folder)
    if not described:
        raise FileNotFoundError(
            f"{folder} has no config.json; name a folder that save_pretrained or convert has written."
        )
    kind = described.get("config.json", {"model_type": "hf_clip"}).get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_MAPS:
        raise ValueError(f"{folder} holds a {kind!r:.80} model; code is added to models of hf_clip alone.")
    written = []
    for name in TRAVELLING:
        shutil.copyfile(MODEL_FOLDER / f"{name}.py", folder / f"{name}.py")
        written.append(folder / f"{name}.py")
    maps = {
        "config.json": MODEL_MAPS[kind],
        "tokenizer_config.json": TOKENIZER_MAP,
        "preprocessor_config.json": IMAGE_PROCESSOR_MAP,
        "processor_config.json": PROCESSOR_MAP,
    }
    for name, content in described.items():
        content |= {"auto_map": maps[name]}
        if isinstance(nested := content.get("image_processor"), dict):
            content["image_processor"] = nested | {"auto_map": IMAGE_PROCESSOR_MAP}
        write_json(folder / name, content)
        written.append(folder / name)
    return written
