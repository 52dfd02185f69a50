"""Texts and pictures through one object: the tokenizer and the image processor side by side."""

from typing import Any

from transformers import ProcessorMixin


class HfClipProcessor(ProcessorMixin):
    """`processor(text=..., images=...)` → input_ids (B, L), attention_mask (B, L), pixel_values (B, 3, H, W)."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, **kwargs)

    def _merge_kwargs(self, *args: Any, tokenizer_init_kwargs: dict | None = None, **kwargs: Any) -> dict:
        """Sort the arguments of a call by modality.

        A tokenizer too has a `backend`, which transformers would hand to the image processor.
        """
        tokenizer_init_kwargs = {k: v for k, v in (tokenizer_init_kwargs or {}).items() if k != "backend"}
        return super()._merge_kwargs(*args, tokenizer_init_kwargs=tokenizer_init_kwargs, **kwargs)


__all__ = ["HfClipProcessor"]
