"""The optimizer: at which rate each parameter learns, what decays, and by which rule.

Every trained parameter is in exactly one group. Two groups differ in learning rate or in weight decay; the temperature
has a group of its own. A group names the parts of the model that are in it. A schedule scales all rates alike.

Weight decay is for matrices and convolutions: not for gains, biases, positions, the class token or the temperature
(Radford et al. 2021, section 2.5).
"""

import inspect
import math
from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import torch
from torch import nn

from .trainable import PARTS, TOWERS, count_blocks, level_of, part_of

MAX_LOGIT_SCALE = math.log(100)
"""The temperature is kept from scaling logits by more than 100 (section 2.5)."""

ADAM_OF_TOWER = {
    "hf_clip_vit": {"betas": (0.9, 0.98), "eps": 1e-6},
    "hf_clip_resnet": {"betas": (0.9, 0.999), "eps": 1e-8},
}
"""Table 18: what Adam is given for each kind of image tower, in both towers."""

BY_THE_TABLE = ("Adam", "AdamW", "Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")
EIGHT_BIT = ("Adam8bit", "AdamW8bit", "Lion8bit", "PagedAdam8bit", "PagedAdamW8bit", "PagedLion8bit", "SGD8bit")
"""Those of bitsandbytes."""

LONGEST_DEFAULT_WARMUP = 2000
"""The paper's (table 18); shorter runs warm up for a twentieth of their steps."""

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")
"""Where torch has one step for all parameters; on two CPU cores it took a quarter of the time."""

UNSUITABLE = {
    "LBFGS": "computes the loss several times for one step",
    "Muon": "takes matrices alone, and a CLIP also has gains, biases and convolutions",
    "SparseAdam": "takes sparse gradients alone",
}


