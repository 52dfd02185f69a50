"""Put labels into templates: the text tower reads a prompt, not a bare label (Radford et al. 2021, section 3.1.4).

A template is a text with one `{}`, or a function from a name to a prompt. Several templates form an ensemble, and so do
several names of one label.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..model.checked_files import read_json
from .template_sets import TEMPLATE_SETS

Template = Callable[[str], str]

DEFAULT_TEMPLATE = "a photo of a {}."


class LabelError(ValueError):
    """A label cannot be used.

    Attributes:
        index: Place of the label among the labels. Where labels of images are given: place of the image.
    """

    def __init__(self, message: str, index: int = -1):
        super().__init__(message, index)
        self.index = index

    def __str__(self) -> str:
        return str(self.args[0])


MARK = "\0label\0"
"""Takes the place of a label when a template is checked."""


def as_plain(text: Any) -> Any:
    """Return a text as a plain `str`, e.g. one of NumPy's texts. Anything else is returned as it is."""
    return str.__str__(text) if isinstance(text, str) else text


def format_template(template: str) -> Template:
    """Turn a text with one `{}` into a function from a name to a prompt.

    Raises:
        ValueError: The text has no placeholder, or one of another kind.
    """
    try:
        filled = template.format(MARK)
    except (AttributeError, IndexError, KeyError, ValueError) as error:
        raise ValueError(
            f"The template {template!r} cannot be filled in ({type(error).__name__}: {error}); write {{}} once where "
            f"the label belongs, and other braces twice."
        ) from None
    if MARK not in filled:
        raise ValueError(
            f'The template {template!r} has no placeholder {{}} for the label, e.g. "a photo of a {{}}."; nor is it '
            f"the name of a set ({', '.join(TEMPLATE_SETS)}) or a file."
        )
    return template.format


def read_template_file(path: str | os.PathLike) -> list[str]:
    """Read a file with one template per line. Empty lines and lines that begin with # are skipped."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The templates {str(path)!r} cannot be read ({error}).") from error
    templates = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
    if not templates:
        raise ValueError(f"{path} has no templates; write one per line, each with {{}} where the label belongs.")
    for template in templates:
        try:
            format_template(template)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return templates


def read_templates(templates: Any) -> tuple[list[Template], list[str] | None]:
    """Read templates in any of the forms that `ZeroShotClassifier` takes.

    Args:
        templates: A template, a list of templates, the name of a set in `TEMPLATE_SETS`, or the path of a file.

    Returns:
        The templates as functions from a name to a prompt; and as texts, or None if one of them is a function.

    Raises:
        ValueError: There are no templates, or one of them cannot be used.
    """
    if isinstance(templates, str) and "{" not in templates and templates in TEMPLATE_SETS:
        templates = TEMPLATE_SETS[templates]
    elif isinstance(templates, os.PathLike) or (
        isinstance(templates, str) and "{" not in templates and os.path.isfile(templates)
    ):
        templates = read_template_file(templates)
    elif isinstance(templates, str) or callable(templates):
        templates = [templates]
    if not isinstance(templates, Iterable):
        raise ValueError(f"templates is a {type(templates).__name__}, but texts with {{}} or functions are needed.")
    given = list(map(as_plain, templates))
    if not given:
        raise ValueError('There are no templates; pass at least one, e.g. "a photo of a {}.".')
    for template in given:
        if not (isinstance(template, str) or callable(template)):
            raise ValueError(f"The template {template!r} is no text and no function.")
    functions = [format_template(template) if isinstance(template, str) else template for template in given]
    return functions, given if all(isinstance(template, str) for template in given) else None


def make_prompts(names: Iterable[str], templates: list[Template]) -> Iterator[str]:
    """Put every name into every template: all prompts of the first name, then all of the second, and so on."""
    for name in names:
        for template in templates:
            prompt = template(name)
            if not isinstance(prompt, str):
                raise ValueError(f"A template made {prompt!r} of a label, but a text is needed.")
            yield prompt


def parse_labels(text: str) -> Any:
    """Read labels as they are given in a command line.

    Args:
        text: Labels with commas between them; or the path of a file with a label on each line, or of a JSON file.

    Returns:
        Labels for `read_labels`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read.
    """
    suffix = os.path.splitext(text)[1].lower()
    if suffix == ".json":
        return read_json(text)
    looks_like_path = os.path.isdir(text) or ("," not in text and os.sep in text)
    if suffix != ".txt" and not looks_like_path and not os.path.isfile(text):
        return [label.strip() for label in text.split(",")]
    if not os.path.isfile(text):
        raise FileNotFoundError(f"There is no file {text} of labels; check the path.")
    try:
        lines = Path(text).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The labels {text!r} cannot be read ({error}); save them as text in UTF-8.") from error
    return [line.strip() for line in lines if line.strip()]


def read_labels(labels: Any) -> dict[str, list[str]]:
    """Read labels and their names in any of the forms that `ZeroShotClassifier` takes.

    Args:
        labels: An iterable of labels, such as a list, an array or a column of a data set. Each label is a text, or a
            list of names whose first is the label. Or a mapping from labels to names, or a `datasets.ClassLabel`.

    Returns:
        The names of each label as plain texts, in the order of the labels.

    Raises:
        LabelError: A label is empty, appears twice, or has a name of another label. A ValueError; its `index` is the
            label's place.
        ValueError: There are no labels.
    """
    if hasattr(labels, "names") and not isinstance(labels, Iterable):
        labels = labels.names
    if isinstance(labels, str) or not isinstance(labels, Iterable) or getattr(labels, "ndim", 1) == 0:
        raise ValueError(
            f"labels is {labels!r:.60}, but a list of labels is needed, or a mapping from labels to names."
        )
    pairs = labels.items() if isinstance(labels, Mapping) else [(None, item) for item in labels]
    found: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for place, (label, given) in enumerate(pairs):
        is_one = isinstance(given, (str, Mapping)) or not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0
        names = [as_plain(given)] if is_one else list(map(as_plain, given))
        for name in [*names, *([] if label is None else [label])]:
            if not isinstance(name, str) or not name.strip():
                shown = given if label is None else {label: given}
                raise LabelError(
                    f"Label {place} is {shown!r:.60}, but a text with at least one letter is needed.", place
                )
        if not names:
            raise LabelError(f"Label {place} ({label!r}) has no names; give it at least one.", place)
        label = names[0] if label is None else as_plain(label)
        if label in found:
            twice = f"The label {label!r} appears twice; leave one out, or tell them apart by their names."
            raise LabelError(twice, place)
        for name in names:
            if name in owner:
                twice = f"for both {owner[name]!r} and {label!r}" if owner[name] != label else f"twice for {label!r}"
                raise LabelError(f"The name {name!r} stands {twice}; an image could not be told by it.", place)
            owner[name] = label
        found[label] = names
    if not found:
        raise ValueError("There are no labels; pass at least one.")
    return found
