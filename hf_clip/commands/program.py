"""`hf-clip COMMAND …`: the commands in groups, and what all of them have in common.

1. An option's underscores and hyphens mean the same: `--batch_size` and `--batch-size`.
2. What a user can mend is one line on stderr, `error: …`, and exit status 1; anything else is a fault of ours, with its
   traceback.

A command is a function in a file, both named as the command, with underscores for hyphens. Its file imports typer at
the top, and what does the work within the function, so that neither the help nor a command line that cannot be read
waits for torch. The classes are registered with transformers when a command begins; those of `LATE` have something to
say before, and register them by themselves. A command with tasks is a folder with a file for each. What several
commands share is in `shared_options`, `loaded_model` and `image_results`.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import wraps
from importlib import import_module
from typing import Annotated, Any

import typer

from ..model.checked_files import LONGEST_LINE, one_line

COMMANDS: dict[str, tuple[str, ...]] = {
    "Use a model": ("classify", "app", "evaluate", "info"),
    "Search": ("index", "search", "embed", "quantize", "duplicates", "tag", "caption", "curate"),
    "Server": ("serve",),
    "Checkpoints": ("convert", "publish", "export-onnx"),
    "Training": ("finetune", "mine-negatives"),
}
"""Group in the help → its commands. A new command is a name here and a file."""

HAVE_SEVERAL = ("evaluate",)
"""Commands with options that take several values, see `name_each`."""

READ_ALIKE = ("finetune",)
"""Commands whose own parser takes an option's underscores and hyphens alike."""

LATE = ("classify", "index", "search", "duplicates", "tag", "caption", "export-onnx", "finetune", "serve", "app")
"""Commands that say what is wrong, or that nothing has changed, before they import torch and transformers."""


class Dtype(str, Enum):
    """What a command line may ask a model to compute in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


TRACEBACK = "HF_CLIP_TRACEBACK"
"""Environment variable: errors come with their traceback."""

UsageError: Any = typer.BadParameter.__base__
"""typer's error for a command line that cannot be read, which has had several homes."""

INTERRUPTED = 130

NO_BARS = "HF_HUB_DISABLE_PROGRESS_BARS"


@contextmanager
def bars_on_terminals() -> Iterator[None]:
    """Within this block transformers and the Hub's client show bars, such as that of loading weights, for terminals.

    A user who sets the Hub's variable for bars has the last word.
    """
    if sys.stderr.isatty() or NO_BARS in os.environ:
        yield
        return
    logging = sys.modules.get("transformers.utils.logging")
    was_shown = logging is not None and logging.is_progress_bar_enabled()
    os.environ[NO_BARS] = "1"  # which is read when they are imported
    if logging is not None and was_shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        del os.environ[NO_BARS]
        if logging is not None and was_shown:
            logging.enable_progress_bar()


def check_not_empty(options: Mapping[str, Any]) -> None:
    """Refuse an empty text, such as a shell makes of "$OUT" if there is no OUT: as a path, it is the current folder."""
    for name, given in options.items():
        if "" in (given if isinstance(given, (list, tuple)) else [given]):
            raise ValueError(
                f"{name.replace('_', '-')} is given as an empty text; write what is meant, or leave it out."
            )


