"""metrics.jsonl: what was measured in a run, one JSON object a line, and the same for trackers."""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..checkpoints.whole_file import whole_file
from ..checkpoints.whole_folder import FULL
from .config import TrainingConfig

METRICS_FILE = "metrics.jsonl"

DEFAULT_METRIC = "recall@1"
"""In every record of an evaluation, and in no other."""


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a run.

    Args:
        folder: the run's output folder.

    Returns:
        Its records in their order. A line that the end of a program cut off is left out.
    """
    path = Path(folder, METRICS_FILE)
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and "step" in record]


class Records:
    """The records of a run that is going on. The main process writes the file; trackers are accelerate's."""

    def __init__(self, config: TrainingConfig, accelerator: Any):
        self.config, self.accelerator = config, accelerator
        self.has_begun = False
        self._unwritten = ""

    def add(self, record: dict[str, float]) -> None:
        """Write one record. Every process calls this."""
        if self.accelerator.is_main_process:
            self._unwritten += json.dumps(record) + "\n"
            self._write()
        if not self.config.report_to:
            return
        if not self.has_begun:
            self.has_begun = True
            shown = {k: v for k, v in self.config.to_dict().items() if isinstance(v, (int, float, str, bool))}
            self.accelerator.init_trackers("hf_clip", config=shown)
        self.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=int(record["step"]))

    def _write(self) -> None:
        """Append what is not written yet. Where there is no room, a run that goes on without checkpoints keeps it."""
        path, text = Path(self.config.output_dir, METRICS_FILE), self._unwritten.encode()
        with path.open("ab", buffering=0) as file:
            before, sent = file.tell(), 0
            try:
                while sent < len(text):
                    sent += file.write(text[sent:])
            except OSError as error:
                os.truncate(path, before)
                if error.errno not in FULL:
                    raise
                needed = f"No space left for {len(text)} bytes in {path}."
                if not self.config.keep_going_without_checkpoints:
                    raise OSError(f"{needed} Make room, and go on with --resume_from_checkpoint latest.") from error
                sys.stderr.write(f"warning: {needed} The run goes on, and writes them later.\n")
                return
        self._unwritten = ""

    def forget_after(self, step: int) -> None:
        """Remove the records of later steps, which a resumed run takes again. Every process calls this."""
        if self.accelerator.is_main_process:
            kept = [record for record in read_metrics(self.config.output_dir) if record["step"] <= step]
            text = "".join(f"{json.dumps(record)}\n" for record in kept)
            with whole_file(Path(self.config.output_dir, METRICS_FILE)) as unfinished:
                unfinished.write_text(text)
        self.accelerator.wait_for_everyone()

    def figures_of(self, step: int) -> dict[str, float]:
        """What was measured after this step on the validation data, by name; empty where nothing was."""
        records = read_metrics(self.config.output_dir)
        found = [r for r in records if r["step"] == step and DEFAULT_METRIC in r and "alpha" not in r]
        return {name: value for name, value in found[-1].items() if name != "step"} if found else {}

    def last_part_cut(self) -> float:
        """The part of the captions that were longer than the model takes, as the last record of training has it."""
        records = read_metrics(self.config.output_dir)
        return next((r["truncated_captions"] for r in reversed(records) if "truncated_captions" in r), 0.0)
