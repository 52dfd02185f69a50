"""CLIP as transformers models: two towers, their projections into one space, and a classifier head.

A vision tower of either kind returns `last_hidden_state` and `pooler_output`, and a projection follows. For
a ViT the pooled vector is the class token after the last LayerNorm. For a ResNet it is what the attention
pool gathers, and the pool's own output projection, which has a bias, stands here as `visual_projection`.

Invariant: for the text tower and the ViTs, parameter names are those of transformers' `CLIPModel`.

Dimensions: B batch, I images, T texts, L text length, P patches + class token, W tower width, D embedding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_hf_clip import (
    HUB_ARGUMENTS,
    HfClipConfig,
    HfClipPreTrainedConfig,
    HfClipResNetConfig,
    HfClipTextConfig,
    HfClipViTConfig,
    HubUpload,
    find_foreign,
)
from .files_hf_clip import DamagedWeightsError, FolderReplacedError, check_weights, read_unchanged
from .inference_hf_clip import Optimizable
from .resnet_hf_clip import (
    HfClipAttentionPool,
    HfClipBottleneck,
    HfClipResNetStage,
    channels_last,
    init_attention_pool_,
    init_convolution_,
    init_last_norm_,
    relu_of_norm,
    suits_channels_last,
)
from .text_ends_hf_clip import count_positions, find_ends, find_starts, pool_at
from .transformer_hf_clip import (
    BUILT_IN_ATTENTION,
    HfClipAttention,
    HfClipEncoder,
    HfClipEncoderLayer,
    apply_patch_embedding,
    init_linear_bias_,
    init_text_layer_,
    init_vit_layer_,
    resize_position_table,
)


@dataclass
class HfClipOutput(ModelOutput):
    """What `HfClipModel` returns, field for field what transformers' `CLIPModel` returns.

    loss:               ()      symmetric cross-entropy or the sigmoid loss, if `return_loss`
    logits_per_image:   (I, T)  cosine similarities times the logit scale, plus the logit bias where there is one
    logits_per_text:    (T, I)  the same, transposed
    text_embeds:        (T, D)  of length one
    image_embeds:       (I, D)  of length one
    text_model_output, vision_model_output: the towers' outputs; their `pooler_output` is projected, (·, D)

    Fields of a modality that was not given are None.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


@dataclass
class HfClipTextModelOutput(ModelOutput):
    """A text tower's output with `text_embeds` (B, D), projected and not normalised."""

    text_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class HfClipVisionModelOutput(ModelOutput):
    """An image tower's output with `image_embeds` (B, D), projected and not normalised."""

    image_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class HfClipPreTrainedModel(HubUpload, Optimizable, PreTrainedModel):
    """What all CLIP models here have in common: loading, saving, attention kinds, checkpointing."""

    config_class = HfClipConfig
    base_model_prefix = "hf_clip"
    input_modalities: tuple[str, ...] = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # else Trainer leaves the division by its accumulation steps to the model
    _no_split_modules = [
        "HfClipTextEmbeddings",
        "HfClipViTEmbeddings",
        "HfClipEncoderLayer",
        "HfClipBottleneck",
        "HfClipAttentionPool",
    ]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As everywhere in transformers; repositories of stock CLIP and, with the package, of open_clip too."""
        source, given = pretrained_model_name_or_path, kwargs.get("config")
        model = read_unchanged(source, lambda: cls._read(source, *args, **kwargs), kwargs.get("subfolder"))
        if isinstance(given, HfClipPreTrainedConfig) and not given.is_of_this_writing(source, kwargs.get("subfolder")):
            raise FolderReplacedError(source)
        return model

    @classmethod
    def _read(cls, source: Any, *args: Any, **kwargs: Any) -> Any:
        foreign = None if kwargs.get("state_dict") is not None else find_foreign(source, kwargs)
        if foreign is None:
            check_weights(source, kwargs.get("subfolder"))
            try:
                return super().from_pretrained(source, *args, **kwargs)
            except SafetensorError as error:
                raise DamagedWeightsError(source, error) from error
        own = {name: kwargs.pop(name) for name in ("config", "dtype", "torch_dtype") if name in kwargs}
        if isinstance(config := own.pop("config", None), PreTrainedConfig):
            given = kwargs
        else:
            config, given = cls.config_class.from_pretrained(config or source, return_unused_kwargs=True, **kwargs)
        unused = own | {name: value for name, value in given.items() if name not in HUB_ARGUMENTS}
        model = super().from_pretrained(None, *args, config=config, state_dict=foreign.tensors(), **unused)
        loaded = model[0] if kwargs.get("output_loading_info") else model
        loaded.config.name_or_path = str(source)
        return model

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Initialise a module, unless its tensors have been loaded.

        For classes outside of transformers, modules without tensors of their own count as loaded: layers and whole
        models would be passed over. The guard is for code that writes to tensors directly, which ours does not.
        """
        super()._initialize_weights(module)


