"""Replace the layers of a model by faster ones.

BatchNorm is folded into the convolution before it. The weights of linear maps, MLPs and the patch embedding are stored
in oneDNN's order of memory, if that is faster on this processor. Layers with hooks, adapters or quantised weights stay.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..model.attention import PRODUCT_ATTENTION, HfClipAttention, HfClipEncoder, HfClipEncoderLayer
from ..model.linear_map import forward_hooks, is_plain_patch_embedding
from ..model.resnet_tower import HfClipBottleneck, HfClipResNetStage
from .layers import (
    FUSED_ACTIVATIONS,
    InferenceBottleneck,
    InferenceConv2d,
    PackedAttention,
    PackedEncoderLayer,
    PackedLinear,
    PackedMLP,
    PackedPatches,
    SingleQueryAttentionPool,
)
from .measure import Comparison, compare_attention, compare_fused, compare_packed, remembered
from .parts import STAGES, guess_map_bytes, images_at_once

LEFT = "left as before"
"""Part of the descriptions of changes that were not made."""


def is_plain(module: Any) -> bool:
    """Whether a module is an ordinary linear map: no adapter, no quantised weight, no hooks but transformers' own."""
    is_linear = type(module) is nn.Linear and type(module.weight) is nn.Parameter
    return is_linear and not is_hooked(module)


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks as `has_hooks` says, or its `forward` was replaced."""
    return has_hooks(module) or "forward" in vars(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks other than those by which transformers records the outputs of all layers."""
    hooks = forward_hooks(module)
    return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)


FOLDED = (nn.Conv2d, nn.AvgPool2d, nn.Identity, nn.Sequential, HfClipBottleneck, HfClipResNetStage)


def find_changed(tower: Any) -> str | None:
    """Return the name of the first part of a ResNet that has hooks or was replaced, e.g. by an adapter."""
    for root in [*(f"{kind}{place}" for kind in ("conv", "bn") for place in (1, 2, 3)), *STAGES]:
        for name, module in tower.get_submodule(root).named_modules(prefix=root):
            if is_hooked(module) or not (type(module) in FOLDED or isinstance(module, nn.BatchNorm2d)):
                return name
    return None


def pack_transformer_(model: nn.Module) -> list[str]:
    """Replace the layers of transformers by packed ones where these are faster. Returns descriptions of the changes.

    Layers of one kind and size are timed once.
    """
    found: dict[str, tuple[int, Comparison]] = {}  # by kind of layer: how many, and their times

    def pays(kind: str, layer: Any, pack: Pack) -> bool:
        count, comparison = found[kind] if kind in found else (0, compare_packed(layer, pack(layer)))
        found[kind] = (count + 1, comparison)
        return comparison.pays

    # Features need the queries of the last layer at one position only, so its maps stay apart.
    last = {module.layers[-1] for module in model.modules() if isinstance(module, HfClipEncoder)}
    for module in model.modules():
        patches: Any = getattr(module, "patch_embedding", None)
        if is_plain_patch_embedding(patches) and pays("patch embedding", patches, PackedPatches):
            module.patch_embedding = PackedPatches(patches)
        if isinstance(module, HfClipEncoderLayer):
            _pack_layer_(module, pays, stacks=module not in last)
    done = []
    for kind, (count, comparison) in found.items():
        if comparison.pays:
            done.append(f"{kind}: {count} in oneDNN's order of memory, {comparison}")
        else:
            done.append(f"{kind}: {count} {LEFT}; in oneDNN's order of memory {comparison}")
    return done


Pack = Callable[[Any], nn.Module]
"""Makes the replacement of a layer."""

Pays = Callable[[str, Any, Pack], bool]
"""Whether the replacement of a layer is faster, given the name of its kind."""


def _pack_layer_(layer: Any, pays: Pays, stacks: bool) -> None:
    """Replace the parts of an encoder layer. With `stacks`, q, k and v become one product if all four maps pay."""
    attention, mlp = layer.self_attn, layer.mlp
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    maps = {name: linear for name in names if is_plain(linear := getattr(attention, name))}
    kinds = {name: f"linear maps {linear.in_features} → {linear.out_features}" for name, linear in maps.items()}
    chosen = [name for name, linear in maps.items() if pays(kinds[name], linear, PackedLinear)]
    is_whole = len(chosen) == len(names) and type(attention) is HfClipAttention and not is_hooked(attention)
    if is_whole and stacks:
        PackedAttention.change_(attention)
    else:
        for name in chosen:
            setattr(attention, name, PackedLinear(maps[name]))
    hidden_act = attention.config.hidden_act
    fuses = not (is_hooked(mlp) or is_hooked(mlp.activation_fn)) and is_plain(mlp.fc1) and is_plain(mlp.fc2)
    if fuses and hidden_act in FUSED_ACTIVATIONS:
        kind, pack = f"MLPs {mlp.fc1.in_features} → {mlp.fc1.out_features} → {mlp.fc2.out_features}", PackedMLP
        if pays(kind, mlp, partial(pack, hidden_act=hidden_act)):
            layer.mlp = pack(mlp, hidden_act)
    if type(layer) is HfClipEncoderLayer and type(layer.self_attn) is PackedAttention and type(layer.mlp) is PackedMLP:
        layer.__class__ = PackedEncoderLayer


