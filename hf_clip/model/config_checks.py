"""Checks of a configuration's fields. Each raises ValueError for what no model can have.

This file imports no torch.
"""

from typing import Any

from transformers import PreTrainedConfig

MOST_LAYERS = 1000
MOST_BLOCKS = 200
MOST_WIDTH = 1 << 20
MOST_IDS = 1 << 24
MOST_CHANNELS = 1 << 10
"""Upper limits, far beyond any real model. A larger number is damage, or an attempt to exhaust memory and time."""


def require_positive(config: PreTrainedConfig, *names: str, most: int = MOST_WIDTH) -> None:
    """Refuse fields that are missing, zero or negative, or too large."""
    for name in names:
        value = getattr(config, name)
        if value is None or value <= 0:
            raise ValueError(f"{type(config).__name__}: {name} is {value!r:.80}, but it must be a positive number.")
        require_at_most(config, name, value, most)


def require_at_most(config: PreTrainedConfig, name: str, value: int, most: int) -> None:
    """Refuse a value that is too large."""
    if value > most:
        raise ValueError(
            f"{type(config).__name__}: {name} is {float(min(value, 10**300)):.4g}, but at most {most:,} can be built."
        )


def require_layers(config: Any) -> None:
    """Refuse an impossible number of layers, and an activation that is unknown."""
    from transformers.activations import ACT2FN

    if (layers := config.num_hidden_layers) < 0:
        raise ValueError(f"{type(config).__name__}: num_hidden_layers is {layers}, but it must not be negative.")
    require_at_most(config, "num_hidden_layers", layers, MOST_LAYERS)
    if (activation := config.hidden_act) not in ACT2FN:
        raise ValueError(
            f"{type(config).__name__}: hidden_act is {activation!r:.80}, but transformers has no activation of that "
            f"name; OpenAI's models have 'quick_gelu'."
        )


def require_divisible(config: PreTrainedConfig, whole: str, part: str, reason: str) -> None:
    """Refuse a field that is no multiple of another one."""
    dividend, divisor = getattr(config, whole), getattr(config, part)
    if dividend % divisor:
        raise ValueError(
            f"{type(config).__name__}: {whole} is {dividend} and {part} is {divisor}, but {whole} must be a "
            f"multiple of {part} ({reason})."
        )


def check_kind(config: PreTrainedConfig, given: str | None, stock: str = "") -> None:
    """Raise ValueError for the configuration of another kind of tower: no weight would be read, without an error."""
    if given not in (None, config.model_type, stock):
        raise ValueError(
            f"This is the configuration of a {given!r}, but {type(config).__name__} describes a "
            f"{config.model_type!r}. Load it with AutoConfig or AutoModel, which take the right class."
        )