class HfClipTextEmbeddings(nn.Module):
    """Token plus position embeddings: (B, L) → (B, L, W)."""

    def __init__(self, config: HfClipTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        length, limit = input_ids.shape[-1], self.position_embedding.num_embeddings
        if length > limit:
            raise ValueError(
                f"input_ids hold {length} tokens per text, but this model's position table has {limit}. Tokenize with "
                f"truncation=True, which keeps the end of the text marked, or shorten the text."
            )
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)
        try:
            tokens = self.token_embedding(input_ids)
        except IndexError:  # a GPU cannot say so; there the embedding's own assertion stops the program
            raise ValueError(
                f"input_ids hold an id outside of this model's vocabulary of {self.token_embedding.num_embeddings}. "
                f"Tokenize with the tokenizer that was saved with the model."
            ) from None
        return tokens + self.position_embedding(position_ids)


def check_input_ids(input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """Return the ids as (B, L), or refuse what is no batch of token ids."""
    if not isinstance(input_ids, Tensor):
        raise ValueError(
            f"The text tower needs input_ids as a tensor of token ids, but got {type(input_ids).__name__}: pass what "
            f'HfClipTokenizer returns with return_tensors="pt".'
        )
    if input_ids.is_floating_point() or input_ids.ndim == 0 or input_ids.shape[-1] == 0:
        raise ValueError(
            f"input_ids are {input_ids.dtype} of shape {tuple(input_ids.shape)}, but integers of shape (batch, length) "
            f'are needed: pass what HfClipTokenizer returns with return_tensors="pt".'
        )
    input_ids = input_ids[None] if input_ids.ndim == 1 else input_ids.flatten(0, -2)
    if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, but input_ids have {tuple(input_ids.shape)}; "
            f"pass both as the tokenizer returned them."
        )
    return input_ids


HEEDED = {"return_dict", "attention_mask", "use_cache", "debug_io", "debug_io_dir", "prune_layers"}
HEEDED |= {*TransformersKwargs.__annotations__} - {"position_ids"}
"""Arguments beyond those that a `forward` names which it, its attention or transformers' wrappers around it know."""

BY_PRODUCTS = {"token_type_ids", "special_tokens_mask", "offset_mapping", "length", "overflow_to_sample_mapping"}
"""What tokenizers return beside ids and mask, of which nobody expects an effect here."""

INSTEAD = {
    "labels": "the loss of pairs is had by return_loss=True, that of classes from HfClipForImageClassification",
    "inputs_embeds": "texts are taken as input_ids",
}


