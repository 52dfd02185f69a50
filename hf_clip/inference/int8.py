"""What `optimize_for_inference(precision="int8")` replaces by products of integers, and which models it refuses.

In a transformer these are the patch embedding and all linear maps of the layers. In a ResNet they are the convolutions
of its four stages. Embeddings, LayerNorm, attention, a ResNet's stem and attention pool, and the projections stay in
the model's dtype. So do layers with hooks or adapters. The stem is where most of a ResNet's error would come from: on
the demo's ResNet the lowest cosine of 500 images was 0.9972 with it and 0.9996 without, and it is 7 % of the work.
"""

from typing import Any

import torch
from torch import nn

from ..model.attention import HfClipAttention, HfClipEncoder, HfClipEncoderLayer, HfClipMLP
from ..model.linear_map import is_plain_patch_embedding
from ..model.optimized import OptimizedModelError
from .int8_layers import (
    ACTIVATIONS,
    Int8Attention,
    Int8Bottleneck,
    Int8Conv2d,
    Int8Linear,
    Int8MLP,
    Int8Patches,
    Int8Stage,
    has_int8_operators,
)
from .layers import has_packed_operators
from .parts import STAGES
from .replace import LEFT, find_changed, fold_stem_, is_hooked, is_plain, simplify_pool_

INT8 = "int8"

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


def check_int8(model: Any) -> None:
    """Raise OptimizedModelError if this model cannot be computed in integers, or not here. Nothing is changed."""
    place, dtype = model.device, model.dtype
    if place.type != "cpu":
        raise OptimizedModelError(
            f'precision="int8" is computed on CPUs only, and this model is on {place}: move it to the CPU with '
            f'.to("cpu"), or leave the precision out.'
        )
    if dtype not in (torch.float32, torch.bfloat16):
        raise OptimizedModelError(
            f'precision="int8" needs a model in float32 or bfloat16, in which everything but the products is computed, '
            f"and this one is in {str(dtype).removeprefix('torch.')}: load it with dtype=torch.float32."
        )
    if not has_int8_operators(dtype):
        raise OptimizedModelError(
            f'precision="int8" needs the integer products of oneDNN, and torch {torch.__version__} has none on this '
            f"machine that compute what they should: leave the precision out."
        )
    if not any(_count(model).values()):
        raise OptimizedModelError(
            'precision="int8" has nothing to do: all layers of this model that could be computed in integers have '
            "hooks or adapters. Remove the hooks or merge the adapters, or leave the precision out."
        )


def is_int8(model: nn.Module) -> bool:
    """Whether a model's products are computed in integers already."""
    return any(isinstance(module, (Int8Linear, Int8Conv2d)) for module in model.modules())


def _towers(model: nn.Module, kind: str) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, kind)]


def _count(model: nn.Module) -> dict[str, int]:
    """Count the layers that can be computed in integers, by kind."""
    layers = [module for module in model.modules() if isinstance(module, HfClipEncoderLayer)]
    linears = [linear for layer in layers for linear in _linears_of(layer).values()]
    patches = [tower.patch_embedding for tower in _towers(model, "patch_embedding")]
    resnets = [tower for tower in _towers(model, "attnpool") if find_changed(tower) is None]
    return {
        "linear maps": sum(map(is_plain, linears)),
        "patch embeddings": sum(map(is_plain_patch_embedding, patches)),
        "convolutions": sum(
            isinstance(part, nn.Conv2d)
            for tower in resnets
            for name in STAGES
            for part in tower.get_submodule(name).modules()
        ),
    }


def _linears_of(layer: HfClipEncoderLayer) -> dict[str, nn.Module]:
    """The linear maps of a layer, hooked and adapted ones too. Those inside of what was replaced are not looked for."""
    named = [(layer.self_attn, name) for name in PROJECTIONS] + [(layer.mlp, "fc1"), (layer.mlp, "fc2")]
    return {name: getattr(owner, name) for owner, name in named if isinstance(getattr(owner, name, None), nn.Module)}


@torch.no_grad()
def quantize_(model: Any) -> list[str]:
    """Compute a model's products in integers, one layer after the other. Returns descriptions of the changes.

    The weights of a layer are freed before those of the next one are touched.
    """
    check_int8(model)
    counts, layers = _count(model), [module for module in model.modules() if isinstance(module, HfClipEncoderLayer)]
    for owner in _towers(model, "patch_embedding"):
        if is_plain_patch_embedding(owner.patch_embedding):
            owner.patch_embedding = Int8Patches(owner.patch_embedding)
    # Features need the queries of the last layer at one position only, so its maps stay apart.
    last = {module.layers[-1] for module in model.modules() if isinstance(module, HfClipEncoder)}
    left = sum(not is_plain(linear) for layer in layers for linear in _linears_of(layer).values())
    for layer in layers:
        _quantize_attention_(layer.self_attn, is_fused=layer not in last)
        _quantize_mlp_(layer)
    left_towers = []
    for tower in _towers(model, "attnpool"):
        if changed := find_changed(tower):
            left_towers.append(f"the ResNet {LEFT}: {changed} is hooked or adapted")
        else:
            _quantize_resnet_(tower)
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    done = [f"{kinds} computed in int8; weights scaled by output channel, activations in each call by token or image"]
    if left:
        done.append(f"{left} linear maps {LEFT}: they are hooked or adapted")
    return done + left_towers


def _quantize_attention_(attention: Any, is_fused: bool) -> None:
    is_whole = type(attention) is HfClipAttention and not is_hooked(attention)
    if is_fused and is_whole and all(is_plain(getattr(attention, name)) for name in PROJECTIONS[:3]):
        Int8Attention.change_(attention)
    for name in PROJECTIONS:
        linear: Any = getattr(attention, name, None)
        if is_plain(linear):
            setattr(attention, name, Int8Linear.replace(linear))


def _quantize_mlp_(layer: Any) -> None:
    mlp, hidden_act = layer.mlp, layer.self_attn.config.hidden_act
    linears: list[Any] = [getattr(mlp, name, None) for name in ("fc1", "fc2")]
    is_whole = type(mlp) is HfClipMLP and not (is_hooked(mlp) or is_hooked(mlp.activation_fn))
    if is_whole and hidden_act in ACTIVATIONS and all(map(is_plain, linears)):
        layer.mlp = Int8MLP(mlp, hidden_act)
        return
    for name, linear in zip(("fc1", "fc2"), linears, strict=True):
        if is_plain(linear):
            setattr(mlp, name, Int8Linear.replace(linear))


def _quantize_resnet_(tower: Any) -> None:
    fold_stem_(tower, is_fused=has_packed_operators(tower.dtype))
    for stage in map(tower.get_submodule, STAGES):
        for index, block in enumerate(stage):
            stage[index] = Int8Bottleneck(block)
        stage.__class__ = Int8Stage
    simplify_pool_(tower)
