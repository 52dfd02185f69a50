"""Configurations of the CLIP models: plain data that is checked when it is made. This file imports no torch.

Fields have the names and meanings of transformers' `CLIPConfig` family, so a stock CLIP configuration describes the
same model when it is read here.

`HfClipConfig` is a whole model. It holds the configuration of the text tower and that of the image tower, which is a
Vision Transformer or a ResNet. In a dictionary the field `model_type` says which of the two. Without that field it is a
ResNet if there is a field `depths`.
"""

import copy
import math
import os
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .checked_files import check_no_methods, one_line, read_object, writing_of
from .config_checks import (
    MOST_BLOCKS,
    MOST_CHANNELS,
    MOST_IDS,
    check_kind,
    require_divisible,
    require_layers,
    require_positive,
)
from .hub_repository import find_foreign, read_config_object
from .matryoshka import check_dims
from .stock_config import SPECIAL_IDS, STOCK_TEXT, named_as_ours, repair_special_ids
from .variants import MOST_PIXELS, OPENAI_VOCAB_SIZE, get_variant

BOOKKEEPING = ("_name_or_path", "architectures", "auto_map", "dtype", "transformers_version")
"""Fields that do not change what a model computes."""


def _essence(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a configuration that change what a model computes."""
    values = {name: value for name, value in config.to_dict().items() if name not in BOOKKEEPING}
    for name, tower in vars(config).items():
        if isinstance(tower, PreTrainedConfig):
            values[name] = _essence(tower)
    return values


class HfClipPreTrainedConfig(PreTrainedConfig):
    """Base class of all configurations. It also reads configurations of stock CLIP and open_clip."""

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the fields of a configuration, in our layout or in that of stock CLIP or open_clip."""
        source = pretrained_model_name_or_path
        if (foreign := find_foreign(source, kwargs)) is not None:
            return foreign.config.to_dict(), kwargs
        if source is not None and os.path.isfile(source) and not kwargs.get("gguf_file"):
            read_config_object(source)
        values, kwargs = super().get_config_dict(source, **kwargs)
        return named_as_ours(values, source), kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration from a dictionary, as in transformers.

        Args:
            config_dict: The fields.
            **kwargs: As for any configuration of transformers: fields that replace those of the dictionary.

        Returns:
            The configuration.

        Raises:
            ValueError: A field has a value of the wrong type, or one that no model can have.
        """
        source = kwargs.get("name_or_path") or config_dict.get("_name_or_path") or "this model"
        try:
            check_no_methods(cls, config_dict, "it")
            read = dict(config_dict)
            config = super().from_dict(config_dict, **kwargs)
            if kwargs:  # transformers sets those that replace fields without looking at them
                (config[0] if isinstance(config, tuple) else config).validate()
        except Exception as error:  # transformers does not check types: a wrong one raises any kind of error
            said = one_line(error) if isinstance(error, ValueError) else one_line(f"{type(error).__name__}: {error}")
            said = said.removeprefix("StrictDataclassFieldValidationError: ")
            said = said.removeprefix("StrictDataclassClassValidationError: ")
            raise ValueError(f"The configuration of {one_line(source, 200)} is refused: {said}") from error
        whole = config[0] if isinstance(config, tuple) else config
        whole._remember_writing(kwargs.get("name_or_path"), read)
        return config

    def _remember_writing(self, source: Any, read: dict[str, Any]) -> None:
        """Remember which version of a folder this configuration was read from.

        The Auto classes read the configuration first and the weights later. If the folder is replaced in between, the
        two do not belong together, which `is_of_this_writing` finds out.

        Args:
            source: The folder.
            read: The fields that were read from it.
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
        """Whether a folder still holds the model that this configuration was read from.

        Args:
            source: The folder.
            subfolder: Folder within it, in which the model is.

        Returns:
            False if another model has been written into the folder since. True for any other folder than the one that
            this configuration was read from.
        """
        read_from, writing = self.__dict__.pop("_writing", (None, None))
        if read_from != str(source) or subfolder or writing == writing_of(source):
            return True
        # The same model may have been saved there again.
        return _essence(type(self).from_pretrained(source)) == _essence(self)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name != "_writing"}

    def validate_kinds(self) -> None:
        """Raise ValueError for a `dtype` that is not a dtype, and for numbers that are not finite."""
        kind = type(self.dtype)
        if self.dtype is not None and (kind.__module__, kind.__name__) != ("torch", "dtype") and kind is not str:
            raise ValueError(
                f"{type(self).__name__}: dtype is {self.dtype!r:.80}, but the name of a torch.dtype is needed, such as "
                f"'float32'."
            )
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{type(self).__name__}: {name} is {value}, but a finite number is needed.")


