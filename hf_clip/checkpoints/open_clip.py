"""Read and write open_clip's configuration, and read its repositories.

A repository in open_clip's layout has `open_clip_config.json`, and weights with OpenAI's tensor names. An example is
`timm/vit_base_patch32_clip_224.openai`. `from_pretrained` of our classes loads such a repository directly: it finds
`find_open_clip` in the list `FOREIGN_LAYOUTS`.

The configuration is needed, since no tensor shows the activation. QuickGELU in place of GELU raises no error and costs
a few points of accuracy. A field that is not known here and may change the architecture is an error.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from ..model.checked_files import find_file, one_line, read_object
from ..model.config_checks import MOST_WIDTH
from ..model.configuration_hf_clip import HfClipConfig, HfClipResNetConfig, HfClipTextConfig, HfClipViTConfig
from ..model.image_processing_hf_clip import HfClipImageProcessor
from ..model.image_steps import OPENAI_MEAN, OPENAI_STD
from ..model.stock_config import last_special_ids
from ..model.tokenization_hf_clip import HfClipTokenizer
from ..model.variants import OPENAI_VOCAB_SIZE
from .keys import HEAD_WIDTH
from .original import read_original
from .vocabulary import find_vocabulary

CONFIG_FILE = "open_clip_config.json"
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")

FITS = {"shortest": "crop", "squash": "squash"}
"""open_clip's `resize_mode` and our `fit`. Its "longest" has black margins, our "pad" those of `image_mean`."""

RESAMPLE = {"bicubic": 3, "bilinear": 2}

IGNORED = {
    "model_cfg": {"custom_text", "init_logit_scale", "nonscalar_logit_scale", "cast_dtype", "output_dict"},
    "vision_cfg": {
        *("patch_dropout", "output_tokens", "pos_embed_type", "attn_pooler_queries", "attn_pooler_heads"),
        *("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"),
    },
    "text_cfg": {
        *("hf_tokenizer_name", "pad_id", "eos_id", "output_tokens"),
        *("hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "hf_model_config"),
    },
}
"""Fields that say nothing about how a trained CLIP computes, or that matter for other architectures only."""

REQUIRED = {
    "vision_cfg": {"pool_type": "tok", "block_type": "default"},
    "text_cfg": {"pool_type": "argmax", "proj_type": "linear", "block_type": "default"},
}
"""Fields that must be left out, or have this value; all others that are not known must be false or empty."""

VISION_FIELDS = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "norm_kwargs"}
TEXT_FIELDS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "norm_kwargs"}
MODEL_FIELDS = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "init_logit_bias"}


def _number(name: str, values: dict[str, Any], field: str, default: float | None, kind: type = int) -> Any:
    """Read a number from a field. Raises ValueError unless it is of the given kind; an int must be positive."""
    value = values.get(field, default)
    kinds = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not abs(value) <= MOST_WIDTH:
        raise ValueError(f"its {name} has {field}={value!r:.80}, but a number is needed.")
    if kind is int and value < 1:
        raise ValueError(f"its {name} has {field}={value}, but a positive number is needed.")
    return value


def _check_fields(name: str, values: Any, known: set[str]) -> dict[str, Any]:
    """Return the fields. Raises ValueError for a field that asks for another architecture than CLIP."""
    if not isinstance(values, dict):
        raise ValueError(f"{name} is a {type(values).__name__}, but an object of fields is needed.")
    for field, value in values.items():
        if field in known or field in IGNORED[name] or value in (None, False, "", REQUIRED.get(name, {}).get(field)):
            continue
        raise ValueError(
            f"its {name} has {one_line(field, 80)}={value!r:.80}, which none of OpenAI's architectures "
            f"has; open_clip itself reads it."
        )
    if not isinstance(values.get("norm_kwargs", {}) or {}, dict) or (values.get("norm_kwargs") or {}).keys() - {"eps"}:
        raise ValueError(f"its {name} has norm_kwargs={values['norm_kwargs']!r:.80}, but only eps is known here.")
    return values


