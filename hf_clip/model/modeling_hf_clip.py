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
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .attention import init_linear_bias_
from .base import BESIDE_THE_TOWERS, POSITION_COUNTERS, HfClipPreTrainedModel, refuse_ignored
from .configuration_hf_clip import HfClipConfig, HfClipResNetConfig, HfClipTextConfig, HfClipViTConfig
from .resnet_tower import HfClipResNetModel
from .text_tower import HfClipTextModel
from .vit_tower import HfClipViTModel


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
        POSITION_COUNTERS,
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
        POSITION_COUNTERS,
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
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", *BESIDE_THE_TOWERS]

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
        """Classify images.

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
