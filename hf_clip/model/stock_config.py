"""Stock CLIP's configurations, read as ours: other model types, and special ids that say `eos_token_id: 2`.

This file imports no torch.
"""

from typing import Any

from .variants import OPENAI_VOCAB_SIZE

LEGACY_END_OF_TEXT_ID = 2
"""Stock CLIP repositories from before transformers 4.31 have `eos_token_id: 2`, which is not the end-of-text token.

For this value stock CLIP takes the text feature at the highest id of each text, as OpenAI's code does.
"""

STOCK_TYPES = {"clip": "hf_clip", "clip_text_model": "hf_clip_text", "clip_vision_model": "hf_clip_vit"}
"""Model types of stock CLIP, and our types that read them."""

STOCK_TEXT = "clip_text_model"

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

STOCK_TOWERS = {"text_config": "hf_clip_text", "vision_config": "hf_clip_vit"}
"""Fields of a whole stock CLIP configuration that hold a tower, and our types of these towers."""


def repair_special_ids(values: dict[str, Any]) -> dict[str, Any]:
    """Repair the special ids of a stock text configuration that says `eos_token_id: 2`.

    With OpenAI's vocabulary the ids become OpenAI's, since the end of text is the highest id there. With another
    vocabulary they become None, which means that the text feature is taken at the highest id of each text.
    """
    if values.get("eos_token_id") != LEGACY_END_OF_TEXT_ID:
        return values
    is_openai = values.get("vocab_size", OPENAI_VOCAB_SIZE) == OPENAI_VOCAB_SIZE
    return values | (last_special_ids(OPENAI_VOCAB_SIZE) if is_openai else dict.fromkeys(SPECIAL_IDS))


def last_special_ids(vocab_size: int) -> dict[str, int | None]:
    """Return the special ids of a vocabulary in OpenAI's order, in which the last two ids are start and end.

    For more ids than OpenAI's vocabulary has, all are None: it is unknown which of the further ids are tokens.
    """
    if vocab_size > OPENAI_VOCAB_SIZE:
        return dict.fromkeys(SPECIAL_IDS)
    return dict(zip(SPECIAL_IDS, (vocab_size - 2, vocab_size - 1, vocab_size - 1), strict=True))


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Replace the model types in a stock CLIP configuration by ours. Otherwise transformers warns of another model.

    A single tower may be read out of a whole configuration, so each tower's fields are made complete. Repositories of
    2022 have the real fields under `text_config_dict` and `vision_config_dict`, and `projection_dim` of the whole
    overrides that of a tower.
    """
    if not isinstance(kind := values.get("model_type"), str) or kind not in STOCK_TYPES:
        return values
    for name in STOCK_TOWERS:
        for written in (name, f"{name}_dict"):
            if not isinstance(values.get(written) or {}, dict):
                raise ValueError(f"its {written} is a {type(values[written]).__name__}, but an object is needed.")
    values = values | {"model_type": STOCK_TYPES[values["model_type"]]}
    for name, model_type in STOCK_TOWERS.items():
        if nested := (values.get(name) or {}) | (values.get(f"{name}_dict") or {}):
            shared = {"projection_dim": values["projection_dim"]} if "projection_dim" in values else {}
            nested = repair_special_ids(nested) if name == "text_config" else nested
            values[name] = nested | shared | {"model_type": model_type}
    return repair_special_ids(values) if values["model_type"] == "hf_clip_text" else values


def named_as_ours(values: dict[str, Any], source: Any) -> dict[str, Any]:
    """Replace stock CLIP's model types in a config.json's fields by ours. Raises ValueError that names `source`."""
    try:
        return _renamed(values)
    except ValueError as error:
        raise ValueError(f"The configuration of {source} is refused: {error}") from None
