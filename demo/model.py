"""The demo's CLIP before training: small, random, with a BPE vocabulary learned from the captions."""

from collections.abc import Iterable
from pathlib import Path

import torch

from hf_clip import (
    HfClipConfig,
    HfClipImageProcessor,
    HfClipModel,
    HfClipProcessor,
    HfClipResNetConfig,
    HfClipTextConfig,
    HfClipTokenizer,
    HfClipViTConfig,
)

VOCAB_SIZE = 640
TOWERS: dict[str, HfClipViTConfig | HfClipResNetConfig] = {
    "vit": HfClipViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=3,
        hidden_act="gelu",
    ),
    "resnet": HfClipResNetConfig(image_size=32, stem_width=16, depths=[1, 1, 1, 1], num_attention_heads=8),
}


def write_fresh_model(folder: Path, tower: str, captions: Iterable[str], seed: int) -> None:
    """Write an untrained model and its processor, in Hub format."""
    tokenizer = HfClipTokenizer.train_from_iterator(captions, VOCAB_SIZE, model_max_length=24)
    text = HfClipTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=24,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = TOWERS[tower]
    torch.manual_seed(seed)
    HfClipModel(HfClipConfig(text_config=text, vision_config=vision, projection_dim=64)).save_pretrained(folder)
    image_processor = HfClipImageProcessor.for_image_size(
        vision.image_size, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5]
    )
    HfClipProcessor(image_processor, tokenizer).save_pretrained(folder)
