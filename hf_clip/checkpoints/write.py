"""One model, written in the layout of one of the libraries around it.

| format       | what is written                                               | who loads it                     |
|--------------|---------------------------------------------------------------|----------------------------------|
| hf_clip      | config, model.safetensors, tokenizer, processor               | this package, all nine           |
| transformers | the same under stock names (ViTs)                             | CLIPModel, AutoModel, servers    |
| open_clip    | open_clip_config.json, open_clip_model.safetensors, tokenizer | open_clip                        |
| openai       | model.pt, a state dict with OpenAI's names                    | OpenAI's `build_model`           |
| diffusers    | text_encoder/ and tokenizer/                                  | diffusion pipelines              |
| comfyui      | clip_l.safetensors: text tower of ViT-L/14 or RN50x16         | ComfyUI                          |

Tensors are written as they are stored: every format holds the same bits.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPTextConfig

from ..model.configuration_hf_clip import OPENAI_VOCAB_SIZE, HfClipTextConfig
from ..model.processing_hf_clip import HfClipProcessor
from .keys import original_names
from .open_clip import CONFIG_FILE, open_clip_config
from .open_clip import WEIGHT_FILES as OPEN_CLIP_WEIGHT_FILES
from .read import PUBLISHED_KEY, StoredModel
from .safetensors_stream import write_safetensors
from .stock import TOWER_FIELDS, stock_special_ids, write_stock_files, write_tokenizer

AfterEach = Callable[[int], None]
Writer = Callable[[Path, StoredModel, AfterEach], None]

LAYER_NORM_EPS = 1e-5
CLIP_L = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": LAYER_NORM_EPS,
    "eos_token_id": 49407,
}
"""The text tower that goes by the name of clip_l."""


def _metadata(model: StoredModel) -> dict[str, str]:
    return {PUBLISHED_KEY: model.published} if model.published else {}


def write_hf_clip(folder: Path, model: StoredModel, after_each: AfterEach) -> None:
    write_safetensors(folder / "model.safetensors", model.tensors, after_each, _metadata(model))
    model.config.architectures = ["HfClipModel"]
    model.config.dtype = "float32"  # what to compute in; the file keeps what was stored
    model.config.save_pretrained(folder)
    HfClipProcessor(model.image_processor, model.tokenizer).save_pretrained(folder)


def write_transformers(folder: Path, model: StoredModel, after_each: AfterEach) -> None:
    write_stock_files(folder, model.config, model.tokenizer, model.image_processor)
    write_safetensors(folder / "model.safetensors", model.tensors, after_each, _metadata(model))


def check_pooling(config: HfClipTextConfig, program: str) -> None:
    """Refuse a text tower whose end of text isn't the last id, at which those programs take the feature."""
    if config.eos_token_id not in (None, config.vocab_size - 1):
        raise ValueError(
            f"{program} takes a text's feature at its largest id, but this model's end of text is "
            f"{config.eos_token_id} of {config.vocab_size} ids; its features would be wrong there."
        )


def write_open_clip(folder: Path, model: StoredModel, after_each: AfterEach) -> None:
    check_pooling(model.config.text_config, "open_clip")
    values = open_clip_config(model.config, model.image_processor)
    if model.config.text_config.vocab_size != OPENAI_VOCAB_SIZE:
        # Without a name open_clip takes OpenAI's vocabulary. For a folder it then reads the files beside; for a
        # repository on the Hub the name must be the repository's, which isn't known here.
        values["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "write-the-name-of-this-repository-here"
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    write_tokenizer(folder, model.tokenizer, "PreTrainedTokenizerFast")
    write_safetensors(folder / OPEN_CLIP_WEIGHT_FILES[0], original_names(model.tensors, model.config), after_each)


def write_openai(folder: Path, model: StoredModel, after_each: AfterEach) -> None:
    config = model.config
    check_pooling(config.text_config, "OpenAI's code")
    towers = [config.text_config, config.vision_config]
    activations = {tower.hidden_act for tower in towers if hasattr(tower, "hidden_act")}
    if activations != {"quick_gelu"} or config.contrastive_loss != "softmax":
        raise ValueError(
            f"OpenAI's code has QuickGELU and the softmax loss, but this model has "
            f"{', '.join(sorted(activations))} and the {config.contrastive_loss} loss; its features would be wrong "
            f"there."
        )
    for tower in towers:
        if getattr(tower, "layer_norm_eps", LAYER_NORM_EPS) != LAYER_NORM_EPS:
            raise ValueError(
                f"OpenAI's code has LayerNorms of eps {LAYER_NORM_EPS}, but {tower.model_type} has "
                f"{tower.layer_norm_eps}; its features would be wrong there."
            )
        if tower.hidden_size != 64 * tower.num_attention_heads:
            raise ValueError(
                f"OpenAI's code takes heads for 64 wide, but {tower.model_type} has {tower.num_attention_heads} heads "
                f"in {tower.hidden_size}; its features would be wrong there."
            )
    state = {}
    for name, tensor in original_names(model.tensors, config).items():
        state[name] = tensor.contiguous().clone()  # not the whole mapped file behind a view
        after_each(tensor.nbytes)
    torch.save(state, folder / "model.pt")


def _text_tower(model: StoredModel) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.tensors.items() if name.startswith("text_model.")}


def write_diffusers(folder: Path, model: StoredModel, after_each: AfterEach) -> None:
    (folder / "text_encoder").mkdir()
    (folder / "tokenizer").mkdir()
    values = model.config.text_config.to_dict()
    kept = {name: value for name, value in values.items() if name not in TOWER_FIELDS}
    config = CLIPTextConfig(**stock_special_ids(kept))
    config.architectures = ["CLIPTextModel"]
    config.dtype = "float32"
    config.save_pretrained(folder / "text_encoder")
    write_safetensors(folder / "text_encoder" / "model.safetensors", _text_tower(model), after_each)
    write_tokenizer(folder / "tokenizer", model.tokenizer, "CLIPTokenizer")


def check_clip_l(config: HfClipTextConfig) -> None:
    """Raises ValueError for a text tower that ComfyUI's `clip_l` is not."""
    other = {name: value for name, value in CLIP_L.items() if getattr(config, name) != value}
    if other:
        listed = ", ".join(f"{name} {getattr(config, name)} instead of {value}" for name, value in other.items())
        raise ValueError(
            f"ComfyUI's clip_l is the text tower of ViT-L/14 and RN50x16, but this model's has {listed}; use --format "
            f"diffusers."
        )


def write_comfyui(folder: Path, model: StoredModel, after_each: AfterEach) -> None:
    check_clip_l(model.config.text_config)
    tensors = _text_tower(model) | {"text_projection.weight": model.tensors["text_projection.weight"]}
    write_safetensors(folder / "clip_l.safetensors", tensors, after_each)


FORMATS: dict[str, Writer] = {
    "hf_clip": write_hf_clip,
    "transformers": write_transformers,
    "open_clip": write_open_clip,
    "openai": write_openai,
    "diffusers": write_diffusers,
    "comfyui": write_comfyui,
}


def write_model(
    folder: Path, model: StoredModel, format_name: str, after_each: AfterEach = lambda written: None
) -> None:
    """Fill an empty folder. Raises ValueError for a model that the format cannot express, before anything is large.

    after_each: called with the number of bytes of every tensor once it is written
    """
    if format_name not in FORMATS:
        raise ValueError(f"format is {format_name!r}, but must be one of {', '.join(FORMATS)}.")
    FORMATS[format_name](folder, model, after_each)


__all__ = ["FORMATS", "write_model"]
