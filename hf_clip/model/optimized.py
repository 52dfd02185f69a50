"""What `optimize_for_inference()` is for a model that travels: a call of the package, and what is refused afterwards.

What it changes cannot be undone and cannot be trained, so an optimized model refuses to be trained, saved or moved.
How models are optimized does not travel: the package puts that into `OPTIMIZERS` when it is imported.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OPTIMIZERS: list[Callable[[Any], list[str]]] = []
"""What optimizes a model in place and returns what it did, in words. The package appends its own."""


class OptimizedModelError(RuntimeError):
    """An optimized model was asked for what it cannot do any more."""


class Optimizable:
    """What a model is asked by `optimize_for_inference`, and what it refuses afterwards."""

    optimizations: list[str] | None = None
    """What `optimize_for_inference` has done, in words; None before it."""

    def optimize_for_inference(self: Any) -> list[str]:
        """Make this model as fast as it can be made for inference on the device and in the dtype that it has now.

        BatchNorm goes into convolutions, weights into the processor's order of memory, and large batches are cut into
        parts that stay in its cache. glibc is asked to keep freed memory, in the whole process. What doesn't pay on
        this processor is left out, and so are layers with hooks or adapters. Outputs change by at most 1e-5 relative
        in float32, and by rounding in half precision.

        It cannot be undone. The model can be trained, saved and moved no more, nor exported or compiled where weights
        were reordered. Autocast does not reach those layers, so bring the model into its dtype before. Hooks that are
        added later may see parts of a batch, or tensors that later layers overwrite.

        Returns:
            What was done and what was left as it is, in words, which `optimizations` holds too. Where nothing was
            done the model is as it was, and `optimizations` is None.

        Raises:
            OptimizedModelError: The model is in training, lies on several devices, has a tower that was optimized, or
                is one with which this was begun and interrupted.
            ModuleNotFoundError: The package is missing, or was not imported before the model was loaded.
        """
        if not OPTIMIZERS:
            raise ModuleNotFoundError(
                "optimize_for_inference() comes with the package: pip install hf-clip, then `import hf_clip` and load "
                "the model again.",
                name="hf_clip",
            )
        return OPTIMIZERS[-1](self)

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
