"""The Vision Transformer image tower: patches as tokens, residual attention layers, the class token as the feature.

Dimensions: B batch, C channels, Y × X pixels, S patch side, P patches and class token, W tower width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel  # noqa: F401  diffusers looks for it in the file of a class that it loads
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import HfClipAttention, HfClipEncoder, HfClipEncoderLayer, init_linear_bias_
from .base import BESIDE_THE_TOWERS, HfClipPreTrainedModel, refuse_ignored
from .configuration_hf_clip import HfClipViTConfig
from .linear_map import apply_patch_embedding
from .position_table import check_image_size, resize_position_table


class HfClipViTEmbeddings(nn.Module):
    """Embed patches as tokens, put the class token before them, and add positions: (B, C, Y, X) → (B, P, W)."""

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
        # The module is called, its weight is not read: offloaded weights are only loaded by a call of their module.
        cells = torch.arange(1 + self.grid_size**2, device=patches.device)
        positions = self.position_embedding(cells)
        if (height, width) != (self.grid_size, self.grid_size):
            positions = resize_position_table(positions, self.grid_size, height, width)
        class_token = self.class_embedding.expand(patches.shape[0], 1, -1)
        return torch.cat([class_token, patches.flatten(2).transpose(1, 2)], dim=1) + positions


class HfClipViTModel(HfClipPreTrainedModel):
    """The Vision Transformer image tower (Radford et al. 2021, section 2.4), without projection.

    Args:
        config: Configuration of the tower.
    """

    config_class = HfClipViTConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", *BESIDE_THE_TOWERS]
    _input_embed_layer = "patch_embedding"
    _can_record_outputs = {"hidden_states": HfClipEncoderLayer, "attentions": HfClipAttention}

    def __init__(self, config: HfClipViTConfig):
        super().__init__(config)
        self.embeddings = HfClipViTEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # spelled as in stock files
        self.encoder = HfClipEncoder(config, is_causal=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, HfClipViTEmbeddings):
            std = self.config.hidden_size**-0.5 * self.config.initializer_factor
            init.normal_(module.class_embedding, std=std)
            init.normal_(module.position_embedding.weight, std=std)
            init.kaiming_uniform_(module.patch_embedding.weight, a=5**0.5)  # PyTorch's default
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
        """Encode images.

        Args:
            pixel_values: (B, C, Y, X), float, from the image processor. Y = X = `image_size`.
            interpolate_pos_encoding: Whether to resample the learned positions, so that images of another size are
                accepted.
            **kwargs: As for any model of transformers: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `last_hidden_state` (B, P, W), and `pooler_output` (B, W), the class token after the last LayerNorm.

        Raises:
            ValueError: The images have a size, shape or dtype that the tower does not take.
        """
        refuse_ignored(self, kwargs)
        images = check_image_size(pixel_values, self.config, interpolate_pos_encoding, smallest=self.config.patch_size)
        hidden_states = self.encoder(self.pre_layrnorm(self.embeddings(images)), **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=self.post_layernorm(hidden_states[:, 0])
        )


def init_vit_layer_(layer: HfClipEncoderLayer) -> None:
    """Initialise a ViT layer as the original does, which takes PyTorch's default for each part.

    `nn.MultiheadAttention` draws q, k and v as one (3W, W) matrix with Xavier's bound √(6 / (W + 3W)).
    """
    attention, mlp = layer.self_attn, layer.mlp
    width = attention.q_proj.in_features
    bound = (6 / (width + 3 * width)) ** 0.5
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        init.uniform_(projection.weight, -bound, bound)
        init.zeros_(projection.bias)
    for linear in (attention.out_proj, mlp.fc1, mlp.fc2):
        init.kaiming_uniform_(linear.weight, a=5**0.5)
    init.zeros_(attention.out_proj.bias)
    init_linear_bias_(mlp.fc1)
    init_linear_bias_(mlp.fc2)
