"""Configurations of the CLIP models. Plain data, validated when built; imports no torch.

Field names and meanings are those of transformers' `CLIPConfig` family, so a stock CLIP configuration read
here describes the same model. One composite `HfClipConfig` holds a text tower and either of two image
towers: the dictionary's `model_type`, or for lack of one the presence of `depths`, says which.
"""

import copy
import math
import os
from collections.abc import Callable
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from .checked_files import check_names, check_no_methods, one_line, read_object, writing_of
from .variants import get_variant

LEGACY_END_OF_TEXT_ID = 2
"""Stock CLIP repositories from before transformers 4.31 say `eos_token_id: 2`, which is no token of theirs.

Stock CLIP then takes the feature at the highest id of each text, as OpenAI's code does.
"""

OPENAI_VOCAB_SIZE = 49408
"""The published vocabulary file lists more merges than there are ids for; the rest is ignored."""

CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")

STOCK_TYPES = {"clip": "hf_clip", "clip_text_model": "hf_clip_text", "clip_vision_model": "hf_clip_vit"}
"""Stock CLIP's model types and those that read them."""

STOCK_TEXT = "clip_text_model"

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

STOCK_TOWERS = {"text_config": "hf_clip_text", "vision_config": "hf_clip_vit"}
"""What stands under these names in the configuration of a whole stock CLIP."""

MOST_LAYERS = 1000
MOST_BLOCKS = 200
MOST_WIDTH = 1 << 20
MOST_IDS = 1 << 24
MOST_PIXELS = 1 << 14
MOST_CHANNELS = 1 << 10
"""Far beyond any model. Larger ones are damage, or made to fill the memory and the time of whoever builds them."""

BOOKKEEPING = ("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version")
"""What says nothing of how a model computes."""

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")

FOREIGN_LAYOUTS: list[Callable[..., Any]] = []
"""Readers of other libraries' repositories, which the package adds; remote code has none.

Each takes (folder or repository, arguments of the Hub) and returns None, or an object with `config`, `tensors()`,
`image_processor_values()` and `tokenizer()`.
"""

BEFORE_UPLOAD: list[Callable[[str, str], None]] = []
"""What the package does with a folder that is about to be pushed; called with the folder and the repository."""


class HubUpload:
    """For all that can be pushed: what goes to the Hub can be loaded there by people without this package."""

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        for prepare in BEFORE_UPLOAD:
            prepare(working_dir, repo_id)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)  # type: ignore[misc]


def read_config_object(path: Any) -> dict[str, Any]:
    """The fields of a config.json. Raises ValueError for a damaged one, or one that names files elsewhere."""
    values = read_object(path)
    check_names(path, values, ("configuration_files", "transformers_weights"))
    return values


def refuse_checkpoint_file(source: Any) -> None:
    """Raise ValueError for a file of weights, which `from_pretrained` takes from its repository only."""
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""
    is_repository = os.path.isdir(name) or (name.count("/") == 1 and not name.startswith((".", "/", "~")))
    if not name.endswith(CHECKPOINT_SUFFIXES) or (is_repository and not os.path.isfile(name)):
        return
    folder = os.path.dirname(name) or "."
    if os.path.isfile(name) and os.path.isfile(os.path.join(folder, "config.json")):
        raise ValueError(
            f"{name} is a file, but from_pretrained takes the folder that describes it too: pass {folder}."
        )
    raise ValueError(
        f"{name} is a checkpoint file, but from_pretrained takes a folder or a repository. Convert it once, by "
        f"`python -m conversion.convert {name} FOLDER`, and pass that folder."
    )


def find_foreign(source: Any, arguments: dict[str, Any]) -> Any:
    """The reader of a repository in another library's layout, or None for one that describes itself to transformers.

    arguments: those of `from_pretrained`, of which the Hub's are used

    Raises ValueError for a file of weights.
    """
    refuse_checkpoint_file(source)
    if source is None or os.path.isfile(source):
        return None
    hub = {name: arguments[name] for name in HUB_ARGUMENTS if arguments.get(name) is not None}
    try:
        path = cached_file(source, "config.json", _raise_exceptions_for_missing_entries=False, **hub)
    except OSError:
        return None  # what asked will say it better
    if path is not None and "model_type" in read_config_object(path):
        return None
    return next((found for layout in FOREIGN_LAYOUTS if (found := layout(source, hub)) is not None), None)


