"""transformers' common tests of processors."""

import unittest

from transformers import ProcessorMixin

from hf_clip import HfClipImageProcessor, HfClipProcessor, HfClipTokenizer

from .sdist import load

mixins = load("test_processing_common")


class HfClipProcessorTest(mixins.ProcessorTesterMixin, unittest.TestCase):
    processor_class = HfClipProcessor

    @classmethod
    def _setup_tokenizer(cls) -> HfClipTokenizer:
        texts = ["lower newer", "upper older longer string"]
        return HfClipTokenizer.train_from_iterator(texts, vocab_size=600, model_max_length=200)

    @classmethod
    def _setup_image_processor(cls) -> HfClipImageProcessor:
        return HfClipImageProcessor.for_image_size(32)

    @staticmethod
    def does_processor_return_mm_offsets(processor_class: type, method_name: str) -> bool:
        """transformers compares with the first base class, which here is another than its own."""
        return getattr(processor_class, method_name) is not getattr(ProcessorMixin, method_name, None)
