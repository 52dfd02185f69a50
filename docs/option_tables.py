"""The directives `{command-options}` and `{training-options}`: tables of options, made of the programs themselves."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import typer
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from hf_clip.commands.program import COMMANDS, build_app
from hf_clip.training.options import DEFAULT, GROUPS

OF_EVERY_COMMAND = ("--help",)
ELSEWHERE = {"finetune": "Its options have [a page of their own](training-options.md)."}
"""Commands that read their options themselves, and where these are explained."""

IN_CELL = {"|": "\\|", "<": "\\<", "*": "\\*"}
"""What would be Markdown in a cell of a table."""


def in_cell(text: str) -> str:
    """A help text as a cell; what stands in backquotes stays as it is, but for the bar between cells."""
    parts = re.split(r"(`[^`]*`)", text.replace("%%", "%").replace("\n", " "))
    marks = re.compile("|".join(map(re.escape, IN_CELL)))
    return "".join(
        part.replace("|", "\\|") if part.startswith("`") else marks.sub(lambda found: IN_CELL[found[0]], part)
        for part in parts
    )


def command_table(command: Any, name: str) -> Iterator[str]:
    """The arguments and options of a command, with what each is for."""
    context = command.make_context(name, [], resilient_parsing=True)
    rows = [
        parameter.get_help_record(context)
        for parameter in command.get_params(context)
        if not set(OF_EVERY_COMMAND) & set(parameter.opts)
    ]
    if rows:
        yield from ("| argument or option | meaning |", "|---|---|")
    for usage, meaning in rows:
        shown = re.sub(r" <(?:list\[)?(?:str|int range|int|float range|float)\]?>", "", usage)
        yield f"| {in_cell(f'`{shown}`')} | {in_cell(meaning)} |"
    yield ""


def command_section(command: Any, name: str, level: int) -> Iterator[str]:
    """A command's help, and the commands below it."""
    said, _, examples = (command.help or "").partition("Examples:")
    yield from (f"{'#' * level} {name}", "", said.strip(), "")
    if lines := [line.strip() for line in examples.splitlines() if line.strip()]:
        yield from ("```bash", *lines, "```", "")
    last = name.rpartition(" ")[2]
    if last in ELSEWHERE:
        yield from (ELSEWHERE[last], "")
    elif hasattr(command, "commands"):
        for task, below in command.commands.items():
            yield from command_section(below, f"{name} {task}", level + 1)
    else:
        yield from command_table(command, last)


class CommandOptions(SphinxDirective):
    """`{command-options}`: all commands of `hf-clip`, in the groups of its help."""

    def run(self) -> list[nodes.Node]:
        commands = typer.main.get_command(build_app()).commands  # type: ignore[attr-defined]
        lines: list[str] = []
        for group, names in COMMANDS.items():
            lines += [f"## {group}", ""]
            for name in names:
                lines += command_section(commands[name], f"hf-clip {name}", 3)
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


class TrainingOptions(SphinxDirective):
    """`{training-options}`: a table for each group of the trainer's options."""

    def run(self) -> list[nodes.Node]:
        lines: list[str] = []
        for group in GROUPS:
            lines += [
                f"## {group._argument_group_name.capitalize()}",
                "",
                "| option | default | meaning |",
                "|---|---|---|",
            ]
            for field in dataclasses.fields(group):
                default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
                shown = "" if default in (None, "", []) else f"`{default}`"
                lines.append(
                    f"| `--{field.name}` | {shown} | {in_cell(field.metadata['help'].removesuffix(DEFAULT))} |"
                )
            lines.append("")
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("command-options", CommandOptions)
    app.add_directive("training-options", TrainingOptions)
    return {"parallel_read_safe": True}
