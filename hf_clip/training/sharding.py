"""Runs whose wrapper splits the model or the optimizer's state over the processes: FSDP2, and DeepSpeed's ZeRO 1 to 3.

They train the same parameters to the same numbers as DDP. Where a wrapper would do otherwise, this file steps in:

- FSDP2 shards no scalars. The temperature stays whole on every process, and its gradients are averaged here.
- By themselves both wrappers would cast weights, statistics and gradients to bfloat16, and round what is locked. Here
  all of these stay in float32, and the model's forward runs under autocast, as under DDP.
- DeepSpeed takes no scalars. During the run the temperature has shape (1,). DeepSpeed steps on copies of the
  parameters, so the logit scale is clamped in the copy.
- ZeRO 3 splits parameters too, and gathers those of a layer while it computes. The temperature is gathered for the loss
  and after steps. All other code that reads or writes weights does so in `whole_parameters`. Models are built whole,
  and a moving average is whole on every process.

Invariant: the same loss, gradients and weights as one process with the whole batch. What is not known to keep it is
refused before any work is done. Every process calls every function here.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..model.resnet_tower import BatchNorm
from .averaging import whole_tensor
from .config import TrainingConfig
from .lora import temperature_of
from .optim import MAX_LOGIT_SCALE, clamp_logit_scale_, parse_optimizer
from .trainable import FrozenBatchNorm2d

LARGEST_KEPT_WHOLE = 100_000
"""DeepSpeed's own `stage3_param_persistence_threshold`: parameters up to so many numbers stay whole between layers."""

ELEMENTWISE = ("AdamW", "Adam", "SGD", "NAdam", "RAdam", "Adamax", "RMSprop")
"""Optimizers that treat every number by itself, so that the parts which DeepSpeed cuts matrices into do as well."""

SHARDED_LAYERS = ("HfClipEncoderLayer", "HfClipBottleneck")
"""What FSDP2 gathers at a time, of these what the model has; the rest is gathered for the whole step."""

ASKED = {"FSDP": "ACCELERATE_USE_FSDP", "DEEPSPEED": "ACCELERATE_USE_DEEPSPEED"}
NAMES = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed"}


def is_fsdp2(accelerator: Any) -> bool:
    return bool(getattr(accelerator, "is_fsdp2", False))


def is_deepspeed(accelerator: Any) -> bool:
    return str(accelerator.distributed_type.value) == "DEEPSPEED"


def is_zero3(accelerator: Any) -> bool:
    return is_deepspeed(accelerator) and accelerator.state.deepspeed_plugin.zero_stage == 3


# --- what is refused -------------------------------------------------------------------------------------------------


def check_wrapper(accelerator: Any, config: TrainingConfig) -> None:
    """Refuse a wrapper that accelerate would silently leave out, and settings that would train something else.

    Args:
        accelerator: What `accelerate launch` has set up.
        config: The options.

    Raises:
        ValueError: The message names the setting and what to do instead.
    """
    kind = accelerator.distributed_type.value
    for asked, variable in ASKED.items():
        if os.environ.get(variable, "false").lower() == "true" and kind != asked:
            raise ValueError(
                f"The launcher asks for {NAMES[asked]}, but accelerate shards nothing here "
                f"({accelerator.num_processes} process(es) on {accelerator.device.type}): it does so over GPUs alone. "
                f"Launch without it."
            )
    if kind not in ASKED:
        return
    precision = accelerator.mixed_precision
    if config.pairs_at_once is None:
        raise ValueError(
            f"--micro_batch_size auto is not supported under {NAMES[kind]}: a process that runs out of memory would "
            f"leave the others waiting for its part of the weights. Pass a number."
        )
    unsupported = _find_unsupported_fsdp(accelerator) if kind == "FSDP" else _find_unsupported_zero(accelerator, config)
    if precision not in ("no", "bf16"):
        unsupported = [(f"mixed_precision: {precision}", "take bf16"), *unsupported]
    for setting, instead in unsupported:
        raise ValueError(f"{setting} is not supported under {NAMES[kind]}: {instead}.")


def _find_unsupported_fsdp(accelerator: Any) -> list[tuple[str, str]]:
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        return [(f"fsdp_version: {plugin.fsdp_version}", "set fsdp_version: 2")]
    torch_version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    possible = [
        (torch_version < (2, 7), f"torch {torch.__version__}", "it cannot leave out scalars before 2.7"),
        (plugin.cpu_ram_efficient_loading, "fsdp_cpu_ram_efficient_loading", "set it to false"),
        (
            type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy",
            "fsdp_offload_params",
            "the temperature isn't sharded, and would be on another device; set it to false",
        ),
        (
            plugin.activation_checkpointing,
            "fsdp_activation_checkpointing",
            "set it to false, and pass --gradient_checkpointing",
        ),
    ]
    return [(setting, instead) for is_so, setting, instead in possible if is_so]