def repair_special_ids(values: dict[str, Any]) -> dict[str, Any]:
    """A stock text configuration whose end of text is a token, or None where only the rule of the highest id is known.

    In OpenAI's vocabulary the end of text is the highest id of every text. In others it may be any.
    """
    if values.get("eos_token_id") != LEGACY_END_OF_TEXT_ID:
        return values
    is_openai = values.get("vocab_size", OPENAI_VOCAB_SIZE) == OPENAI_VOCAB_SIZE
    return values | (last_special_ids(OPENAI_VOCAB_SIZE) if is_openai else dict.fromkeys(SPECIAL_IDS))


def last_special_ids(vocab_size: int) -> dict[str, int | None]:
    """The special ids of a vocabulary in OpenAI's order, whose last two are start and end.

    All are None for a table of more rows than OpenAI's vocabulary: rows were added, or nobody uses them.
    """
    if vocab_size > OPENAI_VOCAB_SIZE:
        return dict.fromkeys(SPECIAL_IDS)
    return dict(zip(SPECIAL_IDS, (vocab_size - 2, vocab_size - 1, vocab_size - 1), strict=True))


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """A stock CLIP's configuration under our types; under its own, transformers would warn of another model's.

    A tower alone is read out of the whole, so each is made complete: repositories of 2022 nest its real values under
    `text_config_dict` and `vision_config_dict`, and the width of the shared space counts as the whole says it.
    """
    if not isinstance(kind := values.get("model_type"), str) or kind not in STOCK_TYPES:
        return values
    for name in STOCK_TOWERS:
        for written in (name, f"{name}_dict"):
            if not isinstance(values.get(written) or {}, dict):
                raise ValueError(f"its {written} is a {type(values[written]).__name__}, but an object is needed.")
    values = values | {"model_type": STOCK_TYPES[values["model_type"]]}
    for name, model_type in STOCK_TOWERS.items():
        if nested := (values.get(name) or {}) | (values.get(f"{name}_dict") or {}):
            shared = {"projection_dim": values["projection_dim"]} if "projection_dim" in values else {}
            nested = repair_special_ids(nested) if name == "text_config" else nested
            values[name] = nested | shared | {"model_type": model_type}
    return repair_special_ids(values) if values["model_type"] == "hf_clip_text" else values


def _essence(config: PreTrainedConfig) -> dict[str, Any]:
    """What a configuration says of how a model computes."""
    values = {name: value for name, value in config.to_dict().items() if name not in BOOKKEEPING}
    for name, tower in vars(config).items():
        if isinstance(tower, PreTrainedConfig):
            values[name] = _essence(tower)
    return values


