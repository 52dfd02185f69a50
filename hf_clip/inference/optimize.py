"""`optimize_for_inference()`: the changes to a whole model, in their order.

1. A ResNet's BatchNorm is folded into the convolution before it. Its attention pool, which has a single query,
   computes no keys and values (see `layers.SingleQueryAttentionPool`).
2. On CPUs, layers are replaced by those in `layers`, if these are at least `LEAST_GAIN` times as fast on this
   processor. With `precision="int8"` they are replaced by those in `int8_layers` without a measurement. Their weights
   are moved to large pages of memory where the system has them.
3. On CPUs, large batches are divided into parts that fit the processor's cache.
4. On CPUs, `encode_text` skips padding, and `encode_image` computes a ViT's last layer for the class token only.
5. On GPUs, what pays there is timed and kept: see `on_gpu`.

With `compile=True` the towers are compiled in place of steps 2 to 5: see `compiled`.
"""

import ctypes
import os
import threading
from typing import Any

import torch

from ..model.attention import attention_of
from ..model.freed_memory import return_freed_memory
from ..model.optimized import Optimizable, OptimizedModelError
from .batches import keep_not_finite_, positions_of, rows_in_parts, towers_of, work_depth_first_, work_in_parts_
from .compiled import check_compiler, compile_towers_, is_compiled
from .huge_pages import use_huge_pages
from .int8 import INT8, check_int8, is_int8, quantize_
from .layers import has_packed_operators
from .mapped_weights import addresses_of, let_go_of
from .needed_positions import encode_what_features_need_, is_as_made
from .on_gpu import suit_the_gpu_
from .parts import guess_map_bytes, measure_map_bytes, measure_positions
from .replace import LEFT, choose_attention_, fold_resnet_, pack_transformer_

FREED_BYTES_KEPT = 64 * 2**20
"""Freed memory, in bytes, that a process keeps before glibc returns it: the most that glibc's own rule can lead to."""

USUAL_LENGTH = 16
"""Positions of a text with which the size of parts is measured."""

UNFINISHED = "begun, and not finished"
"""The only entry in `optimizations` while a model is changed. If it is still there later, the model is refused."""

_lock = threading.Lock()
"""Held while a model is optimized. A second thread that optimizes the same model waits, and finds it optimized."""


