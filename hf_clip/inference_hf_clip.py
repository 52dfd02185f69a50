"""What `optimize_for_inference()` puts in the place of a model's layers: fewer, fused, with weights in oneDNN's order.

What it changes cannot be undone and cannot be trained, so an optimized model refuses to be trained, saved or moved.
Two things are public arithmetic: BatchNorm goes into the convolution before it, and the attention pool, which has one
query, multiplies that query instead of every key and value. On CPUs large batches are cut into parts that stay in the
cache, `encode_text` leaves out padding, and bfloat16 attention of pictures may be two products.

Also on CPUs, weights are brought into the order of memory that oneDNN wants once instead of in every call, and
activations are computed in the same pass as the product. torch has that only as the operators that its own compiler
emits, `torch.ops.mkldnn`, so they are tried out and timed before they are used: where they are missing, compute
something else or gain less than `LEAST_GAIN`, the public ones stay.

Dimensions: B batch, L positions, C channels, D width, H heads, E = D / H.
"""

import copy
import time
from collections.abc import Callable
from functools import cache
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import AttentionInterface

from .resnet_hf_clip import HfClipAttentionPool, HfClipBottleneck, HfClipResNetStage
from .transformer_hf_clip import HfClipEncoderLayer, HfClipLinear, HfClipMLP

ROWS_AT_ONCE = 1600
"""Positions that a transformer works on at once: more fall out of the processor's cache between layers."""

PIXELS_AT_ONCE = 8 * 224 * 224
"""The same for a ResNet, in pixels of its input."""

LEAST_GAIN = 1.05
"""How many times as fast something has to be, measured on this processor, to take a public operator's place."""

FUSED_ACTIVATIONS = {"quick_gelu": ("swish", ""), "gelu": ("gelu", "none")}
"""`hidden_act` → oneDNN's name of it and which algorithm; quick_gelu is swish of 1.702 x, divided by 1.702."""

PRODUCT_ATTENTION = "hf_clip_products"

LEFT = "left as before"
"""In the lines of a report that say what was not done."""

STAGES = ("layer1", "layer2", "layer3", "layer4")


class OptimizedModelError(RuntimeError):
    """An optimized model was asked for what it cannot do any more."""


# --- the operators --------------------------------------------------------------------------------------------------


@cache
def has_packed_operators(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN's fused operators for this type here, and they compute what is expected."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    rows, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in ((64, 48), (32, 48), (32,)))
    maps, kernel = (torch.randn(size, generator=generator).to(dtype) for size in ((2, 16, 6, 6), (16, 16, 3, 3)))
    maps = maps.contiguous(memory_format=torch.channels_last)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(rows))
        for name, algorithm in FUSED_ACTIVATIONS.values():
            found = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, name, [], algorithm).float()
            products = functional.linear(rows.float(), weight.float(), bias.float())
            expected = functional.silu(products) if name == "swish" else functional.gelu(products)
            if not _is_close(found, expected, tolerance):
                return False
        convolution = InferenceConv2d(kernel, bias[:16], (1, 1), (1, 1), has_relu=True, is_fused=True)
        products = functional.conv2d(maps.float(), kernel.float(), bias[:16].float(), padding=1)
        ends = (convolution(maps).float(), convolution.add_to(maps.clone(), maps).float())
        expecteds = (products.relu(), (products + maps.float()).relu())
        return all(_is_close(found, expected, tolerance) for found, expected in zip(ends, expecteds, strict=True))
    except (RuntimeError, AttributeError, NotImplementedError, TypeError):
        return False


def _is_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


def _seconds(work: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times[1:])


