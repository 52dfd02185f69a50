"""The published and measured figures of the nine models. The README of `card_data/figures/` names their sources.

A file has one row for each model, in the order of the paper's tables. Cells are kept as texts, so a card prints a
figure as its source prints it. An empty cell was not published.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).with_name("card_data") / "figures"


@dataclass(frozen=True)
class DataSet:
    """One of the 27 data sets of the paper.

    Attributes:
        column: Name of its column in the files.
        name: Name of the data set.
        metric: The metric that is reported for it (table 9 of the paper).
    """

    column: str
    name: str
    metric: str = "accuracy"


DATA_SETS = [
    DataSet("Food101", "Food-101"),
    DataSet("CIFAR10", "CIFAR-10"),
    DataSet("CIFAR100", "CIFAR-100"),
    DataSet("Birdsnap", "Birdsnap"),
    DataSet("SUN397", "SUN397"),
    DataSet("StanfordCars", "Stanford Cars"),
    DataSet("FGVCAircraft", "FGVC Aircraft", "mean per class"),
    DataSet("VOC2007", "Pascal VOC 2007", "11-point mAP"),
    DataSet("DTD", "Describable Textures"),
    DataSet("OxfordPets", "Oxford-IIIT Pets", "mean per class"),
    DataSet("Caltech101", "Caltech-101", "mean per class"),
    DataSet("Flowers102", "Oxford Flowers 102", "mean per class"),
    DataSet("MNIST", "MNIST"),
    DataSet("FER2013", "FER 2013"),
    DataSet("STL10", "STL-10"),
    DataSet("EuroSAT", "EuroSAT"),
    DataSet("RESISC45", "RESISC45"),
    DataSet("GTSRB", "GTSRB"),
    DataSet("KITTI", "KITTI distance"),
    DataSet("Country211", "Country211"),
    DataSet("PCam", "PatchCamelyon"),
    DataSet("UCF101", "UCF101"),
    DataSet("Kinetics700", "Kinetics-700", "mean of top-1 and top-5"),
    DataSet("CLEVRCounts", "CLEVR counts"),
    DataSet("HatefulMemes", "Hateful Memes", "ROC AUC"),
    DataSet("RenderedSST2", "Rendered SST2"),
    DataSet("ImageNet", "ImageNet"),
]


def read_figures(name: str) -> dict[str, dict[str, str]]:
    """Read `figures/NAME.csv` as a dictionary from each model to its cells by column."""
    with open(FOLDER / f"{name}.csv", encoding="utf-8", newline="") as file:
        return {row.pop("variant"): row for row in csv.DictReader(file)}


ZERO_SHOT = read_figures("paper_zero_shot")
LINEAR_PROBE = read_figures("paper_linear_probe")
OPEN_CLIP = read_figures("openclip_measured")
PRETRAINING = read_figures("pretraining")
PARITY = read_figures("parity")
