"""Texts and pictures through one object: the tokenizer and the image processor side by side."""

from typing import Any

from transformers import ProcessorMixin


class HfClipProcessor(ProcessorMixin):
    """`processor(text=..., images=...)` → input_ids (B, L), attention_mask (B, L), pixel_values (B, 3, H, W)."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, **kwargs)


__all__ = ["HfClipProcessor"]
