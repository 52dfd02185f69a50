"""transformers' own CLIP classes with our models' sizes and weights, and inputs for whole models."""

from typing import Any

from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from hf_clip import HfClipModel, HfClipTextModel, HfClipTextModelWithProjection

from ..small import random_images, texts


def stock_model(ours: HfClipModel) -> CLIPModel:
    return _with_weights_of(ours, CLIPModel(CLIPConfig(**ours.config.to_dict())))


def stock_text_model(ours: HfClipTextModel) -> CLIPTextModel:
    return _with_weights_of(ours, CLIPTextModel(CLIPTextConfig(**ours.config.to_dict())))


def stock_text_model_with_projection(ours: HfClipTextModelWithProjection) -> CLIPTextModelWithProjection:
    return _with_weights_of(ours, CLIPTextModelWithProjection(CLIPTextConfig(**ours.config.to_dict())))


def _with_weights_of(ours: nn.Module, stock: Any) -> Any:
    stock.load_state_dict(ours.state_dict())
    return stock.eval()


def pairs(tower: str) -> dict[str, Tensor]:
    """Four texts and the images that belong to them."""
    return {"input_ids": texts(), "pixel_values": random_images(tower)}
