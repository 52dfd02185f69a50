"""What all commands of `hf-clip` have in common: the help, the spelling of options, errors in one line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import pytest
import typer
from transformers.utils import logging

from hf_clip import __version__
from hf_clip.commands import program

ROOT = Path(__file__).resolve().parents[2]
ALL = [name for names in program.COMMANDS.values() for name in names]


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A command `scratch-pad` that records its option and raises what it is told to."""
    seen: list[object] = []
    module = ModuleType("hf_clip.commands.scratch_pad")

    def scratch_pad(
        batch_size: Annotated[int, typer.Option(help="A size.")] = 1,
        labels: Annotated[str, typer.Option(help="Labels.")] = "a",
        problem: Annotated[str, typer.Option(help="An error's name.")] = "none",
        out_folder: Annotated[str | None, typer.Option(help="A folder.")] = None,
    ) -> None:
        """Do something."""
        seen.append((batch_size, labels))
        kinds: dict[str, BaseException] = {
            "value": ValueError("the size is\nwrong"),
            "file": FileNotFoundError("there is no file"),
            "package": ModuleNotFoundError("pip install it"),
            "fault": ZeroDivisionError("a fault"),
            "signal": KeyboardInterrupt("interrupted; nothing was written"),
            "pipe": BrokenPipeError(),
        }
        if problem != "none":
            raise kinds[problem]

    module.scratch_pad = scratch_pad  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hf_clip.commands.scratch_pad", module)
    monkeypatch.setattr(program, "COMMANDS", {**program.COMMANDS, "Scratch": ("scratch-pad",)})
    monkeypatch.setenv(program.TRACEBACK, "")
    return seen


def test_version(capsys: pytest.CaptureFixture[str]):
    assert program.main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf-clip {__version__}\n"


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands_in_their_groups(words: list[str], capsys: pytest.CaptureFixture[str]):
    assert program.main(words) == 0
    shown = capsys.readouterr().out
    for group, names in program.COMMANDS.items():
        assert group in shown or not names
        assert all(f" {name} " in shown for name in names)


def test_every_command_has_a_file_or_folder_of_its_name():
    folder = Path(program.__file__).parent
    found = [*folder.glob("*.py"), *(path.parent for path in folder.glob("*/__init__.py"))]
    shared = {"__init__", "program", "shared_options", "image_results", "loaded_model"}
    assert {name.replace("-", "_") for name in ALL} | shared == {path.stem for path in found}


@pytest.mark.parametrize("name", ALL)
def test_help_of_a_command_has_two_examples(name: str, capsys: pytest.CaptureFixture[str]):
    assert program.main([name, "--help"]) == 0
    assert capsys.readouterr().out.count(f" hf-clip {name} ") >= 2 + 1  # the line of usage is one


@pytest.mark.parametrize("option", ["--batch-size=3", "--batch_size=3"])
def test_options_are_read_in_both_spellings(option: str, scratch: list[object]):
    assert program.main(["scratch-pad", option, "--labels", "a_b,c"]) == 0
    assert scratch == [(3, "a_b,c")]


def test_empty_text_is_not_the_current_folder(scratch: list[object], capsys: pytest.CaptureFixture[str]):
    assert program.main(["scratch-pad", "--batch-size", "3", "--out-folder", ""]) == 1
    assert capsys.readouterr().err.startswith("error: out-folder is given as an empty text; write what is meant")
    assert scratch == []


def test_values_keep_their_underscores():
    words = ["classify", "a_b", "--image_column=my_image", "--top_k", "2", "--", "--a_file"]
    assert program.read_alike(words) == [
        *("classify", "a_b", "--image-column=my_image", "--top-k", "2", "--", "--a_file")
    ]


@pytest.mark.parametrize(
    ("problem", "line"),
    [("value", "the size is wrong"), ("file", "there is no file"), ("package", "pip install it")],
)
def test_what_a_user_can_mend_is_one_line(
    problem: str, line: str, scratch: list[object], capsys: pytest.CaptureFixture[str]
):
    assert program.main(["scratch-pad", "--problem", problem]) == 1
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["scratch-pad", "--batch-sise", "3"], "No such option: --batch-sise. Did you mean --batch-size? See"),
        (["scratch-pad", "--label", "3"], "No such option: --label. Did you mean --labels? See"),
        (["convert", "--layout", "x"], "Invalid value for '--format' / '--layout': 'x' is not one of 'hf_clip', 'tr"),
        (["scratch-pad", "--batch_size", "many"], "Invalid value for '--batch-size': "),
        (["scratch-pads"], "No such command 'scratch-pads'."),
    ],
)
def test_command_line_that_cannot_be_read_is_one_line(
    words: list[str], line: str, scratch: list[object], capsys: pytest.CaptureFixture[str]
):
    assert program.main(words) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {line}")
    assert re.search(r"[.)?] See hf-clip( scratch-pad| convert)? --help\.\n$", shown)
    assert shown.count("\n") == 1
    assert scratch == []


def test_traceback_is_shown_when_asked_for(scratch: list[object], monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="the size is"):
        program.main(["scratch-pad", "--problem", "value", "--traceback"])
    monkeypatch.setenv(program.TRACEBACK, "1")
    with pytest.raises(FileNotFoundError):
        program.main(["scratch-pad", "--problem", "file"])


