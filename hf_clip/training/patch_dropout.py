"""Train a ViT on a random part of each image's patches, as FLIP does (Li et al. 2023, arXiv 2212.00794).

A step takes less time and memory, since the image tower sees fewer tokens. Where it does not train, in evaluation and
where it is loaded again, the model sees all patches.

Dimensions: B batch, P patches, W width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..model.modeling_hf_clip import HfClipModel
from ..model.vit_tower import HfClipViTModel


@dataclass(frozen=True)
class _KeepSome:
    """A forward hook of a ViT's embeddings, which have the class token first. part: of the patches that are dropped"""

    part: float

    def __call__(self, embeddings: nn.Module, _: Any, tokens: Tensor) -> Tensor:
        if not embeddings.training:
            return tokens
        batch, patches = tokens.shape[0], tokens.shape[1] - 1
        count = max(1, round(patches * (1 - self.part)))
        chosen = torch.rand(batch, patches, device=tokens.device).argsort(dim=1)[:, :count] + 1
        places = torch.cat([chosen.new_zeros(batch, 1), chosen], dim=1)  # (B, 1 + count)
        return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[2]))


def drop_patches_(model: HfClipModel, part: float) -> None:
    """Let a model leave out a part of each image's patches while it trains. The class token always stays.

    Args:
        model: Its image tower is a ViT.
        part: Of the patches, between 0 and 1. At least one patch stays.

    Raises:
        ValueError: The image tower has no patches.
    """
    tower = model.vision_model
    if not isinstance(tower, HfClipViTModel):
        raise ValueError(
            "--patch_dropout leaves out patches of a ViT, but the image tower of this model is a ResNet, which has "
            "none; leave the option out."
        )
    tower.embeddings.register_forward_hook(_KeepSome(part))


__all__ = ["drop_patches_"]
