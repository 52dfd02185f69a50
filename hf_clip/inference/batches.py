"""Divide batches into parts that fit the processor's caches.

Dimensions: B batch, L text length, C channels, Y × X pixels, P patches and class token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ..model.text_ends import EndOfTextError
from .parts import STAGES, PartSize, images_at_once

CAPTURED = ("output_hidden_states", "output_attentions")
"""Arguments of a tower that ask for the outputs of all layers."""


def towers_of(model: nn.Module) -> list[Any]:
    """The towers of a model, or the model itself if it is one."""
    return [module for module in model.modules() if hasattr(module, "attnpool") or hasattr(module, "encoder")]


def wants_all_layers(tower: Any, arguments: dict[str, Any]) -> bool:
    """Whether a call of a tower with these arguments, or its configuration, asks for the outputs of all layers."""
    given = ((arguments.get(name), getattr(tower.config, name, False)) for name in CAPTURED)
    return any(default if value is None else value for value, default in given)


def even_parts(batch: Tensor, most: int) -> tuple[Tensor, ...]:
    """Divide a batch into as few parts of at most `most` rows as possible, of about equal size."""
    return batch.tensor_split(-(-len(batch) // max(1, most)))


def join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def work_in_parts_(tower: Any, part_size: Callable[[Tensor], int], encode: Callable[..., Any] | None = None) -> None:
    """Let a tower encode its input in parts. If the outputs of all layers are asked for, it is encoded at once.

    Args:
        tower: The tower, whose `forward` is replaced.
        part_size: Returns the number of rows of a part, given the input.
        encode: Encodes a part. None: the tower's own `forward`.
    """
    whole = tower.forward
    encode = encode or whole

    def forward(input: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        input = kwargs.pop(tower.main_input_name, input)
        is_simple = isinstance(input, Tensor) and input.ndim > 1 and input.numel() > 0 and not args
        is_simple = is_simple and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        is_simple = is_simple and not any(isinstance(value, Tensor) for value in kwargs.values())
        is_simple = is_simple and not wants_all_layers(tower, kwargs)
        if not is_simple:
            return whole(input, *args, **kwargs)
        as_dict = kwargs.pop("return_dict", tower.config.return_dict) is not False
        try:
            parts = [encode(part, return_dict=True, **kwargs) for part in even_parts(input, part_size(input))]
        except EndOfTextError:
            return whole(input, **kwargs)  # raises the error with places in the whole batch
        fields = ("last_hidden_state", "pooler_output")
        output = BaseModelOutputWithPooling(**{name: join([part[name] for part in parts]) for name in fields})
        return output if as_dict else output.to_tuple()

    tower.forward = forward


def positions_of(tower: Any) -> int:
    """Return P, for an image of the ViT's own size."""
    return 1 + tower.config.grid_size**2


def rows_in_parts(tower: Any, size: PartSize) -> Callable[[Tensor], int]:
    """Return a function from texts (B, L), or images (B, C, Y, X), to the number that a transformer takes at once."""
    if tower.config.model_type == "hf_clip_text":
        return lambda ids: size.now() // ids.shape[1]
    area = tower.config.patch_size**2
    return lambda images: size.now() // (1 + images[0, 0].numel() // area)


def is_of_own_size(images: Any, tower: Any) -> bool:
    """Whether these are images of the tower's own size, so that nothing has to be resampled or refused."""
    shape = (tower.config.num_channels, tower.config.image_size, tower.config.image_size)
    return isinstance(images, Tensor) and images.shape[1:] == shape and images.is_floating_point()


def keep_not_finite_(tower: Any) -> None:
    """Let a ResNet's feature be NaN where an image is not finite: oneDNN's and cuDNN's ReLU make 0 of NaN."""
    whole = tower.forward

    def forward(input: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        images = kwargs.pop(tower.main_input_name, input)
        output = whole(images, *args, **kwargs)
        is_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
        if is_graph or not isinstance(images, Tensor) or not images.numel():
            return output
        lost = ~images.flatten(1).isfinite().all(dim=1, keepdim=True)
        pooled = output[1].masked_fill(lost, torch.nan)
        if isinstance(output, tuple):
            return (output[0], pooled, *output[2:])
        output["pooler_output"] = pooled
        return output

    tower.forward = forward


def work_depth_first_(tower: Any, size: PartSize, is_as_made: bool) -> None:
    """Let each stage of a ResNet process feature maps while they are in the cache.

    Early stages have large maps and take few images at once, later stages take more. The images that a stage takes at
    once go through the earlier stages in smaller parts.

    If the tower was changed (`is_as_made` is False), its own `forward` encodes as many images as the last stage takes.
    """
    whole = tower.forward
    stages = [tower.get_submodule(name) for name in STAGES]

    def run(images: Tensor, last: int) -> Tensor:
        maps = []
        for part in even_parts(images, images_at_once(tower, images[0, 0].numel(), last, size)):
            maps.append(stages[last](run(part, last - 1) if last else tower.stem(part)))
        return join(maps)

    def encode(images: Tensor, **kwargs: Any) -> Any:
        if not (is_as_made and is_of_own_size(images, tower)):
            return whole(images, **kwargs)  # resamples positions, or refuses the images
        feature_map = run(images.to(tower.dtype), len(stages) - 1)
        pooled, _ = tower.attnpool(feature_map)
        return BaseModelOutputWithPooling(last_hidden_state=feature_map, pooler_output=pooled)

    work_in_parts_(tower, lambda images: images_at_once(tower, images[0, 0].numel(), len(stages) - 1, size), encode)
