"""`optimize_for_inference()`: what is done to a whole model, and what it refuses afterwards.

What it changes cannot be undone and cannot be trained, so an optimized model refuses to be trained, saved or moved.
BatchNorm goes into the convolution before it, and the attention pool, which has one query, multiplies that query
instead of every key and value. On CPUs layers are replaced by those of packed_hf_clip where they are at least
`LEAST_GAIN` times as fast on this processor, large batches are cut into parts that stay in the cache, `encode_text`
leaves out padding, `encode_image` what is computed of a ViT's last layer for other positions than the class token.
"""

import copy
import ctypes
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .packed_hf_clip import (
    FUSED_ACTIVATIONS,
    InferenceBottleneck,
    InferenceConv2d,
    OptimizedModelError,
    PackedLinear,
    PackedMLP,
    PackedPatches,
    SingleQueryAttentionPool,
    attention_by_products,
    has_packed_operators,
    rows_at_once,
)
from .resnet_hf_clip import HfClipBottleneck, HfClipResNetStage
from .text_ends_hf_clip import EndOfTextError, find_ends, find_starts
from .transformer_hf_clip import (
    PRODUCT_ATTENTION,
    HfClipAttention,
    HfClipEncoderLayer,
    HfClipMLP,
    apply_linear,
    apply_patch_embedding,
    attend,
    is_plain_patch_embedding,
)

MAP_BYTES_OF_A_THREAD = 4 * 2**20
"""How large a ResNet's widest feature map of a stage may be for each thread, all pictures that it takes at once."""

FREED_BYTES_KEPT = 64 * 2**20
"""How much freed memory a process keeps before the C library gives it back: the most that glibc's own rule leads to."""

LEAST_GAIN = 1.05
"""How many times as fast something has to be, measured on this processor, to take a public operator's place."""

LEFT = "left as before"
"""In the lines of a report that say what was not done."""

UNFINISHED = "begun, and not finished"
"""All that is said of a model whose optimization was interrupted: parts of it are changed, so it is refused too."""

STAGES = ("layer1", "layer2", "layer3", "layer4")


# --- what is measured -----------------------------------------------------------------------------------------------


@torch.no_grad()
def _gain(before: Callable[[], object], after: Callable[[], object], repeats: int = 7) -> float:
    """How many times as fast `after` is: the shortest times, taken in turn, since other work only adds to them."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats + 1):
        for work, taken in zip((before, after), times, strict=True):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
    return min(times[0][1:]) / min(times[1][1:])


def gain_of_packing(layer: Any, packed: nn.Module) -> float:
    """How many times as fast a linear map, an MLP or a patch embedding is as its replacement, measured here."""
    weight = (layer.fc1 if isinstance(layer, HfClipMLP) else layer).weight
    count = rows_at_once(weight.dtype) // 2
    shape: tuple[int, ...] = (count, weight.shape[1])
    if isinstance(layer, nn.Conv2d):  # so many patches side by side
        shape = (1, weight.shape[1], weight.shape[2], count * weight.shape[3])
    input = torch.zeros(shape, dtype=weight.dtype)
    kinds = {nn.Linear: apply_linear, nn.Conv2d: apply_patch_embedding}
    apply = kinds.get(type(layer), nn.Module.__call__)
    return _gain(lambda: apply(layer, input), lambda: packed(input))


def gain_of_fusing(tower: Any) -> float:
    """How many times as fast a ResNet's blocks are with ReLU and sums in the convolutions' pass, measured here.

    Measured with the last block of each stage: the geometric mean of one picture and as many as a stage takes at once.
    """
    public, fused = (
        [InferenceBottleneck(tower.get_submodule(name)[-1], kind) for name in STAGES] for kind in (False, True)
    )
    pixels, dtype = tower.config.image_size**2, tower.dtype
    batches = ((1,) * len(STAGES), tuple(_pictures_at_once(tower, pixels, stage) for stage in range(len(STAGES))))
    gains = []
    for counts in batches:
        maps = []
        for stage, (count, block) in enumerate(zip(counts, public, strict=True)):
            side = (tower.config.image_size >> 2 + stage) * getattr(block.pool, "kernel_size", 1)
            shape = (count, block.conv1.weight.shape[1], side, side)
            maps.append(torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last))

        def run(blocks: list[InferenceBottleneck], maps: list[Tensor] = maps) -> None:
            for block, map in zip(blocks, maps, strict=True):
                block(map)

        gains.append(_gain(lambda run=run: run(public), lambda run=run: run(fused), 5))  # type: ignore[misc]
    return geometric_mean(gains)


def gain_of_products(heads: int, width: int, length: int, dtype: torch.dtype) -> float:
    """How many times as fast attention is as two products than as torch's fused kernel, measured here."""
    query, key, value = (torch.zeros(8, length, heads, width, dtype=dtype).transpose(1, 2) for _ in range(3))
    return _gain(
        lambda: functional.scaled_dot_product_attention(query, key, value),
        lambda: attention_by_products(nn.Identity(), query, key, value, None, 0.125),
    )