def in_one_line(command: Callable[..., Any], is_late: bool = False) -> Callable[..., Any]:
    """The same command, ending with `error: …` and status 1 where the user can do something about it.

    Args:
        command: The function.
        is_late: Whether it registers the classes by itself.
    """

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> Any:
        try:
            check_not_empty(options)
            if not is_late:
                from ..registration import register

                register()
            return command(*arguments, **options)
        except BrokenPipeError:  # whoever reads our output has read enough
            raise
        except (OSError, ValueError, ImportError) as error:
            if os.environ.get(TRACEBACK):
                raise
            print(f"error: {one_line(error, LONGEST_LINE)}", file=sys.stderr)
            raise typer.Exit(1) from None
        except KeyboardInterrupt as error:
            print(f"\n{one_line(error) or 'interrupted'}", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None

    return run


def _command_in(words: Sequence[str]) -> str:
    return next((word for word in words if not word.startswith("-")), "")


def read_alike(words: Sequence[str]) -> list[str]:
    """A command line's words with hyphens in the names of its options, and `--traceback` first.

    What follows `=` or a lone `--` stays as it is, and so do all options of a command that reads both spellings itself:
    its errors then name an option as it was typed.
    """
    is_read_alike = _command_in(words) in READ_ALIKE
    end = list(words).index("--") if "--" in words else len(words)
    found = []
    for word in words[:end]:
        name, equals, value = word.partition("=")
        is_option = not is_read_alike and re.fullmatch(r"--[A-Za-z][A-Za-z0-9_-]*", name) is not None
        found.append(f"{name.replace('_', '-')}{equals}{value}" if is_option else word)
    first = ["--traceback"] if "--traceback" in found else []
    return [*first, *(word for word in found if word != "--traceback"), *words[end:]]


def name_each(words: Sequence[str]) -> list[str]:
    """A command line with each value of an option behind the option's name, for the options that take several.

    `--model A B --split test` becomes `--model A --model B --split test`, for the options that a command's file lists
    as SEVERAL.
    """
    command = _command_in(words)
    if command not in HAVE_SEVERAL:
        return list(words)
    several = import_module(f"{__package__}.{command.replace('-', '_')}").SEVERAL
    found: list[str] = []
    option, has_value = "", False
    for word in words:
        if word.startswith("-") and len(word) > 1:
            option, has_value = word if word in several else "", False
        elif option:
            if has_value:
                found.append(option)
            has_value = True
        found.append(word)
    return found


def _in_words(error: Any) -> str:
    """What is wrong with a command line, without what the libraries below add: once said, one option suggested."""
    if near := getattr(error, "possibilities", None):  # best first
        return f"{error.message}. Did you mean {near[0]}?"
    return one_line(error.format_message(), LONGEST_LINE).replace(": Value error, ", ": ")


def build_app(only: str | None = None) -> typer.Typer:
    """The program, with all commands or one of them."""
    app = typer.Typer(
        name="hf-clip",
        help="All nine OpenAI CLIP models for transformers, the Hub and beyond.",
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def options_of_all(
        context: typer.Context,
        version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
        traceback: Annotated[
            bool, typer.Option("--traceback", envvar=TRACEBACK, help="Show where an error was raised.")
        ] = False,
    ) -> None:
        if traceback:
            os.environ[TRACEBACK] = "1"
        if version:
            typer.echo(f"hf-clip {sys.modules['hf_clip'].__version__}")
        elif context.invoked_subcommand is None:
            typer.echo(context.get_help())

    for panel, names in COMMANDS.items():
        for name in names:
            if only in (None, name):
                function_name = name.replace("-", "_")
                module = import_module(f"{__package__}.{function_name}")
                command = getattr(module, function_name)
                if isinstance(command, typer.Typer):  # a group of commands, each of which ends in one line by itself
                    app.add_typer(command, name=name, rich_help_panel=panel)
                    continue
                # A command that reads its own options, as the trainer does, says so in SETTINGS.
                register = app.command(name, rich_help_panel=panel, **getattr(module, "SETTINGS", {}))
                register(in_one_line(command, is_late=name in LATE))
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line, by default that of the process. Returns the exit status.

    0: done; 1: an error; 2: some of many things could not be done, which each command's help describes
    """
    words = read_alike(sys.argv[1:] if arguments is None else arguments)
    words = name_each(words)
    names = [name for names in COMMANDS.values() for name in names]
    only = _command_in(words)
    is_completion = "_HF_CLIP_COMPLETE" in os.environ
    try:
        app = build_app(only if only in names and not is_completion else None)
        with bars_on_terminals():
            status = app(words, prog_name="hf-clip", standalone_mode=False)
    except UsageError as error:
        where = getattr(getattr(error, "ctx", None), "command_path", "hf-clip")
        problem = _in_words(error)
        end = "" if problem.endswith((".", ")", "?")) else "."
        print(f"error: {problem}{end} See {where} --help.", file=sys.stderr)
        return 1
    except (typer.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # Python flushes what is left at its end
        os.close(nowhere)
        return 1
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(main())