@torch.no_grad()
def gain_of_packing(linear: nn.Linear) -> float:
    """How many times as fast this linear map is with its weight in oneDNN's order, measured here."""
    rows = torch.zeros(ROWS_AT_ONCE // 2, linear.in_features, dtype=linear.weight.dtype)
    packed = PackedLinear(linear)
    return _seconds(lambda: linear(rows)) / _seconds(lambda: packed(rows))


@torch.no_grad()
def gain_of_fusing(block: HfClipBottleneck) -> float:
    """How many times as fast a ResNet's block is with sums and activations in the convolutions' pass, measured here.

    block: of the first stage, whose maps are the largest: what is saved is another way through the memory
    """
    side = 56
    count = PIXELS_AT_ONCE // (4 * side) ** 2
    maps = torch.zeros(count, block.conv1.in_channels, side, side, dtype=block.conv1.weight.dtype)
    maps = maps.contiguous(memory_format=torch.channels_last)
    public, fused = (InferenceBottleneck(block, is_fused) for is_fused in (False, True))
    return _seconds(lambda: public(maps), 11) / _seconds(lambda: fused(maps), 11)


@torch.no_grad()
def gain_of_products(heads: int, width: int, length: int, dtype: torch.dtype) -> float:
    """How many times as fast attention is as two products than as torch's fused kernel, measured here."""
    parts = torch.zeros(8, heads, length, width, dtype=dtype)
    kernel = _seconds(lambda: functional.scaled_dot_product_attention(parts, parts, parts))
    return kernel / _seconds(lambda: attention_by_products(nn.Identity(), parts, parts, parts, None, 0.125))


# --- layers ---------------------------------------------------------------------------------------------------------


def _check_use(input: Tensor) -> None:
    if input.requires_grad and torch.is_grad_enabled():
        raise OptimizedModelError(
            "This model was optimized for inference and gives no gradients; load it again for them."
        )
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        raise OptimizedModelError(
            "This model was optimized for inference and can be neither compiled nor exported; load it again for that."
        )


class PackedLinear(nn.Module):
    """A linear map with its weight in oneDNN's order, and an activation if there is one: (…, inputs) → (…, outputs).

    scale: what the weight is multiplied by, and if `scales_bias` the bias too
    """

    def __init__(
        self,
        linear: nn.Linear,
        activation: tuple[str, str] = ("none", ""),
        *,
        scale: float = 1.0,
        scales_bias: bool = True,
    ):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype, self.activation = linear.weight.dtype, activation
        # Plain attributes: oneDNN's tensors can neither be saved nor moved.
        weight = (linear.weight.detach().float() * scale).to(self.dtype)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_AT_ONCE)
        self.bias = None if linear.bias is None else linear.bias.detach() * (scale if scales_bias else 1)

    def forward(self, input: Tensor) -> Tensor:
        _check_use(input)
        name, algorithm = self.activation
        input = input.to(self.dtype)
        return torch.ops.mkldnn._linear_pointwise(input, self.packed, self.bias, name, [], algorithm)