# --- what is replaced -----------------------------------------------------------------------------------------------


def _is_plain(module: nn.Module) -> bool:
    """An ordinary linear map: no adapter, no quantised weight, nothing hooked to it."""
    is_linear = type(module) is nn.Linear and type(module.weight) is nn.Parameter
    return is_linear and not _is_hooked(module)


def _is_hooked(module: nn.Module) -> bool:
    return _has_hooks(module) or "forward" in vars(module)


def _has_hooks(module: nn.Module) -> bool:
    """Whether anyone listens here, but for transformers, which does when all layers' outputs have been asked for."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)


FOLDED = (nn.Conv2d, nn.AvgPool2d, nn.Identity, nn.Sequential, HfClipBottleneck, HfClipResNetStage)


def _find_changed(tower: Any) -> str | None:
    """The name of the first part of a ResNet that is hooked, or not as it was made: an adapter, say."""
    for root in [*(f"{kind}{place}" for kind in ("conv", "bn") for place in (1, 2, 3)), *STAGES]:
        for name, module in tower.get_submodule(root).named_modules(prefix=root):
            if _is_hooked(module) or not (type(module) in FOLDED or isinstance(module, nn.BatchNorm2d)):
                return name
    return None


def _pack_transformer_(model: nn.Module) -> list[str]:
    gains: dict[str, float] = {}

    def packed_if_it_pays(kind: str, layer: Any, pack: Callable[[Any], nn.Module]) -> nn.Module | None:
        if kind not in gains:
            gains[kind] = gain_of_packing(layer, pack(layer))
        return pack(layer) if gains[kind] >= LEAST_GAIN else None

    counts = {"linear maps": 0, "MLPs with their activations": 0, "patch embedding": 0}
    for module in model.modules():
        patches: Any = getattr(module, "patch_embedding", None)
        if is_plain_patch_embedding(patches) and (
            embedding := packed_if_it_pays("the patch embedding", patches, PackedPatches)
        ):
            module.patch_embedding = embedding
            counts["patch embedding"] += 1
        if not isinstance(module, HfClipEncoderLayer):
            continue
        attention, mlp = module.self_attn, module.mlp
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            if _is_plain(linear := getattr(attention, name)):
                kind = f"linear maps {linear.in_features} → {linear.out_features}"
                if packed := packed_if_it_pays(kind, linear, PackedLinear):
                    setattr(attention, name, packed)
                    counts["linear maps"] += 1
        hidden_act = attention.config.hidden_act
        is_plain = not (_is_hooked(mlp) or _is_hooked(mlp.activation_fn)) and _is_plain(mlp.fc1) and _is_plain(mlp.fc2)
        if is_plain and hidden_act in FUSED_ACTIVATIONS:
            kind = f"MLPs {mlp.fc1.in_features} → {mlp.fc1.out_features} → {mlp.fc2.out_features}"
            if fused := packed_if_it_pays(kind, mlp, partial(PackedMLP, hidden_act=hidden_act)):
                module.mlp = fused  # type: ignore[assignment]
                counts["MLPs with their activations"] += 1
    done = []
    if packed_kinds := [f"{count} {what}" for what, count in counts.items() if count]:
        least, most = min(gain for gain in gains.values() if gain >= LEAST_GAIN), max(gains.values())
        how = f"{least:.2f} to {most:.2f} times as fast here"
        done.append(f"{', '.join(packed_kinds)} brought into oneDNN's order of memory, {how}")
    for kind, gain in gains.items():
        if gain < LEAST_GAIN:
            done.append(f"{kind} {LEFT}; in oneDNN's order {gain:.2f} times as fast")
    return done


def _fold_resnet_(tower: Any, has_operators: bool) -> list[str]:
    if changed := _find_changed(tower):
        return [f"the ResNet {LEFT}: {changed} is hooked or adapted"]
    gain = gain_of_fusing(tower) if has_operators else 0.0
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
        done.append(f"ReLU and sums {how} with weights in oneDNN's order {gain:.2f} times as fast here")
    if all(_is_plain(linear) for linear in (pool.q_proj, pool.k_proj, pool.v_proj)):
        pool.__class__ = SingleQueryAttentionPool
        done.append("the attention pool multiplies its one query instead of all keys and values")
    return done


# --- how batches are taken ------------------------------------------------------------------------------------------


def _even_parts(batch: Tensor, most: int) -> tuple[Tensor, ...]:
    """A batch in as few parts of at most so many rows as possible, of about the same size."""
    return batch.tensor_split(-(-len(batch) // max(1, most)))


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _work_in_parts_(tower: Any, part_size: Callable[[Tensor], int], encode: Callable[..., Any] | None = None) -> None:
    """Let a tower take so many rows of its input at a time; where all layers' outputs are asked for, all at once.

    encode: the way of a part through the tower, if it differs from the tower's own
    """
    whole = tower.forward
    encode = encode or whole
    captured = ("output_hidden_states", "output_attentions")

    def forward(input: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        input = kwargs.pop(tower.main_input_name, input)
        is_simple = isinstance(input, Tensor) and input.ndim > 1 and input.numel() > 0 and not args
        is_simple = is_simple and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        is_simple = is_simple and not any(isinstance(value, Tensor) for value in kwargs.values())
        is_simple = is_simple and not any(kwargs.get(name, getattr(tower.config, name, False)) for name in captured)
        if not is_simple:
            return whole(input, *args, **kwargs)
        as_dict = kwargs.pop("return_dict", tower.config.return_dict) is not False
        try:
            parts = [encode(part, return_dict=True, **kwargs) for part in _even_parts(input, part_size(input))]
        except EndOfTextError:
            return whole(input, **kwargs)  # which names the rows of the whole batch
        fields = ("last_hidden_state", "pooler_output")
        output = BaseModelOutputWithPooling(**{name: _join([part[name] for part in parts]) for name in fields})
        return output if as_dict else output.to_tuple()

    tower.forward = forward


def map_bytes_at_once() -> int:
    """The size of a ResNet's widest feature map in its first stage, with as many threads as torch has now."""
    return MAP_BYTES_OF_A_THREAD * torch.get_num_threads()


