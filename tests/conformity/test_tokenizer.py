"""transformers' common tests of tokenizers, with the first thousand of OpenAI's merges."""

import tempfile
import unittest

from hf_clip import HfClipTokenizer
from hf_clip.checkpoints.vocabulary import installed_vocabulary

from .sdist import load

PAIRS = "passes pairs of texts, which are refused with a message: CLIP reads single ones"


class SavedTokenizer:
    """A folder with the tokenizer under test, in place of a repository on the Hub."""

    tokenizer_class = HfClipTokenizer

    @classmethod
    def setUpClass(cls) -> None:
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        HfClipTokenizer.from_vocabulary_file(installed_vocabulary(), vocab_size=1514).save_pretrained(folder.name)
        cls.from_pretrained_id = [folder.name]
        super().setUpClass()


class HfClipTokenizerTest(SavedTokenizer, load("test_tokenization_common").TokenizerTesterMixin, unittest.TestCase):
    test_seq2seq = False
    inapplicable = {
        "test_call": PAIRS,
        "test_mask_output": PAIRS,
        "test_maximum_encoding_length_pair_input": PAIRS,
        "test_maximum_encoding_length_single_input": (
            "wants a warning for a text that is too long; here it is an error, since the model would fail"
        ),
        "test_number_of_added_tokens": PAIRS,
        "test_padding_to_multiple_of": "wants no padding unless it is asked for; here a batch is padded by default",
        "test_sequence_ids": PAIRS,
        "test_special_tokens_mask_input_pairs": PAIRS,
    }


class HfClipTokenizerOnRustTest(
    SavedTokenizer, load("test_tokenizers_backend_mixin").TokenizersBackendTesterMixin, unittest.TestCase
):
    inapplicable = {
        "test_add_bos_token_without_bos_token": "leaves the start token out, which is refused with a message",
        "test_alignment_methods": PAIRS,
        "test_offsets_mapping": PAIRS,
    }
