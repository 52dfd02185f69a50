"""The pages of the documentation: what they tell to run is run, what they show is printed, what they name exists."""

import ast
import contextlib
import io
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

import hf_clip
from benchmarks import pages
from hf_clip import HfClipTokenizer
from hf_clip.commands.program import main

from .doc_blocks import COMMENT, PAGES, ROOT, Block, commands_of, differences, read_blocks
from .doc_commands import known_options, read_command
from .doc_models import write_stand_ins
from .test_contracts import ORDER

BLOCKS = {str(page.relative_to(ROOT)): read_blocks(page) for page in PAGES}
RUN = ("python", "bash")


def run_python(block: Block, names: dict[str, object]) -> str:
    """What a block prints. `names` are those of the page's earlier blocks."""
    code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, names)
    return printed.getvalue()


def run_shell(block: Block) -> str:
    """What a block's commands print; all are `hf-clip`'s, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for line in commands_of(block):
            program, *words = shlex.split(line)
            assert program == "hf-clip", f"{block.place}: {program} is not run by the tests; say why it is not run"
            if words[0] == "convert":
                shutil.rmtree(words[2], ignore_errors=True)  # a stand-in that is there for other pages
            assert main(words) == 0, line
    return printed.getvalue()


@pytest.fixture(scope="module")
def stand_ins(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: HfClipTokenizer,
    photographs: dict[str, Image.Image],
    digits: Path,
) -> Path:
    folder = tmp_path_factory.mktemp("stand-ins")
    write_stand_ins(folder, tokenizer, photographs, digits)
    return folder


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by peft
@pytest.mark.parametrize("page", [name for name, blocks in BLOCKS.items() if any(b.language in RUN for b in blocks)])
def test_blocks_print_what_the_page_shows(page: str, stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In the order of the page; a block knows the names of those before it."""
    here = tmp_path / "here"
    shutil.copytree(stand_ins, here, copy_function=os.link)
    monkeypatch.chdir(here)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in BLOCKS[page]:
        if block.language in RUN and "not run" not in block.comments:
            printed = run_python(block, names) if block.language == "python" else run_shell(block)
            if block.output is not None:
                assert not differences(block, printed)


@pytest.mark.parametrize("page", BLOCKS)
def test_blocks_that_are_not_run_can_be_read(page: str):
    for block in BLOCKS[page]:
        if block.language == "python":
            compile(block.text, block.place, "exec")
        elif block.language == "bash":
            assert commands_of(block), block.place
            for line in commands_of(block):
                read_command(line)


def test_comparison_tells_wrong_words_and_figures():
    page = ROOT / "README.md"

    def said(shown: str, printed: str, **comments: str) -> bool:
        block = Block(page, 1, "python", "", output=Block(page, 2, "text", shown, comments))
        return not differences(block, printed)

    assert said("cat 0.995", "cat 0.9951\n")
    assert not said("cat 0.995", "cat 0.912")
    assert not said("cat 3", "cat 4")
    assert not said("cat 0.995", "dog 0.995")
    assert said("cat 0.995", "cat 0.1", figures="of another model")
    assert not said("cat 0.995", "dog 0.995", figures="of another model")


def test_every_option_that_a_page_names_exists():
    known = known_options()
    for page in PAGES:
        words = re.findall(r"(?<![\w-])--[a-z][\w-]+", re.sub(r"^<!--.*-->$", "", page.read_text(), flags=re.MULTILINE))
        assert {word for word in words if word.replace("_", "-") not in known} == set(), page


def test_comments_before_blocks_are_read():
    """A comment that is misspelt, or stands elsewhere, would silently do nothing."""
    for name, blocks in BLOCKS.items():
        read = sum(len(block.comments) for block in [*blocks, *(b.output for b in blocks if b.output)])
        written = re.findall(r"^<!--.*$", (ROOT / name).read_text(), flags=re.MULTILINE)
        written = [line for line in written if line not in (pages.BEGIN, pages.END)]  # around a machine's figures
        assert len(written) == read, name
        assert all(COMMENT.match(line) for line in written), name


def test_files_and_pages_that_a_page_names_exist():
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page}: {target}"
        for path in re.findall(r"`((?:hf_clip|tests|benchmarks|conversion|model_cards|docs)/[\w/.-]*)`", text):
            assert (ROOT / path).exists(), f"{page}: {path}"


def said_in_the_package() -> str:
    """All texts of the package's sources, with … for what is filled in."""
    found = []
    for path in (ROOT / "hf_clip").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


OF_TRANSFORMERS = ("The checkpoint you are trying to load", "contains custom code", "Unrecognized model in")


def test_messages_of_the_troubleshooting_page_are_said():
    said = said_in_the_package()
    messages = re.findall(r"^> (.+)$", (ROOT / "docs/guides/troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert len(messages) > 15
    for message in messages:
        for part in (part.strip(" :`") for part in message.split("…")):
            assert part in said or message.startswith(OF_TRANSFORMERS), part


def test_reference_names_everything_public():
    pages = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    assert [name for name in hf_clip.__all__ if not re.search(rf"hf_clip\.{name}\b", pages)] == []


def test_legend_explains_every_letter():
    """Of the `Dimensions:` with which the package's files begin."""
    table = (ROOT / "docs/reference/dimensions.md").read_text()
    explained = {
        letter for line in re.findall(r"^\| (.+?) \|", table, flags=re.MULTILINE) for letter in line.split(" × ")
    }
    for path in (ROOT / "hf_clip").rglob("*.py"):
        for legend in re.findall(r"^Dimensions: (.*?)\.?$", path.read_text(), flags=re.MULTILINE):
            letters = re.findall(r"(?<![\w.`])([A-Za-z])(?![\w.`'’])", legend)
            assert {letter for letter in letters if letter not in {"a", *explained}} == set(), path


def test_picture_of_the_import_order_is_the_list_of_the_contract_tests():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    picture = text.partition("## The import order")[2].partition("```text\n")[2].partition("```")[0]
    rows = [re.split(r" {2,}", line)[0] for line in picture.splitlines() if line.strip() != "↓"]
    assert rows == [" · ".join(parts) for parts in ORDER]


def test_readme_is_short_and_its_links_and_pictures_work_everywhere():
    """On the package index, too, where a relative address leads nowhere."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 160
    home = re.search(r'^Source = "https://github.com/(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert home is not None
    assert re.findall(r"\]\((?!https?://)[^)]*\)", text) == []
    for start in (f"https://raw.githubusercontent.com/{home[1]}/main/", f"https://github.com/{home[1]}/blob/main/"):
        places = re.findall(rf"\({re.escape(start)}([^)\s]+)\)", text)
        assert len(places) == text.count(start) > 0
        assert [place for place in places if not (ROOT / place).is_file()] == []
