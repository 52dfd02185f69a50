"""The method `optimize_for_inference()`, and all that an optimized model refuses to do.

The changes cannot be undone or trained, so an optimized model refuses to be trained, saved or moved.

The optimizer itself is no part of a Hub repository. The package adds it to `OPTIMIZERS` when it is imported.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OPTIMIZERS: list[Callable[..., list[str]]] = []
"""Functions that optimize a model in place and return descriptions of the changes. The last one is used."""


class OptimizedModelError(RuntimeError):
    """An optimized model was asked for something that it can no longer do, or a model cannot be optimized."""


class Optimizable:
    """Base class of models that can be optimized for inference."""

    optimizations: list[str] | None = None
    """Descriptions of what `optimize_for_inference` has changed. None for a model that is not optimized."""

    def optimize_for_inference(self: Any, compile: bool = False, precision: str | None = None) -> list[str]:
        """Change this model in place, so that inference on its present device and in its present dtype is faster.

        - BatchNorm is folded into the convolutions before it.
        - On CPUs, weights are stored in the processor's own order of memory, in large pages where Linux has them, and
          large batches are divided into parts that fit its cache. Pages of a file whose weights were replaced leave
          memory.
        - On CPUs, glibc is asked to keep freed memory. This holds for the whole process.
        - On GPUs, queries, keys and values come from one product, cuDNN computes ReLU and sums with the convolutions,
          and texts are sorted by length.
        - On GPUs, a shape of input that comes for the second time becomes a CUDA graph, whose kernels are launched
          together. A line about each is added to `optimizations`. Its memory is kept as long as the model.

        A change is made only if it is faster on this processor. Layers with hooks or adapters stay as they are. In
        float32 outputs change by at most 1e-5 (relative), in half precision by rounding.

        The changes cannot be undone. The model can no longer be trained, saved or moved. If weights were reordered, it
        cannot be exported or compiled either, and autocast has no effect on these layers: convert the model to its
        dtype before. Hooks that are added later may see parts of a batch, or tensors that later layers overwrite. With
        them, and where gradients of the input or autocast are asked for, no CUDA graph is used.

        Args:
            compile: Whether torch's own compiler computes the towers, in place of the package's layers. BatchNorm is
                folded before. It needs a C++ compiler on CPUs and Triton on GPUs. The first calls take up to minutes,
                and less where torch finds what it compiled before (environment variable `TORCHINDUCTOR_CACHE_DIR`).
                It was not faster on the processors that were measured.
            precision: None: products are computed in the model's dtype. "int8": products are computed in 8-bit
                integers, on CPUs, by models in float32 or bfloat16. Weights are scaled by output channel, once.
                Activations are scaled in each call: those of a transformer by token, those of a ResNet by image.
                Everything else stays in the model's dtype, which is also that of the outputs. Features change, see the
                guide of speed. The float weights of these layers are freed.

        Returns:
            Descriptions of what was changed and what was left, and why: the times that were measured, and the caches.
            They are also kept in `optimizations`. If nothing was changed,
            the model is as before and `optimizations` is None.

        Raises:
            OptimizedModelError: The model is in training mode, is spread over several devices, has a tower that is
                already optimized, or was left half-optimized by an interruption. With `compile` also: there is no
                compiler, or the model is already optimized without. With "int8" also: the model is not on a CPU, is in
                another dtype, is already optimized without, has only layers with hooks or adapters, or torch has no
                such products on this processor.
            ValueError: The precision is not known, or is given together with `compile`.
            ModuleNotFoundError: The package is not installed, or was imported only after the model was loaded.

        Example::

            model = HfClipModel.from_pretrained("org/clip-vit-b32").eval()
            model.optimize_for_inference()
        """
        if not OPTIMIZERS:
            raise ModuleNotFoundError(
                "optimize_for_inference() comes with the package: pip install hf-clip, then `import hf_clip` and load "
                "the model again.",
                name="hf_clip",
            )
        return OPTIMIZERS[-1](self, compile=compile, precision=precision)

    def _refuse_if_optimized(self: Any, wish: str) -> None:
        """Raise OptimizedModelError if this model, or one of its towers, is optimized."""
        if any(isinstance(module, Optimizable) and module.optimizations is not None for module in self.modules()):
            raise OptimizedModelError(
                f"This model was optimized for inference and cannot be {wish} any more; load it again with "
                f"from_pretrained and do that before optimize_for_inference()."
            )

    def train(self: Any, mode: bool = True) -> Any:
        """Set training or evaluation mode, as in torch. An optimized model refuses training mode."""
        if mode:
            self._refuse_if_optimized("trained")
        return super().train(mode)  # type: ignore[misc]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the model to a folder, as in transformers. An optimized model refuses."""
        self._refuse_if_optimized("saved")
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's tensors by name, as in torch. An optimized model refuses."""
        self._refuse_if_optimized("saved")
        return super().state_dict(*args, **kwargs)  # type: ignore[misc]

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load tensors by name, as in torch. An optimized model refuses."""
        self._refuse_if_optimized("given other weights")
        return super().load_state_dict(*args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> Any:  # when a module around it is loaded
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