def _find_unsupported_zero(accelerator: Any, config: TrainingConfig) -> list[tuple[str, str]]:
    plugin = accelerator.state.deepspeed_plugin
    stage, settings = plugin.zero_stage, plugin.deepspeed_config
    clipping, wanted = settings.get("gradient_clipping", "auto"), config.max_grad_norm or 0.0
    accumulation, told = settings.get("gradient_accumulation_steps", "auto"), accelerator.gradient_accumulation_steps
    optimizer = parse_optimizer(config.optim)[0]
    possible = [
        (stage not in (1, 2, 3), f"zero_stage: {stage}", "take 1, 2 or 3"),
        (plugin.hf_ds_config.is_offload(), "offloading", "set both offload devices to none"),
        ("scheduler" in settings, "a scheduler in its configuration", "pass --lr_scheduler_type"),
        (
            optimizer not in ELEMENTWISE,
            f"--optim {optimizer}",
            f"it would see flat parts of the matrices; take one of {', '.join(ELEMENTWISE)}",
        ),
        (
            accumulation not in ("auto", told),
            f"gradient_accumulation_steps: {accumulation} in its configuration beside the launcher's {told}",
            'write "auto" there',
        ),
        (
            config.l2_to_pretrained is not None,
            "--l2_to_pretrained",
            "it adds to gradients that DeepSpeed keeps to itself; take FSDP2",
        ),
        ("optimizer" in settings, "an optimizer in its configuration", "pass --optim"),
        (
            clipping != "auto" and float(clipping) != wanted,
            f"gradient_clipping: {clipping} beside --max_grad_norm {config.max_grad_norm}",
            "pass --max_grad_norm alone",
        ),
    ]
    return [(setting, instead) for is_so, setting, instead in possible if is_so]


def check_batch_norm(accelerator: Any, model: nn.Module) -> None:
    """Refuse BatchNorm whose statistics would differ between processes.

    DDP sends the main process's statistics to all others in each step. FSDP2 and DeepSpeed do not.

    Raises:
        ValueError: the model has such a BatchNorm and is to be wrapped by FSDP2 or DeepSpeed.
    """
    wrapper = "FSDP" if is_fsdp2(accelerator) else "DeepSpeed" if is_deepspeed(accelerator) else None
    if wrapper is None:
        return
    for module in model.modules():
        if isinstance(module, BatchNorm) and not isinstance(module, (FrozenBatchNorm2d, nn.SyncBatchNorm)):
            raise ValueError(
                f"Under {wrapper} every process would keep BatchNorm statistics of its own: pass --sync_batchnorm."
            )


# --- around the wrapper ----------------------------------------------------------------------------------------------


class _Temperature(nn.Module):
    """A module that holds a model's scalars, because accelerate leaves whole modules out of sharding."""

    def __init__(self, model: nn.Module):
        super().__init__()
        for name, parameter in temperature_of(model).items():
            self.register_parameter(name, parameter)


def prepare(accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainingConfig) -> Any:
    """`accelerator.prepare` of a model and its optimizer. Call `check_wrapper` before.

    Args:
        accelerator: What `accelerate launch` has set up.
        model: An HfClipModel, locked and adapted.
        optimizer: The model's.
        config: The options.

    Returns:
        Model and optimizer as accelerate made them.

    Raises:
        ValueError: See `check_batch_norm`.
    """
    precision = accelerator.mixed_precision  # under DeepSpeed it is read from the settings that are changed here
    if is_fsdp2(accelerator):
        check_batch_norm(accelerator, model)
        plugin = accelerator.state.fsdp_plugin
        for parameter in temperature_of(model).values():
            parameter.data = parameter.data.to(accelerator.device)
        plugin.ignored_modules = [_Temperature(model)]
        plugin.mixed_precision_policy = None
        if plugin.transformer_cls_names_to_wrap is None:
            present = {type(module).__name__ for module in model.modules()}
            plugin.transformer_cls_names_to_wrap = [name for name in SHARDED_LAYERS if name in present]
        _autocast_(model, accelerator.device.type, precision)
        _broadcast_(model, accelerator.device)
    elif is_deepspeed(accelerator):
        check_batch_norm(accelerator, model)
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = config.per_device_train_batch_size
        settings["gradient_clipping"] = config.max_grad_norm or 0.0
        settings["bf16"] = {"enabled": False}
        if is_zero3(accelerator):
            zero = settings["zero_optimization"]
            threshold = zero.get("stage3_param_persistence_threshold", LARGEST_KEPT_WHOLE)
            zero["stage3_param_persistence_threshold"] = (
                LARGEST_KEPT_WHOLE if threshold == "auto" else max(1, threshold)
            )
        _autocast_(model, accelerator.device.type, precision)
        for parameter in temperature_of(model).values():
            parameter.data = parameter.data.view(1)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if is_zero3(accelerator):
        wrapped.register_forward_hook(lambda *_: _gather_temperature(model))
        _gather_temperature(model)
    return wrapped, optimizer


