"""A run's options from a command line, or from a YAML or JSON file with a command line behind it.

Neither torch nor transformers is imported before the words are read, so that the help is there at once.
"""

import dataclasses
import re
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .option_file import OPTION_FILES, read_options, words_of
from .option_names import hint, moved_repository
from .options import GROUPS, OPTIONS
from .recipes import check_filled, find_recipe, recipe_names

if TYPE_CHECKING:
    from .config import TrainingConfig

EXAMPLES = """\
examples:
  {prog} --model clip-vit-b32/ --dataset my/pairs --num_train_epochs 3 --output_dir fine-tuned/
  {prog} lit --model clip-vit-b32/ --dataset my/pairs --output_dir fine-tuned/
  {prog} run.yaml --max_steps 100
  accelerate launch --num_processes 8 -m hf_clip.commands.finetune run.yaml

recipes: {recipes}
"""


INSTEAD = (
    ("num_train_epochs", "max_steps"),
    ("model", "variant"),
    ("overwrite_output_dir", "resume_from_checkpoint"),
)
"""Options of which a run has one: on the command line it takes the place of the other in a file."""

SWITCH_VALUES = ("true", "false", "yes", "no", "on", "off", "t", "f", "y", "n", "1", "0")
"""What may stand behind a switch."""


def _without_replaced(values: dict[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """A file's options without those that an option of the command line stands for."""
    given = {word.partition("=")[0][2:].replace("-", "_") for word in words if word.startswith("--")}
    replaced = {one for pair in INSTEAD for one, other in (pair, pair[::-1]) if other in given and one not in given}
    return {name: value for name, value in values.items() if name not in replaced}


def _check_push_to_hub(words: Sequence[str]) -> None:
    """Raises ValueError for a repository behind `--push_to_hub`."""
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        name, equals, value = word.partition("=")
        value = value if equals else "" if following.startswith("-") else following
        if name.replace("-", "_") == "__push_to_hub" and value and value.lower() not in SWITCH_VALUES:
            raise ValueError(moved_repository(value))


def _refuse_with(words: Sequence[str], before: str = "", after: str = "") -> Callable[[str], None]:
    """What a parser does instead of ending the program with a line of usage: a function that raises ValueError.

    Args:
        words: Of the command line. An option that has two spellings is named as it stands there.
        before: What is said before what is wrong.
        after: What is said behind it.
    """

    def refuse(message: str) -> None:
        if found := re.match(r"argument (--\S+): ", message):
            spellings, given = found[1].split("/"), [word.partition("=")[0] for word in words]
            typed = next((name for name in reversed(given) if name in spellings), spellings[0])
            message = f"{typed}: {message[found.end() :]}"
        end = "" if message.endswith((".", "?")) else "."
        raise ValueError(f"{before}{message}{end}{after}")

    return refuse


def _check_words(parser: Any, words: list[str], path: Path) -> None:
    """Raises ValueError that names the file for a value of a wrong type."""
    before, parser.error = parser.error, _refuse_with(words, f"{path}: ")
    try:
        parser.parse_args(words)
    finally:
        parser.error = before


def _argument_parser() -> Any:
    """transformers' HfArgumentParser. Its file needs nothing of transformers, whose import takes most of a second."""
    package = find_spec("transformers")
    path = Path(package.origin or "").with_name("hf_argparser.py") if package is not None else Path()
    spec = spec_from_file_location("transformers.hf_argparser", path)
    if "transformers" not in sys.modules and path.is_file() and spec is not None and spec.loader is not None:
        try:
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
            return module.HfArgumentParser
        except (ImportError, AttributeError):  # a version whose file needs the package
            pass
    from transformers import HfArgumentParser

    return HfArgumentParser


def _with_negatives_joined(words: Sequence[str]) -> list[str]:
    """A command line's words with a value that begins with a minus, as `-1,32` or `-1e-5`, joined to its option by `=`.

    argparse takes it for an option unless it is a plain number, and says of the option in front of it that it has no
    value.
    """
    found: list[str] = []
    for word in words:
        is_value = re.match(r"-[\d.]", word) is not None and not re.fullmatch(r"-\d+|-\d*\.\d+", word)
        if is_value and found and re.fullmatch(r"--[A-Za-z][\w-]*", found[-1]):
            found[-1] += f"={word}"
        else:
            found.append(word)
    return found


def parse_config(arguments: Sequence[str] | None = None, prog: str = "finetune.py") -> "TrainingConfig":
    """The configuration that a command line asks for.

    Args:
        arguments: the words behind the program's name; None takes those of this process. Where the first is a .yaml or
            .json file, or the name of a recipe, its options hold unless the command line says otherwise.
        prog: what the program is called in its help.

    Returns:
        The configuration, checked.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file cannot be read, there is no such recipe or option, its value is ill-formed, or the options
            contradict each other.
        SystemExit: after --help.
    """
    words, recipe = list(sys.argv[1:] if arguments is None else arguments), None
    parser = _argument_parser()(
        GROUPS,
        prog=prog,
        description="Contrastive training of a CLIP on images with captions.",
        epilog=EXAMPLES.format(prog=prog, recipes=", ".join(recipe_names())),
        formatter_class=RawDescriptionHelpFormatter,
        usage=f"{prog} [RECIPE | run.yaml] --model MODEL --dataset DATASET --output_dir FOLDER --num_train_epochs N "
        f"[options]",
        allow_abbrev=False,
    )
    if words and not words[0].startswith("-"):
        first, words = words[0], words[1:]
        path = Path(first) if first.endswith(OPTION_FILES) else find_recipe(first, hint(first, OPTIONS, dashes="--"))
        recipe = path.stem
        from_file = words_of(_without_replaced(read_options(path, OPTIONS), words))
        _check_push_to_hub(from_file)
        _check_words(parser, from_file, path)
        words = [*from_file, *words]
    words = _with_negatives_joined(words)
    _check_push_to_hub(words)
    parser.error = _refuse_with(words, after=f" See {prog} --help.")
    values: dict[str, Any] = {}
    *groups, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown:
        if unknown[0].endswith(OPTION_FILES):
            parser.error(f"{unknown[0]} is no option; a file of options comes first, before all options.")
        parser.error(f"there is no option {unknown[0]!r}.{hint(unknown[0], OPTIONS, dashes='--')}")
    for group in groups:
        values |= dataclasses.asdict(group)
    if recipe is not None:
        check_filled(recipe, values)
    from .config import TrainingConfig

    return TrainingConfig(**values)
