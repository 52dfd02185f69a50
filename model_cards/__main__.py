"""Write the nine cards and their picture, or say what differs.

python -m model_cards
python -m model_cards --check

Cards are written here, to be read. The picture is written here and into the package, which publishes it.
"""

import argparse
import shutil
import sys
from pathlib import Path

from hf_clip.checkpoints.whole_file import whole_file
from hf_clip.checkpoints.whole_folder import whole_folder
from hf_clip.hub.openai_cards import CHART, render_card
from hf_clip.model.variants import VARIANTS

from .chart import draw, drawn_points, points

FOLDER = Path(__file__).parent


def committed_cards() -> dict[str, str]:
    """{file name: card}, for repositories of an owner called `org`."""
    return {f"{row.slug}.md": render_card(row.name, f"org/{row.slug}") for row in VARIANTS.values()}


def write(out: Path) -> None:
    """The cards and the picture, all of them or none; then the package's copy of the picture."""
    with whole_folder(out) as folder:
        draw(folder / CHART.name)
        for name, card in committed_cards().items():
            (folder / name).write_text(card, encoding="utf-8", newline="\n")
    with whole_file(CHART) as copy:
        shutil.copyfile(out / CHART.name, copy)


def differences(folder: Path) -> list[str]:
    """What in `folder` is not what `write` would write, by name and reason."""
    found = []
    for name, card in committed_cards().items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.read_bytes() != card.encode():
            old, new = path.read_bytes().decode(errors="replace").splitlines(), card.splitlines()
            pairs = enumerate(zip(old, new, strict=False), start=1)
            line = next((place for place, (ours, theirs) in pairs if ours != theirs), min(len(old), len(new)) + 1)
            found.append(f"{name} differs from line {line} on")
    for path, name in ((folder / CHART.name, CHART.name), (CHART, f"the package's {CHART.name}")):
        drawn = drawn_points(path)
        if drawn is None:
            found.append(f"{name} is missing")
        elif drawn != points():
            found.append(f"{name} shows other figures")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m model_cards",
        description="Write the cards of OpenAI's nine models and the picture that they show, from the "
        "template and the figures of hf_clip/hub/card_data/.",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; say what differs, and exit with 1 if so")
    options = parser.parse_args(arguments)
    if options.check:
        found = differences(FOLDER)
        for difference in found:
            print(difference)
        if found:
            print("Write them anew with: python -m model_cards")
        return 1 if found else 0
    try:
        write(FOLDER)
    except (ModuleNotFoundError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(VARIANTS)} cards and {CHART.name} are in {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
