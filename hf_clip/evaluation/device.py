"""Where and in which dtype a model computes, checked before anything is loaded."""

import torch


def check_computes(device: str | None) -> None:
    """Raise ValueError for a device that is not there, or that computes nothing.   None: whatever there is"""
    from ..zero_shot.pipeline import check_device  # which imports all of transformers' pipelines

    check_device(device)
    if device is not None and torch.device(device).type == "meta":
        raise ValueError("device='meta' holds no values, so nothing can be measured; write cpu, cuda or the like.")


def dtype_named(name: str) -> torch.dtype:
    """Return the dtype of a name such as "bfloat16". Raises ValueError for one that no model computes in."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {name!r}, but one that computes is needed: float32, bfloat16 or float16.")
    return found


__all__ = ["check_computes", "dtype_named"]
