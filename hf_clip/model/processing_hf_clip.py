"""The processor: tokenizer and image processor in one object."""

from typing import Any, TypeVar

from transformers import ProcessorMixin

from .checked_files import read_unchanged
from .hub_repository import HubUpload, find_foreign, refuse_checkpoint_file
from .image_processing_hf_clip import HfClipImageProcessor
from .tokenization_hf_clip import HfClipTokenizer

Processor = TypeVar("Processor", bound="HfClipProcessor")


class HfClipProcessor(HubUpload, ProcessorMixin):
    """Prepares texts and images for the model.

    A call takes `text`, `images` or both, and arguments of the tokenizer and the image processor. It returns
    `input_ids` (T, L), `attention_mask` (T, L) and `pixel_values` (I, 3, Y, X).

    Args:
        image_processor: HfClipImageProcessor.
        tokenizer: HfClipTokenizer.
        **kwargs: As for any processor of transformers.

    Example::

        processor = HfClipProcessor.from_pretrained("org/clip-vit-b32")
        inputs = processor(text=["a cat", "a dog"], images=["cat.jpg"], return_tensors="pt")
        inputs["pixel_values"].shape  # (1, 3, 224, 224)
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_pretrained(
        cls: type[Processor], pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> Processor:
        """Load a processor from a folder or from a repository on the Hub.

        Tokenizer and image processor belong together even if the folder is replaced while it is read.

        Args:
            pretrained_model_name_or_path: A folder, or the name of a repository, such as "org/clip-vit-b32".
            *args: As for any processor of transformers.
            **kwargs: As for any processor of transformers: `revision`, `subfolder`, `token`, …

        Returns:
            The processor.

        Raises:
            OSError: There is no such folder or repository.
            ValueError: A file is damaged, or the path is that of a checkpoint file.
        """
        source = pretrained_model_name_or_path
        refuse_checkpoint_file(source)
        read = super().from_pretrained
        return read_unchanged(source, lambda: read(source, *args, **kwargs), kwargs.get("subfolder"))

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: Any, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Load our image processor and tokenizer, even if the repository names other classes."""
        source = pretrained_model_name_or_path
        image_processor = HfClipImageProcessor.from_pretrained(source, **kwargs)
        foreign = find_foreign(source, kwargs)
        tokenizer = None if foreign is None else foreign.tokenizer()
        return [image_processor, tokenizer or HfClipTokenizer.from_pretrained(source, **kwargs)]


__all__ = ["HfClipProcessor"]
