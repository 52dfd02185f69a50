"""The nine CLIP models of OpenAI, one row each.

Sizes are those of the published checkpoints (Radford et al. 2021, tables 19 and 20). The sha256 is part of a
checkpoint's published address. All text towers have 12 layers, heads of width 64, 77 positions and 49,408 tokens. All
MLPs are four times as wide as their tower.
"""

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

OPENAI_VOCAB_SIZE = 49408
"""Number of ids of OpenAI's models. The published vocabulary file has more merges than this; the rest is ignored."""

MOST_PIXELS = 1 << 14
"""Largest height and width of an image that a model may take. A larger number is damage."""


@dataclass(frozen=True)
class Variant:
    """One of OpenAI's nine models.

    Attributes:
        name: OpenAI's exact name, such as "ViT-L/14@336px".
        slug: Name for a repository on the Hub, such as "clip-vit-l14-336".
        checkpoint: File name of the published checkpoint.
        sha256: SHA-256 of the published checkpoint, as hexadecimal digits.
        embed_dim: Width of the embeddings, which images and texts share.
        image_size: Height and width of an image in pixels.
        vision_layers: Number of layers of a ViT, or blocks in each stage of a ResNet.
        vision_width: Width of a ViT, or of a ResNet's stem, whose last feature map has 32 times as many channels.
        vision_heads: Attention heads of a ViT's layers, or of a ResNet's attention pool.
        patch_size: Height and width of a patch in pixels. None for a ResNet.
        text_width: Width of the text tower.
        text_heads: Attention heads of the text tower's layers.
        image_parameters: Parameters of the image tower and its projection.
        text_parameters: Parameters of the text tower and its projection.
        image_gflops: Floating-point operations for one image, in units of 10⁹.
        imagenet_zero_shot_top1: Zero-shot top-1 accuracy on ImageNet in percent, as published.
    """

    name: str
    slug: str
    checkpoint: str
    sha256: str
    embed_dim: int
    image_size: int
    vision_layers: int | tuple[int, int, int, int]
    vision_width: int
    vision_heads: int
    patch_size: int | None
    text_width: int
    text_heads: int
    image_parameters: int
    text_parameters: int
    image_gflops: float
    imagenet_zero_shot_top1: float

    @property
    def total_parameters(self) -> int:
        """Number of parameters of the whole model, with the projections and the logit scale."""
        return self.image_parameters + self.text_parameters + 1  # the logit scale


# fmt: off
_ROWS = [
    #       name              slug                checkpoint             sha256                                                              embed image layers          width heads patch text  heads image-param  text-param   GFLOPs  top-1
    Variant("RN50",           "clip-rn50",        "RN50.pt",             "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762", 1024, 224, (3, 4, 6, 3),    64,   32, None, 512,  8,   38_316_896,  63_690_240,  12.22, 59.6),
    Variant("RN101",          "clip-rn101",       "RN101.pt",            "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599", 512,  224, (3, 4, 23, 3),   64,   32, None, 512,  8,   56_259_936,  63_428_096,  19.54, 62.2),
    Variant("RN50x4",         "clip-rn50x4",      "RN50x4.pt",           "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd", 640,  288, (4, 6, 10, 6),   80,   40, None, 640,  10,  87_137_080,  91_163_520,  42.56, 65.8),
    Variant("RN50x16",        "clip-rn50x16",     "RN50x16.pt",          "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa", 768,  384, (6, 8, 18, 8),   96,   48, None, 768,  12, 167_328_912, 123_650_304, 149.39, 70.5),
    Variant("RN50x64",        "clip-rn50x64",     "RN50x64.pt",          "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c", 1024, 448, (3, 15, 36, 10), 128,  64, None, 1024, 16, 420_380_352, 202_877_952, 529.11, 73.6),
    Variant("ViT-B/32",       "clip-vit-b32",     "ViT-B-32.pt",         "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", 512,  224, 12,              768,  12, 32,   512,  8,   87_849_216,  63_428_096,   8.82, 63.2),
    Variant("ViT-B/16",       "clip-vit-b16",     "ViT-B-16.pt",         "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", 512,  224, 12,              768,  12, 16,   512,  8,   86_192_640,  63_428_096,  35.13, 68.6),
    Variant("ViT-L/14",       "clip-vit-l14",     "ViT-L-14.pt",         "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", 768,  224, 24,              1024, 16, 14,   768,  12, 303_966_208, 123_650_304, 162.03, 75.3),
    Variant("ViT-L/14@336px", "clip-vit-l14-336", "ViT-L-14-336px.pt",   "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", 768,  336, 24,              1024, 16, 14,   768,  12, 304_293_888, 123_650_304, 381.92, 76.2),
]
# fmt: on

VARIANTS: dict[str, Variant] = {row.name: row for row in _ROWS}
"""OpenAI's nine models by their exact names."""


LIKE_A_VARIANT = re.compile(r"(vit-[a-z]+[/-]|rn)\d+(x\d+)?(@\d+px)?$", re.IGNORECASE)
"""What the nine names look like, and others that are none of them."""


def get_variant(name: str) -> Variant:
    """Look up a variant by OpenAI's exact name, e.g. "ViT-L/14@336px".

    Raises:
        ValueError: There is no such variant. The message names all nine, and the nearest one.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    by_other_name = {row.slug: row.name for row in _ROWS} | {
        row.checkpoint.removesuffix(".pt"): row.name for row in _ROWS
    }
    candidates = {known.lower(): known for known in [*VARIANTS, *by_other_name]}
    near = get_close_matches(str(name).lower(), candidates, n=1, cutoff=0.6)
    match = candidates[near[0]] if near else None
    hint = f" Did you mean {by_other_name.get(match, match)!r}?" if match else ""
    raise ValueError(f"Unknown CLIP variant {name!r}; the nine are {', '.join(VARIANTS)}.{hint}")


def refuse_unknown_variant(source: Any) -> None:
    """Raise ValueError, as `get_variant` does, for a name that looks like one of the nine and is none of them.

    The Hub has no such model, and would be asked for it several times, for a minute or two without a network.
    """
    name = os.fspath(source) if isinstance(source, (str, os.PathLike)) else ""
    if isinstance(name, str) and LIKE_A_VARIANT.match(name) and not os.path.exists(name):
        get_variant(name)