def _gather_temperature(model: nn.Module) -> None:
    scalars: list[Any] = list(temperature_of(model).values())
    scalars[0].all_gather(scalars)  # of ZeRO 3's parameters; those that are whole stay so


@contextmanager
def whole_parameters(
    accelerator: Any, model: nn.Module, parameters: list[nn.Parameter] | None = None, *, written: bool = False
) -> Iterator[None]:
    """Within this block ZeRO 3's parameters are whole on every process. Other wrappers' are left as they are.

    The model must not compute within the block: a layer lets go of its parameters when it is done.

    Args:
        accelerator: What `accelerate launch` has set up.
        model: The model itself.
        parameters: Which ones; all where they are not named.
        written: Whether they may be written too.
    """
    if not is_zero3(accelerator):
        yield
        return
    gathered = import_module("deepspeed").zero.GatheredParameters
    with gathered(parameters or list(model.parameters()), modifier_rank=0 if written else None):
        yield
    _gather_temperature(model)


@torch.no_grad()
def _broadcast_(model: nn.Module, device: torch.device) -> None:
    """Give all processes the main process's weights, since each draws its adapters at random."""
    for tensor in (*model.parameters(), *model.buffers()):
        sent = tensor.detach().to(device)
        dist.broadcast(sent, src=0)
        tensor.copy_(sent)


def _autocast_(model: Any, device_type: str, precision: str) -> None:
    if precision == "bf16":
        model.forward = torch.autocast(device_type, torch.bfloat16)(model.forward)


@torch.no_grad()
def average_left_out_gradients(accelerator: Any, model: nn.Module) -> None:
    """Average the gradients of what FSDP2 leaves out. Call it after the last backward of a step, before clipping."""
    if is_fsdp2(accelerator):
        for parameter in temperature_of(model).values():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()


@torch.no_grad()
def clamp_temperature_(accelerator: Any, model: Any) -> None:
    """`clamp_logit_scale_` for any wrapper."""
    if not is_deepspeed(accelerator):
        clamp_logit_scale_(model)
    elif model.config.contrastive_loss == "softmax" and model.logit_scale.requires_grad:
        scale, copies = model.logit_scale, import_module("deepspeed.utils")
        if is_zero3(accelerator):
            _gather_temperature(model)  # DeepSpeed leaves it split after a step that it has passed over
        if scale.item() <= MAX_LOGIT_SCALE:
            return
        if is_zero3(accelerator):
            copies.safe_set_local_fp32_param(scale, torch.full_like(scale.ds_tensor, MAX_LOGIT_SCALE))
        else:
            copies.safe_set_full_fp32_param(scale, torch.full_like(scale, MAX_LOGIT_SCALE))
        with whole_parameters(accelerator, model, [scale], written=True):
            clamp_logit_scale_(model)


def whole_weights(accelerator: Any, wrapped: Any, model: nn.Module) -> dict[str, Tensor]:
    """The whole state of a model by its own names, on the CPU, on every process.

    Args:
        accelerator: What `accelerate launch` has set up.
        wrapped: The model as accelerate made it.
        model: The model itself.
    """
    if is_deepspeed(accelerator):
        with whole_parameters(accelerator, model):
            state = _copied(model.state_dict())
        return state | {name: state[name].view(()) for name in temperature_of(model)}
    # accelerate would gather FSDP2's on the main process alone.
    return _copied(wrapped.state_dict() if is_fsdp2(accelerator) else accelerator.get_state_dict(wrapped))


def _copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # torch.compile puts a prefix in front of all names.
    return {
        name.removeprefix("_orig_mod."): whole_tensor(tensor).detach().to("cpu", copy=True)
        for name, tensor in state.items()
    }