def parse_rates(spec: str | float) -> dict[str, float]:
    """Read the learning rate of each part of the model.

    Args:
        spec: One rate for all parts, `1e-5`; or rates by name,
            `"image=1e-6,text=1e-5,temperature=1e-3,projections=1e-4"`; or both, `"1e-5,temperature=1e-3"`, where the
            plain number is for the parts that are not named. A rate of 0 keeps a part as it is.

    Returns:
        A rate for each of `PARTS`.

    Raises:
        ValueError: A part or a rate cannot be meant.
    """
    base: float | None = None
    rates: dict[str, Any] = {}
    for item in filter(None, (item.strip() for item in str(spec).split(","))):
        name, equals, value = (piece.strip() for piece in item.rpartition("="))
        if equals and name not in PARTS:
            near = get_close_matches(name, PARTS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"There is no part {name!r} to give a learning rate; there are {', '.join(PARTS)}.{hint}")
        try:
            rate = float(value)
        except ValueError:
            raise ValueError(
                f"The learning rate {item!r} is no number; write one as in '1e-5' or '1e-5,temperature=1e-3'."
            ) from None
        if not math.isfinite(rate) or rate < 0:
            raise ValueError(f"The learning rate {item!r} must be finite and not negative.")
        if name in rates or (not equals and base is not None):
            raise ValueError(f"The learning rates {spec!r} give {name or 'the base'!r} twice; give it once.")
        if equals:
            rates[name] = rate
        else:
            base = rate
    if base is None and (missing := [part for part in PARTS if part not in rates]):
        raise ValueError(
            f"The learning rates {spec!r} say nothing for {', '.join(missing)}; name them, or put a rate for all that "
            f"is not named, as in '1e-5,temperature=1e-3'."
        )
    rates = {part: rates.get(part, base) for part in PARTS}
    if not any(rates.values()):
        raise ValueError(f"The learning rates {spec!r} are all zero; at least one must be positive.")
    return rates


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay is for matrices: not for gains, biases, positions, the class token or the logit scale."""
    return parameter.ndim >= 2 and "position" not in name


def parameter_groups(
    model: nn.Module, rates: dict[str, float], weight_decay: float = 0.2, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Sort the trained parameters of an HfClipModel into groups, for an optimizer.

    Args:
        model: An HfClipModel, locked and adapted.
        rates: The learning rate of each part, as `parse_rates` returns them.
        weight_decay: For matrices and convolutions.
        layer_decay: The rate is multiplied by this with each level down a tower. The final LayerNorm or the attention
            pool has the tower's rate, the last layer or stage `layer_decay` times that, and so on down to the
            embeddings or the stem.

    Returns:
        The groups, those that decay first. Each has `params`, `lr`, `weight_decay` and `parts`.

    Raises:
        ValueError: Nothing is trained, or a decay cannot be meant.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is {layer_decay}, but must be above 0 and at most 1, where it changes nothing.")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay is {weight_decay}, but must be finite and not negative.")
    tops = {tower: count_blocks(model, tower) + 1 for tower in TOWERS}
    placed = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = part_of(name)
            depth = tops[part] - level_of(name, tops[part] - 1) if part in TOWERS else 0
            placed.append((not is_decayed(name, parameter), PARTS.index(part), depth, parameter))
    if not placed:
        raise ValueError("There is nothing to train: every parameter is locked.")
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for is_spared, part_index, depth, parameter in sorted(placed, key=lambda place: place[:3]):
        part = PARTS[part_index]
        rate, decay = rates[part] * layer_decay**depth, 0.0 if is_spared else weight_decay
        # The temperature by itself: FSDP2 leaves scalars whole, and one step for several parameters takes no mixture.
        key = (rate, decay, part == "temperature")
        group = groups.setdefault(key, {"params": [], "lr": rate, "weight_decay": decay, "parts": []})
        group["params"].append(parameter)
        if part not in group["parts"]:
            group["parts"].append(part)
    return list(groups.values())


def warmup_steps(given: int | None, total_steps: int) -> int:
    """Steps until the learning rate is at its peak.

    Args:
        given: What the user asked for, or None for 5 % of the run, at most `LONGEST_DEFAULT_WARMUP`.
        total_steps: Of the run.
    """
    return min(total_steps // 20, LONGEST_DEFAULT_WARMUP) if given is None else given


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The present learning rate of each trained part. A tower with layer decay has the rate of its top."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        for part in group["parts"]:
            rates[part] = max(rates.get(part, 0.0), float(group["lr"]))
    return rates


def _parse_value(text: str) -> Any:
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    if "," in text:
        return tuple(_parse_value(item) for item in text.split(",") if item)
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def parse_optimizer(spec: str) -> tuple[str, dict[str, Any]]:
    """A name and its options: `"AdamW betas=0.9,0.95"` → ("AdamW", {"betas": (0.9, 0.95)})."""
    name, *items = spec.split() or [""]
    options: dict[str, Any] = {}
    for item in items:
        option, equals, value = item.partition("=")
        if not (option and equals and value):
            raise ValueError(
                f"{item!r} in the optimizer {spec!r} is no option; write them as in 'SGD momentum=0.9 nesterov=true'."
            )
        options[option] = _parse_value(value)
    return name, options


def _torch_optimizers() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    base = torch.optim.Optimizer
    known = {
        n: c for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, base) and c is not base
    }
    return {name: kind for name, kind in known.items() if name not in UNSUITABLE}


def find_optimizer(name: str) -> Callable[..., torch.optim.Optimizer]:
    """Find an optimizer's class.

    Args:
        name: Of a class of `torch.optim`, or of an 8-bit one of bitsandbytes.

    Raises:
        ValueError: There is no such class, or bitsandbytes is not installed. The message has names that are alike.
    """
    if name in UNSUITABLE:
        raise ValueError(f"The optimizer {name} {UNSUITABLE[name]}. Take another, such as AdamW.")
    known = _torch_optimizers()
    if name in known:
        return known[name]
    if name not in EIGHT_BIT:
        names = {candidate.lower(): candidate for candidate in [*known, *EIGHT_BIT]}
        near = [names[match] for match in get_close_matches(name.lower(), names, n=3, cutoff=0.5)]
        hint = f"Did you mean {' or '.join(near)}?" if near else f"There are {', '.join([*known, *EIGHT_BIT])}."
        raise ValueError(f"There is no optimizer {name!r}. {hint}")
    try:
        return getattr(import_module("bitsandbytes.optim"), name)
    except ImportError as error:
        raise ValueError(
            f"{name} needs the package bitsandbytes, which is not installed: pip install bitsandbytes"
        ) from error


def _check_options(name: str, kind: Callable[..., Any], options: dict[str, Any]) -> None:
    accepted = [
        option for option in inspect.signature(kind).parameters if option not in ("params", "lr", "weight_decay")
    ]
    for option in options:
        if option in ("lr", "weight_decay"):
            raise ValueError(
                f"{option!r} is no option of the optimizer's here: learning rates and weight decay are given apart, "
                f"since parts of the model differ in them."
            )
        if option not in accepted:
            raise ValueError(f"{name} has no option {option!r}; its options are {', '.join(accepted)}.")


def _check_named_parts(spec: str | float, groups: list[dict[str, Any]]) -> None:
    """Refuse a rate that would be given to nothing."""
    trained = {part for group in groups for part in group["parts"]}
    for item in str(spec).split(","):
        name, equals, value = item.partition("=")
        if equals and name.strip() not in trained and float(value) > 0:
            raise ValueError(
                f"The learning rates {spec!r} name {name.strip()!r}, but all of it is locked; leave it out."
            )


def _keep_embeddings_exact(model: nn.Module) -> None:
    """Embeddings' moments stay in 32 bit: rare tokens get rare, large gradients (Dettmers et al. 2022)."""
    manager = import_module("bitsandbytes.optim").GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})


