"""The modified ResNet image tower and its attention pool (Radford et al. 2021, section 2.4).

It differs from the familiar ResNet in three ways: the stem has three 3×3 convolutions and an average pool; wherever a
convolution would have a stride, an average pool precedes a convolution without one; and the final average pool is one
attention step whose only query is the mean of the feature map.

Dimensions: B batch, C channels, Y × X pixels or feature-map cells, H heads, W = 32 × stem width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import attend, init_linear_bias_
from .base import BESIDE_THE_TOWERS, HfClipPreTrainedModel, refuse_ignored
from .configuration_hf_clip import HfClipResNetConfig
from .linear_map import apply_linear, is_hooked
from .position_table import check_image_size, resize_position_table

EXPANSION = 4
"""A bottleneck's output has four times the channels of its 3×3 convolution."""


def suits_channels_last(images: Tensor, norm: nn.BatchNorm2d) -> bool:
    """Whether a ResNet on (B, C, Y, X) is better off where the channels of a pixel lie side by side in memory.

    It is faster in GPUs' tensor cores, and on CPUs, which bring other layouts into this one and back around every
    convolution. But there a batch's statistics come out ten times less exact, so not where they are normalised by.
    """
    device = images.device.type
    in_tensor_cores = device == "cuda" and (images.itemsize == 2 or torch.is_autocast_enabled("cuda"))
    return in_tensor_cores or (device == "cpu" and not norm.training)


def is_unseen(convolution: nn.Module, norm: nn.Module) -> bool:
    """Whether nobody else has a norm's output, so that what follows may be computed in its place.

    A hook may keep it, or hand it on as a view that autograd protects. A norm may have been replaced by nothing at all,
    and its output be the convolution's.
    """
    return not (is_hooked(norm) or is_hooked(convolution))


def relu_of_norm(convolution: nn.Module, norm: nn.Module, feature_map: Tensor) -> Tensor:
    """max(0, norm(convolution(x))): (B, C, Y, X) → (B, C', Y', X')."""
    output = norm(convolution(feature_map))
    return output.relu_() if is_unseen(convolution, norm) else output.relu()


def channels_last(images: Tensor) -> Tensor:
    """The same (B, C, Y, X) with the channels of a pixel side by side in memory."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return images.contiguous(memory_format=torch.channels_last)
    return images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # torch.vmap knows no memory formats


@contextmanager
def frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Within this context BatchNorm normalises as in training, and counts the batch in copies that are thrown away.

    Autograd must save as many tensors as without, so the statistics cannot just be switched off.
    """
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [dict(norm.named_buffers()) for norm in norms]
    try:
        for norm, buffers in zip(norms, kept, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer.clone())
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            for name, buffer in buffers.items():
                setattr(norm, name, buffer)


