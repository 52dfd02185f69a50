"""A model where a command line asks for it: on its device, in its dtype."""

from typing import Any


def load_placed(model: str, *, device: str | None, dtype: str, offline: bool = False) -> tuple[Any, Any]:
    """Load a model and its processor, and move the model to a device, by default a GPU if there is one."""
    from ..checkpoints.in_memory import load_model
    from ..registration import register
    from ..zero_shot.pipeline import default_device

    register()
    loaded, processor = load_model(model, dtype=dtype, offline=offline)
    return loaded.to(device or default_device()), processor


def place_model(model: Any, device: str | None, dtype: str) -> Any:
    """Move a model that an index has loaded to where, and into what, a command line asks for."""
    import torch

    return model.to(device or model.device, getattr(torch, dtype))
