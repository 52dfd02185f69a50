"""Which of OpenAI's architectures a model is of."""

from typing import Any

from ..checkpoints.keys import identify_variant
from ..model.configuration_hf_clip import HfClipConfig


def architecture_of(config: Any) -> str:
    """Return the name of one of OpenAI's architectures, such as "ViT-B/32", or else the model type."""
    values = config.to_dict()
    try:
        ours = (
            config if isinstance(config, HfClipConfig) else HfClipConfig.from_dict(values | {"model_type": "hf_clip"})
        )
        variant = identify_variant(ours) if str(config.model_type) in ("clip", "hf_clip") else None
    except ValueError:
        variant = None
    return variant.name if variant else str(config.model_type)
