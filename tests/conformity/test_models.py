"""transformers' common tests of models, on every class and both kinds of image tower."""

import unittest
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from hf_clip import (
    HfClipConfig,
    HfClipForImageClassification,
    HfClipModel,
    HfClipResNetConfig,
    HfClipResNetModel,
    HfClipTextConfig,
    HfClipTextModel,
    HfClipTextModelWithProjection,
    HfClipVisionModelWithProjection,
    HfClipViTConfig,
    HfClipViTModel,
)

from .sdist import load

mixins = load("test_modeling_common")

BATCH, LENGTH, HEADS = 12, 7, 4
TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 24,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "projection_dim": 16,
}
VIT = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 16,
}
RESNET = {
    "depths": [1, 1, 1, 1],
    "stem_width": 2,
    "num_attention_heads": HEADS,
    "image_size": 64,
    "projection_dim": 16,
}


class TextTester:
    """What a mixin asks of a model's tester: a configuration, inputs, and the numbers that it expects in outputs."""

    batch_size = BATCH
    is_training = False  # a tower by itself has no loss
    hidden_size = TEXT["hidden_size"]
    num_hidden_layers = TEXT["num_hidden_layers"]
    num_attention_heads = HEADS
    seq_length = LENGTH
    vocab_size = TEXT["vocab_size"]

    def get_config(self) -> Any:
        return HfClipTextConfig(**TEXT)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        input_ids = 2 + mixins.ids_tensor([BATCH, LENGTH], TEXT["vocab_size"] - 2)
        input_ids[:, -1] = TEXT["eos_token_id"]
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