def create_optimizer(
    model: Any,
    optimizer: str = "AdamW",
    *,
    rates: str | float = 1e-5,
    weight_decay: float = 0.2,
    layer_decay: float = 1.0,
    **options: Any,
) -> torch.optim.Optimizer:
    """Make the optimizer of what is trainable in a model. Lock and adapt the model first.

    Args:
        model: An HfClipModel.
        optimizer: A class of `torch.optim` or an 8-bit one of bitsandbytes, perhaps with options:
            `"SGD momentum=0.9"`. Adam and AdamW take the paper's betas and epsilon for the kind of image tower, and
            one fused step for all parameters, unless told otherwise: `"AdamW betas=0.9,0.95 fused=false"`.
        rates: See `parse_rates`.
        weight_decay: See `parameter_groups`.
        layer_decay: See `parameter_groups`.
        **options: Of the optimizer. Those in its name win.

    Returns:
        The optimizer.

    Raises:
        ValueError: The optimizer does not exist, is not installed, or does not fit the model or the options.
    """
    name, given = parse_optimizer(optimizer)
    kind = find_optimizer(name)
    options |= given
    _check_options(name, kind, options)
    groups = parameter_groups(model, parse_rates(rates), weight_decay, layer_decay)
    _check_named_parts(rates, groups)
    if "weight_decay" not in inspect.signature(kind).parameters and weight_decay:
        raise ValueError(f"{name} has no weight decay, but weight_decay is {weight_decay}; pass 0.")
    if name in BY_THE_TABLE:
        options = ADAM_OF_TOWER[model.config.vision_config.model_type] | options
    if name in ("Adam", "AdamW") and not options.keys() & {"fused", "foreach", "capturable", "differentiable"}:
        options["fused"] = all(p.device.type in FUSED_DEVICES for group in groups for p in group["params"])
    if next(model.parameters()).is_meta:
        options.pop("fused", None)  # what is tried without numbers has no fused step
    if name in EIGHT_BIT:
        _keep_embeddings_exact(model)
    try:
        return kind(groups, lr=groups[0]["lr"], **options)  # some have no default; every group has its own
    except (TypeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"The optimizer {optimizer!r} cannot be made: {str(error).rstrip('.!')}.") from error


@torch.no_grad()
def clamp_logit_scale_(model: Any) -> None:
    """Keep a CLIP's logit scale at or below ln 100. Call it after each step.

    A model of the sigmoid loss is left alone. There a bias learns against the scale and so bounds it, and published
    models have scales above 100 (Zhai et al. 2023 do not clamp).
    """
    if model.config.contrastive_loss == "softmax":
        model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
