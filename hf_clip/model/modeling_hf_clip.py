"""CLIP as transformers models: two towers, their projections into one space, and a classifier head.

An image tower of either kind returns `last_hidden_state` and `pooler_output`. A projection then maps the pooled vector
into the shared space. For a ViT the pooled vector is the class token after the last LayerNorm. For a ResNet it is the
result of the attention pool before the pool's output projection. That projection, which has a bias, is
`visual_projection` here.

Invariant: for the text tower and the ViTs, parameter names are those of transformers' `CLIPModel`.

Dimensions: B batch, I images, T texts, L text length, P patches and class token, W tower width, D embedding,
C channels, Y × X pixels or cells, K classes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel  # noqa: F401  diffusers looks for it in the file of a class that it loads
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .attention import init_linear_bias_
from .base import BESIDE_THE_TOWERS, POSITION_COUNTERS, HfClipPreTrainedModel, refuse_ignored
from .configuration_hf_clip import HfClipConfig, HfClipResNetConfig, HfClipTextConfig, HfClipViTConfig
from .matryoshka import truncate
from .resnet_tower import HfClipResNetModel
from .text_tower import HfClipTextModel
from .vit_tower import HfClipViTModel


@dataclass
class HfClipOutput(ModelOutput):
    """Output of `HfClipModel`, with the fields of transformers' `CLIPOutput`.

    Fields of a modality that was not given are None.

    Attributes:
        loss: Scalar contrastive loss, with `return_loss=True`: symmetric cross-entropy, or the sigmoid loss.
        logits_per_image: (I, T) cosine similarities times the logit scale, plus the logit bias if there is one.
        logits_per_text: (T, I) the transpose of `logits_per_image`.
        text_embeds: (T, D) text features of length one.
        image_embeds: (I, D) image features of length one.
        text_model_output: Output of the text tower. Its `pooler_output` (T, D) is projected and not normalised.
        vision_model_output: Output of the image tower. Its `pooler_output` (I, D) is projected and not normalised.
    """

    loss: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are not None as a tuple, with the towers' outputs as tuples too."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


@dataclass
class HfClipTextModelOutput(ModelOutput):
    """Output of `HfClipTextModelWithProjection`.

    Attributes:
        text_embeds: (B, D) projected text features, not normalised.
        last_hidden_state: (B, L, W) the text tower's output at every position, after the final LayerNorm.
        hidden_states: With `output_hidden_states=True`, (B, L, W) each: the embeddings and every layer's output.
        attentions: With `output_attentions=True`, (B, H, L, L) each: every layer's attention weights.
    """

    text_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class HfClipVisionModelOutput(ModelOutput):
    """Output of `HfClipVisionModelWithProjection`.

    Attributes:
        image_embeds: (B, D) projected image features, not normalised.
        last_hidden_state: A ViT's output at every position (B, P, W), or a ResNet's last feature map (B, W, Y, X).
        hidden_states: With `output_hidden_states=True`: a ViT's embeddings and every layer's output (B, P, W), or the
            feature maps of a ResNet's stem and stages (B, C, Y, X).
        attentions: With `output_attentions=True`: the attention weights of every layer of a ViT (B, H, P, P), or of a
            ResNet's attention pool (B, H, 1, 1 + cells).
    """

    image_embeds: Tensor | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


def build_vision_tower(config: HfClipViTConfig | HfClipResNetConfig) -> "HfClipViTModel | HfClipResNetModel":
    """Make the image tower that a configuration describes."""
    kind = HfClipResNetModel if config.model_type == HfClipResNetConfig.model_type else HfClipViTModel
    return kind._from_config(config)


def build_visual_projection(config: HfClipViTConfig | HfClipResNetConfig, projection_dim: int) -> nn.Linear:
    """Make the map into the shared space. For a ResNet it is the attention pool's output projection, with a bias."""
    has_bias = config.model_type == HfClipResNetConfig.model_type
    return nn.Linear(config.hidden_size, projection_dim, bias=has_bias)


def init_projection_(projection: nn.Linear, factor: float) -> None:
    """Initialise a projection as the original does: normal with standard deviation 1/√inputs."""
    init.normal_(projection.weight, std=projection.in_features**-0.5 * factor)
    if projection.bias is not None:
        init_linear_bias_(projection)


def contrastive_loss(logits: Tensor) -> Tensor:
    """Compute CLIP's loss: symmetric cross-entropy (Radford et al. 2021, section 2.3, figure 3).

    Args:
        logits: Square matrix of texts and images, whose diagonal holds the true pairs.

    Returns:
        Scalar loss.
    """
    targets = torch.arange(logits.shape[0], device=logits.device)
    return (nn.functional.cross_entropy(logits, targets) + nn.functional.cross_entropy(logits.T, targets)) / 2


