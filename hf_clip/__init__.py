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
import typing as _typing
from pathlib import Path as _Path

__version__ = "0.1.0.dev0"


def _is_hf_clip_command(command_line: list[str]) -> bool:
    """Whether this process is the program `hf-clip`, whose commands import what they need when they need it.

    The help and what is wrong with a command line are then there at once, and `registration.register` is called before
    a model is loaded. Every other program gets everything at once: the classes have to be registered before
    transformers looks for them.
    """
    return bool(command_line) and _Path(command_line[0]).name.removesuffix(".exe") == "hf-clip"


if not _is_hf_clip_command(getattr(_sys, "argv", [])):
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

_NAMES_OF_TRANSFORMERS = {
    "CLIPImageProcessorFast": "HfClipImageProcessor",
    "CLIPTokenizerFast": "HfClipTokenizer",
    "CLIPVisionConfig": "HfClipViTConfig",
    "CLIPVisionModel": "HfClipViTModel",
}
"""Classes of transformers whose name here is not the same with `HfClip` in place of `CLIP`."""

if not _typing.TYPE_CHECKING:  # a type checker would take every name for one that there is

    def __getattr__(name: str) -> object:
        """Say what a class of transformers is called here, and why a program called `hf-clip` finds none of the names.

        Raises:
            ImportError: Either of these. `from hf_clip import` would drop the words of an AttributeError.
            AttributeError: There is nothing of that name.
        """
        ours = _NAMES_OF_TRANSFORMERS.get(name, name.replace("CLIP", "HfClip", 1))
        if name.startswith("CLIP") and ours in __all__:
            raise ImportError(f"hf_clip has no {name}: the class is called {ours} here.")
        if name in __all__:
            raise ImportError(
                f"hf_clip.{name} is missing since this program is called hf-clip, as the package's own command, which "
                f"imports what it needs by itself: rename {_sys.argv[0]}."
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
