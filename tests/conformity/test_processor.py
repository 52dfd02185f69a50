"""transformers' common tests of processors."""

import unittest

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