class HfClipBottleneck(GradientCheckpointingLayer):
    """1×1, 3×3, 1×1 convolutions around a shortcut: (B, C, Y, X) → (B, 4 × width, Y / stride, X / stride)."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * EXPANSION, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * EXPANSION)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = None
        if stride > 1 or channels != width * EXPANSION:
            shortcut = nn.Conv2d(channels, width * EXPANSION, 1, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(width * EXPANSION))

    def forward(self, feature_map: Tensor) -> Tensor:
        branch = relu_of_norm(self.conv1, self.bn1, feature_map)
        branch = relu_of_norm(self.conv2, self.bn2, branch)
        branch = self.bn3(self.conv3(self.pool(branch)))
        shortcut = feature_map if self.downsample is None else self.downsample(self.pool(feature_map))
        is_ours = is_unseen(self.conv3, self.bn3)
        return (branch.add_(shortcut) if is_ours else branch + shortcut).relu_()

    # Gradient checkpointing runs a block twice. BatchNorm must count the batch in the first run only, or
    # its running statistics would depend on whether memory was saved. transformers stores its checkpoint
    # function in this attribute of every layer, so the rule is put around it here.

    @property
    def _gradient_checkpointing_func(self) -> Callable:
        if "checkpoint_function" not in self.__dict__:
            raise AttributeError("Gradient checkpointing has not been enabled.")
        return partial(self._checkpoint_counting_once, self.__dict__["checkpoint_function"])

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Callable) -> None:
        self.__dict__["checkpoint_function"] = function

    @_gradient_checkpointing_func.deleter
    def _gradient_checkpointing_func(self) -> None:
        del self.__dict__["checkpoint_function"]

    def _checkpoint_counting_once(self, checkpoint: Callable, forward: Callable, *inputs: Tensor) -> Tensor:
        replay = False

        def run(*inputs: Tensor) -> Tensor:
            nonlocal replay
            if replay:
                with frozen_statistics(self):
                    return forward(*inputs)
            replay = True
            return forward(*inputs)

        return checkpoint(run, *inputs)


class HfClipResNetStage(nn.Sequential):
    """Blocks of one resolution; the first one changes channels and, by its stride, the resolution."""

    def __init__(self, channels: int, width: int, blocks: int, stride: int):
        first = HfClipBottleneck(channels, width, stride)
        super().__init__(first, *(HfClipBottleneck(width * EXPANSION, width, 1) for _ in range(blocks - 1)))


class HfClipAttentionPool(nn.Module):
    """One attention step that gathers the feature map into a vector: (B, W, Y, X) → (B, W).

    Tokens are the map's cells preceded by their mean; the mean's attention output is the result. The
    original's output projection is not here: it is the model's `visual_projection`.
    """

    def __init__(self, config: HfClipResNetConfig):
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.is_causal = False
        self.grid_size = config.grid_size
        self.positional_embedding = nn.Parameter(torch.empty(1 + config.grid_size**2, config.hidden_size))
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, feature_map: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Returns the pooled vector (B, W) and the attention weights (B, H, 1, 1 + Y * X), if there are any."""
        height, width = feature_map.shape[-2:]
        cells = feature_map.flatten(2).transpose(1, 2)  # (B, Y * X, W)
        tokens = torch.cat([cells.mean(dim=1, keepdim=True), cells], dim=1)  # (B, 1 + Y * X, W)
        positions: Tensor = self.positional_embedding
        if (height, width) != (self.grid_size, self.grid_size):
            positions = resize_position_table(positions, self.grid_size, height, width)
        mixed, weights = self.gather(tokens + positions.to(tokens.dtype), **kwargs)
        return mixed[:, 0], weights

    def gather(self, tokens: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """The first token's attention over all: (B, 1 + Y * X, W) → (B, 1, W) and the weights."""
        query = apply_linear(self.q_proj, tokens[:, :1])
        key, value = apply_linear(self.k_proj, tokens), apply_linear(self.v_proj, tokens)
        return attend(self, query, key, value, **kwargs)


class HfClipResNetModel(HfClipPreTrainedModel):
    """The modified ResNet image tower, as far as the attention pool's output projection."""

    config_class = HfClipResNetConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", *BESIDE_THE_TOWERS]
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
        """Encode images.

        pixel_values:             (B, C, Y, X)  normalised by HfClipImageProcessor; Y = X = image_size unless ...
        interpolate_pos_encoding: ... the attention pool's positions are to be resampled to the images' own size
        returns: last_hidden_state (B, W, Y / 32, X / 32) and pooler_output (B, W); hidden states are the stem's
            and the four stages' feature maps, attentions the attention pool's (B, heads, 1, 1 + cells)
        """
        refuse_ignored(self, kwargs)
        images = check_image_size(
            pixel_values, self.config, interpolate_pos_encoding, smallest=self.config.total_stride
        )
        hidden_states = self.stem(images.to(self.conv1.weight.dtype))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            hidden_states = stage(hidden_states)
        pooled, _ = self.attnpool(hidden_states, **kwargs)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=pooled)

    def stem(self, images: Tensor) -> Tensor:
        """Three convolutions and a pool: (B, C, Y, X) → (B, stem_width, Y / 4, X / 4)."""
        if suits_channels_last(images, self.bn1):
            images = channels_last(images)
        feature_map = relu_of_norm(self.conv1, self.bn1, images)
        feature_map = relu_of_norm(self.conv2, self.bn2, feature_map)
        return self.pool(relu_of_norm(self.conv3, self.bn3, feature_map))


def init_attention_pool_(pool: HfClipAttentionPool, factor: float) -> None:
    """The original's initialisation: normal with deviation 1/√W for weights and positions."""
    std = pool.config.hidden_size**-0.5 * factor
    init.normal_(pool.positional_embedding, std=std)
    for projection in (pool.q_proj, pool.k_proj, pool.v_proj):
        init.normal_(projection.weight, std=std)
        init_linear_bias_(projection)


def init_convolution_(convolution: nn.Conv2d) -> None:
    """PyTorch's default, which the original leaves in place."""
    init.kaiming_uniform_(convolution.weight, a=5**0.5)


def init_last_norm_(block: HfClipBottleneck) -> None:
    """Zero the last gain, so that every residual block starts as its shortcut."""
    init.zeros_(block.bn3.weight)
