"""How fast pictures become the model's input, beside transformers' own processor on Pillow.

    python -m benchmarks.image_processor

Photographs of 640x480 pixels, one at a time on one thread, and lists of 32 on one thread and on all. Before anything
is timed the pixels are compared: the default backend's grey levels with Pillow's, torch's with those. Then a JPEG of
twelve megapixels from file to input, decoded exactly and with draft=True, and how far the latter is from the former.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from io import BytesIO

import numpy as np
import PIL
import torch
import transformers
from PIL import Image
from transformers import CLIPImageProcessorPil

from hf_clip import HfClipImageProcessor

from .in_turn import OURS, at_least_one, print_rates, rates_in_turn

LIST_LENGTH = 32
CALLS_IN_A_ROW = 10
"""Pictures are rarely processed between other work; caches are as they are in a loop over files."""

QUICK = f"{OURS}, backend='torch'"
PEER = "transformers CLIPImageProcessorPil"


def photograph(size: tuple[int, int]) -> Image.Image:
    """A real picture that ships with scikit-image, at another size."""
    from skimage import data

    return Image.fromarray(data.chelsea()).resize(size, Image.Resampling.LANCZOS)


def grey_levels(processor: Callable[..., dict], picture: object, **settings: object) -> np.ndarray:
    pixels = processor(picture, do_normalize=False, return_tensors="np", **settings)["pixel_values"][0]
    return np.round(pixels * 255).astype(int)


def check_equal(ours: HfClipImageProcessor, stock: CLIPImageProcessorPil, picture: Image.Image) -> None:
    """Speed of something else would say nothing."""
    expected = grey_levels(stock, picture)
    found = grey_levels(ours, picture)
    print(f"\ntransformers' grey levels differ from ours by {np.abs(found - expected).max()} at most")
    quick = np.abs(grey_levels(ours, picture, backend="torch") - found)
    if quick.max() > 1:
        raise AssertionError(f"backend='torch' is {quick.max()} grey levels off")
    print(f"backend='torch': {(quick > 0).mean():.2%} of the values differ from the default's, by one grey level")


def call_often(call: Callable[[], object]) -> None:
    for _ in range(CALLS_IN_A_ROW):
        call()


def compare_one_picture(
    ours: HfClipImageProcessor, stock: CLIPImageProcessorPil, picture: Image.Image, rounds: int
) -> None:
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    calls: dict[str, Callable[[], object]] = {
        OURS: lambda: ours(picture, return_tensors="pt"),
        QUICK: lambda: ours(pixels, backend="torch", return_tensors="pt"),
        PEER: lambda: stock(picture, return_tensors="pt"),
    }
    works = {name: partial(call_often, call) for name, call in calls.items()}
    rates = rates_in_turn(works, dict.fromkeys(works, CALLS_IN_A_ROW), rounds)
    title = f"pictures of {picture.width}x{picture.height} pixels, one at a time, one thread"
    for row in (OURS, QUICK):
        print_rates(title, {row: rates[row], PEER: rates[PEER]})


def compare_lists(ours: HfClipImageProcessor, picture: Image.Image, threads: int, rounds: int) -> None:
    pictures = [picture] * LIST_LENGTH
    works: dict[str, Callable[[], object]] = {
        f"{OURS}, {threads} threads": lambda: ours(pictures, num_threads=threads, return_tensors="pt"),
        f"{OURS}, one thread": lambda: ours(pictures, num_threads=1, return_tensors="pt"),
    }
    print_rates(f"lists of {LIST_LENGTH}", rates_in_turn(works, dict.fromkeys(works, LIST_LENGTH), rounds))


def compare_draft(ours: HfClipImageProcessor, rounds: int) -> None:
    file = BytesIO()
    photograph((4000, 3000)).save(file, "JPEG", quality=90)
    works: dict[str, Callable[[], object]] = {
        f"{OURS}, draft": lambda: ours(file.getvalue(), draft=True, return_tensors="pt"),
        f"{OURS}, exact": lambda: ours(file.getvalue(), return_tensors="pt"),
    }
    print_rates("a JPEG of 12 megapixels, from its bytes", rates_in_turn(works, dict.fromkeys(works, 1), rounds))
    error = np.abs(grey_levels(ours, file.getvalue(), draft=True) - grey_levels(ours, file.getvalue()))
    print(f"draft: grey levels are {error.mean():.2f} off on average, {error.max()} at most")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.image_processor", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=at_least_one, default=20, help="rounds over all implementations (default 20)")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    ours, stock = HfClipImageProcessor(), CLIPImageProcessorPil()
    print(f"transformers {transformers.__version__}, Pillow {PIL.__version__}, torch {torch.__version__}, ", end="")
    print(f"medians of {options.rounds} rounds")
    landscape = photograph((640, 480))
    torch.set_num_threads(1)
    for picture in (landscape, landscape.transpose(Image.Transpose.ROTATE_90)):
        check_equal(ours, stock, picture)
        compare_one_picture(ours, stock, picture, options.rounds)
    torch.set_num_threads(threads)
    compare_lists(ours, landscape, threads, max(options.rounds // 2, 1))
    compare_draft(ours, max(options.rounds // 4, 1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
