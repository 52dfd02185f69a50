"""The folder of a run: one run at a time, and nothing in it of runs that were killed."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..checkpoints.whole_file import write_json
from ..checkpoints.whole_folder import check_writable, held_folder
from .checkpoint import FOLDER, remove_unfinished
from .option_file import LAUNCH
from .plan import Plan
from .records import METRICS_FILE

CONFIG_FILE = "training_config.json"


@contextmanager
def held(output_dir: str | Path) -> Iterator[None]:
    """Within this block no other run can hold the folder, and what runs left in it that were killed is gone.

    Args:
        output_dir: the folder, which need not be there.

    Raises:
        FolderInUseError: another run holds it.
        PermissionError, DiskFullError: it cannot be written.
    """
    out = Path(output_dir).resolve()
    check_writable(out)
    with held_folder(out):
        remove_unfinished(out)
        yield


def prepare_output(plan: Plan) -> None:
    """Make the folder, with the options of this run and without the records and checkpoints of an earlier one.

    The main process calls this when the first batch is there.
    """
    config = plan.config
    output = Path(config.output_dir)
    if config.resume_from_checkpoint is None:
        output.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(output / FOLDER, ignore_errors=True)
        (output / METRICS_FILE).write_text("")
    write_json(output / CONFIG_FILE, config.to_dict() | {LAUNCH: plan.launched})
