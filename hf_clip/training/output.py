"""The folder of a run: one run at a time, and nothing of runs that were killed."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..checkpoints.whole_folder import held_folder
from .checkpoint import FOLDER, remove_unfinished
from .config import LAUNCH, TrainingConfig
from .results import CONFIG_FILE, METRICS_FILE


@contextmanager
def held(output_dir: str | Path) -> Iterator[None]:
    """Within this block no other run can hold the folder, and nothing is left in it of runs that were killed.

    Raises FolderInUseError that names who holds it.
    """
    out = Path(output_dir).resolve()
    with held_folder(out):
        remove_unfinished(out)
        yield


def prepare_output(config: TrainingConfig, launched: dict[str, Any]) -> None:
    """Make the folder, with the records of this run alone. The main process calls this when the first batch is there.

    launched: what the launcher decided, see `launch_settings`
    """
    output = Path(config.output_dir)
    if config.resume_from_checkpoint is None:
        output.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(output / FOLDER, ignore_errors=True)
        (output / METRICS_FILE).write_text("")
    content = config.to_dict() | {LAUNCH: launched}
    (output / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")
