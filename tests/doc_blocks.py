"""The code blocks of the Markdown pages, what is said of them, and how their output is compared.

A comment on the line before a block says what the block itself does not:

    <!-- not run: why -->       before a Python or shell block
    <!-- figures: whose -->     before the output: its numbers are another model's than the test's stand-in
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]

FENCE = re.compile(r"(?P<indent> *)(?P<ticks>`{3,})(?P<language>\S*)")
COMMENT = re.compile(r"<!-- (?P<name>not run|figures): (?P<said>.+) -->")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


@dataclass
class Block:
    """One fenced block.

    Attributes:
        line: of the page, on which its text begins, from 1.
        comments: what stands on the line before it, by name.
        output: the block that follows at once, if that is plain text.
    """

    page: Path
    line: int
    language: str
    text: str
    comments: dict[str, str] = field(default_factory=dict)
    output: "Block | None" = None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    """A page's blocks in their order; a block of output belongs to the one before it."""
    blocks: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    comments: dict[str, str] = {}
    is_adjacent, place = False, 0
    while place < len(lines):
        line = lines[place]
        place += 1
        if found := FENCE.match(line):
            end = next(n for n in range(place, len(lines)) if lines[n].strip() == found["ticks"])
            text = "\n".join(line.removeprefix(found["indent"]) for line in lines[place:end])
            block = Block(page, place + 1, found["language"], text, comments)
            if is_adjacent and block.language in ("", "text"):
                blocks[-1].output = block
            else:
                blocks.append(block)
            place, comments, is_adjacent = end + 1, {}, True
        elif found := COMMENT.match(line):
            comments[found["name"]] = found["said"]
        elif line.strip():
            comments, is_adjacent = {}, False
    return blocks


def differences(block: Block, printed: str) -> str:
    """What a block printed that its page does not show, in words; empty where they agree.

    Fractions may differ in the last digit that a page shows. Figures of another model are not compared.
    """
    assert block.output is not None
    shown, printed = block.output.text.strip(), printed.strip()
    if "figures" in block.output.comments:
        shown, printed = (NUMBER.sub("#", text) for text in (shown, printed))
    same_words = NUMBER.sub("#", shown) == NUMBER.sub("#", printed)
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=False)
    if same_words and all(_is_near(*pair) for pair in pairs):
        return ""
    return f"{block.output.place} shows\n{shown}\nbut the block prints\n{printed}"


def _is_near(shown: str, printed: str) -> bool:
    if "." not in shown and "e" not in shown:
        return shown == printed
    decimals = len(shown.partition(".")[2])
    return abs(float(shown) - float(printed)) <= 10.0**-decimals


def commands_of(block: Block) -> list[str]:
    """A shell block's command lines, without comments, continued lines joined."""
    joined = re.sub(r"\\\n\s*", "", block.text)
    lines = (re.sub(r"(^|\s+)#.*$", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line]