class HfClipPreTrainedConfig(PreTrainedConfig):
    """What all configurations here have in common: stock CLIP's and open_clip's are read as well."""

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        source = pretrained_model_name_or_path
        if (foreign := find_foreign(source, kwargs)) is not None:
            return foreign.config.to_dict(), kwargs
        if source is not None and os.path.isfile(source) and not kwargs.get("gguf_file"):
            read_config_object(source)
        values, kwargs = super().get_config_dict(source, **kwargs)
        try:
            return _renamed(values), kwargs
        except ValueError as error:
            raise ValueError(f"The configuration of {source} is refused: {error}") from None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As everywhere in transformers; raises ValueError in one line for values of any other kind than needed."""
        source = kwargs.get("name_or_path") or config_dict.get("_name_or_path") or "this model"
        try:
            check_no_methods(cls, config_dict, "it")
            read = dict(config_dict)
            config = super().from_dict(config_dict, **kwargs)
        except Exception as error:  # transformers meets values of any kind, and raises as many kinds of errors
            said = one_line(error) if isinstance(error, ValueError) else one_line(f"{type(error).__name__}: {error}")
            said = said.removeprefix("StrictDataclassFieldValidationError: ")
            said = said.removeprefix("StrictDataclassClassValidationError: ")
            raise ValueError(f"The configuration of {one_line(source, 200)} is refused: {said}") from error
        whole = config[0] if isinstance(config, tuple) else config
        whole._remember_writing(kwargs.get("name_or_path"), read)
        return config

    def _remember_writing(self, source: Any, read: dict[str, Any]) -> None:
        """Keep which writing of a folder this is of. The Auto classes read it apart from the weights, and before them.

        read: the fields that were found there
        """
        if not os.path.isfile(path := os.path.join(str(source or ""), "config.json")) or source is None:
            return
        writing = writing_of(source)
        try:
            found = read_object(path)
        except (OSError, ValueError):
            found = {"model_type": None}
        is_same = all(read[name] == value for name, value in found.items() if name in read)
        self._writing = (str(source), writing if is_same else None)

    def is_of_this_writing(self, source: Any, subfolder: str | None = None) -> bool:
        """Whether the folder that this was read from, by an Auto class, still is what it was then."""
        read_from, writing = self.__dict__.pop("_writing", (None, None))
        if read_from != str(source) or subfolder or writing == writing_of(source):
            return True
        return _essence(type(self).from_pretrained(source)) == _essence(self)  # it may have been saved there again

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "_writing"}

    def validate_kinds(self) -> None:
        """Raises ValueError for a dtype that is none, and for numbers that are not finite."""
        kind = type(self.dtype)
        if self.dtype is not None and (kind.__module__, kind.__name__) != ("torch", "dtype") and kind is not str:
            raise ValueError(
                f"{type(self).__name__}: dtype is {self.dtype!r:.80}, but the name of a torch.dtype is needed, such as "
                f"'float32'."
            )
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{type(self).__name__}: {name} is {value}, but a finite number is needed.")


def _require_positive(config: PreTrainedConfig, *names: str, most: int = MOST_WIDTH) -> None:
    for name in names:
        value = getattr(config, name)
        if value is None or value <= 0:
            raise ValueError(f"{type(config).__name__}: {name} is {value!r:.80}, but it must be a positive number.")
        _require_at_most(config, name, value, most)


def _require_at_most(config: PreTrainedConfig, name: str, value: int, most: int) -> None:
    if value > most:
        raise ValueError(
            f"{type(config).__name__}: {name} is {float(min(value, 10**300)):.4g}, but at most {most:,} can be built."
        )


def _require_layers(config: Any) -> None:
    from transformers.activations import ACT2FN

    if (layers := config.num_hidden_layers) < 0:
        raise ValueError(f"{type(config).__name__}: num_hidden_layers is {layers}, but it must not be negative.")
    _require_at_most(config, "num_hidden_layers", layers, MOST_LAYERS)
    if (activation := config.hidden_act) not in ACT2FN:
        raise ValueError(
            f"{type(config).__name__}: hidden_act is {activation!r:.80}, but transformers has no activation of that "
            f"name; OpenAI's models have 'quick_gelu'."
        )


def _require_divisible(config: PreTrainedConfig, whole: str, part: str, reason: str) -> None:
    dividend, divisor = getattr(config, whole), getattr(config, part)
    if dividend % divisor:
        raise ValueError(
            f"{type(config).__name__}: {whole} is {dividend} and {part} is {divisor}, but {whole} must be a "
            f"multiple of {part} ({reason})."
        )


def _check_kind(config: PreTrainedConfig, given: str | None, stock: str = "") -> None:
    """Refuse the configuration of another kind of tower, which would silently leave the weights unread."""
    if given not in (None, config.model_type, stock):
        raise ValueError(
            f"This is the configuration of a {given!r}, but {type(config).__name__} describes a "
            f"{config.model_type!r}. Load it with AutoConfig or AutoModel, which take the right class."
        )


@strict
class HfClipTextConfig(HfClipPreTrainedConfig):
    """The causal text transformer (Radford et al. 2021, section 2.4).

    vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: as everywhere
    projection_dim:           width of the space shared with images
    max_position_embeddings:  longest text in tokens, start and end included
    hidden_act:               `quick_gelu` for OpenAI's weights
    initializer_range:        standard deviation of token embeddings; position embeddings take half of it
    eos_token_id:             the id whose first occurrence gives the text feature; None: it is taken at the highest id
                              of each text, as by OpenAI's code and by stock configurations that say 2
    """

    model_type = "hf_clip_text"
    base_config_key = "text_config"

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: int | float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0
    pad_token_id: int | None = 49407
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407

    def __post_init__(self, **kwargs: Any) -> None:
        kind = kwargs.pop("model_type", None)
        _check_kind(self, kind, stock=STOCK_TEXT)
        if kind == STOCK_TEXT or self.vocab_size == OPENAI_VOCAB_SIZE:
            ids = {name: getattr(self, name) for name in ("vocab_size", *SPECIAL_IDS)}
            for name, value in repair_special_ids(ids).items():
                setattr(self, name, value)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        _require_positive(
            self, "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings", "projection_dim"
        )
        _require_positive(self, "vocab_size", most=MOST_IDS)
        _require_layers(self)
        _require_divisible(self, "hidden_size", "num_attention_heads", "every head has the same width")
        if self.eos_token_id is not None and not 0 <= self.eos_token_id < self.vocab_size:
            raise ValueError(
                f"HfClipTextConfig: eos_token_id is {self.eos_token_id}, but the text feature is taken at that id, so "
                f"it must be one of the {self.vocab_size} ids of the vocabulary, or None for the highest of a text."
            )


@strict
class HfClipViTConfig(HfClipPreTrainedConfig):
    """The Vision Transformer image tower (section 2.4: a LayerNorm stands before the first layer too)."""

    model_type = "hf_clip_vit"
    base_config_key = "vision_config"

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: int | float = 0.0
    initializer_factor: float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        _check_kind(self, kwargs.pop("model_type", None), stock="clip_vision_model")
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        _require_positive(self, "hidden_size", "intermediate_size", "num_attention_heads", "projection_dim")
        _require_positive(self, "image_size", "patch_size", most=MOST_PIXELS)
        _require_positive(self, "num_channels", most=MOST_CHANNELS)
        _require_layers(self)
        _require_divisible(self, "hidden_size", "num_attention_heads", "every head has the same width")
        if self.patch_size > self.image_size:
            raise ValueError(f"HfClipViTConfig: patch_size {self.patch_size} exceeds image_size {self.image_size}.")

    @property
    def grid_size(self) -> int:
        """Patches along one side of an image of `image_size` pixels."""
        return self.image_size // self.patch_size


@strict
class HfClipResNetConfig(HfClipPreTrainedConfig):
    """The modified ResNet image tower (section 2.4; names and sizes: table 19).

    depths:               bottleneck blocks in each of the four stages
    stem_width:           channels after the stem; the stages have 4, 8, 16 and 32 times as many
    num_attention_heads:  heads of the attention pool
    """

    model_type = "hf_clip_resnet"
    base_config_key = "vision_config"

    depths: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    stem_width: int = 64
    num_attention_heads: int = 32
    projection_dim: int = 1024
    num_channels: int = 3
    image_size: int = 224
    attention_dropout: int | float = 0.0
    initializer_factor: float = 1.0

    total_stride: ClassVar[int] = 32

    def __post_init__(self, **kwargs: Any) -> None:
        _check_kind(self, kwargs.pop("model_type", None))
        self.depths = list(self.depths)
        for name in ("hidden_size", "num_hidden_layers"):  # derived below
            if (given := kwargs.pop(name, None)) not in (None, getattr(self, name)):
                raise ValueError(
                    f"HfClipResNetConfig: {name} is {given}, but stem_width {self.stem_width} and depths {self.depths} "
                    f"make it {getattr(self, name)}; leave it out."
                )
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        _require_positive(self, "stem_width", "num_attention_heads", "projection_dim")
        _require_positive(self, "image_size", most=MOST_PIXELS)
        _require_positive(self, "num_channels", most=MOST_CHANNELS)
        if len(self.depths) != 4 or min(self.depths) < 1:
            raise ValueError(
                f"HfClipResNetConfig: depths is {self.depths}, but a CLIP ResNet has four stages of blocks."
            )
        if max(self.depths) > MOST_BLOCKS:
            raise ValueError(f"HfClipResNetConfig: a stage has at most {MOST_BLOCKS} blocks, but depths is larger.")
        if self.stem_width % 2:
            raise ValueError(
                f"HfClipResNetConfig: stem_width is {self.stem_width}, but the stem starts with half of it."
            )
        _require_divisible(self, "hidden_size", "num_attention_heads", "every head has the same width")
        if self.image_size < self.total_stride:
            raise ValueError(
                f"HfClipResNetConfig: image_size is {self.image_size}, but the tower divides it by {self.total_stride}."
            )

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage, and width of the attention pool."""
        return self.stem_width * 32

    @property
    def num_hidden_layers(self) -> int:
        """Stages: what `output_hidden_states` counts."""
        return len(self.depths)

    @property
    def grid_size(self) -> int:
        """Feature-map side for an image of `image_size` pixels."""
        return self.image_size // self.total_stride

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"hidden_size": self.hidden_size}


