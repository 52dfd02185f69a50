"""What `import hf_clip` tells transformers, and what it tells the files that travel to the Hub without the package.

A command that begins without torch calls `register` when it needs a model after all.
"""

from typing import Any

import transformers

from .checkpoints.open_clip import find_open_clip
from .hub.upload import prepare_for_hub
from .inference.optimize import optimize_for_inference
from .model.configuration_hf_clip import HfClipConfig, HfClipResNetConfig, HfClipTextConfig, HfClipViTConfig
from .model.hub_repository import BEFORE_UPLOAD, FOREIGN_LAYOUTS
from .model.image_processing_hf_clip import HfClipImageProcessor
from .model.modeling_hf_clip import (
    HfClipForImageClassification,
    HfClipModel,
    HfClipResNetModel,
    HfClipTextModel,
    HfClipViTModel,
)
from .model.optimized import OPTIMIZERS
from .model.processing_hf_clip import HfClipProcessor
from .model.tokenization_hf_clip import HfClipTokenizer
from .zero_shot.pipeline import register_pipeline


def register_classes() -> None:
    """Register the classes with the Auto classes of transformers."""
    models: dict[type[transformers.PreTrainedConfig], type[transformers.PreTrainedModel]] = {
        HfClipConfig: HfClipModel,
        HfClipTextConfig: HfClipTextModel,
        HfClipViTConfig: HfClipViTModel,
        HfClipResNetConfig: HfClipResNetModel,
    }
    for config, model in models.items():
        transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        transformers.AutoModel.register(config, model, exist_ok=True)
    transformers.AutoModelForZeroShotImageClassification.register(HfClipConfig, HfClipModel, exist_ok=True)
    transformers.AutoModelForImageClassification.register(HfClipConfig, HfClipForImageClassification, exist_ok=True)
    for config in (HfClipConfig, HfClipTextConfig):
        transformers.AutoTokenizer.register(config, fast_tokenizer_class=HfClipTokenizer, exist_ok=True)
    for config in (HfClipConfig, HfClipViTConfig, HfClipResNetConfig):
        transformers.AutoImageProcessor.register(
            config, image_processor_classes={"pil": HfClipImageProcessor}, exist_ok=True
        )
    transformers.AutoProcessor.register(HfClipConfig, HfClipProcessor, exist_ok=True)


def register() -> None:
    """Register the classes and the pipeline, and what the model's files ask the package for."""
    register_classes()
    register_pipeline()
    hooks: list[tuple[list[Any], Any]] = [(FOREIGN_LAYOUTS, find_open_clip), (BEFORE_UPLOAD, prepare_for_hub)]
    for functions, function in [*hooks, (OPTIMIZERS, optimize_for_inference)]:
        if function not in functions:
            functions.append(function)