def _build_config(model: dict[str, Any]) -> HfClipConfig:
    model = _check_fields("model_cfg", model, MODEL_FIELDS)
    text = _check_fields("text_cfg", model["text_cfg"], TEXT_FIELDS)
    vision = _check_fields("vision_cfg", model["vision_cfg"], VISION_FIELDS)
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    width, vocab_size = _number("text_cfg", text, "width", 512), _number("text_cfg", text, "vocab_size", 49408)
    text_config = HfClipTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=int(width * _number("text_cfg", text, "mlp_ratio", 4.0, float)),
        num_hidden_layers=_number("text_cfg", text, "layers", 12),
        num_attention_heads=_number("text_cfg", text, "heads", 8),
        max_position_embeddings=_number("text_cfg", text, "context_length", 77),
        hidden_act=activation,
        layer_norm_eps=_number("text_cfg", text.get("norm_kwargs") or {}, "eps", 1e-5, float),
        **last_special_ids(vocab_size),
    )
    sizes, layers = vision.get("image_size", 224), vision.get("layers", 12)
    height, *more = sizes if isinstance(sizes, list) and sizes else [sizes]
    if any(side != height for side in more):
        raise ValueError(f"its image_size is {sizes!r:.80}, but OpenAI's architectures take square images.")
    image_size = _number("vision_cfg", {"image_size": height}, "image_size", None)
    head_width = _number("vision_cfg", vision, "head_width", HEAD_WIDTH)
    vision_config: HfClipViTConfig | HfClipResNetConfig
    if isinstance(layers, list):
        width = _number("vision_cfg", vision, "width", 64)
        vision_config = HfClipResNetConfig(
            depths=[_number("vision_cfg", {"layers": depth}, "layers", None) for depth in layers],
            stem_width=width,
            num_attention_heads=width * 32 // head_width,
            image_size=image_size,
        )
    else:
        width = _number("vision_cfg", vision, "width", 768)
        vision_config = HfClipViTConfig(
            hidden_size=width,
            intermediate_size=int(width * _number("vision_cfg", vision, "mlp_ratio", 4.0, float)),
            num_hidden_layers=_number("vision_cfg", vision, "layers", 12),
            num_attention_heads=width // head_width,
            image_size=image_size,
            patch_size=_number("vision_cfg", vision, "patch_size", 16),
            hidden_act=activation,
            layer_norm_eps=_number("vision_cfg", vision.get("norm_kwargs") or {}, "eps", 1e-5, float),
        )
    bias = None if model.get("init_logit_bias") is None else _number("model_cfg", model, "init_logit_bias", 0, float)
    return HfClipConfig(
        text_config=text_config,
        vision_config=vision_config,
        projection_dim=_number("model_cfg", {"embed_dim": model["embed_dim"]}, "embed_dim", None),
        contrastive_loss="softmax" if bias is None else "sigmoid",
        logit_bias_init_value=-10.0 if bias is None else bias,
    )


def config_from_open_clip(values: dict[str, Any]) -> HfClipConfig:
    """Build the configuration of a model from open_clip's.

    Args:
        values: The content of `open_clip_config.json`, or of one of open_clip's model configurations.

    Returns:
        The same model's configuration here.

    Raises:
        ValueError: The model has another architecture than OpenAI's: other towers, poolings or blocks.
    """
    model = values.get("model_cfg", values)
    try:
        config = _build_config(model)
    except KeyError as error:
        raise ValueError(f"it has no {error}, which an open_clip configuration of a CLIP has.") from None
    except StrictDataclassError as error:
        raise ValueError(f"it describes no model that can be built ({one_line(error)}).") from None
    config.dtype = "float32"  # what to compute in, whatever the file stores
    return config


def open_clip_config(config: HfClipConfig, image_processor: HfClipImageProcessor) -> dict[str, Any]:
    """Build the content of `open_clip_config.json`; the inverse of `config_from_open_clip`.

    Args:
        config: The model's configuration.
        image_processor: Its image processor.

    Returns:
        The fields of the file.

    Raises:
        ValueError: open_clip cannot express the model or its images.
    """
    text, vision = config.text_config, config.vision_config
    activations = {text.hidden_act} | ({vision.hidden_act} if isinstance(vision, HfClipViTConfig) else set())
    if activations not in ({"quick_gelu"}, {"gelu"}):
        raise ValueError(
            f"open_clip has quick_gelu or gelu, one for both towers, but this model has "
            f"{', '.join(sorted(activations))}."
        )
    vision_cfg: dict[str, Any] = {"image_size": vision.image_size}
    if isinstance(vision, HfClipResNetConfig):
        vision_cfg |= {"layers": list(vision.depths), "width": vision.stem_width, "patch_size": None}
    else:
        vision_cfg |= {
            "layers": vision.num_hidden_layers,
            "width": vision.hidden_size,
            "patch_size": vision.patch_size,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        }
        if vision.layer_norm_eps != 1e-5:
            vision_cfg["norm_kwargs"] = {"eps": vision.layer_norm_eps}
    head_width = vision.hidden_size // vision.num_attention_heads
    if head_width != HEAD_WIDTH:
        vision_cfg["head_width"] = head_width
    text_cfg = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        "mlp_ratio": text.intermediate_size / text.hidden_size,
    }
    if text.layer_norm_eps != 1e-5:
        text_cfg["norm_kwargs"] = {"eps": text.layer_norm_eps}
    model_cfg: dict[str, Any] = {"embed_dim": config.projection_dim, "vision_cfg": vision_cfg, "text_cfg": text_cfg}
    if "quick_gelu" in activations:
        model_cfg["quick_gelu"] = True
    if config.contrastive_loss == "sigmoid":
        model_cfg["init_logit_bias"] = config.logit_bias_init_value
    modes = {fit: mode for mode, fit in FITS.items()}
    interpolations = {number: name for name, number in RESAMPLE.items()}
    if image_processor.fit not in modes:
        raise ValueError(
            f"open_clip's margins are black and those of fit={image_processor.fit!r} have the colour of image_mean, so "
            f"that images would be others there; choose fit='crop' or 'squash'."
        )
    if image_processor.resample not in interpolations:
        raise ValueError(f"open_clip resizes by bicubic or bilinear; this processor has {image_processor.resample}.")
    preprocess_cfg = {
        "mean": list(image_processor.image_mean),
        "std": list(image_processor.image_std),
        "interpolation": interpolations[image_processor.resample],
        "resize_mode": modes[image_processor.fit],
    }
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}