def _values_of(name: str, given: Any) -> dict[str, Any]:
    """A tower's fields, whichever way they were given; a stock CLIP configuration is one of them."""
    if given is None:
        return {}
    if isinstance(given, PreTrainedConfig):
        return given.to_dict()
    if isinstance(given, dict):
        return given
    raise ValueError(
        f"HfClipConfig: {name} is a {type(given).__name__}, but a dictionary or a configuration is needed."
    )


def _build_text_config(values: dict[str, Any]) -> HfClipTextConfig:
    values = repair_special_ids(values) if values.get("model_type") == STOCK_TEXT else values
    return HfClipTextConfig(**{name: value for name, value in values.items() if name != "model_type"})


def _build_vision_config(values: dict[str, Any]) -> "HfClipViTConfig | HfClipResNetConfig":
    is_resnet = values.get("model_type") == HfClipResNetConfig.model_type or "depths" in values
    kind = HfClipResNetConfig if is_resnet else HfClipViTConfig
    return kind(**{name: value for name, value in values.items() if name != "model_type"})


@strict
class HfClipConfig(HfClipPreTrainedConfig):
    """A whole CLIP model: text tower, image tower, and the space they share.

    text_config:             given as a dictionary or a configuration; once built, an HfClipTextConfig
    vision_config:           the same; once built, an HfClipViTConfig or an HfClipResNetConfig
    projection_dim:          width of the shared space; the towers' own `projection_dim` follows it
    logit_scale_init_value:  ln(1 / 0.07), section 2.5
    contrastive_loss:        what the model was trained by, which says how its logits become scores: "softmax" over a
                             batch, as CLIP, or "sigmoid" of every pair, as SigLIP (Zhai et al. 2023), with a bias
    logit_bias_init_value:   the sigmoid loss's bias at the start (section 3.1 there)
    """

    model_type = "hf_clip"
    sub_configs: ClassVar[dict[str, type]] = {"text_config": HfClipTextConfig, "vision_config": PreTrainedConfig}

    text_config: Any = None
    vision_config: Any = None
    projection_dim: int = 512
    logit_scale_init_value: float | int = 2.6592
    contrastive_loss: str = "softmax"
    logit_bias_init_value: float | int = -10.0
    initializer_factor: float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        text = kwargs.pop("text_config_dict", None)  # repositories of 2022 nest the real values under these names
        vision = kwargs.pop("vision_config_dict", None)
        if not isinstance(self.text_config, HfClipTextConfig):
            self.text_config = _build_text_config(_values_of("text_config", self.text_config) | (text or {}))
        if not isinstance(self.vision_config, (HfClipViTConfig, HfClipResNetConfig)):
            self.vision_config = _build_vision_config(_values_of("vision_config", self.vision_config) | (vision or {}))
        # Copies: a tower's configuration may be shared with another model, whose space is another.
        self.text_config, self.vision_config = copy.deepcopy(self.text_config), copy.deepcopy(self.vision_config)
        self.text_config.projection_dim = self.projection_dim
        self.vision_config.projection_dim = self.projection_dim
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        _require_positive(self, "projection_dim")
        if self.contrastive_loss not in ("softmax", "sigmoid"):
            raise ValueError(
                f"HfClipConfig: contrastive_loss is {self.contrastive_loss!r}, but must be 'softmax' or 'sigmoid'."
            )

    @classmethod
    def from_variant(cls, name: str, **overrides: Any) -> "HfClipConfig":
        """The configuration of one of OpenAI's nine models, by its exact name: `from_variant("ViT-L/14@336px")`.

        overrides: further HfClipConfig fields. Raises ValueError for a name that is none of the nine.
        """
        variant = get_variant(name)
        text = HfClipTextConfig(
            hidden_size=variant.text_width,
            intermediate_size=4 * variant.text_width,
            num_attention_heads=variant.text_heads,
        )
        vision: HfClipViTConfig | HfClipResNetConfig
        if isinstance(variant.vision_layers, tuple):
            vision = HfClipResNetConfig(
                depths=list(variant.vision_layers),
                stem_width=variant.vision_width,
                num_attention_heads=variant.vision_heads,
                image_size=variant.image_size,
            )
        else:
            vision = HfClipViTConfig(
                hidden_size=variant.vision_width,
                intermediate_size=4 * variant.vision_width,
                num_hidden_layers=variant.vision_layers,
                num_attention_heads=variant.vision_heads,
                image_size=variant.image_size,
                patch_size=variant.patch_size,
            )
        return cls(**{"text_config": text, "vision_config": vision, "projection_dim": variant.embed_dim} | overrides)


__all__ = ["HfClipConfig", "HfClipResNetConfig", "HfClipTextConfig", "HfClipViTConfig"]
