"""The modified ResNet image tower and its attention pool (Radford et al. 2021, section 2.4).

It differs from the usual ResNet in three ways:

1. The stem has three 3×3 convolutions and an average pool.
2. In place of a convolution with a stride there is an average pool, followed by a convolution without a stride.
3. The final average pool is replaced by one attention step, whose only query is the mean of the feature map.

Dimensions: B batch, C channels, Y × X pixels or cells, H heads, W tower width = 32 × stem width,
L = 1 + Y · X positions (the mean and the cells).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel  # noqa: F401  diffusers looks for it in the file of a class that it loads
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
    """Whether a ResNet should have the channels of a pixel side by side in memory, for images (B, C, Y, X).

    This layout is faster in tensor cores of GPUs. On CPUs it is faster too, since torch converts any other layout to
    it and back around every convolution. But on CPUs the statistics of a batch come out ten times less exact in this
    layout, so it is not used in training mode, which normalises by them.
    """
    device = images.device.type
    in_tensor_cores = device == "cuda" and (images.itemsize == 2 or torch.is_autocast_enabled("cuda"))
    return in_tensor_cores or (device == "cpu" and not norm.training)


def is_unseen(convolution: nn.Module, norm: nn.Module) -> bool:
    """Whether the output of a norm may be overwritten by the next step, because nothing else refers to it.

    A hook on the norm may keep its output, or return a view of it that autograd protects. If the norm was replaced by
    an identity, its output is that of the convolution, so hooks on the convolution count too.
    """
    return not (is_hooked(norm) or is_hooked(convolution))


def relu_of_norm(convolution: nn.Module, norm: nn.Module, feature_map: Tensor) -> Tensor:
    """Compute ReLU(norm(convolution(x))): (B, C, Y, X) → (B, C', Y', X'), the sizes after the convolution."""
    output = norm(convolution(feature_map))
    return output.relu_() if is_unseen(convolution, norm) else output.relu()


def channels_last(images: Tensor) -> Tensor:
    """Return (B, C, Y, X) with the same values and the channels of a pixel side by side in memory."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return images.contiguous(memory_format=torch.channels_last)
    return images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # torch.vmap knows no memory formats


BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


@contextmanager
def frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Let BatchNorm normalise as in training within a `with` block, but keep its running statistics unchanged.

    The batch is counted in copies of the statistics, which are discarded. Counting cannot simply be switched off: a
    replay for gradient checkpointing must save as many tensors for autograd as the first run.
    """
    norms = [module for module in block.modules() if isinstance(module, BatchNorm)]
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
    """Three convolutions (1×1, 3×3, 1×1) and a shortcut: (B, C, Y, X) → (B, 4 × width, Y / stride, X / stride)."""

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

    # Gradient checkpointing runs a block twice. BatchNorm must count the batch in the first run only, or its running
    # statistics would change with checkpointing. transformers stores its checkpoint function in this attribute of
    # every layer; the property wraps it.

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
    """The blocks of one resolution. The first block changes the channels, and the resolution by its stride."""

    def __init__(self, channels: int, width: int, blocks: int, stride: int):
        first = HfClipBottleneck(channels, width, stride)
        super().__init__(first, *(HfClipBottleneck(width * EXPANSION, width, 1) for _ in range(blocks - 1)))


class HfClipAttentionPool(nn.Module):
    """Attention pool: turns the feature map into one vector, (B, W, Y, X) → (B, W).

    The tokens are the mean of the map's cells, followed by the cells. The result is the attention output of the first
    token, the mean. The pool's output projection in the original is the model's `visual_projection` here.
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
        """Return the pooled vector (B, W) and the attention weights (B, H, 1, L), which only eager attention has."""
        height, width = feature_map.shape[-2:]
        cells = feature_map.flatten(2).transpose(1, 2)  # (B, Y * X, W)
        tokens = torch.cat([cells.mean(dim=1, keepdim=True), cells], dim=1)  # (B, L, W)
        positions: Tensor = self.positional_embedding
        if (height, width) != (self.grid_size, self.grid_size):
            positions = resize_position_table(positions, self.grid_size, height, width)
        mixed, weights = self.gather(tokens + positions.to(tokens.dtype), **kwargs)
        return mixed[:, 0], weights

    def gather(self, tokens: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Compute the attention of the first token over all tokens: (B, L, W) → (B, 1, W), and the weights."""
        query = apply_linear(self.q_proj, tokens[:, :1])
        key, value = apply_linear(self.k_proj, tokens), apply_linear(self.v_proj, tokens)
        return attend(self, query, key, value, **kwargs)


class HfClipResNetModel(HfClipPreTrainedModel):
    """The modified ResNet image tower (Radford et al. 2021, section 2.4), up to its output projection.

    Args:
        config: Configuration of the tower.
    """

    config_class = HfClipResNetConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", *BESIDE_THE_TOWERS]
    _input_embed_layer = "conv1"
    _can_record_outputs = {"hidden_states": HfClipResNetStage, "attentions": HfClipAttentionPool}
    # Running statistics in bfloat16 would stop changing once they are near their mean, since updates would be smaller
    # than the resolution of bfloat16. The counter of batches is an integer and must not be named here.
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

        Args:
            pixel_values: (B, C, Y, X), float, from the image processor. Y = X = `image_size`.
            interpolate_pos_encoding: Whether to resample the attention pool's positions, so that images of another
                size are accepted.
            **kwargs: As for any model of transformers: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `last_hidden_state` (B, W, Y / 32, X / 32), the last feature map, and `pooler_output` (B, W). Hidden states
            are the feature maps of the stem and the four stages. Attentions are those of the attention pool,
            (B, H, 1, L).

        Raises:
            ValueError: The images have a size, shape or dtype that the tower does not take.
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
        """Run the stem, three convolutions and an average pool.

        Args:
            images: (B, C, Y, X).

        Returns:
            Feature map (B, stem_width, Y / 4, X / 4).
        """
        if suits_channels_last(images, self.bn1):
            images = channels_last(images)
        feature_map = relu_of_norm(self.conv1, self.bn1, images)
        feature_map = relu_of_norm(self.conv2, self.bn2, feature_map)
        return self.pool(relu_of_norm(self.conv3, self.bn3, feature_map))


def init_attention_pool_(pool: HfClipAttentionPool, factor: float) -> None:
    """Initialise the attention pool as the original does: normal with standard deviation 1/√W."""
    std = pool.config.hidden_size**-0.5 * factor
    init.normal_(pool.positional_embedding, std=std)
    for projection in (pool.q_proj, pool.k_proj, pool.v_proj):
        init.normal_(projection.weight, std=std)
        init_linear_bias_(projection)


def init_convolution_(convolution: nn.Conv2d) -> None:
    """Initialise a convolution by PyTorch's default, as the original does."""
    init.kaiming_uniform_(convolution.weight, a=5**0.5)


def init_last_norm_(block: HfClipBottleneck) -> None:
    """Set the last gain to zero, so that a block starts as its shortcut."""
    init.zeros_(block.bn3.weight)
