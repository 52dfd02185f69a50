"""The command lines of the pages, read by the parsers of the programs that they name, and never carried out here."""

import argparse
import os
import re
import shlex
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any
from unittest.mock import patch

import typer
from accelerate.commands.launch import launch_command_parser

from hf_clip.commands.program import build_app, name_each, read_alike
from hf_clip.training.command_line import parse_config
from hf_clip.training.options import OPTIONS

from .doc_blocks import ROOT

PROGRAMS: dict[str, list[str]] = {
    "benchmarks": [],
    "benchmarks.forgetting": [],
    "benchmarks.gpu": [],
    "benchmarks.hard_negatives": [],
    "benchmarks.looking_inside": ["vit", "resnet"],
    "benchmarks.pages": ["file.json", "--into", "page.md"],
    "benchmarks.search.cutoff": ["folder"],
    "benchmarks.search.first_answer": ["--work", "folder"],
    "benchmarks.search.folder": ["--work", "folder"],
    "benchmarks.search.quantized": [],
    "benchmarks.search.vectors": [],
    "benchmarks.serve": [],
    "benchmarks.serve.memory": [],
    "conversion.parity": [],
    "demo": [],
    "model_cards": [],
}
"""Those of a checkout that read their command line by argparse, in `main`, and the words that each needs at least."""

SECTION = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
EXTRAS = set(re.findall(r"^(\w+) = \[", SECTION, flags=re.MULTILINE))
TARGETS = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))

ELSEWHERE = {
    *("--help", "--strategy", "--no-deps", "--no-index"),
    *("--build-arg", "--env", "--file", "--publish", "--read-only", "--tag", "--time", "--tmpfs", "--user", "--volume"),
}
"""Options of programs that are none of ours, such as docker."""


class ParsedError(Exception):
    """A command line was read; it holds the parser."""


def read_by_argparse(program: str, words: Sequence[str]) -> argparse.ArgumentParser:
    """Raises SystemExit for a command line that the program would refuse."""
    real = argparse.ArgumentParser.parse_args

    def parse_args(parser: argparse.ArgumentParser, *given: Any, **more: Any) -> None:
        real(parser, *given, **more)
        raise ParsedError(parser)

    name = f"{program}.__main__" if (ROOT / program.replace(".", "/")).is_dir() else program
    with patch.object(argparse.ArgumentParser, "parse_args", parse_args):
        try:
            import_module(name).main(list(words))
        except ParsedError as read:
            return read.args[0]
    raise AssertionError(f"{program} reads no command line")


def program() -> Any:
    """`hf-clip` as click has it, with all commands."""
    return typer.main.get_command(build_app())


def read_by_hf_clip(words: Sequence[str]) -> None:
    """Raises typer's UsageError, or SystemExit, for a command line that `hf-clip` would refuse."""
    name, *rest = name_each(read_alike(words))
    if name == "finetune":
        read_trainer(words[1:])
        return
    command = program().commands[name]
    while hasattr(command, "commands"):  # a group, as `evaluate` is
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(name, list(rest))


def read_by_accelerate(words: Sequence[str]) -> None:
    options = launch_command_parser().parse_args(list(words))
    if options.config_file:
        assert (ROOT / options.config_file).is_file(), options.config_file
    if options.training_script == "hf_clip.commands.evaluate":
        read_by_hf_clip(["evaluate", *options.training_script_args])
        return
    assert options.training_script in ("finetune.py", "hf_clip.commands.finetune"), options.training_script
    read_trainer(options.training_script_args)


def read_trainer(words: Sequence[str]) -> None:
    """A run's options, but where they stand in an example's file, which nobody has."""
    if not words[0].endswith((".yaml", ".json")) or (ROOT / words[0]).is_file():
        first = str(ROOT / words[0]) if words[0].endswith((".yaml", ".json")) else words[0]
        parse_config([first, *words[1:]])


def read_by_pip(words: Sequence[str]) -> None:
    assert words[0] in ("install", "wheel"), words
    for extras in re.findall(r"\[(.+?)\]", " ".join(words)):
        assert set(extras.split(",")) <= EXTRAS, extras


def read_by_make(words: Sequence[str]) -> None:
    assert {word for word in words if "=" not in word} <= TARGETS, words


def read_by_python(words: Sequence[str]) -> None:
    assert words[0] == "-m", words
    read_by_argparse(words[1], words[2:])


def read_by_curl(words: Sequence[str]) -> None:
    """Raises ValidationError for a body that the server would refuse."""
    from hf_clip.serve.classify_request import ClassifyRequest
    from hf_clip.serve.embedding_request import EmbeddingRequest
    from hf_clip.serve.search_request import SearchRequest

    kinds = {"embeddings": EmbeddingRequest, "classify": ClassifyRequest, "search": SearchRequest}
    kind = kinds[words[0].rpartition("/")[2]]
    body = words[words.index("-d") + 1]
    if not body.startswith("@"):
        kind.model_validate_json(body)


def read_by_printf(words: Sequence[str]) -> None:
    """What is filled into a body, and sent by curl."""
    assert words[2:4] == ["|", "curl"], words
    body = words[0].replace("%s", "AAAA")
    read_by_curl([body if word == "@-" else word for word in words[4:]])


def read_by_docker(words: Sequence[str]) -> None:
    """What stands behind the image's name is read as the server reads it."""
    assert words[0] in ("build", "run"), words
    if words[0] == "run":
        read_by_hf_clip(["serve", "/model", *words[words.index("hf-clip") + 1 :]])


READERS: dict[str, Callable[[Sequence[str]], Any]] = {
    "hf-clip": read_by_hf_clip,
    "accelerate": lambda words: read_by_accelerate(words[1:]),
    "pip": read_by_pip,
    "make": read_by_make,
    "python": read_by_python,
    "curl": read_by_curl,
    "docker": read_by_docker,
    "printf": read_by_printf,
}


def read_command(line: str) -> None:
    """Fails as the program would that the line names."""
    words = shlex.split(line)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    assert words[0] in READERS, f"{line}: no reader for {words[0]}"
    READERS[words[0]](words[1:])


def known_options() -> set[str]:
    """Every option that a page may name, with hyphens."""
    found = set(ELSEWHERE)
    groups = [program(), *(command for command in program().commands.values() if hasattr(command, "commands"))]
    for command in (*groups, *(command for group in groups for command in group.commands.values())):
        found |= {name for parameter in command.params for name in parameter.opts if name.startswith("--")}
    found |= {f"--{name}" for name in OPTIONS}
    parsers = [launch_command_parser(), *(read_by_argparse(name, words) for name, words in PROGRAMS.items())]
    found |= {name for parser in parsers for name in parser._option_string_actions}
    return {name.replace("_", "-") for name in found}


def is_dry(line: str) -> bool:
    """Whether a command line installs or builds something, which no test does."""
    return shlex.split(line)[0] in ("pip", "make", os.devnull)