class PackedMLP(nn.Module):
    """HfClipMLP with its activation computed in the pass of the first product."""

    def __init__(self, mlp: HfClipMLP, hidden_act: str):
        super().__init__()
        slope = 1.702 if hidden_act == "quick_gelu" else 1.0
        self.fc1 = PackedLinear(mlp.fc1, FUSED_ACTIVATIONS[hidden_act], scale=slope)
        self.fc2 = PackedLinear(mlp.fc2, scale=1 / slope, scales_bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.fc2(self.fc1(hidden_states))


class InferenceConv2d(nn.Module):
    """A convolution with BatchNorm's gain and shift in it, and ReLU after it: (B, C, Y, X) → (B, C', Y', X').

    Fused, ReLU and the sum with a shortcut are computed in the pass of the convolution.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        has_relu: bool,
        is_fused: bool,
    ):
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.stride, self.padding, self.has_relu, self.is_fused = stride, padding, has_relu, is_fused

    @classmethod
    @torch.no_grad()
    def fold(cls, convolution: Any, norm: Any, has_relu: bool, is_fused: bool) -> "InferenceConv2d":
        """y = gain · (w * x − mean) / √(variance + ε) + shift as one convolution, computed in float32 or better."""
        exact = torch.promote_types(convolution.weight.dtype, torch.float32)
        gain = norm.weight.to(exact) / (norm.running_var.to(exact) + norm.eps).sqrt()
        weight = convolution.weight.to(exact) * gain[:, None, None, None]
        bias = norm.bias.to(exact) - norm.running_mean.to(exact) * gain
        dtype = convolution.weight.dtype
        return cls(weight.to(dtype), bias.to(dtype), convolution.stride, convolution.padding, has_relu, is_fused)

    def _arguments(self) -> tuple[Any, ...]:
        return self.weight, self.bias, self.padding, self.stride, (1, 1), 1

    def forward(self, input: Tensor) -> Tensor:
        if self.is_fused:
            _check_use(input)
            name = "relu" if self.has_relu else "none"
            return torch.ops.mkldnn._convolution_pointwise(input, *self._arguments(), name, [], "")
        output = functional.conv2d(input, self.weight, self.bias, self.stride, self.padding)
        return output.relu_() if self.has_relu else output

    def add_to(self, sum: Tensor, input: Tensor) -> Tensor:
        """max(0, sum + this convolution of `input`), which may take the place of `sum`."""
        if self.is_fused:
            _check_use(input)
            end: tuple[Any, ...] = ("add", 1.0, "relu", [], "")
            return torch.ops.mkldnn._convolution_pointwise_.binary(sum, input, *self._arguments(), *end)
        return functional.conv2d(input, self.weight, self.bias, self.stride, self.padding).add_(sum).relu_()


class InferenceBottleneck(nn.Module):
    """HfClipBottleneck without BatchNorm; its result takes the memory of its input where the input is the shortcut."""

    def __init__(self, block: HfClipBottleneck, is_fused: bool):
        super().__init__()
        self.conv1 = InferenceConv2d.fold(block.conv1, block.bn1, True, is_fused)
        self.conv2 = InferenceConv2d.fold(block.conv2, block.bn2, True, is_fused)
        self.conv3 = InferenceConv2d.fold(block.conv3, block.bn3, False, is_fused)
        self.pool = block.pool
        self.downsample = None
        if block.downsample is not None:
            convolution, norm = block.downsample
            self.downsample = InferenceConv2d.fold(convolution, norm, False, is_fused)

    def forward(self, feature_map: Tensor) -> Tensor:
        branch = self.pool(self.conv2(self.conv1(feature_map)))
        shortcut = feature_map if self.downsample is None else self.downsample(self.pool(feature_map))
        return self.conv3.add_to(shortcut, branch)


class SingleQueryAttentionPool(HfClipAttentionPool):
    """The attention pool for its one query q: q · (K x) = (Kᵀ q) · x, and Σ aᵢ V xᵢ = V Σ aᵢ xᵢ.

    So no key and no value is computed, but a direction and a mean of the cells for each head. What the keys' bias adds
    is the same for all cells, and the softmax takes it out again.
    """

    def gather(self, tokens: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        batch, _, width = tokens.shape
        by_head = (self.num_heads, width // self.num_heads, width)
        query = self.q_proj(tokens[:, 0]).view(batch, *by_head[:2]).transpose(0, 1)  # (H, B, E)
        directions = (query * by_head[1] ** -0.5) @ self.k_proj.weight.view(by_head)  # (H, B, D)
        weights = (directions.transpose(0, 1) @ tokens.transpose(1, 2)).softmax(dim=-1)  # (B, H, L)
        means = (weights @ tokens).transpose(0, 1)  # (H, B, D)
        mixed = means @ self.v_proj.weight.view(by_head).transpose(1, 2)  # (H, B, E)
        return mixed.transpose(0, 1).reshape(batch, 1, width) + self.v_proj.bias, weights[:, :, None]


def attention_by_products(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as two matrix products, which in bfloat16 on CPUs run twice as fast as torch's fused kernel.

    Shapes are those of `eager_attention`; there is no mask, since this is for the image tower alone.
    """
    weights = ((query * scaling) @ key.transpose(-1, -2)).softmax(dim=-1)
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register(PRODUCT_ATTENTION, attention_by_products)


# --- the whole model ------------------------------------------------------------------------------------------------


def _is_plain(module: nn.Module) -> bool:
    """An ordinary linear map: no adapter, no quantised weight, nothing hooked to it."""
    is_linear = type(module) in (nn.Linear, HfClipLinear) and type(module.weight) is nn.Parameter
    return is_linear and not _is_hooked(module)


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


FOLDED = (nn.Conv2d, nn.AvgPool2d, nn.Identity, nn.Sequential, HfClipBottleneck, HfClipResNetStage)


def _find_changed(tower: Any) -> str | None:
    """The name of the first part of a ResNet that is hooked, or not as it was made: an adapter, say."""
    for root in [*(f"{kind}{place}" for kind in ("conv", "bn") for place in (1, 2, 3)), *STAGES]:
        for name, module in tower.get_submodule(root).named_modules(prefix=root):
            if _is_hooked(module) or not (type(module) in FOLDED or isinstance(module, nn.BatchNorm2d)):
                return name
    return None


def _pack_transformer_(model: nn.Module) -> list[str]:
    gains: dict[tuple[int, ...], float] = {}

    def pays(linear: nn.Linear) -> bool:
        shape = (linear.in_features, linear.out_features)
        if shape not in gains:
            gains[shape] = gain_of_packing(linear)
        return gains[shape] >= LEAST_GAIN

    count = 0
    for layer in [module for module in model.modules() if isinstance(module, HfClipEncoderLayer)]:
        attention, mlp = layer.self_attn, layer.mlp
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            if _is_plain(linear := getattr(attention, name)) and pays(linear):
                setattr(attention, name, PackedLinear(linear))
                count += 1
        hidden_act = attention.config.hidden_act
        if (
            hidden_act in FUSED_ACTIVATIONS
            and not (_is_hooked(mlp) or _is_hooked(mlp.activation_fn))
            and _is_plain(mlp.fc1)
            and _is_plain(mlp.fc2)
            and pays(mlp.fc1)
            and pays(mlp.fc2)
        ):
            layer.mlp = PackedMLP(mlp, hidden_act)  # type: ignore[assignment]
            count += 2
    if not gains:
        return []
    done = []
    if count:
        least, most = min(gain for gain in gains.values() if gain >= LEAST_GAIN), max(gains.values())
        how = f"{least:.2f} to {most:.2f} times as fast here"
        if any(isinstance(module, PackedMLP) for module in model.modules()):
            how += ", activations fused into them"
        done.append(f"{count} linear maps brought into oneDNN's order of memory, {how}")
    for (inputs, outputs), gain in gains.items():
        if gain < LEAST_GAIN:
            done.append(f"linear maps {inputs} → {outputs} {LEFT}; in oneDNN's order {gain:.2f} times as fast")
    return done


def _fold_resnet_(tower: Any, has_operators: bool) -> list[str]:
    if changed := _find_changed(tower):
        return [f"the ResNet {LEFT}: {changed} is hooked or adapted"]
    gain = gain_of_fusing(tower.layer1[-1]) if has_operators else 0.0
    is_fused = gain >= LEAST_GAIN
    count = sum(isinstance(module, nn.BatchNorm2d) for module in tower.modules())
    for number in (1, 2, 3):
        convolution, norm = getattr(tower, f"conv{number}"), getattr(tower, f"bn{number}")
        setattr(tower, f"conv{number}", InferenceConv2d.fold(convolution, norm, False, is_fused))  # ReLU follows
        setattr(tower, f"bn{number}", nn.Identity())
    for stage in map(tower.get_submodule, STAGES):
        for index, block in enumerate(stage):
            stage[index] = InferenceBottleneck(block, is_fused)
    pool = tower.attnpool
    done = [f"BatchNorm folded into {count} convolutions"]
    if has_operators:
        how = "computed in the convolutions' pass," if is_fused else "not computed in the convolutions' pass, which is"
        done.append(f"ReLU and sums {how} {gain:.2f} times as fast here")
    if all(_is_plain(linear) for linear in (pool.q_proj, pool.k_proj, pool.v_proj)):
        pool.__class__ = SingleQueryAttentionPool
        done.append("the attention pool multiplies its one query instead of all keys and values")
    return done


def _work_in_parts_(tower: Any, rows_at_once: Callable[[Tensor], int]) -> None:
    """Let a tower take so many rows of its input at a time; where all layers' outputs are asked for, all at once."""
    whole = tower.forward
    captured = ("output_hidden_states", "output_attentions")

    def forward(input: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        input = kwargs.pop(tower.main_input_name, input)
        is_simple = isinstance(input, Tensor) and input.ndim > 1 and input.numel() > 0 and not args
        is_simple = is_simple and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        is_simple = is_simple and not any(isinstance(value, Tensor) for value in kwargs.values())
        is_simple = is_simple and not any(kwargs.get(name, getattr(tower.config, name, False)) for name in captured)
        if not is_simple or len(input) <= (size := rows_at_once(input)):
            return whole(input, *args, **kwargs)
        as_dict = kwargs.pop("return_dict", tower.config.return_dict) is not False
        parts = [whole(part, return_dict=True, **kwargs) for part in input.split(size)]
        fields = ("last_hidden_state", "pooler_output")
        output = BaseModelOutputWithPooling(**{name: torch.cat([part[name] for part in parts]) for name in fields})
        return output if as_dict else output.to_tuple()

    tower.forward = forward


def _encode_texts_by_length_(model: Any) -> None:
    """Let `encode_text` sort its texts by length and leave out the columns behind their ends."""
    whole = model.encode_text
    end_of_text_id = model.config.text_config.eos_token_id

    def encode_text(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        is_simple = isinstance(input_ids, Tensor) and input_ids.ndim == 2 and min(input_ids.shape) > 0
        is_simple = is_simple and not torch.jit.is_tracing()
        lengths = (input_ids == end_of_text_id).int().argmax(dim=1) + 1 if is_simple else torch.zeros(0)
        if is_simple and attention_mask is not None:
            is_simple = attention_mask.shape == input_ids.shape and _hides_only_ends(attention_mask, lengths)
        if not is_simple:
            return whole(input_ids, attention_mask)
        lengths, order = lengths.sort()
        features, first = [], 0
        while first < len(order):
            # As many texts as make no more than so many positions; the last of a part is its longest.
            positions = torch.arange(1, len(order) - first + 1) * lengths[first:]
            last = first + max(1, int((positions <= ROWS_AT_ONCE).sum()))
            features.append(whole(input_ids[order[first:last], : int(lengths[last - 1])]))
            first = last
        return torch.cat(features)[order.argsort()]

    model.encode_text = encode_text


def _hides_only_ends(attention_mask: Tensor, lengths: Tensor) -> bool:
    """Whether a mask shows each text to its end, and hides what follows, which changes nothing that comes before."""
    shown = attention_mask.to(torch.bool)
    is_needed = torch.arange(shown.shape[1], device=shown.device) < lengths[:, None]
    return bool((shown | ~is_needed).all())


@torch.no_grad()
def optimize_(model: Any) -> list[str]:
    """Do to a model what is described above; returns what was done, in words."""
    places = {parameter.device.type for parameter in model.parameters()}
    mapped = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if len(places) > 1 or len(mapped) > 1 or "meta" in places:
        raise OptimizedModelError(
            f"This model is spread over {', '.join(sorted(places | mapped))}, and only one that is whole on one device "
            f"can be optimized: load it without device_map."
        )
    on_cpu = places == {"cpu"}
    has_operators = on_cpu and has_packed_operators(model.dtype)
    done: list[str] = []
    for tower in [module for module in model.modules() if hasattr(module, "attnpool")]:
        done += _fold_resnet_(tower, has_operators)
    if has_operators:
        done += _pack_transformer_(model)
    if on_cpu:
        done += _suit_the_cache_(model)
    return done


def _suit_the_cache_(model: Any) -> list[str]:
    """On a CPU: work on as much at once as its cache holds, and on no padding."""
    for tower in [module for module in model.modules() if hasattr(module, "attnpool") or hasattr(module, "encoder")]:
        kind = tower.config.model_type
        if kind == "hf_clip_resnet":
            _work_in_parts_(tower, lambda pictures: max(1, PIXELS_AT_ONCE // pictures[0, 0].numel()))
        elif kind == "hf_clip_vit":
            area = tower.config.patch_size**2
            _work_in_parts_(tower, lambda pictures: max(1, ROWS_AT_ONCE // (1 + pictures[0, 0].numel() // area)))  # noqa: B023
            if model.dtype == torch.bfloat16 and tower.config._attn_implementation == "sdpa":
                heads, length = tower.config.num_attention_heads, 1 + tower.config.image_size**2 // area
                width = tower.config.hidden_size // heads
                if gain_of_products(heads, width, length, model.dtype) >= LEAST_GAIN:
                    _attend_by_products_(tower)
        else:
            _work_in_parts_(tower, lambda ids: max(1, ROWS_AT_ONCE // ids.shape[1]))
    done = [f"large batches cut into parts that stay in the cache ({ROWS_AT_ONCE} positions of a transformer)"]
    if hasattr(model, "encode_text"):
        _encode_texts_by_length_(model)
        done.append("encode_text sorts its texts by length and computes no padding")
    return done


def _attend_by_products_(tower: Any) -> None:
    shared = tower.config  # with other models, perhaps
    config = copy.deepcopy(shared)
    config._attn_implementation = PRODUCT_ATTENTION
    for module in tower.modules():
        if getattr(module, "config", None) is shared:
            module.config = config


class Optimizable:
    """What a model is asked by `optimize_for_inference`, and what it refuses afterwards."""

    optimizations: list[str] | None = None
    """What `optimize_for_inference` has done, in words; None before it."""

    def optimize_for_inference(self: Any) -> list[str]:
        """Make this model as fast as it can be made for inference on the device and in the type it has now.

        BatchNorm goes into convolutions, weights into the processor's order of memory, and large batches are cut into
        parts that stay in its cache; what doesn't pay on this processor is left out, and so are layers with hooks or
        adapters. Outputs change by at most 1e-5 relative in float32, and by rounding in half precision. It cannot be
        undone: the model cannot be trained, saved, exported or moved any more, other hooks may see parts of a batch, or
        tensors that later layers overwrite, and autocast does not reach it: bring it into its type before.

        returns: what was done and what was left as it is, in words, which `optimizations` holds too. Where nothing
                 was done the model is as it was, and `optimizations` None
        Raises OptimizedModelError for a model in training, on several devices, or a tower of which was optimized.
        """
        if self.training:
            raise OptimizedModelError("This model is in training; call .eval() before optimize_for_inference().")
        if self.optimizations is None:
            self._refuse_if_optimized("optimized as a whole")
            done = optimize_(self)
            if all(LEFT in line for line in done):
                return done
            self.requires_grad_(False)
            for module in self.modules():
                if isinstance(module, Optimizable):
                    module.optimizations = done
        return list(self.optimizations)

    def _refuse_if_optimized(self: Any, wish: str) -> None:
        """Also where a tower of this model was optimized by itself."""
        if any(isinstance(module, Optimizable) and module.optimizations is not None for module in self.modules()):
            raise OptimizedModelError(
                f"This model was optimized for inference and cannot be {wish} any more; load it again with "
                f"from_pretrained and do that before optimize_for_inference()."
            )

    def train(self: Any, mode: bool = True) -> Any:
        if mode:
            self._refuse_if_optimized("trained")
        return super().train(mode)  # type: ignore[misc]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_if_optimized("saved")
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_if_optimized("saved")
        return super().state_dict(*args, **kwargs)  # type: ignore[misc]

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._refuse_if_optimized("given other weights")
        return super().load_state_dict(*args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> Any:  # by which a module around it goes
        self._refuse_if_optimized("given other weights")
        return super()._load_from_state_dict(*args, **kwargs)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._refuse_if_optimized("copied or pickled")
        return super().__reduce_ex__(protocol)

    def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if any(isinstance(module, Optimizable) and module.optimizations is not None for module in self.modules()):
            here = torch.empty(0, dtype=self.dtype, device=self.device)
            there = fn(here)
            if (there.dtype, there.device) != (here.dtype, here.device):
                self._refuse_if_optimized(
                    f"moved from {here.dtype} on {here.device} to {there.dtype} on {there.device}"
                )
        return super()._apply(fn, recurse)  # type: ignore[misc]


__all__ = ["Optimizable", "OptimizedModelError"]
