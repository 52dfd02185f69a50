"""One check in a process of its own, since it needs other processes, another launcher or all of a GPU's memory.

    python -m benchmarks.gpu.process SCENARIO --device cuda [--dry-run]

It prints a line of JSON for each row. The rank and the number of processes come from the environment, as with torchrun.
"""

import argparse
import sys
from collections.abc import Callable

import torch

from .place import Place
from .two_processes import nccl_on_one_gpu, two_processes
from .with_accelerate import fp16, fsdp2, micro_batch_size, program, resume

SCENARIOS: dict[str, Callable[[Place], None]] = {
    "nccl": nccl_on_one_gpu,
    "two": two_processes,
    "fsdp2": fsdp2,
    "auto": micro_batch_size,
    "fp16": fp16,
    "resume": resume,
    "program": program,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.process", description=__doc__)
    parser.add_argument("scenario", choices=list(SCENARIOS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="tiny models")
    options = parser.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    SCENARIOS[options.scenario](Place(options.device, options.dry_run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
