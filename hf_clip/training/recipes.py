"""Recipes: files of options that come with the package, and that a command line names without a path.

They lie in `recipes/` of a checkout. The wheel has them in `hf_clip/recipes/`.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = (PACKAGE / "recipes", PACKAGE.parent / "recipes")
"""Where they lie: in an installed package, in a checkout. Beside an installed package lie other packages' folders."""

ENDING = ".yaml"

PLACEHOLDERS = {"replay": ("OLD_PAIRS", "old/pairs=0.5"), "teacher": ("TEACHER", "clip-vit-b32/")}
"""Option → what stands in a recipe where only the user knows the value, and an example of one."""


def recipe_folder() -> Path:
    """The folder with the recipes."""
    return next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[0])


def recipe_names() -> list[str]:
    """The recipes that there are, in alphabetical order."""
    return sorted(path.stem for path in recipe_folder().glob(f"*{ENDING}"))


def find_recipe(name: str, otherwise: str = "") -> Path:
    """Find the file of a recipe.

    Args:
        name: Its name, `lit`.
        otherwise: What else the word may have meant, said where there is no such recipe and none of a similar name.

    Returns:
        The path of its file.

    Raises:
        ValueError: There is no such recipe.
    """
    names = recipe_names()
    if name in names:
        return recipe_folder() / f"{name}{ENDING}"
    near = get_close_matches(name, names, n=1)
    said = f" Did you mean {near[0]!r}?" if near else otherwise
    raise ValueError(
        f"There is no recipe {name!r}; there are {', '.join(names)}. A file of your own ends in .yaml, .yml or .json."
        f"{said}"
    )


def check_filled(name: str, values: Mapping[str, Any]) -> None:
    """Refuse a recipe in which something is still to be filled in.

    Args:
        name: Of the recipe.
        values: All options by name, with those of the command line.

    Raises:
        ValueError: A value is still the recipe's placeholder.
    """
    for option, (placeholder, example) in PLACEHOLDERS.items():
        if str(values[option]).partition("=")[0] == placeholder:
            raise ValueError(f"The recipe {name} leaves --{option} to you: name it, as in --{option} {example}.")
