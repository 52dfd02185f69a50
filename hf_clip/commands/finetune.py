"""`hf-clip finetune`: contrastive training of a CLIP on images with captions.

    accelerate launch -m hf_clip.commands.finetune --model clip-vit-b32/ --dataset my/pairs --num_train_epochs 3 \\
        --output_dir fine-tuned/
    hf-clip finetune run.yaml --max_steps 100

The same program runs on one CPU and on many GPUs: the loss is over the pairs of all processes. `hf-clip finetune` runs
it in one process. The output folder holds the model, its processor and card, metrics.jsonl, training_config.json and
the checkpoints.
"""

import os
import sys
from collections.abc import Sequence

import typer

from ..training import failures
from ..training.command_line import parse_config
from .program import TRACEBACK, bars_on_terminals

SETTINGS = {
    "add_help_option": False,
    "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True},
}
"""For the console program: the options are read by `parse_config`, which knows their groups."""


def main(arguments: Sequence[str] | None = None, prog: str = "finetune.py") -> int:
    """Run one command line.

    Args:
        arguments: the words behind the program's name; None takes those of this process.
        prog: what the program is called in its help.

    Returns:
        The exit status: 0, 1 after an error, or 128 and the number of the signal that ended the run.
    """
    try:
        with failures.said_once():
            config = parse_config(arguments, prog)
        # Here, since a command line that cannot be read need not wait for torch and transformers.
        from ..registration import register
        from ..training.run_steps import train

        register()
        with bars_on_terminals():
            train(config)
    except KeyboardInterrupt as stop:
        return failures.report_stop(stop)
    except Exception as error:
        return failures.report(error, with_traceback=bool(os.environ.get(TRACEBACK)))
    return 0


def finetune(context: typer.Context) -> int:
    """Train a CLIP on images with captions, from another CLIP or from scratch.

    On several GPUs: accelerate launch -m hf_clip.commands.finetune, with the same options.
    """
    try:
        return main(context.args, prog="hf-clip finetune")
    except SystemExit as end:  # after --help
        return end.code if isinstance(end.code, int) else 1


if __name__ == "__main__":
    sys.exit(main())
