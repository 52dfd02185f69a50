"""What `accelerate launch` has set up, checked, and by name."""

from datetime import timedelta
from importlib.util import find_spec
from typing import Any

from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from .config import TrainingConfig
from .stopping import LONGEST_WAIT

LONGEST_UPLOAD = timedelta(hours=6)


def make_accelerator(config: TrainingConfig) -> Any:
    """The `Accelerator` that `accelerate launch` has set up.

    Args:
        config: the options, which name trackers.
    """
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # At checkpoints the others wait while the main process uploads.
    longest = LONGEST_UPLOAD if config.hub_strategy == "every_save" else LONGEST_WAIT
    accelerator = Accelerator(
        # A tracker that is missing is refused with all else that is; accelerate would only warn of it.
        log_with=[name for name in config.report_to if find_spec(name) is not None] or None,
        project_dir=config.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=longest)],
    )
    unset_hf_deepspeed_config()  # models are built whole, then split
    return accelerator


def launch_settings(accelerator: Any) -> dict[str, Any]:
    """What `accelerate launch` decides of a run, by name."""
    kind = accelerator.distributed_type.value
    wrapper = {"FSDP": "FSDP2", "DEEPSPEED": "ZeRO"}.get(kind, "DDP" if accelerator.num_processes > 1 else "none")
    if kind == "DEEPSPEED":
        wrapper = f"{wrapper} {accelerator.state.deepspeed_plugin.zero_stage}"
    return {
        "processes": accelerator.num_processes,
        "wrapper": wrapper,
        "mixed_precision": accelerator.mixed_precision,
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
        "compiler": accelerator.state.dynamo_plugin.backend.value.lower(),
    }
