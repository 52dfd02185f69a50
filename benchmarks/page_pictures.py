"""Make the screenshots of the guide to the page again, with the demo's models and an index of held-out images.

    make demo
    make demo TOWER=resnet
    python -m benchmarks.page_pictures

Needs the extras app and test (for playwright), and a Chromium.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from datasets import load_from_disk
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
SWITCHES += ["--disable-component-update", "--disable-sync", "--hide-scrollbars"]
WIDE, PHONE = {"width": 1120, "height": 760}, {"width": 390, "height": 760}
SHOWN = (3, 20)
"""Rows of the held-out images that are classified."""


@contextmanager
def served(model: Path, *options: str) -> Iterator[str]:
    """Run `hf-clip app`; yields its address."""
    command = [sys.executable, "-m", "hf_clip.commands.program", "app", str(model), *options, "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "http://" not in line:
            raise RuntimeError("hf-clip app has ended; its message stands above.")
        try:
            yield line.partition("http://")[1] + line.partition("http://")[2].split()[0]
        finally:
            process.terminate()


def keep(tab: Any, path: Path) -> None:
    """Write what a tab shows, without a channel for transparency."""
    tab.wait_for_timeout(400)
    with Image.open(BytesIO(tab.screenshot())) as picture:
        picture.convert("RGB").save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def send(tab: Any, where: str, paths: list[Path]) -> None:
    """Choose files, and wait until the server has them."""
    tab.set_input_files(f"#{where} input[type=file]", paths)
    for path in paths:
        tab.locator(f"#{where} a[download='{path.name}']").wait_for()


def classify_and_search(tab: Any, address: str, images: dict[Path, str], into: Path) -> None:
    """Use two tabs of the page as the guide tells, and keep what they show."""
    tab.goto(address)
    captions = [*images.values(), "a photo of a purple one on white paper", "a photo of a white four on purple paper"]
    tab.get_by_label("Labels").fill("\n".join(captions))
    send(tab, "classify-images", list(images))
    tab.locator("#threshold input[type=number]").fill("0.5")
    tab.get_by_role("button", name="Classify").click()
    tab.locator("#labelled .card").nth(len(images) - 1).wait_for()
    keep(tab, into / "page-classify.png")

    tab.get_by_role("tab", name="Search").click()
    tab.get_by_label("Text", exact=True).fill("a photo of a green eight on purple paper")
    tab.get_by_role("button", name="Search").click()
    tab.locator("#results button[data-place='0']").click()
    tab.locator("#details .chosen").wait_for()
    keep(tab, into / "page-search.png")
    tab.set_viewport_size(PHONE)
    tab.locator("#results").evaluate("results => results.scrollIntoView()")
    keep(tab, into / "page-phone.png")


def look_inside(tab: Any, address: str, scene: Path, texts: list[str], into: Path) -> None:
    """Use the third tab."""
    tab.goto(address)
    tab.get_by_role("tab", name="Look inside").click()
    send(tab, "look-image", [scene])
    tab.get_by_label("What to look for").fill("\n".join(texts))
    tab.get_by_label("twice as fine").check()
    tab.get_by_role("button", name="Look", exact=True).click()
    tab.locator("#maps figure").nth(len(texts) + 1).wait_for()
    keep(tab, into / "page-look-inside.png")


def write_images(rows: Any, folder: Path) -> tuple[dict[Path, str], Path, list[str]]:
    """Write some images with their captions, and a scene of four digits on white paper."""
    images: dict[Path, str] = {}
    for number in SHOWN:
        path = folder / f"digit-{number}.png"
        rows[number]["image"].save(path)
        images[path] = rows[number]["caption"]
    on_white = [row for row in rows if row["caption"].endswith("on white paper")][: 2 * 2]
    side = on_white[0]["image"].width
    whole = Image.new("RGB", (2 * side, 2 * side))
    for place, row in enumerate(on_white):
        whole.paste(row["image"], (side * (place % 2), side * (place // 2)))
    whole.save(folder / "four-digits.png")
    return images, folder / "four-digits.png", [row["caption"] for row in on_white]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page_pictures", description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=Path("demo-output"), help="what `make demo` wrote")
    parser.add_argument("--into", type=Path, default=ROOT / "docs" / "guides")
    options = parser.parse_args(arguments)
    from playwright.sync_api import sync_playwright

    from hf_clip.search.image_index import ImageIndex

    demo = options.demo.resolve()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as drivers:
        index, vit = Path(folder) / "index", demo / "clip-digits-vit"
        ImageIndex.open(index, model=vit).add_data_set(str(options.demo / "data"), split="held_out_images")
        images, scene, texts = write_images(load_from_disk(demo / "data")["held_out_images"], Path(folder))
        browser = drivers.chromium.launch(executable_path=shutil.which("chromium"), args=SWITCHES)
        with served(vit, "--index", str(index)) as address:
            classify_and_search(browser.new_page(viewport=WIDE), address, images, options.into)
        with served(demo / "clip-digits-resnet") as address:
            look_inside(browser.new_page(viewport=WIDE), address, scene, texts, options.into)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
