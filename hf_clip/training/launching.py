"""What `accelerate launch` has set up, checked, and by name."""

from datetime import timedelta
from importlib.util import find_spec
from typing import Any

from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from .config import TrainingConfig
from .sharding import check_wrapper
from .stopping import LONGEST_WAIT

LONGEST_UPLOAD = timedelta(hours=6)
TRACKERS = ("tensorboard", "wandb", "trackio")


def make_accelerator(config: TrainingConfig) -> Any:
    """What `accelerate launch` has set up. Raises ValueError for a wrapper or tracker that cannot be, ImportError for a
    missing tracker."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    for name in config.report_to:
        if name not in TRACKERS:
            raise ValueError(f"report_to has {name!r}, but must be of {', '.join(TRACKERS)}.")
        if find_spec(name) is None:  # accelerate would pass over it
            raise ImportError(f"--report_to {name} needs a package that is not installed: pip install {name}")
    # At checkpoints the others wait while the main process uploads.
    longest = LONGEST_UPLOAD if config.hub_strategy == "every_save" else LONGEST_WAIT
    accelerator = Accelerator(
        log_with=config.report_to or None,
        project_dir=config.output_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=longest)],
    )
    check_wrapper(accelerator, config)
    unset_hf_deepspeed_config()  # models are built whole, then split
    return accelerator


def launch_settings(accelerator: Any) -> dict[str, Any]:
    """What `accelerate launch` decides of a run, by name. Call it before anything is prepared."""
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