def refuse_ignored(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Raise TypeError for an argument that would have no effect, as Python does for functions without `**kwargs`.

    What is None or False asks for nothing. Attention of the user's own may know any argument.
    """
    if model.config._attn_implementation not in BUILT_IN_ATTENTION:
        return
    for name, value in arguments.items():
        if name not in HEEDED and name not in BY_PRODUCTS and value is not None and value is not False:
            reason = INSTEAD.get(name, "it would be ignored")
            raise TypeError(f"{type(model).__name__} takes no argument {name!r}: {reason}. Leave it out.")


_POSITION_COUNTERS = r"embeddings\.position_ids$"  # in stock repositories from before transformers 4.31
_BESIDE_THE_TOWERS = [_POSITION_COUNTERS, r"^text_projection\.", r"^visual_projection\.", r"^logit_(scale|bias)$"]
"""What a tower alone leaves unread in a whole model's file, besides the other tower."""


class HfClipTextModel(HfClipPreTrainedModel):
    """The causal text tower."""

    config_class = HfClipTextConfig
    input_modalities = ("text",)
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", *_BESIDE_THE_TOWERS]
    _input_embed_layer = "token_embedding"
    _can_record_outputs = {"hidden_states": HfClipEncoderLayer, "attentions": HfClipAttention}

    def __init__(self, config: HfClipTextConfig):
        super().__init__(config)
        self.embeddings = HfClipTextEmbeddings(config)
        self.encoder = HfClipEncoder(config, is_causal=True)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        factor = self.config.initializer_factor
        if isinstance(module, HfClipTextEmbeddings):
            init.normal_(module.token_embedding.weight, std=self.config.initializer_range * factor)
            init.normal_(module.position_embedding.weight, std=self.config.initializer_range / 2 * factor)
        elif isinstance(module, HfClipEncoderLayer):
            init_text_layer_(module, self.config.num_hidden_layers, factor)
        elif isinstance(module, nn.LayerNorm):
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.token_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.token_embedding = value

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode texts.

        input_ids:      (B, L)  with the end-of-text id in every row
        attention_mask: (B, L)  optional: with padding on the right the feature is the same without it; padding on the
            left needs it, and then gives the features of padding on the right
        position_ids:   (B, L)  optional; by default they count from the first token that the mask shows
        returns: last_hidden_state (B, L, W) and pooler_output (B, W), both after the final LayerNorm

        Raises EndOfTextError for a row without its end; on GPUs and in graphs its pooler_output is NaN instead.
        """
        refuse_ignored(self, kwargs)
        input_ids = check_input_ids(input_ids, attention_mask)
        starts = find_starts(attention_mask)
        if position_ids is None and starts is not None:
            position_ids = count_positions(starts, input_ids.shape[-1]).to(input_ids.device)
        hidden_states = self.embeddings(input_ids, position_ids)
        ends, is_endless = find_ends(input_ids, starts, self.config)
        causal_mask = create_causal_mask(
            config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask, past_key_values=None
        )
        hidden_states = self.final_layer_norm(self.encoder(hidden_states, causal_mask, **kwargs))
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=pool_at(hidden_states, ends, is_endless)
        )


def check_image_size(
    pixel_values: Tensor | None, config: HfClipViTConfig | HfClipResNetConfig, interpolate: bool, smallest: int
) -> Tensor:
    """Return the pictures, or refuse those that the tower's position table doesn't fit."""
    if not isinstance(pixel_values, Tensor):
        raise ValueError(
            f"The image tower needs pixel_values as a tensor, but got {type(pixel_values).__name__}: pass what "
            f'HfClipImageProcessor returns with return_tensors="pt".'
        )
    if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels:
        raise ValueError(
            f"pixel_values have shape {tuple(pixel_values.shape)}, but (batch, {config.num_channels}, height, width) "
            f"is needed. Preprocess with HfClipImageProcessor."
        )
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values are {pixel_values.dtype}, but the tower takes normalised floating-point pictures. "
            f"Preprocess with HfClipImageProcessor."
        )
    height, width = pixel_values.shape[-2:]
    size = config.image_size
    if not interpolate and (height, width) != (size, size):
        raise ValueError(
            f"pixel_values are {height}x{width}, but this checkpoint's position table fits only {size}x{size}. "
            f"Preprocess with HfClipImageProcessor, or pass interpolate_pos_encoding=True."
        )
    if min(height, width) < smallest:
        raise ValueError(
            f"pixel_values are {height}x{width}, but this image tower needs at least {smallest} pixels each way."
        )
    return pixel_values


class HfClipViTEmbeddings(nn.Module):
    """Patches as tokens, the class token before them, positions added: (B, C, Y, X) → (B, P, W)."""

    def __init__(self, config: HfClipViTConfig):
        super().__init__()
        self.grid_size = config.grid_size
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        size = config.patch_size
        self.patch_embedding = nn.Conv2d(config.num_channels, config.hidden_size, size, stride=size, bias=False)
        self.position_embedding = nn.Embedding(1 + config.grid_size**2, config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        pixels = pixel_values.to(self.patch_embedding.weight.dtype)
        patches = apply_patch_embedding(self.patch_embedding, pixels)  # (B, W, Y / S, X / S)
        height, width = patches.shape[-2:]
        # Called, not read: where weights are offloaded, a module's call is what brings them back.
        cells = torch.arange(1 + self.grid_size**2, device=patches.device)
        positions = self.position_embedding(cells)
        if (height, width) != (self.grid_size, self.grid_size):
            positions = resize_position_table(positions, self.grid_size, height, width)
        class_token = self.class_embedding.expand(patches.shape[0], 1, -1)
        return torch.cat([class_token, patches.flatten(2).transpose(1, 2)], dim=1) + positions


class HfClipViTModel(HfClipPreTrainedModel):
    """The Vision Transformer image tower."""

    config_class = HfClipViTConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", *_BESIDE_THE_TOWERS]
    _input_embed_layer = "patch_embedding"
    _can_record_outputs = {"hidden_states": HfClipEncoderLayer, "attentions": HfClipAttention}

    def __init__(self, config: HfClipViTConfig):
        super().__init__(config)
        self.embeddings = HfClipViTEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # spelled as stock files do
        self.encoder = HfClipEncoder(config, is_causal=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, HfClipViTEmbeddings):
            std = self.config.hidden_size**-0.5 * self.config.initializer_factor
            init.normal_(module.class_embedding, std=std)
            init.normal_(module.position_embedding.weight, std=std)
            init_convolution_(module.patch_embedding)
        elif isinstance(module, HfClipEncoderLayer):
            init_vit_layer_(module)
        elif isinstance(module, nn.LayerNorm):
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embedding

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor | None = None, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode pictures.

        pixel_values:             (B, C, Y, X)  normalised by HfClipImageProcessor; Y = X = image_size unless ...
        interpolate_pos_encoding: ... the position table is to be resampled to the pictures' own size
        returns: last_hidden_state (B, P, W) and pooler_output (B, W), the class token after the last LayerNorm
        """
        refuse_ignored(self, kwargs)
        pictures = check_image_size(
            pixel_values, self.config, interpolate_pos_encoding, smallest=self.config.patch_size
        )
        hidden_states = self.encoder(self.pre_layrnorm(self.embeddings(pictures)), **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self.post_layernorm(hidden_states[:, 0])
        )


class HfClipResNetModel(HfClipPreTrainedModel):
    """The modified ResNet image tower, as far as the attention pool's output projection."""

    config_class = HfClipResNetConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", *_BESIDE_THE_TOWERS]
    _input_embed_layer = "conv1"
    _can_record_outputs = {"hidden_states": HfClipResNetStage, "attentions": HfClipAttentionPool}
    # Running statistics in bfloat16 would stop moving once they are near their mean: their updates fall below
    # its resolution. The counter of batches is an integer and must not be named here.
    _keep_in_fp32_modules_strict = [
        rf"{norm}.{tensor}"
        for norm in ("bn1", "bn2", "bn3", "downsample.1")
        for tensor in ("weight", "bias", "running_mean", "running_var")
    ]

    def __init__(self, config: HfClipResNetConfig):
        super().__init__(config)
        width = config.stem_width
        self.conv1 = nn.Conv2d(config.num_channels, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.pool = nn.AvgPool2d(2)
        self.layer1 = HfClipResNetStage(width, width, config.depths[0], stride=1)
        self.layer2 = HfClipResNetStage(width * 4, width * 2, config.depths[1], stride=2)
        self.layer3 = HfClipResNetStage(width * 8, width * 4, config.depths[2], stride=2)
        self.layer4 = HfClipResNetStage(width * 16, width * 8, config.depths[3], stride=2)
        self.attnpool = HfClipAttentionPool(config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d):
            init_convolution_(module)
        elif isinstance(module, nn.BatchNorm2d):
            super()._init_weights(module)
        elif isinstance(module, HfClipBottleneck):
            init_last_norm_(module)
        elif isinstance(module, HfClipAttentionPool):
            init_attention_pool_(module, self.config.initializer_factor)

    def get_input_embeddings(self) -> nn.Module:
        return self.conv1

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor | None = None, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode pictures.

        pixel_values:             (B, C, Y, X)  normalised by HfClipImageProcessor; Y = X = image_size unless ...
        interpolate_pos_encoding: ... the attention pool's positions are to be resampled to the pictures' own size
        returns: last_hidden_state (B, W, Y / 32, X / 32) and pooler_output (B, W); hidden states are the stem's
            and the four stages' feature maps, attentions the attention pool's (B, heads, 1, 1 + cells)
        """
        refuse_ignored(self, kwargs)
        pictures = check_image_size(
            pixel_values, self.config, interpolate_pos_encoding, smallest=self.config.total_stride
        )
        hidden_states = self.stem(pictures.to(self.conv1.weight.dtype))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            hidden_states = stage(hidden_states)
        pooled, _ = self.attnpool(hidden_states, **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def stem(self, pictures: Tensor) -> Tensor:
        """Three convolutions and a pool: (B, C, Y, X) → (B, stem_width, Y / 4, X / 4)."""
        if suits_channels_last(pictures, self.bn1):
            pictures = channels_last(pictures)
        feature_map = relu_of_norm(self.conv1, self.bn1, pictures)
        feature_map = relu_of_norm(self.conv2, self.bn2, feature_map)
        return self.pool(relu_of_norm(self.conv3, self.bn3, feature_map))


def build_vision_tower(config: HfClipViTConfig | HfClipResNetConfig) -> "HfClipViTModel | HfClipResNetModel":
    kind = HfClipResNetModel if config.model_type == HfClipResNetConfig.model_type else HfClipViTModel
    return kind._from_config(config)


def build_visual_projection(config: HfClipViTConfig | HfClipResNetConfig, projection_dim: int) -> nn.Linear:
    """The map into the shared space; a ResNet's is its attention pool's output projection, with a bias."""
    has_bias = config.model_type == HfClipResNetConfig.model_type
    return nn.Linear(config.hidden_size, projection_dim, bias=has_bias)


def init_projection_(projection: nn.Linear, factor: float) -> None:
    init.normal_(projection.weight, std=projection.in_features**-0.5 * factor)
    if projection.bias is not None:
        init_linear_bias_(projection)


def contrastive_loss(logits: Tensor) -> Tensor:
    """Symmetric cross-entropy of a square matrix whose diagonal holds the true pairs (section 2.3, figure 3)."""
    targets = torch.arange(logits.shape[0], device=logits.device)
    return (nn.functional.cross_entropy(logits, targets) + nn.functional.cross_entropy(logits.T, targets)) / 2


def sigmoid_loss(logits: Tensor) -> Tensor:
    """Every pair of a square matrix by itself, true ones on the diagonal (Zhai et al. 2023, algorithm 1)."""
    signs = 2 * torch.eye(logits.shape[0], device=logits.device, dtype=logits.dtype) - 1
    return -nn.functional.logsigmoid(signs * logits).sum() / logits.shape[0]


class HfClipModel(HfClipPreTrainedModel):
    """A whole CLIP: both towers, their projections and the logit scale; a bias too where the loss was the sigmoid's."""

    def __init__(self, config: HfClipConfig):
        super().__init__(config)
        self.text_model = HfClipTextModel._from_config(config.text_config)
        self.vision_model = build_vision_tower(config.vision_config)
        self.visual_projection = build_visual_projection(config.vision_config, config.projection_dim)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        has_bias = config.contrastive_loss == "sigmoid"
        self.logit_bias = nn.Parameter(torch.tensor(float(config.logit_bias_init_value))) if has_bias else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            init.constant_(self.logit_scale, self.config.logit_scale_init_value)
            if self.logit_bias is not None:
                init.constant_(self.logit_bias, self.config.logit_bias_init_value)
            init_projection_(self.text_projection, self.config.initializer_factor)
            init_projection_(self.visual_projection, self.config.initializer_factor)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.text_model.set_input_embeddings(value)

    def encode_image(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Image features as the original returns them: (B, C, Y, X) → (B, D), not normalised."""
        outputs = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True)
        return self.visual_projection(outputs.pooler_output)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Text features as the original returns them: (B, L) → (B, D), not normalised."""
        outputs = self.text_model(input_ids, attention_mask=attention_mask, return_dict=True)
        return self.text_projection(outputs.pooler_output)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """The text tower's output with `pooler_output` projected to (B, D), as in transformers 5."""
        outputs = self.text_model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, **(kwargs | {"return_dict": True})
        )
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """The image tower's output with `pooler_output` projected to (B, D), as in transformers 5."""
        outputs = self.vision_model(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **(kwargs | {"return_dict": True})
        )
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> HfClipOutput:
        """Compare every image with every text; either may be left out, and then only the other is embedded.

        input_ids:    (T, L)        pixel_values: (I, C, Y, X)
        return_loss:  the contrastive loss that the configuration names too, for which image i belongs to text i
        """
        refuse_ignored(self, kwargs)
        if input_ids is None and pixel_values is None:
            raise ValueError("HfClipModel got neither input_ids nor pixel_values; pass at least one of them.")
        if return_loss and (input_ids is None or pixel_values is None or len(input_ids) != len(pixel_values)):
            texts, images = ("no" if batch is None else len(batch) for batch in (input_ids, pixel_values))
            raise ValueError(
                f"return_loss=True needs as many texts as images, pair by pair, but got {texts} texts and {images} "
                f"images."
            )
        if return_loss and input_ids is not None and len(input_ids) == 0:
            raise ValueError("return_loss=True needs at least one pair, but the batch is empty: a loss is a mean.")
        image_embeds = text_embeds = logits_per_image = logits_per_text = loss = None
        vision = text = None
        if pixel_values is not None:
            vision = self.get_image_features(
                pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **(kwargs | {"return_dict": True})
            )
            image_embeds = nn.functional.normalize(vision.pooler_output, dim=-1)
        if input_ids is not None:
            text = self.get_text_features(
                input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **(kwargs | {"return_dict": True}),
            )
            text_embeds = nn.functional.normalize(text.pooler_output, dim=-1)
        if image_embeds is not None and text_embeds is not None:
            scale = self.logit_scale.exp().to(text_embeds.device)
            logits_per_text = text_embeds @ image_embeds.to(text_embeds.device).T * scale  # (T, I)
            if self.logit_bias is not None:
                logits_per_text = logits_per_text + self.logit_bias.to(text_embeds.device)
            logits_per_image = logits_per_text.T
            loss_of = contrastive_loss if self.logit_bias is None else sigmoid_loss
            loss = loss_of(logits_per_text) if return_loss else None
        return HfClipOutput(
            loss=loss,
            logits_per_image=logits_per_image,
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
        )


class HfClipTextModelWithProjection(HfClipPreTrainedModel):
    """The text tower and its projection, for those who need no images."""

    config_class = HfClipTextConfig
    base_model_prefix = "text_model"
    input_modalities = ("text",)
    _keys_to_ignore_on_load_unexpected = [
        r"^vision_model\.",
        r"^visual_projection\.",
        r"^logit_(scale|bias)$",
        _POSITION_COUNTERS,
    ]

    def __init__(self, config: HfClipTextConfig):
        super().__init__(config)
        self.text_model = HfClipTextModel._from_config(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            init_projection_(self.text_projection, self.config.initializer_factor)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> HfClipTextModelOutput:
        """input_ids (B, L) → text_embeds (B, D) and the tower's own outputs."""
        refuse_ignored(self, kwargs)
        outputs = self.text_model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, **(kwargs | {"return_dict": True})
        )
        return HfClipTextModelOutput(
            text_embeds=self.text_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class HfClipVisionModelWithProjection(HfClipPreTrainedModel):
    """The image tower of either kind and its projection, for those who need no texts.

    Takes the composite HfClipConfig, since that is where the kind of the tower is written down.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = [
        r"^text_model\.",
        r"^text_projection\.",
        r"^logit_(scale|bias)$",
        _POSITION_COUNTERS,
    ]

    def __init__(self, config: HfClipConfig):
        super().__init__(config)
        self.vision_model = build_vision_tower(config.vision_config)
        self.visual_projection = build_visual_projection(config.vision_config, config.projection_dim)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            init_projection_(self.visual_projection, self.config.initializer_factor)

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.vision_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor | None = None, interpolate_pos_encoding: bool = False, **kwargs: Any
    ) -> HfClipVisionModelOutput:
        """pixel_values (B, C, Y, X) → image_embeds (B, D) and the tower's own outputs."""
        refuse_ignored(self, kwargs)
        outputs = self.vision_model(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **(kwargs | {"return_dict": True})
        )
        return HfClipVisionModelOutput(
            image_embeds=self.visual_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class HfClipForImageClassification(HfClipPreTrainedModel):
    """An image tower of either kind with a linear head on its pooled feature."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", *_BESIDE_THE_TOWERS]

    def __init__(self, config: HfClipConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vision_model = build_vision_tower(config.vision_config)
        self.classifier = nn.Linear(config.vision_config.hidden_size, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            std = self.config.vision_config.hidden_size**-0.5 * self.config.initializer_factor
            init.normal_(self.classifier.weight, std=std)
            init.zeros_(self.classifier.bias)

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.vision_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Classify pictures.

        pixel_values: (B, C, Y, X)
        labels:       (B,) class ids, or (B, num_labels) floats for several labels at once or regression:
                      `config.problem_type` says which, and is inferred as everywhere in transformers when unset
        returns: logits (B, num_labels), and the loss if there are labels
        """
        refuse_ignored(self, kwargs)
        if labels is not None and len(labels) == 0:
            raise ValueError("labels are empty, and a loss is a mean; leave them out for an empty batch.")
        outputs = self.vision_model(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **(kwargs | {"return_dict": True})
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


# A tower alone reads and writes the names it has within a whole model, as stock CLIP's towers do.
for _tower, _prefix in [
    ("HfClipTextModel", "text_model"),
    ("HfClipViTModel", "vision_model"),
    ("HfClipResNetModel", "vision_model"),
]:
    register_checkpoint_conversion_mapping(_tower, [PrefixChange(prefix_to_remove=_prefix)], overwrite=True)

__all__ = [
    "HfClipForImageClassification",
    "HfClipModel",
    "HfClipOutput",
    "HfClipPreTrainedModel",
    "HfClipResNetModel",
    "HfClipTextModel",
    "HfClipTextModelOutput",
    "HfClipTextModelWithProjection",
    "HfClipViTModel",
    "HfClipVisionModelOutput",
    "HfClipVisionModelWithProjection",
]
