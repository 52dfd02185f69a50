"""`optimize_for_inference()`: what is done to a whole model, and in which order.

BatchNorm goes into the convolution before it, and the attention pool, which has one query, multiplies that query
instead of every key and value. On CPUs layers are replaced by those of `layers` where these are at least `LEAST_GAIN`
times as fast on this processor. Large batches are cut into parts that stay in the cache, `encode_text` leaves out
padding, and `encode_image` leaves out what a ViT's last layer computes for other positions than the class token.
"""

import ctypes
import os
import threading
from typing import Any

import torch

from ..model.optimized import Optimizable, OptimizedModelError
from .batches import suit_the_cache_
from .layers import has_packed_operators
from .replace import LEFT, fold_resnet_, pack_transformer_

FREED_BYTES_KEPT = 64 * 2**20
"""How much freed memory a process keeps before the C library gives it back: the most that glibc's own rule leads to."""

UNFINISHED = "begun, and not finished"
"""All that is said of a model whose optimization was interrupted: parts of it are changed, so it is refused too."""

_lock = threading.Lock()
"""Held while a model is optimized: threads that ask for the same model wait, and find it done."""


def _renew_lock() -> None:
    """In a forked process the thread that held it is not there."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def optimize_for_inference(model: Any) -> list[str]:
    """Optimize a model in place; see `hf_clip.model.optimized.Optimizable.optimize_for_inference`."""
    with _lock:  # for the model, and for what is timed
        return _optimize_alone(model)


def _optimize_alone(model: Any) -> list[str]:
    if model.training:
        raise OptimizedModelError("This model is in training; call .eval() before optimize_for_inference().")
    if model.optimizations is None:
        model._refuse_if_optimized("optimized as a whole")
        _refuse_if_spread(model)
        parts = [module for module in model.modules() if isinstance(module, Optimizable)]
        for part in parts:
            part.optimizations = [UNFINISHED]  # in case of an interruption
        done = optimize_(model)
        is_changed = not all(LEFT in line for line in done)
        for part in parts:
            part.optimizations = done if is_changed else None
        if not is_changed:
            return done
        model.requires_grad_(False)
    elif model.optimizations == [UNFINISHED]:
        model._refuse_if_optimized("optimized to the end")
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
def optimize_(model: Any) -> list[str]:
    """Do to a model, which is whole on one device, what is described above; returns what was done, in words."""
    on_cpu = model.device.type == "cpu"
    keeps_memory = on_cpu and _keep_freed_memory()  # before anything is timed
    has_operators = on_cpu and has_packed_operators(model.dtype)
    done: list[str] = []
    for tower in [module for module in model.modules() if hasattr(module, "attnpool")]:
        done += fold_resnet_(tower, has_operators)
    if has_operators:
        done += pack_transformer_(model)
    if on_cpu:
        done += suit_the_cache_(model)
    if keeps_memory:
        done.append(f"glibc gives freed memory back only beyond {FREED_BYTES_KEPT >> 20} MiB, in the whole process")
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
