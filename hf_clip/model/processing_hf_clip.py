"""Texts and images through one object: the tokenizer and the image processor side by side."""

from typing import Any

from transformers import ProcessorMixin

from .checked_files import read_unchanged
from .configuration_hf_clip import HubUpload, find_foreign, refuse_checkpoint_file
from .image_processing_hf_clip import HfClipImageProcessor
from .tokenization_hf_clip import HfClipTokenizer


class HfClipProcessor(HubUpload, ProcessorMixin):
    """`processor(text=..., images=...)` → input_ids (B, L), attention_mask (B, L), pixel_values (B, 3, H, W)."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As everywhere in transformers; tokenizer and image processor are of the same writing of a folder."""
        source = pretrained_model_name_or_path
        refuse_checkpoint_file(source)
        read = super().from_pretrained
        return read_unchanged(source, lambda: read(source, *args, **kwargs), kwargs.get("subfolder"))

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Our own image processor and tokenizer, whichever classes the repository names."""
        source = pretrained_model_name_or_path
        image_processor = HfClipImageProcessor.from_pretrained(source, **kwargs)
        foreign = find_foreign(source, kwargs)
        tokenizer = None if foreign is None else foreign.tokenizer()
        return [image_processor, tokenizer or HfClipTokenizer.from_pretrained(source, **kwargs)]


__all__ = ["HfClipProcessor"]