def _renew_lock() -> None:
    """Make a new lock in a forked process: the thread that may hold the old one does not exist there."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def optimize_for_inference(model: Any, compile: bool = False, precision: str | None = None) -> list[str]:
    """Optimize a model in place; see `hf_clip.model.optimized.Optimizable.optimize_for_inference`."""
    if precision not in (None, INT8):
        raise ValueError(
            f'precision={precision!r} is not known: pass precision="{INT8}", or leave it out to keep the dtype of the '
            f"model. A model in bfloat16 is loaded with dtype=torch.bfloat16."
        )
    if compile and precision:
        raise ValueError(
            f'compile=True and precision="{precision}" exclude each other, since torch\'s compiler cannot see into the '
            f"integer products: leave one of them out."
        )
    with _lock:  # two models are not optimized at once either, since layers are timed
        return _optimize_alone(model, compile, precision)


def _optimize_alone(model: Any, compile: bool, precision: str | None) -> list[str]:
    if model.training:
        raise OptimizedModelError("This model is in training; call .eval() before optimize_for_inference().")
    if model.optimizations is None:
        model._refuse_if_optimized("optimized as a whole")
        _refuse_if_spread(model)
        if compile:
            check_compiler(model.device.type)
        if precision == INT8:
            check_int8(model)
        parts = [module for module in model.modules() if isinstance(module, Optimizable)]
        for part in parts:
            part.optimizations = [UNFINISHED]  # stays if the next step is interrupted
        before = addresses_of(model)
        done = optimize_(model, compile, precision)
        let_go_of(before, addresses_of(model))
        return_freed_memory()
        is_changed = not all(LEFT in line for line in done)
        for part in parts:
            part.optimizations = done if is_changed else None
        if not is_changed:
            return done
        model.requires_grad_(False)
    elif model.optimizations == [UNFINISHED]:
        model._refuse_if_optimized("optimized to the end")
    elif compile and not is_compiled(model):
        model._refuse_if_optimized("optimized with compile=True")
    elif precision == INT8 and not is_int8(model):
        model._refuse_if_optimized('optimized with precision="int8"')
    return list(model.optimizations)


def _refuse_if_spread(model: Any) -> None:
    places = {parameter.device.type for parameter in model.parameters()}
    mapped = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if len(places) > 1 or len(mapped) > 1 or "meta" in places:
        raise OptimizedModelError(
            f"This model is spread over {', '.join(sorted(places | mapped))}, and only one that is whole on one device "
            f"can be optimized: load it without device_map."
        )


@torch.no_grad()
def optimize_(model: Any, compile: bool = False, precision: str | None = None) -> list[str]:
    """Make the changes listed above to a model on a single device. Returns descriptions of what was done."""
    on_cpu = model.device.type == "cpu"
    keeps_memory = on_cpu and _keep_freed_memory()  # first, since it changes the times that are measured below
    is_packed = on_cpu and not compile and precision is None and has_packed_operators(model.dtype)
    done: list[str] = []
    if precision == INT8:
        done += quantize_(model)
    else:
        for tower in [module for module in model.modules() if hasattr(module, "attnpool")]:
            done += fold_resnet_(tower, is_packed)
    if compile:
        done += compile_towers_(model)
    if is_packed:
        done += pack_transformer_(model)
    if is_packed or precision == INT8:
        done += use_huge_pages(model)
    if on_cpu and not compile:
        done += suit_the_cache_(model)
    elif not compile and model.device.type == "cuda":
        done += suit_the_gpu_(model)
    if keeps_memory:
        done.append(f"glibc gives freed memory back only beyond {FREED_BYTES_KEPT >> 20} MiB, in the whole process")
    return done


def suit_the_cache_(model: Any) -> list[str]:
    """Let a model on a CPU work in parts that fit the caches. Returns descriptions of the changes."""
    done, sizes = [], {}
    towers = towers_of(model)
    for tower in towers:
        kind = tower.config.model_type
        if kind == "hf_clip_resnet":
            # In int8 a stage takes one image at a time, so that the size of a part matters less.
            sizes[tower] = guess_map_bytes(tower) if is_int8(tower) else measure_map_bytes(tower)
            what = f"of {sizes[tower].per_thread / 2**20:.3g} MiB for the widest map"
        else:
            if kind == "hf_clip_vit" and attention_of(tower.config) == "sdpa":
                done += choose_attention_(tower, positions_of(tower))
            sizes[tower] = measure_positions(tower, USUAL_LENGTH if kind == "hf_clip_text" else positions_of(tower))
            what = f"of {sizes[tower].per_thread:,} positions"
        name = "texts" if kind == "hf_clip_text" else "images"
        done.append(f"large batches of {name} cut into parts {what} for each thread: {sizes[tower].reason}")
    features = encode_what_features_need_(model, sizes)
    for tower in towers:
        if tower.config.model_type == "hf_clip_resnet":
            work_depth_first_(tower, sizes[tower], is_as_made(model, tower, "encode_image"))
            keep_not_finite_(tower)
        else:
            work_in_parts_(tower, rows_in_parts(tower, sizes[tower]))
    return done + features


def _keep_freed_memory() -> bool:
    """Ask glibc to keep memory that one layer frees for the next layer. Returns whether it was asked.

    By default glibc may return freed memory to the system and fetch it again for every layer, depending on what was
    freed before. With the memory kept, ViT-B/16 in bfloat16 was 1.10 to 1.26 times as fast. glibc is not asked if the
    user has set its thresholds, or if another allocator is used.
    """
    if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"} & os.environ.keys():
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    trim_threshold, mmap_threshold = -1, -3  # of <malloc.h>
    return set_option(mmap_threshold, FREED_BYTES_KEPT // 2) == 1 and set_option(trim_threshold, FREED_BYTES_KEPT) == 1
