"""Where a model computes, checked before anything is loaded."""

import torch


def check_computes(device: str | None) -> None:
    """Raise ValueError for a device that is not there, or that computes nothing.   None: whatever there is"""
    from ..zero_shot.pipeline import check_device  # which imports all of transformers' pipelines

    check_device(device)
    if device is not None and torch.device(device).type == "meta":
        raise ValueError("device='meta' holds no values, so nothing can be measured; write cpu, cuda or the like.")


__all__ = ["check_computes"]
