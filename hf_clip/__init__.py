"""All nine OpenAI CLIP models for transformers. Importing this registers them with the Auto classes and the pipelines.

Example::

    import hf_clip
    from transformers import pipeline

    classify = pipeline("zero-shot-image-classification", model="org/clip-vit-b32")
    classify("cat.jpg", candidate_labels=["a cat", "a dog"])

`import hf_clip as clip` gives the functions of OpenAI's module: `available_models`, `load` and `tokenize`.

What is public:

- Models: HfClipModel; HfClipTextModel, HfClipViTModel and HfClipResNetModel, the towers alone;
  HfClipTextModelWithProjection and HfClipVisionModelWithProjection; HfClipForImageClassification; their base class
  HfClipPreTrainedModel; and their outputs HfClipOutput, HfClipTextModelOutput and HfClipVisionModelOutput.
- Configurations: HfClipConfig, HfClipTextConfig, HfClipViTConfig, HfClipResNetConfig; VARIANTS, the nine models, each a
  Variant.
- Inputs: HfClipProcessor, HfClipTokenizer, HfClipImageProcessor.
- Tasks: ZeroShotClassifier; load_head; encode_images and encode_texts; convert.
- As in OpenAI's module: available_models, load, tokenize.
- Errors: UnreadableImageError, TextError, TextTooLongError, EndOfTextError.
"""

import transformers as _transformers

from .checkpoints.conversion import convert
from .checkpoints.open_clip import find_open_clip as _find_open_clip
from .hub.upload import prepare_for_hub as _prepare_for_hub
from .inference.optimize import optimize_for_inference as _optimize_for_inference
from .model.configuration_hf_clip import BEFORE_UPLOAD as _BEFORE_UPLOAD
from .model.configuration_hf_clip import FOREIGN_LAYOUTS as _FOREIGN_LAYOUTS
from .model.configuration_hf_clip import (
    HfClipConfig,
    HfClipResNetConfig,
    HfClipTextConfig,
    HfClipViTConfig,
)
from .model.image_processing_hf_clip import HfClipImageProcessor
from .model.modeling_hf_clip import (
    HfClipForImageClassification,
    HfClipModel,
    HfClipOutput,
    HfClipPreTrainedModel,
    HfClipResNetModel,
    HfClipTextModel,
    HfClipTextModelOutput,
    HfClipTextModelWithProjection,
    HfClipVisionModelOutput,
    HfClipVisionModelWithProjection,
    HfClipViTModel,
)
from .model.open_image import UnreadableImageError
from .model.optimized import OPTIMIZERS as _OPTIMIZERS
from .model.processing_hf_clip import HfClipProcessor
from .model.repair_text import TextError
from .model.text_ends import EndOfTextError
from .model.tokenization_hf_clip import HfClipTokenizer
from .model.variants import VARIANTS, Variant
from .openai import available_models, load, tokenize
from .zero_shot.classifier import ZeroShotClassifier
from .zero_shot.embedding_head import load_head
from .zero_shot.features import encode_images, encode_texts
from .zero_shot.pipeline import register_pipeline as _register_pipeline
from .zero_shot.text_batches import TextTooLongError

__version__ = "0.1.0.dev0"


def _register() -> None:
    """Register the classes with the Auto classes of transformers."""
    models: dict[type[_transformers.PreTrainedConfig], type[_transformers.PreTrainedModel]] = {
        HfClipConfig: HfClipModel,
        HfClipTextConfig: HfClipTextModel,
        HfClipViTConfig: HfClipViTModel,
        HfClipResNetConfig: HfClipResNetModel,
    }
    for config, model in models.items():
        _transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
        _transformers.AutoModel.register(config, model, exist_ok=True)
    _transformers.AutoModelForZeroShotImageClassification.register(HfClipConfig, HfClipModel, exist_ok=True)
    _transformers.AutoModelForImageClassification.register(HfClipConfig, HfClipForImageClassification, exist_ok=True)
    for config in (HfClipConfig, HfClipTextConfig):
        _transformers.AutoTokenizer.register(config, fast_tokenizer_class=HfClipTokenizer, exist_ok=True)
    for config in (HfClipConfig, HfClipViTConfig, HfClipResNetConfig):
        _transformers.AutoImageProcessor.register(
            config, image_processor_classes={"pil": HfClipImageProcessor}, exist_ok=True
        )
    _transformers.AutoProcessor.register(HfClipConfig, HfClipProcessor, exist_ok=True)


_register()
_register_pipeline()
_FOREIGN_LAYOUTS.append(_find_open_clip)
_BEFORE_UPLOAD.append(_prepare_for_hub)
_OPTIMIZERS.append(_optimize_for_inference)

__all__ = [
    "VARIANTS",
    "EndOfTextError",
    "HfClipConfig",
    "HfClipForImageClassification",
    "HfClipImageProcessor",
    "HfClipModel",
    "HfClipOutput",
    "HfClipPreTrainedModel",
    "HfClipProcessor",
    "HfClipResNetConfig",
    "HfClipResNetModel",
    "HfClipTextConfig",
    "HfClipTextModel",
    "HfClipTextModelOutput",
    "HfClipTextModelWithProjection",
    "HfClipTokenizer",
    "HfClipViTConfig",
    "HfClipViTModel",
    "HfClipVisionModelOutput",
    "HfClipVisionModelWithProjection",
    "TextError",
    "TextTooLongError",
    "UnreadableImageError",
    "Variant",
    "ZeroShotClassifier",
    "__version__",
    "available_models",
    "convert",
    "encode_images",
    "encode_texts",
    "load",
    "load_head",
    "tokenize",
]