@strict
class HfClipTextConfig(HfClipPreTrainedConfig):
    """Configuration of the causal text tower (Radford et al. 2021, section 2.4).

    Args:
        vocab_size: Number of token ids.
        hidden_size: Width of the tower.
        intermediate_size: Width of the MLPs.
        projection_dim: Width of the space shared with images.
        num_hidden_layers: Number of layers.
        num_attention_heads: Attention heads per layer.
        max_position_embeddings: Length of the longest text in tokens, with start and end.
        hidden_act: Activation of the MLPs. OpenAI's weights need "quick_gelu".
        layer_norm_eps: Small number that LayerNorm adds to the variance.
        attention_dropout: Probability that an attention weight is dropped in training.
        initializer_range: Standard deviation of fresh token embeddings. Position embeddings take half of it.
        initializer_factor: Factor of all standard deviations of fresh embeddings and weights.
        pad_token_id: Id of the padding.
        bos_token_id: Id of the start of text.
        eos_token_id: Id of the end of text. The text feature is taken at its first occurrence. None: it is taken at
            the highest id of each text, as in OpenAI's code and in stock configurations that say 2.
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
        check_kind(self, kind, stock=STOCK_TEXT)
        if kind == STOCK_TEXT or self.vocab_size == OPENAI_VOCAB_SIZE:
            ids = {name: getattr(self, name) for name in ("vocab_size", *SPECIAL_IDS)}
            for name, value in repair_special_ids(ids).items():
                setattr(self, name, value)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raise ValueError for sizes that no model can have."""
        require_positive(
            self, "hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings", "projection_dim"
        )
        require_positive(self, "vocab_size", most=MOST_IDS)
        require_layers(self)
        require_divisible(self, "hidden_size", "num_attention_heads", "every head has the same width")
        if self.eos_token_id is not None and not 0 <= self.eos_token_id < self.vocab_size:
            raise ValueError(
                f"HfClipTextConfig: eos_token_id is {self.eos_token_id}, but the text feature is taken at that id, so "
                f"it must be one of the {self.vocab_size} ids of the vocabulary, or None for the highest of a text."
            )


@strict
class HfClipViTConfig(HfClipPreTrainedConfig):
    """Configuration of the Vision Transformer image tower.

    The tower has a LayerNorm before the first layer too (Radford et al. 2021, section 2.4).

    Args:
        hidden_size: Width of the tower.
        intermediate_size: Width of the MLPs.
        projection_dim: Width of the space shared with texts.
        num_hidden_layers: Number of layers.
        num_attention_heads: Attention heads per layer.
        num_channels: Colour channels of an image.
        image_size: Height and width of an image in pixels.
        patch_size: Height and width of a patch in pixels.
        hidden_act: Activation of the MLPs. OpenAI's weights need "quick_gelu".
        layer_norm_eps: Small number that LayerNorm adds to the variance.
        attention_dropout: Probability that an attention weight is dropped in training.
        initializer_factor: Factor of the standard deviations of fresh class and position embeddings.
    """

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
        check_kind(self, kwargs.pop("model_type", None), stock="clip_vision_model")
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raise ValueError for sizes that no model can have."""
        require_positive(self, "hidden_size", "intermediate_size", "num_attention_heads", "projection_dim")
        require_positive(self, "image_size", "patch_size", most=MOST_PIXELS)
        require_positive(self, "num_channels", most=MOST_CHANNELS)
        require_layers(self)
        require_divisible(self, "hidden_size", "num_attention_heads", "every head has the same width")
        if self.patch_size > self.image_size:
            raise ValueError(f"HfClipViTConfig: patch_size {self.patch_size} exceeds image_size {self.image_size}.")

    @property
    def grid_size(self) -> int:
        """Patches along one side of an image of `image_size` pixels."""
        return self.image_size // self.patch_size


@strict
class HfClipResNetConfig(HfClipPreTrainedConfig):
    """Configuration of the modified ResNet image tower (Radford et al. 2021, section 2.4; sizes in table 19).

    Args:
        depths: Number of bottleneck blocks in each of the four stages.
        stem_width: Channels after the stem. The stages have 4, 8, 16 and 32 times as many.
        num_attention_heads: Heads of the attention pool.
        projection_dim: Width of the space shared with texts.
        num_channels: Colour channels of an image.
        image_size: Height and width of an image in pixels.
        attention_dropout: Probability that a weight of the attention pool is dropped in training.
        initializer_factor: Factor of the standard deviations of the attention pool's fresh weights.
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
        check_kind(self, kwargs.pop("model_type", None))
        self.depths = list(self.depths)
        for name in ("hidden_size", "num_hidden_layers"):  # derived below
            if (given := kwargs.pop(name, None)) not in (None, getattr(self, name)):
                raise ValueError(
                    f"HfClipResNetConfig: {name} is {given}, but stem_width {self.stem_width} and depths {self.depths} "
                    f"make it {getattr(self, name)}; leave it out."
                )
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raise ValueError for sizes that no model can have."""
        require_positive(self, "stem_width", "num_attention_heads", "projection_dim")
        require_positive(self, "image_size", most=MOST_PIXELS)
        require_positive(self, "num_channels", most=MOST_CHANNELS)
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
        require_divisible(self, "hidden_size", "num_attention_heads", "every head has the same width")
        if self.image_size < self.total_stride:
            raise ValueError(
                f"HfClipResNetConfig: image_size is {self.image_size}, but the tower divides it by {self.total_stride}."
            )

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage, which is also the width of the attention pool."""
        return self.stem_width * 32

    @property
    def num_hidden_layers(self) -> int:
        """Number of stages. `output_hidden_states=True` returns one feature map per stage, after that of the stem."""
        return len(self.depths)

    @property
    def grid_size(self) -> int:
        """Cells along one side of the last feature map, for an image of `image_size` pixels."""
        return self.image_size // self.total_stride

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"hidden_size": self.hidden_size}


