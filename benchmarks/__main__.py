"""Measure hf_clip and its peers in turn, and print how many times as fast it is.

    make bench
    python -m benchmarks --quick
    python -m benchmarks image_encoder --variants RN50 ViT-B/32 --precision bf16 --json figures.json
    python -m benchmarks tokenizer image_processor --picture ratios.png

Without a subcommand all are measured, which takes about an hour on two idle cores; --quick takes some minutes.
A peer whose outputs are not those of the float32 reference is left out, and so is one that is not installed; a line
says why. Where there is a GPU, its rows are added.
"""

import argparse
import os
import sys
from argparse import ArgumentTypeError
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
import transformers

from hf_clip.model.variants import get_variant

from .machine import describe, headline
from .measuring import PRECISIONS, Table, first_line
from .ratio_chart import draw, import_pyplot
from .reporting import as_json, format_summary, format_table, write_json
from .settings import ALLOWED_ON, Settings

SUBCOMMANDS = {
    "tokenizer": "captions to tensors",
    "image_processor": "images to pixels",
    "loader": "JPEGs to batches for training, by worker processes",
    "load": "ViT-L/14 from disk, and the first image of a fresh process",
    "memory": "what serving both towers keeps in memory, by dtype",
    "train_step": "both towers, the loss, backward, AdamW",
    "gradient_caching": "a training step by micro-batches: time of a pair, and memory",
    "locked_towers": "a step with both towers locked, from stored features and with the towers in memory",
    "loss": "the contrastive loss alone, 1k to 32k pairs; --picture draws its curves where it is measured alone",
    "zero_shot": "the pipeline, and a classifier of 1,000 labels",
    "evaluate": "from JPEGs on disk to a table of zero-shot figures",
    "retrieval": "ranks of both directions, in blocks and by the whole matrix",
    "text_encoder": "prompts per second, in one call and one by one",
    "image_encoder": "images per second, by five of the nine models",
}
"""In the order in which they are measured. Encoders come last, because `optimize_for_inference` changes how the whole
process allocates memory."""


