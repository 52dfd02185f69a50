"""The causal text tower: token and position embeddings, residual attention layers, the feature at the end of the text.

Dimensions: B batch, L text length, W tower width, H heads.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel  # noqa: F401  diffusers looks for it in the file of a class that it loads
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import HfClipAttention, HfClipEncoder, HfClipEncoderLayer, attention_of, init_linear_bias_
from .base import BESIDE_THE_TOWERS, HfClipPreTrainedModel, refuse_ignored
from .configuration_hf_clip import HfClipTextConfig
from .text_ends import count_positions, find_ends, find_starts, must_wait_for, pool_at


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
        except IndexError:  # raised on CPUs only; on a GPU an assertion of CUDA stops the program
            raise ValueError(
                f"input_ids hold an id outside of this model's vocabulary of {self.token_embedding.num_embeddings}. "
                f"Tokenize with the tokenizer that was saved with the model."
            ) from None
        return tokens + self.position_embedding(position_ids)


def check_input_ids(input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    """Return the ids as (B, L). Raises ValueError for anything but a batch of token ids."""
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


class HfClipTextModel(HfClipPreTrainedModel):
    """The causal text tower (Radford et al. 2021, section 2.4), without projection.

    Args:
        config: Configuration of the tower.
    """

    config_class = HfClipTextConfig
    input_modalities = ("text",)
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", *BESIDE_THE_TOWERS]
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

        Args:
            input_ids: (B, L) token ids, from the tokenizer. Every row holds the end-of-text id.
            attention_mask: (B, L), 1 at tokens and 0 at padding. With padding on the right the features are the same
                without it. With padding on the left it is needed, and the features equal those of padding on the right.
            position_ids: (B, L) positions of the tokens. None: counted from the first token that the mask shows.
            **kwargs: As for any model of transformers: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `last_hidden_state` (B, L, W), and `pooler_output` (B, W), the state at the end of each text. Both are taken
            after the final LayerNorm.

        Raises:
            EndOfTextError: A row has no end-of-text id. On GPUs and in compiled, exported or traced graphs its
                `pooler_output` is NaN instead.
            ValueError: The ids have another shape or dtype, are too many, or lie outside the vocabulary.
        """
        refuse_ignored(self, kwargs)
        input_ids = check_input_ids(input_ids, attention_mask)
        starts = find_starts(attention_mask)
        if position_ids is None and starts is not None:
            position_ids = count_positions(starts, input_ids.shape[-1]).to(input_ids.device)
        hidden_states = self.embeddings(input_ids, position_ids)
        ends, is_endless = find_ends(input_ids, starts, self.config)
        causal_mask = self._causal_mask(hidden_states, attention_mask)
        hidden_states = self.final_layer_norm(self.encoder(hidden_states, causal_mask, **kwargs))
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states, pooler_output=pool_at(hidden_states, ends, is_endless)
        )

    def _causal_mask(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Any:
        """Make the mask in the form that this kind of attention takes. None: attention is causal by itself.

        transformers looks whether a mask hides anything. On a GPU the program would wait for that until everything
        before it is computed, the image tower included. So the values are not looked at there.
        """
        is_read = not must_wait_for(hidden_states) or torch.compiler.is_compiling() or torch.jit.is_tracing()
        if is_read or attention_mask is None or attention_mask.ndim != 2 or attention_of(self.config) != "sdpa":
            return create_causal_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask, past_key_values=None
            )
        return additive_causal_mask(attention_mask.to(hidden_states.device), hidden_states.dtype)


def additive_causal_mask(attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Make a causal mask without reading any value of `attention_mask` (T, L).

    Returns:
        (T, 1, L, L) numbers that are added to the scores: 0 at positions that a query attends to, else -∞. torch would
        make the same of a boolean mask, but in every layer anew. Rows begin at multiples of 8 numbers in memory, as
        its kernels need them.
    """
    texts, length = attention_mask.shape
    places = torch.arange(length, device=attention_mask.device)
    is_attended = (places[:, None] >= places) & attention_mask.ne(0)[:, None, None, :]
    shape = (texts, 1, length, -(-length // 8) * 8)
    scores = torch.full(shape, float("-inf"), dtype=dtype, device=attention_mask.device)[..., :length]
    return scores.masked_fill_(is_attended, 0.0)


def init_text_layer_(layer: HfClipEncoderLayer, num_layers: int, factor: float) -> None:
    """Initialise a text layer as the original does: smaller where the residual stream is written, as in GPT-2."""
    attention, mlp = layer.self_attn, layer.mlp
    width = attention.q_proj.in_features
    write_std = width**-0.5 * (2 * num_layers) ** -0.5 * factor
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        init.normal_(projection.weight, std=width**-0.5 * factor)
        init.zeros_(projection.bias)
    init.normal_(attention.out_proj.weight, std=write_std)
    init.zeros_(attention.out_proj.bias)
    init.normal_(mlp.fc1.weight, std=(2 * width) ** -0.5 * factor)
    init.normal_(mlp.fc2.weight, std=write_std)
    init_linear_bias_(mlp.fc1)
    init_linear_bias_(mlp.fc2)
