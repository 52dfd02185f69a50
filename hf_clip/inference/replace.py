"""Replace the layers of a model by faster ones.

BatchNorm is folded into the convolution before it. The weights of linear maps, MLPs and the patch embedding are stored
in oneDNN's order of memory, if that is faster on this processor. Layers with hooks, adapters or quantised weights stay.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ..model.attention import PRODUCT_ATTENTION, HfClipEncoderLayer
from ..model.linear_map import forward_hooks, is_plain_patch_embedding
from ..model.resnet_tower import HfClipBottleneck, HfClipResNetStage
from .layers import (
    FUSED_ACTIVATIONS,
    STAGES,
    InferenceBottleneck,
    InferenceConv2d,
    PackedLinear,
    PackedMLP,
    PackedPatches,
    SingleQueryAttentionPool,
)
from .measure import LEAST_GAIN, gain_of_fusing, gain_of_packing

LEFT = "left as before"
"""Part of the descriptions of changes that were not made."""


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is an ordinary linear map: no adapter, no quantised weight, no hooks."""
    is_linear = type(module) is nn.Linear and type(module.weight) is nn.Parameter
    return is_linear and not _is_hooked(module)


def _is_hooked(module: nn.Module) -> bool:
    return has_hooks(module) or "forward" in vars(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks other than those by which transformers records the outputs of all layers."""
    hooks = forward_hooks(module)
    return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)


FOLDED = (nn.Conv2d, nn.AvgPool2d, nn.Identity, nn.Sequential, HfClipBottleneck, HfClipResNetStage)


def _find_changed(tower: Any) -> str | None:
    """Return the name of the first part of a ResNet that has hooks or was replaced, e.g. by an adapter."""
    for root in [*(f"{kind}{place}" for kind in ("conv", "bn") for place in (1, 2, 3)), *STAGES]:
        for name, module in tower.get_submodule(root).named_modules(prefix=root):
            if _is_hooked(module) or not (type(module) in FOLDED or isinstance(module, nn.BatchNorm2d)):
                return name
    return None


def pack_transformer_(model: nn.Module) -> list[str]:
    """Replace the layers of transformers by packed ones where these are faster. Returns descriptions of the changes.

    Layers of one kind and size are timed once.
    """
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


def fold_resnet_(tower: Any, has_operators: bool) -> list[str]:
    """Fold BatchNorm into the convolutions of a ResNet, and simplify its attention pool. Returns descriptions.

    With `has_operators` ReLU and sums are fused into the convolutions too, if that is faster here.
    """
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


def attend_by_products_(tower: Any) -> None:
    """Let a tower compute attention as two matrix products."""
    shared = tower.config  # other models may use it too, so a copy is changed
    config = copy.deepcopy(shared)
    config._attn_implementation = PRODUCT_ATTENTION
    for module in tower.modules():
        if getattr(module, "config", None) is shared:
            module.config = config