def at_least_one(text: str) -> int:
    """The type of a count on the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def positive_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return seconds


def build_parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:16}{what}" for name, what in SUBCOMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=f"subcommands:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("subcommands", nargs="*", metavar="SUBCOMMAND", help="one or several of those below")
    parser.add_argument("--quick", action="store_true", help="smaller models, fewer rounds: a first look")
    parser.add_argument("--threads", type=at_least_one, help="of everyone (default: as many as torch takes)")
    parser.add_argument("--rounds", type=at_least_one, help="turns of everyone in a table")
    parser.add_argument("--seconds", type=positive_seconds, default=20.0, help="for a table's rounds (default 20)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="only this one (default: both where there is a GPU)")
    parser.add_argument(
        "--no-memory", action="store_true", help="do not measure memory, which takes processes of its own"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, raw seconds too")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the ratios there, as .png, .svg or .pdf")
    some = parser.add_argument_group("of some subcommands")
    some.add_argument("--variants", nargs="+", metavar="NAME", help="models by OpenAI's names, e.g. RN50 ViT-L/14")
    some.add_argument("--precision", nargs="+", choices=list(PRECISIONS), help="float32, bf16; fp16 on a GPU")
    some.add_argument("--batch", nargs="+", type=at_least_one, help="images or pairs in a call")
    some.add_argument("--prompts", type=at_least_one, help="prompts in the text encoder's call (default 512)")
    some.add_argument("--captions", type=at_least_one, help="captions for the tokenizer (default 20,000)")
    return parser


def load_subcommands(names: list[str]) -> dict[str, ModuleType]:
    """Raises ValueError with the names that there are."""
    for name in names:
        if name not in SUBCOMMANDS:
            raise ValueError(f"there is no benchmark {name!r}; there are {', '.join(SUBCOMMANDS)}")
    return {name: import_module(f"{__package__}.{name}") for name in SUBCOMMANDS if name in names or not names}


def check_options(options: argparse.Namespace, modules: dict[str, ModuleType]) -> None:
    """Refuse, before anything is measured, what would be ignored or could not be done. Raises ValueError."""
    taken = {option for module in modules.values() for option in module.OPTIONS}
    for option in ("variants", "precision", "batch", "prompts", "captions"):
        if getattr(options, option) is not None and option not in taken:
            raise ValueError(f"--{option} has no meaning for {', '.join(modules)}")
    for name in options.variants or ():
        get_variant(name)
    if options.device == "cuda" and all(module.IS_ON_CPU for module in modules.values()):
        raise ValueError(f"--device cuda has no meaning for {', '.join(modules)}, which run on the CPU")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but torch sees no GPU here")
    for path in (options.json, options.picture):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise ValueError(f"{path} cannot be written: name a file in a folder that exists")
    if options.picture is not None:
        if options.picture.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"{options.picture} is no picture's name; it must end in .png, .svg or .pdf")
        import_pyplot()


def read_settings(options: argparse.Namespace) -> Settings:
    """Raises ValueError where no device computes in the precisions that were asked for."""
    devices = (options.device,) if options.device else ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if options.threads:
        torch.set_num_threads(options.threads)
    os.environ["RAYON_NUM_THREADS"] = str(torch.get_num_threads())  # tokenizers written in Rust count by themselves
    torch.backends.cudnn.allow_tf32 = False  # float32 is to be float32, in the reference above all
    settings = Settings(
        quick=options.quick,
        threads=torch.get_num_threads(),
        devices=devices,
        rounds=options.rounds,
        seconds=options.seconds,
        variants=options.variants and tuple(options.variants),
        precisions=options.precision and tuple(dict.fromkeys(options.precision)),
        batches=options.batch and tuple(options.batch),
        prompts=options.prompts,
        captions=options.captions,
        is_memory_measured=not (options.no_memory or options.quick),
    )
    if not any(settings.precisions_on(device) for device in devices):
        allowed = "; ".join(f"{device}: {', '.join(ALLOWED_ON[device])}" for device in devices)
        raise ValueError(f"--precision {' '.join(options.precision)} is not measured here, where there are {allowed}")
    return settings


def print_ceilings(settings: Settings) -> None:
    for device in settings.devices:
        for precision in dict.fromkeys(["float32", *settings.precisions_on(device)]):
            print(f"ceiling: {settings.ceiling(device, precision) / 1e9:,.0f} GFLOP/s, {precision}, {device}")


def main(arguments: list[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    try:
        modules = load_subcommands(options.subcommands)
        check_options(options, modules)
        settings = read_settings(options)
    except (ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    draw_all = getattr(next(iter(modules.values())), "draw", draw) if len(modules) == 1 else draw
    facts = describe(settings.threads)
    print(headline(facts))
    tables: dict[str, list[Table]] = {name: [] for name in modules}
    has_failed = False
    for name, module in modules.items():
        if options.device == "cuda" and module.IS_ON_CPU:
            print(f"\n{name} is left out: it runs on the CPU")
            continue
        try:
            if module.NEEDS_CEILING and not settings.ceilings:
                print_ceilings(settings)
            for table in module.run(settings):
                print(format_table(table), flush=True)
                tables[name].append(table)
                if options.json:
                    write_json(options.json, as_json(facts, settings.ceilings, tables))
                if options.picture:
                    draw_all(options.picture, facts, [table for several in tables.values() for table in several])
            if not tables[name]:
                raise ValueError("nothing is measured with these options")
        except Exception as error:  # the others have their turn, and what was measured is not lost
            print(f"\nerror: {name} ended early: {first_line(error)}", file=sys.stderr)
            has_failed = True
    everything = [table for several in tables.values() for table in several]
    if len(everything) > 1:
        print("\nhf_clip is so many times as fast as each, as it is loaded (and in its fastest way):\n")
        print(format_summary(everything))
    return int(has_failed or any(table.lacks_ours for table in everything))


if __name__ == "__main__":
    sys.exit(main())