def _values_of(name: str, given: Any) -> dict[str, Any]:
    """Return a tower's fields, given as a dictionary, as a configuration of ours or of stock CLIP, or not at all."""
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
    """Configuration of a whole CLIP model: text tower, image tower, and the space they share.

    Args:
        text_config: The text tower, as a dictionary or a configuration. The attribute is an HfClipTextConfig.
        vision_config: The image tower, as a dictionary or a configuration. The attribute is an HfClipViTConfig or an
            HfClipResNetConfig.
        projection_dim: Width of the shared space. It replaces the `projection_dim` of both towers.
        logit_scale_init_value: Logarithm of the logit scale before training: ln(1 / 0.07) (Radford et al. 2021,
            section 2.5).
        contrastive_loss: Loss that the model is trained by, which also says how its logits become scores. "softmax":
            over a batch, as in CLIP. "sigmoid": of each pair by itself, with a logit bias, as in SigLIP (Zhai et al.
            2023).
        logit_bias_init_value: Logit bias before training, with the sigmoid loss (Zhai et al. 2023, section 3.2).
        initializer_factor: Factor of the standard deviations of fresh projections.
        return_tensors_from_features: Whether `get_text_features` and `get_image_features` return the features alone,
            tensors (B, D), as transformers 4 did. False (default): the tower's output with the features in its
            `pooler_output`, as in transformers 5. Programs that expect tensors need True.
        matryoshka_dims: Widths d at which the first d numbers of a feature are a feature too, since the model was
            trained at them (Kusupati et al. 2022). The attribute has the largest first. None: the full width alone.

    Example::

        config = HfClipConfig.from_variant("RN50")
        config.vision_config.depths  # [3, 4, 6, 3]
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
    return_tensors_from_features: bool = False
    matryoshka_dims: list[int] | tuple[int, ...] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        text = kwargs.pop("text_config_dict", None)  # repositories of 2022 nest the real values under these names
        vision = kwargs.pop("vision_config_dict", None)
        if not isinstance(self.text_config, HfClipTextConfig):
            self.text_config = _build_text_config(_values_of("text_config", self.text_config) | (text or {}))
        if not isinstance(self.vision_config, (HfClipViTConfig, HfClipResNetConfig)):
            self.vision_config = _build_vision_config(_values_of("vision_config", self.vision_config) | (vision or {}))
        # The towers' configurations are copied: a caller may share one with a model that has another `projection_dim`.
        self.text_config, self.vision_config = copy.deepcopy(self.text_config), copy.deepcopy(self.vision_config)
        self.text_config.projection_dim = self.projection_dim
        self.vision_config.projection_dim = self.projection_dim
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raise ValueError for sizes that no model can have."""
        require_positive(self, "projection_dim")
        if self.contrastive_loss not in ("softmax", "sigmoid"):
            raise ValueError(
                f"HfClipConfig: contrastive_loss is {self.contrastive_loss!r}, but must be 'softmax' or 'sigmoid'."
            )
        if self.matryoshka_dims is not None:
            try:
                self.matryoshka_dims = check_dims(self.matryoshka_dims, self.projection_dim)
            except ValueError as error:
                raise ValueError(f"HfClipConfig: {error}") from None

    @classmethod
    def from_variant(cls, name: str, **overrides: Any) -> "HfClipConfig":
        """Make the configuration of one of OpenAI's nine models.

        Args:
            name: OpenAI's exact name, such as "ViT-L/14@336px".
            **overrides: Fields of HfClipConfig that shall differ.

        Returns:
            The configuration.

        Raises:
            ValueError: The name is none of the nine. The message names the nearest one.
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
