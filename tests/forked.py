"""Processes that are forked from one which has imported everything, since the imports would take seconds in each.

The tests' own process cannot be forked: once it has computed gradients, its children cannot.
"""

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch

from .ports import free_port

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "hf_clip.commands.finetune",
        "hf_clip.training.run_steps",
        "accelerate",
        "datasets",
        "torch._dynamo",
        "matplotlib.pyplot",
        __name__,
    ]
)


def fork(function: Callable[..., None], processes: int, *given: Any) -> list[ForkServerProcess]:
    """Start processes that find each other as those of `accelerate launch` do, on CPUs.

    Args:
        function: of a module; called in each process with its rank and `given`.
        processes: how many. One does not look for others.
        given: what can be pickled.
    """
    shared = {"ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    if processes > 1:
        shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        started.append(CONTEXT.Process(target=_begin, args=(shared | own, function, rank, *given)))
        started[-1].start()
    return started


def _begin(environment: dict[str, str], function: Callable[..., None], *given: Any) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    function(*given)
