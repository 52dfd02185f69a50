"""The picture of the collection: ImageNet zero-shot top-1 against GFLOPs per image, one point for each model.

What was drawn is written into the file, so that it can be compared where matplotlib isn't installed, and although
another version of it draws other pixels.
"""

import json
from pathlib import Path

from PIL import Image

from hf_clip.hub.published_figures import ZERO_SHOT
from hf_clip.model.variants import VARIANTS, Variant

COLOURS = {"ResNet": "#c2571a", "Vision Transformer": "#1f5fa8"}
GREY = "#6b6b6b"

BESIDE = {"RN50": (0, -18), "RN50x64": (5, -19)}
"""Where a label stands from its point, in typographic points, where the usual place is taken or at the edge."""


def kind_of(variant: Variant) -> str:
    return "Vision Transformer" if variant.patch_size else "ResNet"


def points() -> dict[str, tuple[float, float]]:
    """{model: (GFLOPs per image, top-1 in per cent)}"""
    return {name: (row.image_gflops, float(ZERO_SHOT[name]["ImageNet"])) for name, row in VARIANTS.items()}


def drawn_points(path: Path) -> dict[str, tuple[float, float]] | None:
    """The points in a picture that `draw` has written; None where there is none."""
    if not path.is_file():
        return None
    with Image.open(path) as picture:
        return {name: (x, y) for name, (x, y) in json.loads(picture.info.get("Points", "{}")).items()}


def draw(path: Path) -> None:
    """Write the picture. Raises ModuleNotFoundError with the line that installs matplotlib."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ModuleNotFoundError("The picture is drawn with matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = points()
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for kind, colour in COLOURS.items():
        names = [name for name, variant in VARIANTS.items() if kind_of(variant) == kind]
        xs, ys = zip(*(found[name] for name in names), strict=True)
        axes.plot(xs, ys, color=colour, linewidth=1.4, alpha=0.45, zorder=2)
        axes.scatter(xs, ys, s=52, color=colour, edgecolors="white", linewidths=1.2, zorder=3)
        for name in names:
            across, up = BESIDE.get(name, (-7, 9) if kind == "Vision Transformer" else (7, -17))
            side = "center" if name in BESIDE else "left" if across > 0 else "right"
            offset = {"xytext": (across, up), "textcoords": "offset points"}
            axes.annotate(name, found[name], ha=side, color=colour, fontsize=10.5, **offset)
    axes.set_xscale("log")
    axes.set_xlim(5, 800)
    axes.set_ylim(57.2, 78.5)
    axes.set_yticks([60, 65, 70, 75], ["60 %", "65 %", "70 %", "75 %"])
    axes.set_xticks([5, 10, 20, 50, 100, 200, 500], ["5", "10", "20", "50", "100", "200", "500"])
    axes.minorticks_off()
    axes.set_xlabel("GFLOPs per image (a multiplication and an addition are two)", color=GREY)
    axes.set_title(
        "ImageNet zero-shot top-1 of OpenAI's nine CLIP models", loc="left", fontsize=12.5, fontweight="bold", pad=8
    )
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#c8c8c8")
    axes.text(330, 57.6, "Top-1: Radford et al. 2021, table 11", ha="center", color=GREY, fontsize=8.5)
    figure.savefig(path, dpi=150, format="png", metadata={"Points": json.dumps(found), "Software": None})
    plt.close(figure)
