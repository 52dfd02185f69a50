"""transformers' common tests of image processors."""

import unittest
from typing import Any

from hf_clip import HfClipImageProcessor

from .sdist import load

mixins = load("test_image_processing_common")

FOUR_CHANNELS = "passes arrays of four channels, which are refused with a message: nothing says what the fourth one is"


class ImageTester(mixins.ImageProcessingTester):
    def __init__(self, parent: Any):
        super().__init__(parent, size={"shortest_edge": 20}, crop_size={"height": 18, "width": 18}, do_convert_rgb=True)

    def _get_image_processing_classes(self) -> dict[str, type]:
        return {"pil": HfClipImageProcessor}


class HfClipImageProcessorTest(mixins.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = ImageTester
    inapplicable = {
        "test_call_numpy_4_channels": FOUR_CHANNELS,
        "test_convert_to_rgb_mixed_input_batch_2": FOUR_CHANNELS,
        "test_new_models_require_torchvision_backend": (
            'wants a second class on torchvision, which is never needed here; backend="torch" is the same class'
        ),
    }
    inapplicable_in = {
        "5.18": {"test_pil_can_load_without_torchvision": "imports the model from transformers' own folder of models"}
    }