def read_open_clip_config(path: str | Path) -> dict[str, Any]:
    """Read a configuration file of open_clip's. Raises ValueError for another file."""
    values = read_object(path)
    check_open_clip_config(path, values)
    return values


def check_open_clip_config(path: str | Path, values: dict[str, Any]) -> None:
    """Raise ValueError unless `values`, the content of the file `path`, are a configuration of open_clip's."""
    model = values.get("model_cfg", values)
    if not isinstance(model, dict) or "vision_cfg" not in model:
        raise ValueError(f"{path} is no configuration of open_clip's: it has neither model_cfg nor vision_cfg.")


@dataclass
class OpenClipRepository:
    """A folder or a repository on the Hub in open_clip's layout.

    Attributes:
        source: The folder, or the repository's name.
        hub: The Hub's arguments of `from_pretrained`.
        values: The content of `open_clip_config.json`.
        config: The configuration that it describes.
    """

    source: Any
    hub: dict[str, Any]
    values: dict[str, Any]
    config: HfClipConfig

    def _file(self, name: str) -> Path | None:
        return find_file(self.source, name, self.hub)

    def weights_file(self) -> Path:
        """Find the file of weights. Raises FileNotFoundError if there is none."""
        for name in WEIGHT_FILES:
            if (path := self._file(name)) is not None:
                return path
        raise FileNotFoundError(f"{self.source} has {CONFIG_FILE}, but none of its weights: {', '.join(WEIGHT_FILES)}.")

    def tensors(self) -> dict[str, Tensor]:
        """Read the weights under our names, as views of the mapped file in its dtypes."""
        _, _, tensors = read_original(self.weights_file(), verify=False, config=self.config)
        return tensors

    def image_processor_values(self) -> dict[str, Any]:
        """Return the fields of an HfClipImageProcessor that prepares images as `preprocess_cfg` says."""
        images = self.values.get("preprocess_cfg") or {}
        if not isinstance(images, dict):
            raise ValueError(f"The {CONFIG_FILE} of {self.source} has a preprocess_cfg that is no object of fields.")
        interpolation, mode = images.get("interpolation", "bicubic"), images.get("resize_mode", "shortest")
        if interpolation == "random":  # a choice for training
            interpolation = "bicubic"
        if interpolation not in list(RESAMPLE) or mode not in list(FITS):
            raise ValueError(
                f"The {CONFIG_FILE} of {self.source} asks for interpolation {interpolation!r:.80} and resize_mode "
                f"{mode!r:.80}; known are {', '.join(RESAMPLE)}, and {', '.join(FITS)}."
            )
        size = self.config.vision_config.image_size
        processor = HfClipImageProcessor.for_image_size(
            size,
            image_mean=images.get("mean") or OPENAI_MEAN,
            image_std=images.get("std") or OPENAI_STD,
            resample=RESAMPLE[interpolation],
            fit=FITS[mode],
        )
        return processor.to_dict()

    def tokenizer(self) -> HfClipTokenizer:
        """Load the repository's tokenizer. Without one, open_clip uses OpenAI's, so that is loaded."""
        text = self.config.text_config
        if self._file("tokenizer.json") is not None:
            return HfClipTokenizer.from_pretrained(
                self.source, model_max_length=text.max_position_embeddings, **self.hub
            )
        merges = self._file("merges.txt")
        return HfClipTokenizer.from_vocabulary_file(
            merges or find_vocabulary(offline=bool(self.hub.get("local_files_only"))),
            vocab_size=min(text.vocab_size, OPENAI_VOCAB_SIZE),  # a larger table has rows that no token has
            model_max_length=text.max_position_embeddings,
        )


def find_open_clip(
    source: Any, hub: dict[str, Any], described: dict[str, dict[str, Any]] | None = None
) -> OpenClipRepository | None:
    """Find `open_clip_config.json` in a folder or repository, and read it.

    Args:
        source: A folder, or the name of a repository on the Hub.
        hub: The Hub's arguments of `from_pretrained`.
        described: The content of a folder's JSON files that were read before, by their names.

    Returns:
        The repository, or None if it is in another layout.

    Raises:
        ValueError: The file is damaged, or describes an architecture that is none of OpenAI's.
    """
    values = (described or {}).get(CONFIG_FILE)
    try:
        if values is None:
            path = find_file(source, CONFIG_FILE, hub)
            if path is None:
                return None
            values = read_object(path)
        check_open_clip_config(CONFIG_FILE, values)
        return OpenClipRepository(source, hub, values, config_from_open_clip(values))
    except ValueError as error:
        raise ValueError(f"The {CONFIG_FILE} of {source} cannot be read as a CLIP of OpenAI's: {error}") from None


__all__ = ["OpenClipRepository", "config_from_open_clip", "find_open_clip", "open_clip_config", "read_open_clip_config"]