def _pictures_at_once(tower: Any, pixels: int, stage: int) -> int:
    """How many pictures of so many pixels a ResNet's stage takes at once: its maps are half those of the one before."""
    widest = 4 * tower.config.stem_width * pixels // 16 * tower.dtype.itemsize
    return max(1, (map_bytes_at_once() << stage) // widest)


def _positions(tower: Any) -> int:
    """Of a picture of a ViT's own size."""
    return 1 + tower.config.grid_size**2


def _rows_in_parts(tower: Any) -> Callable[[Tensor], int]:
    """How many of these texts (B, L), or pictures (B, C, Y, X), a transformer takes at once."""
    if tower.config.model_type == "hf_clip_text":
        return lambda ids: rows_at_once(tower.dtype) // ids.shape[1]
    area = tower.config.patch_size**2
    return lambda pictures: rows_at_once(tower.dtype) // (1 + pictures[0, 0].numel() // area)


def _is_of_own_size(pictures: Any, tower: Any) -> bool:
    """Whether these are pictures as the tower takes them, with nothing to be resampled or refused."""
    shape = (tower.config.num_channels, tower.config.image_size, tower.config.image_size)
    return isinstance(pictures, Tensor) and pictures.shape[1:] == shape and pictures.is_floating_point()


def _work_depth_first_(tower: Any, is_as_made: bool) -> None:
    """Let a ResNet's stages take their maps while these are in the cache: few pictures at first, more in later stages.

    A stage's part of the batch goes through the stages before in smaller parts; if the tower's way of encoding is
    another than these files', a part of the last stage's size goes that way.
    """
    whole = tower.forward
    stages = [tower.get_submodule(name) for name in STAGES]

    def run(pictures: Tensor, last: int) -> Tensor:
        maps = []
        for part in _even_parts(pictures, _pictures_at_once(tower, pictures[0, 0].numel(), last)):
            maps.append(stages[last](run(part, last - 1) if last else tower.stem(part)))
        return _join(maps)

    def encode(pictures: Tensor, **kwargs: Any) -> Any:
        if not (is_as_made and _is_of_own_size(pictures, tower)):
            return whole(pictures, **kwargs)  # which may refuse them
        feature_map = run(pictures.to(tower.dtype), len(stages) - 1)
        pooled, _ = tower.attnpool(feature_map)
        return BaseModelOutputWithPooling(last_hidden_state=feature_map, pooler_output=pooled)

    _work_in_parts_(tower, lambda pictures: _pictures_at_once(tower, pictures[0, 0].numel(), len(stages) - 1), encode)


def _encode_texts_by_length_(model: Any) -> None:
    """Let `encode_text` sort its texts by length and leave out the columns behind their ends."""
    whole = model.encode_text

    def encode_text(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        is_simple = isinstance(input_ids, Tensor) and input_ids.ndim == 2 and min(input_ids.shape) > 0
        is_simple = is_simple and not input_ids.is_floating_point() and not torch.jit.is_tracing()
        is_simple = is_simple and find_starts(attention_mask) is None
        if not is_simple:
            return whole(input_ids, attention_mask)
        lengths = find_ends(input_ids, None, model.config.text_config)[0] + 1
        if attention_mask is not None and not _hides_only_ends(attention_mask, lengths, input_ids):
            return whole(input_ids, attention_mask)
        lengths, order = lengths.sort()
        features, first, most = [], 0, rows_at_once(model.dtype)
        while first < len(order):
            # As many texts as make no more than `most` positions; the last of a part is its longest.
            positions = torch.arange(1, len(order) - first + 1) * lengths[first:]
            last = first + max(1, int((positions <= most).sum()))
            features.append(whole(input_ids[order[first:last], : int(lengths[last - 1])]))
            first = last
        return torch.cat(features)[order.argsort()]

    model.encode_text = encode_text


def _hides_only_ends(attention_mask: Tensor, lengths: Tensor, input_ids: Tensor) -> bool:
    """Whether a mask shows each text to its end, and hides what follows, which changes nothing that comes before."""
    if attention_mask.shape != input_ids.shape:
        return False
    shown = attention_mask.to(torch.bool)
    is_needed = torch.arange(shown.shape[1], device=shown.device) < lengths[:, None]
    return bool((shown | ~is_needed).all())


def _encode_images_by_class_token_(model: Any) -> None:
    """Let `encode_image` compute a ViT's last layer for the class token alone, which is all that it needs of it.

    As long as nobody listens to the parts that it passes by.
    """
    whole, tower = model.encode_image, model.vision_model

    def encode(pictures: Tensor) -> Tensor:
        *layers, last = tower.encoder.layers
        hidden_states = tower.pre_layrnorm(tower.embeddings(pictures))
        for layer in layers:
            hidden_states = layer(hidden_states)
        states, class_token, attention = last.layer_norm1(hidden_states), hidden_states[:, :1], last.self_attn
        query = apply_linear(attention.q_proj, states[:, :1])
        key, value = apply_linear(attention.k_proj, states), apply_linear(attention.v_proj, states)
        class_token = class_token + apply_linear(attention.out_proj, attend(attention, query, key, value)[0])
        class_token = class_token + last.mlp(last.layer_norm2(class_token))
        return model.visual_projection(tower.post_layernorm(class_token[:, 0]))

    def encode_image(pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        is_simple = _is_of_own_size(pixel_values, tower) and len(pixel_values) > 0
        is_simple = is_simple and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        if not is_simple or any(map(_has_hooks, _parts_around_the_last_layer(tower))):
            return whole(pixel_values, interpolate_pos_encoding)
        size = rows_at_once(tower.dtype) // _positions(tower)
        return _join([encode(part) for part in _even_parts(pixel_values, size)])

    model.encode_image = encode_image


def _parts_around_the_last_layer(tower: Any) -> tuple[nn.Module, ...]:
    last = tower.encoder.layers[-1]
    return tower, tower.encoder, last, last.self_attn


def _is_as_made(model: Any, tower: Any) -> bool:
    """Whether a model and its image tower encode pictures in the way of these files, not of a subclass or a patch."""
    names = {"HfClipModel.encode_image", "HfClipViTModel.forward", "HfClipResNetModel.forward"}
    methods = (type(tower).forward, getattr(type(model), "encode_image", type(tower).forward))
    is_patched = "forward" in vars(tower) or "encode_image" in vars(model)
    return not is_patched and all(method.__qualname__ in names for method in methods)


# --- the whole model ------------------------------------------------------------------------------------------------


def _refuse_if_spread(model: Any) -> None:
    places = {parameter.device.type for parameter in model.parameters()}
    mapped = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if len(places) > 1 or len(mapped) > 1 or "meta" in places:
        raise OptimizedModelError(
            f"This model is spread over {', '.join(sorted(places | mapped))}, and only one that is whole on one device "
            f"can be optimized: load it without device_map."
        )


@torch.no_grad()
def optimize_(model: Any) -> list[str]:
    """Do to a model, which is whole on one device, what is described above; returns what was done, in words."""
    on_cpu = model.device.type == "cpu"
    keeps_memory = on_cpu and _keep_freed_memory()  # before anything is timed
    has_operators = on_cpu and has_packed_operators(model.dtype)
    done: list[str] = []
    for tower in [module for module in model.modules() if hasattr(module, "attnpool")]:
        done += _fold_resnet_(tower, has_operators)
    if has_operators:
        done += _pack_transformer_(model)
    if on_cpu:
        done += _suit_the_cache_(model)
    if keeps_memory:
        done.append(f"glibc gives freed memory back only beyond {FREED_BYTES_KEPT >> 20} MiB, in the whole process")
    return done


def _suit_the_cache_(model: Any) -> list[str]:
    """On a CPU: work on as much at once as its cache holds, and on no padding."""
    by_class_token = False
    if hasattr(model, "encode_image") and hasattr(model.vision_model, "encoder"):
        around, kinds = _parts_around_the_last_layer(model.vision_model), (HfClipEncoderLayer, HfClipAttention)
        is_plain = tuple(map(type, around[2:])) == kinds and not any("forward" in vars(part) for part in around)
        by_class_token = is_plain and _is_as_made(model, model.vision_model)
    for tower in [module for module in model.modules() if hasattr(module, "attnpool") or hasattr(module, "encoder")]:
        kind = tower.config.model_type
        is_half_vit = kind == "hf_clip_vit" and tower.dtype == torch.bfloat16
        if is_half_vit and tower.config._attn_implementation == "sdpa":
            heads = tower.config.num_attention_heads
            width = tower.config.hidden_size // heads
            if gain_of_products(heads, width, _positions(tower), tower.dtype) >= LEAST_GAIN:
                _attend_by_products_(tower)
        if kind == "hf_clip_resnet":
            _work_depth_first_(tower, _is_as_made(model, tower))
        else:
            _work_in_parts_(tower, _rows_in_parts(tower))
    done = ["large batches cut into parts that stay in the cache"]
    if hasattr(model, "encode_text"):
        _encode_texts_by_length_(model)
        done.append("encode_text sorts its texts by length and computes no padding")
        if by_class_token:
            _encode_images_by_class_token_(model)
            done.append("encode_image computes its last layer for the class token alone")
    return done


def _keep_freed_memory() -> bool:
    """Ask glibc, where it is the C library, to keep what one layer frees for the next; whether it was asked.

    Otherwise it gives the memory back and fetches it anew with every layer, or does not, by the chance of what was
    freed before: ViT-B/16 in bfloat16 was 1.10 to 1.26 times as fast without that. It is not asked where the user has
    set it, or taken another allocator.
    """
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"} & os.environ.keys():
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    trim_threshold, mmap_threshold = -1, -3  # of <malloc.h>
    return set_option(mmap_threshold, FREED_BYTES_KEPT // 2) == 1 and set_option(trim_threshold, FREED_BYTES_KEPT) == 1


def _attend_by_products_(tower: Any) -> None:
    shared = tower.config  # with other models, perhaps
    config = copy.deepcopy(shared)
    config._attn_implementation = PRODUCT_ATTENTION
    for module in tower.modules():
        if getattr(module, "config", None) is shared:
            module.config = config


_lock = threading.Lock()
"""Held while a model is optimized: threads that ask for the same model wait, and find it done."""


def _renew_lock() -> None:
    """In a forked process the thread that held it is not there."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class Optimizable:
    """What a model is asked by `optimize_for_inference`, and what it refuses afterwards."""

    optimizations: list[str] | None = None
    """What `optimize_for_inference` has done, in words; None before it."""

    def optimize_for_inference(self: Any) -> list[str]:
        """Make this model as fast as it can be made for inference on the device and in the type it has now.

        BatchNorm goes into convolutions, weights into the processor's order of memory, and large batches are cut into
        parts that stay in its cache; glibc is asked to keep freed memory, in the whole process; what doesn't pay on
        this processor is left out, and so are layers with hooks or adapters. Outputs change by at most 1e-5 relative
        in float32, and by rounding in half precision. It cannot be undone: the model cannot be trained, saved or
        moved any more, nor, where weights were reordered, exported or compiled; autocast does not reach those layers,
        so bring it into its type before. Other hooks may see parts of a batch, or tensors that later layers overwrite.

        returns: what was done and what was left as it is, in words, which `optimizations` holds too. Where nothing
                 was done the model is as it was, and `optimizations` None
        Raises OptimizedModelError for a model in training, on several devices, a tower of which was optimized, or
        with which this was begun and interrupted.
        """
        with _lock:  # for the model, and for what is timed
            return self._optimize_alone()

    def _optimize_alone(self: Any) -> list[str]:
        if self.training:
            raise OptimizedModelError("This model is in training; call .eval() before optimize_for_inference().")
        if self.optimizations is None:
            self._refuse_if_optimized("optimized as a whole")
            _refuse_if_spread(self)
            parts = [module for module in self.modules() if isinstance(module, Optimizable)]
            for part in parts:
                part.optimizations = [UNFINISHED]  # in case of an interruption
            done = optimize_(self)
            is_changed = not all(LEFT in line for line in done)
            for part in parts:
                part.optimizations = done if is_changed else None
            if not is_changed:
                return done
            self.requires_grad_(False)
        elif self.optimizations == [UNFINISHED]:
            self._refuse_if_optimized("optimized to the end")
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
