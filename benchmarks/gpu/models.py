"""The nine models with seeded random weights, as each implementation has them, made on the device itself.

Dimensions: I images, T texts, L text length.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from conversion.parity import random_texts
from conversion.reference import build_reference, reference_dimensions
from hf_clip import HfClipModel, Variant
from hf_clip.checkpoints.keys import config_from_shapes, convert_names
from hf_clip.model.variants import get_variant

from ..ceiling import TEXT_LAYERS
from ..measuring import PRECISIONS, LeftOutError
from ..peers import CONTEXT, Batch, Case, Encoder, cast, encoder_of, new_open_clip

TINY: dict[str, Any] = {"embed_dim": 32, "text_width": 64, "text_heads": 1, "image_size": 64, "image_gflops": 0.01}
TINY_VIT = TINY | {"vision_layers": 2, "vision_width": 64, "vision_heads": 1, "patch_size": 16}
TINY_RESNET = TINY | {"vision_layers": (1, 1, 1, 1), "vision_width": 8, "vision_heads": 4}
TINY_TEXT_LAYERS = 2
VOCABULARY = 49408
PAD_TO = 8
"""As hf_clip's collator pads."""


def variant_of(name: str, is_dry: bool) -> Variant:
    """One of the nine; in a dry run a tiny one of its kind."""
    variant = get_variant(name)
    if not is_dry:
        return variant
    return replace(variant, **(TINY_RESNET if variant.patch_size is None else TINY_VIT))


class Implementations:
    """One model by every implementation, in evaluation mode.

    Args:
        variant: which.
        device: where. Weights are drawn there, which takes seconds less for the largest.
        seed: of the weights.
    """

    def __init__(self, variant: Variant, device: str, seed: int = 0):
        self.variant, self.device = variant, device
        self.text_layers = TINY_TEXT_LAYERS if variant.text_width == TINY["text_width"] else TEXT_LAYERS
        dimensions = reference_dimensions(variant) | {"transformer_layers": self.text_layers}
        with torch.device(device):
            self.reference = build_reference(dimensions, seed)
        state = self.reference.state_dict()
        self.config = config_from_shapes(state)
        self.state = {name: tensor.contiguous() for name, tensor in convert_names(state, self.config).items()}

    def ours(self, precision: str = "float32") -> HfClipModel:
        with torch.device("meta"):
            model = HfClipModel(copy.deepcopy(self.config))
        model.load_state_dict({name: tensor.clone() for name, tensor in self.state.items()}, assign=True)
        return model.eval().to(PRECISIONS[precision])

    def openai(self, precision: str = "float32") -> Any:
        return cast(copy.deepcopy(self.reference), self.case("image", precision))

    def exact(self) -> Any:
        """OpenAI's code in float64. Its LayerNorm would compute in float32."""
        model = copy.deepcopy(self.reference).double()
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.__class__ = nn.LayerNorm
        return model

    def stock(self, precision: str = "float32") -> CLIPModel:
        """transformers' model. Raises LeftOutError for a ResNet."""
        if self.variant.patch_size is None:
            raise LeftOutError("it has no ResNets")
        with torch.device(self.device):
            model = CLIPModel(CLIPConfig(**self.config.to_dict())).eval()
        model.load_state_dict(self.state)
        return model.to(PRECISIONS[precision])

    def open_clip(self, precision: str = "float32") -> Any:
        """open_clip's model. Raises LeftOutError where it is not installed."""
        with torch.device(self.device):
            model = new_open_clip(self.variant, self.text_layers).eval()
        model.load_state_dict(self.reference.state_dict())
        return model.to(PRECISIONS[precision])

    def case(self, kind: str, precision: str) -> Case:
        return Case(self.variant, Path(), kind, precision, self.device)

    def encoder(self, model: Any, kind: str, precision: str) -> Encoder:
        """A model's call that gives the features of "image"s or "text"s, in inference mode."""
        return torch.inference_mode()(encoder_of(model, self.case(kind, precision)))


def make_batch(variant: Variant, images: int, lengths: tuple[int, ...], device: str, seed: int = 1) -> Batch:
    """Random inputs, equal on every device.

    Args:
        variant: that is to take them.
        images: I.
        lengths: of T texts, start and end included.
        device: where they are to be.
        seed: of the numbers.

    Returns:
        pixel_values (I, 3, y, x); input_ids and attention_mask (T, L); padded (T, 77), as OpenAI's code has them.
    """
    size = variant.image_size
    pixels = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        padded = random_texts(lengths, VOCABULARY, CONTEXT)
    ids = padded[:, : min(-(-max(lengths) // PAD_TO) * PAD_TO, CONTEXT)]
    batch = {"pixel_values": pixels, "input_ids": ids, "attention_mask": (ids != 0).long(), "padded": padded}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def caption_lengths(count: int) -> tuple[int, ...]:
    """Of texts with 8 to 16 tokens."""
    return tuple(8 + index % 9 for index in range(count))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ over all elements, in float64; infinite where any is no number."""
    difference = (found.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm()
    return float(difference.nan_to_num(nan=torch.inf))


def worst_gradient(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of a parameter's gradient, and which it is.

    The bias of the keys is left out: it adds the same to all scores of a query, so its gradient is rounding alone.
    """
    errors = {
        name: relative_error(found[name], gradient)
        for name, gradient in expected.items()
        if not name.endswith("k_proj.bias") and gradient.norm() > 0
    }
    name = max(errors, key=lambda name: errors[name])
    return errors[name], name


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Of all parameters that have one; a model is left without."""
    found = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