def _compare_fused(tower: Any) -> Comparison:
    """Time the last block of each stage, with one image and with as many images as the stage takes at once."""
    public, fused = (
        [InferenceBottleneck(tower.get_submodule(name)[-1], is_fused) for name in STAGES] for is_fused in (False, True)
    )
    pixels, size = tower.config.image_size**2, guess_map_bytes(tower)
    shapes: list[list[tuple[int, ...]]] = [[], []]
    for stage, block in enumerate(public):
        side = (tower.config.image_size >> 2 + stage) * getattr(block.pool, "kernel_size", 1)
        for several, images in zip(shapes, (1, images_at_once(tower, pixels, stage, size)), strict=True):
            several.append((images, side, side, block.conv1.weight.shape[1]))
    key = ("fused", tower.config.stem_width, tower.config.image_size, tower.dtype, torch.get_num_threads())
    return remembered(key, lambda: compare_fused(public, fused, shapes))


def fold_stem_(tower: Any, is_fused: bool) -> None:
    """Fold BatchNorm into the three convolutions of a ResNet's stem. ReLU stays apart."""
    for number in (1, 2, 3):
        convolution, norm = getattr(tower, f"conv{number}"), getattr(tower, f"bn{number}")
        setattr(tower, f"conv{number}", InferenceConv2d.fold(convolution, norm, False, is_fused))
        setattr(tower, f"bn{number}", nn.Identity())


def simplify_pool_(tower: Any) -> bool:
    """Let a ResNet's attention pool multiply its one query, if its linear maps are plain. Returns whether it does."""
    pool = tower.attnpool
    if not all(is_plain(linear) for linear in (pool.q_proj, pool.k_proj, pool.v_proj)):
        return False
    pool.__class__ = SingleQueryAttentionPool
    return True


def fold_resnet_(tower: Any, has_operators: bool) -> list[str]:
    """Fold BatchNorm into the convolutions of a ResNet, and simplify its attention pool. Returns descriptions.

    With `has_operators` ReLU and sums are fused into the convolutions too, if that is faster here.
    """
    if changed := find_changed(tower):
        return [f"the ResNet {LEFT}: {changed} is hooked or adapted"]
    comparison = _compare_fused(tower) if has_operators else None
    is_fused = comparison is not None and comparison.pays
    count = sum(isinstance(module, nn.BatchNorm2d) for module in tower.modules())
    fold_stem_(tower, is_fused)
    for stage in map(tower.get_submodule, STAGES):
        for index, block in enumerate(stage):
            stage[index] = InferenceBottleneck(block, is_fused)
    done = [f"BatchNorm folded into {count} convolutions"]
    if is_fused:
        done.append(f"ReLU and sums computed in the convolutions' pass, {comparison}")
    elif comparison is not None:
        done.append(f"ReLU and sums {LEFT}; in the convolutions' pass {comparison}")
    if simplify_pool_(tower):
        done.append("the attention pool multiplies its one query instead of all keys and values")
    return done


def choose_attention_(tower: Any, length: int) -> list[str]:
    """Let an image tower compute attention as two matrix products if that is faster here. Returns a description.

    Args:
        tower: The tower, whose attention is torch's fused one.
        length: L, positions of an image.
    """
    heads, shared = tower.config.num_attention_heads, tower.config
    comparison = compare_attention(heads, shared.hidden_size // heads, length, tower.dtype)
    if not comparison.pays:
        return [f"attention {LEFT}; as two matrix products {comparison}"]
    config = copy.deepcopy(shared)  # other models may use it too, so a copy is changed
    config._attn_implementation = PRODUCT_ATTENTION
    for module in tower.modules():
        if getattr(module, "config", None) is shared:
            module.config = config
    return [f"attention as two matrix products, {comparison}"]