def sigmoid_loss(logits: Tensor) -> Tensor:
    """Compute SigLIP's loss: each pair is classified by itself (Zhai et al. 2023, algorithm 1).

    Args:
        logits: Square matrix of texts and images, whose diagonal holds the true pairs.

    Returns:
        Scalar loss, the sum over all pairs divided by the number of texts.
    """
    signs = 2 * torch.eye(logits.shape[0], device=logits.device, dtype=logits.dtype) - 1
    return -nn.functional.logsigmoid(signs * logits).sum() / logits.shape[0]


class HfClipModel(HfClipPreTrainedModel):
    """A whole CLIP model: text tower, image tower, their projections, and the logit scale.

    A model that was trained by the sigmoid loss has a logit bias too.

    Args:
        config: Configuration of both towers and of the space they share.

    Example::

        model = HfClipModel.from_pretrained("org/clip-vit-b32")
        processor = HfClipProcessor.from_pretrained("org/clip-vit-b32")
        inputs = processor(text=["a cat", "a dog"], images=["cat.jpg"], return_tensors="pt")
        with torch.no_grad():
            outputs = model(**inputs)
        outputs.logits_per_image.softmax(dim=-1)  # (1, 2): the probability of each text
    """

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

    def encode_image(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = False, truncate_dim: int | None = None
    ) -> Tensor:
        """Compute image features, as the original's `encode_image` does.

        Args:
            pixel_values: (B, C, Y, X), float, from the image processor.
            interpolate_pos_encoding: Whether to resample the learned positions, so that images of another size than
                the model's `image_size` are accepted.
            truncate_dim: How many of a feature's first numbers to return, for a model that was trained at that width
                (`config.matryoshka_dims`). None: all.

        Returns:
            Features (B, D) or (B, truncate_dim), not normalised.

        Raises:
            ValueError: The images have a size, shape or dtype that the tower does not take; or `truncate_dim` is not a
                whole number from 1 to D.
        """
        outputs = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True)
        return truncate(self.visual_projection(outputs.pooler_output), truncate_dim, self.config)

    def encode_text(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, truncate_dim: int | None = None
    ) -> Tensor:
        """Compute text features, as the original's `encode_text` does.

        Args:
            input_ids: (B, L) token ids, from the tokenizer.
            attention_mask: (B, L), 1 at tokens and 0 at padding. Needed for padding on the left only.
            truncate_dim: How many of a feature's first numbers to return, as in `encode_image`.

        Returns:
            Features (B, D) or (B, truncate_dim), not normalised.

        Raises:
            EndOfTextError: A text has no end-of-text id.
            ValueError: The ids have another shape or dtype, are too many, or lie outside the vocabulary; or
                `truncate_dim` is not a whole number from 1 to D.
        """
        outputs = self.text_model(input_ids, attention_mask=attention_mask, return_dict=True)
        return truncate(self.text_projection(outputs.pooler_output), truncate_dim, self.config)

    def get_text_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        truncate_dim: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Compute text features and return them with the text tower's other outputs, as in transformers 5.

        Args:
            input_ids: (B, L) token ids, from the tokenizer.
            attention_mask: (B, L), 1 at tokens and 0 at padding. Needed for padding on the left only.
            position_ids: (B, L) positions of the tokens. None: counted from the first token that the mask shows.
            truncate_dim: How many of a feature's first numbers to return, as in `encode_image`.
            **kwargs: As for any model of transformers, e.g. `output_hidden_states=True`.

        Returns:
            The text tower's output. Its `pooler_output` holds the features (B, D), projected and not normalised. With
            `config.return_tensors_from_features` the features alone, a tensor.

        Raises:
            EndOfTextError: A text has no end-of-text id.
            ValueError: The ids have another shape or dtype, are too many, or lie outside the vocabulary; or
                `truncate_dim` is not a whole number from 1 to D.
        """
        outputs = self._text_outputs(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            truncate_dim=truncate_dim,
            **(kwargs | ({"return_dict": True} if self.config.return_tensors_from_features else {})),
        )
        return outputs.pooler_output if self.config.return_tensors_from_features else outputs

    @can_return_tuple
    def _text_outputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        truncate_dim: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Run the text tower, and project its `pooler_output`."""
        outputs = self.text_model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, **(kwargs | {"return_dict": True})
        )
        outputs.pooler_output = truncate(self.text_projection(outputs.pooler_output), truncate_dim, self.config)
        return outputs

    def get_image_features(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        truncate_dim: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Compute image features and return them with the image tower's other outputs, as in transformers 5.

        Args:
            pixel_values: (B, C, Y, X), float, from the image processor.
            interpolate_pos_encoding: Whether to resample the learned positions for images of another size.
            truncate_dim: How many of a feature's first numbers to return, as in `encode_image`.
            **kwargs: As for any model of transformers, e.g. `output_hidden_states=True`.

        Returns:
            The image tower's output. Its `pooler_output` holds the features (B, D), projected and not normalised. With
            `config.return_tensors_from_features` the features alone, a tensor.

        Raises:
            ValueError: The images have a size, shape or dtype that the tower does not take; or `truncate_dim` is not a
                whole number from 1 to D.
        """
        outputs = self._image_outputs(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            truncate_dim=truncate_dim,
            **(kwargs | ({"return_dict": True} if self.config.return_tensors_from_features else {})),
        )
        return outputs.pooler_output if self.config.return_tensors_from_features else outputs

    @can_return_tuple
    def _image_outputs(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool = False,
        truncate_dim: int | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Run the image tower, and project its `pooler_output`."""
        outputs = self.vision_model(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **(kwargs | {"return_dict": True})
        )
        outputs.pooler_output = truncate(self.visual_projection(outputs.pooler_output), truncate_dim, self.config)
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
        truncate_dim: int | None = None,
        **kwargs: Any,
    ) -> HfClipOutput:
        """Compare every image with every text. Given images or texts alone, it computes their features.

        Args:
            input_ids: (T, L) token ids, from the tokenizer.
            pixel_values: (I, C, Y, X), float, from the image processor.
            attention_mask: (T, L), 1 at tokens and 0 at padding. Needed for padding on the left only.
            position_ids: (T, L) positions of the tokens. None: counted from the first token that the mask shows.
            return_loss: Whether to compute the contrastive loss that the configuration names. Image i then belongs to
                text i.
            interpolate_pos_encoding: Whether to resample the learned positions for images of another size.
            truncate_dim: How many of the features' first numbers to compare and return, as in `encode_image`.
            **kwargs: As for any model of transformers: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            Logits, features of length one, and the towers' outputs.

        Raises:
            ValueError: Neither modality is given; or a loss is asked for without as many texts as images; or
                `truncate_dim` is not a whole number from 1 to D.
            TypeError: An argument is unknown and would have no effect.
            EndOfTextError: A text has no end-of-text id.
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
        kwargs |= {"truncate_dim": truncate_dim, "return_dict": True}
        image_embeds = text_embeds = logits_per_image = logits_per_text = loss = None
        vision = text = None
        if pixel_values is not None:
            vision = self._image_outputs(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
            image_embeds = nn.functional.normalize(vision.pooler_output, dim=-1)
        if input_ids is not None:
            text = self._text_outputs(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
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
    """The text tower and its projection, to encode texts without the image tower.

    Args:
        config: Configuration of the text tower.
    """

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
        """Compute text features.

        Args:
            input_ids: (B, L) token ids, from the tokenizer.
            attention_mask: (B, L), 1 at tokens and 0 at padding. Needed for padding on the left only.
            position_ids: (B, L) positions of the tokens. None: counted from the first token that the mask shows.
            **kwargs: As for any model of transformers: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `text_embeds` (B, D), not normalised, and the tower's own outputs.

        Raises:
            EndOfTextError: A text has no end-of-text id.
        """
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
    """The image tower and its projection, to encode images without the text tower.

    Args:
        config: Configuration of the whole model, whose `vision_config` says which kind of image tower it is.
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
        """Compute image features.

        Args:
            pixel_values: (B, C, Y, X), float, from the image processor.
            interpolate_pos_encoding: Whether to resample the learned positions for images of another size.
            **kwargs: As for any model of transformers: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `image_embeds` (B, D), not normalised, and the tower's own outputs.
        """
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
    """An image tower with a linear classifier on its pooled vector.

    Args:
        config: Configuration of the whole model. `num_labels` is the number of classes.
    """

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

        Args:
            pixel_values: (B, C, Y, X), float, from the image processor.
            labels: (B,) class ids, or (B, K) floats for several labels per image or for regression.
                `config.problem_type` says which of these. If it is unset, it is inferred from the labels, as in
                transformers.
            interpolate_pos_encoding: Whether to resample the learned positions for images of another size.
            **kwargs: As for any model of transformers: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            Logits (B, K), and the loss if there are labels.

        Raises:
            ValueError: Labels are given for an empty batch.
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