@pytest.mark.parametrize("option", ["--max_step", "--max-step"])
def test_trainer_reports_as_all_commands_do(
    option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv(program.TRACEBACK, "")
    assert program.main(["finetune", option, "4"]) == 1
    line = f"error: there is no option {option!r}. Did you mean '--max_steps'? See hf-clip finetune --help.\n"
    assert capsys.readouterr().err == line
    with pytest.raises(ValueError, match="there is no option"):
        program.main(["finetune", option, "4", "--traceback"])


def test_a_fault_of_ours_keeps_its_traceback(scratch: list[object]):
    with pytest.raises(ZeroDivisionError):
        program.main(["scratch-pad", "--problem", "fault"])


def test_interruption(scratch: list[object], capsys: pytest.CaptureFixture[str]):
    assert program.main(["scratch-pad", "--problem", "signal"]) == 130
    assert capsys.readouterr().err == "\ninterrupted; nothing was written\n"


def test_interruption_while_a_command_is_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def stop(name: str) -> ModuleType:
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "import_module", stop)
    assert program.main(["finetune"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_reader_that_has_read_enough(scratch: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with (tmp_path / "output").open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        assert program.main(["scratch-pad", "--problem", "pipe"]) == 1
        print("more", file=file, flush=True)
    assert (tmp_path / "output").read_text() == ""


def test_only_the_named_command_is_imported(scratch: list[object], monkeypatch: pytest.MonkeyPatch):
    imported = []
    monkeypatch.setattr(program, "import_module", lambda name: imported.append(name) or sys.modules[name])
    assert program.main(["--traceback", "scratch-pad"]) == 0
    assert imported == ["hf_clip.commands.scratch_pad"]


HELP = """
import contextlib, io, json, sys
from hf_clip.commands.evaluate import TASKS
from hf_clip.commands.program import COMMANDS, main

names = [name for names in COMMANDS.values() for name in names]
lines = [[], ["--help"], ["--version"], ["no-such-command"], ["finetune", "--max-step", "4"], ["finetune", "ltt"]]
lines += [["classify", "--lebels", "a"], ["export-onnx", "m", "--precision", "fp8"], ["serve"]]
lines += [["tag", "--index", "none", "--labels", "a"], ["caption", "a.png", "--index", "none"]]
lines += [["search", "a", "--index", "none"], ["duplicates", "--index", "none"]]
lines += [[name, "--help"] for name in names] + [["evaluate", task, "--help"] for task in TASKS]
found = []
for words in lines:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main(words)
    heavy = {"torch", "transformers", "lancedb", "gradio", "pandas", "datasets", "fastapi", "huggingface_hub"}
    found.append([words, status, sorted(heavy & set(sys.modules)), out.getvalue()])

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupting())
with contextlib.redirect_stderr(io.StringIO()) as out:
    status = main(["finetune", "--model", "m", "--dataset", "d", "--output_dir", "o", "--max_steps", "1"])
print(json.dumps([found, [status, out.getvalue()]]))
"""


@pytest.fixture(scope="module")
def shown_without_torch(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[Any]]:
    """What `HELP` finds in a process whose program is called hf-clip."""
    program_file = tmp_path_factory.mktemp("program") / "hf-clip"  # as it is called where it is installed
    program_file.write_text(HELP)
    done = subprocess.run(
        [sys.executable, str(program_file)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_help_and_wrong_options_import_nothing_that_takes_long(shown_without_torch: tuple[list[Any], list[Any]]):
    for words, status, heavy, shown in shown_without_torch[0]:
        assert heavy == [], f"{words} imports {heavy}, or what it has not imported does"
        assert status == int("--help" not in words and words not in ([], ["--version"])), shown
        assert shown


def test_ctrl_c_while_torch_is_imported_is_told_in_words(shown_without_torch: tuple[list[Any], list[Any]]):
    """What was imported in part cannot be imported again."""
    assert shown_without_torch[1] == [130, "\nended by SIGINT: no step was done that could be kept\n"]


def test_bars_of_transformers_are_for_terminals(scratch: list[object], monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.delenv(program.NO_BARS, raising=False)

    def look() -> None:
        seen.append((logging.is_progress_bar_enabled(), os.environ.get(program.NO_BARS)))

    monkeypatch.setattr(sys.modules["hf_clip.commands.scratch_pad"], "scratch_pad", look)
    was_shown = logging.is_progress_bar_enabled()
    try:
        logging.enable_progress_bar()
        assert program.main(["scratch-pad"]) == 0
        assert logging.is_progress_bar_enabled()
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        assert program.main(["scratch-pad"]) == 0
    finally:
        if not was_shown:
            logging.disable_progress_bar()
    assert seen == [(False, "1"), (True, None)]
    assert program.NO_BARS not in os.environ


@pytest.mark.parametrize(
    ("typed", "word", "found"), [("hf-clip scr", 1, "scratch-pad"), ("hf-clip scratch-pad --ba", 2, "--batch-size")]
)
def test_shell_completes_commands_and_options(
    typed: str,
    word: int,
    found: str,
    scratch: list[object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setenv("_HF_CLIP_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(word))
    with pytest.raises(SystemExit) as ended:
        program.main([])
    assert ended.value.code == 0
    assert capsys.readouterr().out.split() == [found]
