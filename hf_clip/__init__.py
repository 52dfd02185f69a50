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

import sys as _sys
from pathlib import Path as _Path

__version__ = "0.1.0.dev0"


def _is_without_torch(command_line: list[str]) -> bool:
    """Whether a command line need not wait for torch and transformers, or waits for them late.

    These are the help, `hf-clip classify … --onnx`, and the commands of an index, which say first what is wrong, or
    that nothing has changed. Every other program gets everything at once: the classes have to be registered before
    transformers looks for them.
    """
    program, *words = command_line or [""]
    words = words[: words.index("--")] if "--" in words else words
    command = next((word for word in words if not word.startswith("-")), "")
    is_ours = _Path(program).name.removesuffix(".exe") == "hf-clip"
    is_help = not command or "--help" in words
    is_late = command in ("index", "search", "duplicates")  # `search.index_model.load` registers the classes
    return is_ours and (is_help or is_late or (command == "classify" and "--onnx" in words))


if not _is_without_torch(getattr(_sys, "argv", [])):
    from .checkpoints.conversion import convert
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
    from .model.processing_hf_clip import HfClipProcessor
    from .model.repair_text import TextError
    from .model.text_ends import EndOfTextError
    from .model.tokenization_hf_clip import HfClipTokenizer
    from .model.variants import VARIANTS, Variant
    from .openai import available_models, load, tokenize
    from .registration import register as _register
    from .zero_shot.classifier import ZeroShotClassifier
    from .zero_shot.embedding_head import load_head
    from .zero_shot.features import encode_images, encode_texts
    from .zero_shot.text_batches import TextTooLongError

    _register()

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
