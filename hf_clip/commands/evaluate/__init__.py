"""`hf-clip evaluate TASK`: models measured on data sets, the way the papers do it. A file for each task."""

from collections.abc import Callable
from typing import Any

import typer

from ..program import in_one_line
from .compose_task import compose
from .head_task import head
from .interpolate_task import interpolate
from .linear_probe_task import linear_probe
from .list_task import list_data_sets
from .retrieval_task import retrieval
from .zero_shot_task import zero_shot

SEVERAL = ("--model", "--dataset", "--truncate-dim")
"""Options that take several values: `--model A B`."""

evaluate = typer.Typer(
    name="evaluate",
    help="""Measure models on data sets, the way the papers do it. Each result is named by its protocol.

    Examples:

        hf-clip evaluate zero-shot --model clip-vit-b32/ --dataset flowers/ --templates "a photo of a {}, a flower."

        hf-clip evaluate retrieval --model clip-vit-b32/ clip-rn50/ --dataset clip-benchmark/wds_flickr30k
    """,
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

TASKS: dict[str, Callable[..., Any]] = {
    "zero-shot": zero_shot,
    "retrieval": retrieval,
    "linear-probe": linear_probe,
    "compose": compose,
    "interpolate": interpolate,
    "head": head,
    "list": list_data_sets,
}
"""The tasks, in the order of the help. A new task is a name here and a file."""

for name, task in TASKS.items():
    evaluate.command(name)(in_one_line(task))
