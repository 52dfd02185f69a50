"""transformers' common tests of configurations."""

import unittest
from typing import Any
from unittest.mock import patch

from transformers import PreTrainedConfig

from hf_clip import HfClipConfig, HfClipResNetConfig, HfClipTextConfig, HfClipViTConfig

from .sdist import load
from .test_models import RESNET, TEXT, VIT, ResNetInWholeTester, ViTInWholeTester

ConfigTester = load("test_configuration_common").ConfigTester


class ConfigurationTests:
    """Every check of the tester as a test of its own, so that none hides behind the first one that fails."""

    config_class: type[PreTrainedConfig]
    arguments: dict[str, Any]
    model_tester: Any = None
    has_text = False

    def check(self, name: str) -> None:
        tester = ConfigTester(self, self.config_class, has_text_modality=self.has_text, **self.arguments)
        getattr(tester, name)()


for _name in dir(ConfigTester):
    if _name.startswith(("create_and_test_", "check_")):
        _test = lambda self, name=_name: self.check(name)  # noqa: E731
        setattr(ConfigurationTests, "test_" + _name.removeprefix("create_and_test_").removeprefix("check_"), _test)


class HfClipTextConfigTest(ConfigurationTests, unittest.TestCase):
    config_class, arguments, has_text = HfClipTextConfig, TEXT, True


class HfClipViTConfigTest(ConfigurationTests, unittest.TestCase):
    config_class, arguments = HfClipViTConfig, VIT


class HfClipResNetConfigTest(ConfigurationTests, unittest.TestCase):
    config_class, arguments = HfClipResNetConfig, RESNET


class WholeConfigurationTests(ConfigurationTests):
    """`sub_configs` names a class per field, where a tower's kind is told by its `model_type`: here for the kind."""

    config_class = HfClipConfig
    kind: type[PreTrainedConfig]

    def check(self, name: str) -> None:
        with patch.dict(HfClipConfig.sub_configs, vision_config=self.kind):
            super().check(name)


class HfClipConfigViTTest(WholeConfigurationTests, unittest.TestCase):
    kind, model_tester = HfClipViTConfig, ViTInWholeTester()
    arguments = {"projection_dim": 16}


class HfClipConfigResNetTest(WholeConfigurationTests, unittest.TestCase):
    kind, model_tester = HfClipResNetConfig, ResNetInWholeTester()
    arguments = {"projection_dim": 16, "vision_config": {"model_type": "hf_clip_resnet"}}
    inapplicable = {
        "test_config_to_json_string": "compares with the tower's arguments, where all of its fields are saved"
    }
