"""Write the layout of transformers' own CLIP, which `CLIPModel` loads without this package.

Servers that run no code of a repository need it. The tensor names are the same as ours, so only the JSON files differ.
Stock CLIP has no ResNet, no sigmoid loss and no margins around images. Models with one of these are refused.
"""

import json
from pathlib import Path
from typing import Any

from transformers import CLIPConfig

from ..model.checked_files import read_object
from ..model.configuration_hf_clip import HfClipConfig, HfClipResNetConfig
from ..model.image_processing_hf_clip import HfClipImageProcessor
from ..model.stock_config import LEGACY_END_OF_TEXT_ID
from ..model.tokenization_hf_clip import HfClipTokenizer
from .whole_file import write_json

OWN_FIELDS = {
    "model_type",
    "contrastive_loss",
    "logit_bias_init_value",
    "return_tensors_from_features",
    "architectures",
    "transformers_version",
    "dtype",
}
TOWER_FIELDS = {"model_type", "transformers_version", "architectures", "dtype"}


def why_not_stock(config: HfClipConfig) -> str | None:
    """Say why stock CLIP cannot express a model. None if it can."""
    if isinstance(config.vision_config, HfClipResNetConfig):
        return "its image tower is a ResNet, and transformers' CLIPModel has ViTs only"
    if config.contrastive_loss != "softmax":
        return "it was trained with the sigmoid loss, and transformers' CLIPModel has no logit bias"
    return None


def stock_special_ids(text: dict[str, Any]) -> dict[str, Any]:
    """Return a text configuration's fields with the end of text that makes stock CLIP use the highest id of a text."""
    return text | {"eos_token_id": LEGACY_END_OF_TEXT_ID} if text["eos_token_id"] is None else text


def stock_config(config: HfClipConfig) -> CLIPConfig:
    """Build the stock configuration of a model. Raises ValueError for a model that stock CLIP cannot express."""
    if reason := why_not_stock(config):
        raise ValueError(f"This model cannot be written for transformers' own CLIP: {reason}. Leave out --format.")
    values = config.to_dict()
    towers = {
        name: {field: value for field, value in values.pop(name).items() if field not in TOWER_FIELDS}
        for name in ("text_config", "vision_config")
    }
    towers["text_config"] = stock_special_ids(towers["text_config"])
    own = OWN_FIELDS | {"auto_map"} | ({"matryoshka_dims"} if config.matryoshka_dims is None else set())
    kept = {name: value for name, value in values.items() if name not in own}
    return CLIPConfig(**kept, **towers, architectures=["CLIPModel"], dtype="float32")


def stock_image_processor(processor: HfClipImageProcessor) -> dict[str, Any]:
    """Build the content of a stock `preprocessor_config.json`. Raises ValueError for `fit="pad"`."""
    if processor.fit == "pad":
        raise ValueError('fit="pad" cannot be said to transformers\' CLIPImageProcessor, which crops; choose another.')
    values = {k: v for k, v in processor.to_dict().items() if k not in ("fit", "auto_map", "image_processor_type")}
    if processor.fit == "squash":
        values |= {"size": dict(values["crop_size"]), "do_center_crop": False}
    return {"image_processor_type": "CLIPImageProcessor"} | values


def write_tokenizer(folder: Path, tokenizer: HfClipTokenizer, tokenizer_class: str) -> None:
    """Write tokenizer.json, and vocab.json and merges.txt for programs that read these.

    Args:
        folder: The folder to write to.
        tokenizer: The tokenizer.
        tokenizer_class: The class that transformers loads. "PreTrainedTokenizerFast" uses all of tokenizer.json.
            "CLIPTokenizer" uses the vocabulary and the merges only, so its ids of typographic quotes and ligatures
            differ from OpenAI's.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = read_object(path) | {"tokenizer_class": tokenizer_class}
    for of_ours in ("auto_map", "processor_class"):
        values.pop(of_ours, None)
    write_json(path, values)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")


def write_stock_files(
    folder: Path, config: HfClipConfig, tokenizer: HfClipTokenizer, image_processor: HfClipImageProcessor
) -> None:
    """Write all files of a stock repository except the weights, whose tensor names stay the same."""
    stock = stock_config(config)
    images = stock_image_processor(image_processor)
    stock.save_pretrained(folder)
    write_tokenizer(folder, tokenizer, "PreTrainedTokenizerFast")
    write_json(folder / "preprocessor_config.json", images, sort_keys=True)


__all__ = [
    "stock_config",
    "stock_image_processor",
    "stock_special_ids",
    "why_not_stock",
    "write_stock_files",
    "write_tokenizer",
]