class ViTTester:
    batch_size = BATCH
    is_training = False
    image_size = VIT["image_size"]
    hidden_size = VIT["hidden_size"]
    num_hidden_layers = VIT["num_hidden_layers"]
    num_attention_heads = HEADS
    seq_length = 1 + (VIT["image_size"] // VIT["patch_size"]) ** 2

    def get_config(self) -> Any:
        return HfClipViTConfig(**VIT)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        size = self.image_size
        return self.get_config(), {"pixel_values": mixins.floats_tensor([BATCH, 3, size, size])}


class ResNetTester(ViTTester):
    image_size = RESNET["image_size"]
    num_hidden_layers = 1  # attentions: the attention pool's
    expected_num_hidden_layers = 5  # hidden states: the stem's and four stages'
    seq_length = hidden_size = RESNET["image_size"] // 4  # rows and columns of the first of them
    query_length, key_length = 1, 1 + (RESNET["image_size"] // 32) ** 2

    def get_config(self) -> Any:
        return HfClipResNetConfig(**RESNET)


class InWhole:
    """A tower's tester for a model that takes the composite configuration."""

    def get_config(self) -> Any:
        return HfClipConfig(text_config=TEXT, vision_config=super().get_config(), projection_dim=16)


class ViTInWholeTester(InWhole, ViTTester): ...


class ResNetInWholeTester(InWhole, ResNetTester): ...


class WithLoss:
    is_training = True


class ViTWithLossTester(WithLoss, ViTInWholeTester): ...


class ResNetWithLossTester(WithLoss, ResNetInWholeTester): ...


class WholeTester:
    batch_size = BATCH
    is_training = True

    def __init__(self, vision: Any):
        self.text_model_tester, self.vision_model_tester = TextTester(), vision

    def get_config(self) -> Any:
        return self.vision_model_tester.get_config()

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        _, texts = self.text_model_tester.prepare_config_and_inputs_for_common()
        config, images = self.vision_model_tester.prepare_config_and_inputs_for_common()
        return config, texts | images | {"return_loss": True}


class ModelTests(mixins.ModelTesterMixin):
    """The mixin with the few changes that all of our models need."""

    test_resize_embeddings = False
    test_can_init_all_missing_weights_before_2023 = True  # which it takes a file without a year for
    new_tester: Any

    def setUp(self) -> None:
        self.model_tester = self.new_tester()

    def test_model_forward_default_config_values(self) -> None:
        """With a vocabulary that has the default end of text, and with 0 at the end of each text.

        A smaller vocabulary is refused without its own end. The test calls the id 0 the end of text.
        The name is among the base models' here, since the test passes over all others.
        """
        names = {str(number): model.__name__ for number, model in enumerate(self.all_model_classes)}
        with patch.dict(TEXT, vocab_size=49408, eos_token_id=0), patch.dict(MODEL_MAPPING_NAMES, names):
            super().test_model_forward_default_config_values()


class StartsWithConvolution:
    """Where a convolution makes embeddings of the input, which the mixin takes for a table."""

    def test_model_get_set_embeddings(self) -> None:
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config)
            assert isinstance(model.get_input_embeddings(), nn.Conv2d)
            embedding = nn.Conv2d(3, 8, 1)
            model.set_input_embeddings(embedding)
            assert model.get_input_embeddings() is embedding
            assert model.get_output_embeddings() is None


class HfClipTextModelTest(ModelTests, unittest.TestCase):
    all_model_classes = (HfClipTextModel, HfClipTextModelWithProjection)
    new_tester = TextTester
    test_resize_embeddings = True


class HfClipViTModelTest(StartsWithConvolution, ModelTests, unittest.TestCase):
    all_model_classes = (HfClipViTModel,)
    new_tester = ViTTester


class ResNetTests(ModelTests):
    """A ResNet has hidden states per stage, feature maps, and one attention, which has one query."""

    inapplicable_in = {
        "5.18": {"test_keep_in_fp32_modules": "wants integer counters to be cast; later versions look at floats alone"}
    }
    skip_test_image_features_output_shape = True  # compares the last axis with the width, and a map's is a column

    def test_attention_outputs(self) -> None:
        tester = self.model_tester
        tester.seq_length = tester.query_length
        super().test_attention_outputs()

    def _image_features_get_expected_num_attentions(self, model_tester: Any = None) -> int:
        return 1

    def _image_features_get_expected_num_hidden_states(self, model_tester: Any = None) -> int:
        return 5


class HfClipResNetModelTest(StartsWithConvolution, ResNetTests, unittest.TestCase):
    all_model_classes = (HfClipResNetModel,)
    new_tester = ResNetTester
    inapplicable = {
        "test_retain_grad_hidden_states_attentions": (
            "wants the attentions' gradient from the first output, but the attention pool follows last_hidden_state"
        )
    }


class HfClipVisionModelWithProjectionViTTest(StartsWithConvolution, ModelTests, unittest.TestCase):
    all_model_classes = (HfClipVisionModelWithProjection,)
    new_tester = ViTInWholeTester


class HfClipVisionModelWithProjectionResNetTest(StartsWithConvolution, ResNetTests, unittest.TestCase):
    all_model_classes = (HfClipVisionModelWithProjection,)
    new_tester = ResNetInWholeTester


class HfClipForImageClassificationViTTest(StartsWithConvolution, ModelTests, unittest.TestCase):
    all_model_classes = (HfClipForImageClassification,)
    new_tester = ViTWithLossTester


class HfClipForImageClassificationResNetTest(StartsWithConvolution, ResNetTests, unittest.TestCase):
    all_model_classes = (HfClipForImageClassification,)
    new_tester = ResNetWithLossTester


IN_TOWERS = "reads them off the model's own output, where CLIPOutput too has none: they are in the towers' outputs"


class HfClipModelViTTest(ModelTests, unittest.TestCase):
    all_model_classes = (HfClipModel,)
    additional_model_inputs = ["pixel_values"]
    _is_composite = True
    test_resize_embeddings = True
    inapplicable = {
        "test_attention_outputs": IN_TOWERS,
        "test_hidden_states_output": IN_TOWERS,
        "test_retain_grad_hidden_states_attentions": IN_TOWERS,
    }

    def new_tester(self) -> WholeTester:
        return WholeTester(ViTInWholeTester())


class HfClipModelResNetTest(ResNetTests, HfClipModelViTTest):
    def new_tester(self) -> WholeTester:
        return WholeTester(ResNetInWholeTester())
