"""Prompts of classes, and the matrix that they become: as the paper does, or as a file of prompts says.

1. Each name of a class is put into each template; or the class's own prompts are taken, as CuPL writes them.
2. Each prompt's feature is normalised, those of a class are averaged, and the mean is normalised (Radford et al. 2021,
   section 3.1.4).

Dimensions: K classes, D embedding.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..zero_shot.features import truncated
from ..zero_shot.prompts import DEFAULT_TEMPLATE, make_prompts, read_template_file, read_templates
from ..zero_shot.text_batches import in_batches
from .embedder import Embedder

AT_ONCE = 4096
"""Number of prompts whose features are in memory together."""


@dataclass(frozen=True)
class ClassPrompts:
    """The prompts of each of K classes, and how they came about, for a result."""

    prompts: list[list[str]]
    described: str


def _own_prompts(labels: Sequence[str], given: Mapping[str, Any], source: str) -> list[list[str]]:
    missing = [label for label in labels if label not in given]
    if missing:
        raise ValueError(
            f"{source} has no prompts for {len(missing)} of {len(labels)} classes, the first is {missing[0]!r}: a list "
            f"for each class's name is needed."
        )
    found = []
    for label in labels:
        prompts = [given[label]] if isinstance(given[label], str) else given[label]
        if (
            not isinstance(prompts, Sequence)
            or not prompts
            or not all(isinstance(p, str) and p.strip() for p in prompts)
        ):
            raise ValueError(f"{source}: the prompts of {label!r} are {prompts!r:.80}, but a list of texts is needed.")
        found.append(list(prompts))
    return found


def _with_braces(templates: Any) -> Any:
    """Write `{}` for the `{c}` of CLIP_benchmark's templates."""
    if isinstance(templates, str):
        return templates.replace("{c}", "{}")
    if isinstance(templates, (list, tuple)):
        return [_with_braces(template) for template in templates]
    return templates


def _read_file(path: str) -> Any:
    """Return a file's templates, or its mapping from classes to prompts."""
    if not path.endswith(".json"):
        text = Path(path).read_text(encoding="utf-8-sig")
        if "{c}" not in text:
            return read_template_file(path)
        return [_with_braces(line) for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"The prompts {path!r} cannot be read as JSON ({error}).") from error
    if not isinstance(found, (list, dict)):
        raise ValueError(
            f"{path} holds a {type(found).__name__}, but a list of templates, or prompts by class, is needed."
        )
    return _with_braces(found)


def class_prompts(class_names: list[list[str]], templates: Any = None, own: list[str] | None = None) -> ClassPrompts:
    """Make the prompts of classes.

    Args:
        class_names: For each class its names.
        templates: A template with `{}` or `{c}`; a list of these, or of functions; the name of a set; the path of a
            file with one template a line; or prompts for each class: a mapping from its name to texts, or a JSON file
            of one, such as CuPL's. None: `own`, else "a photo of a {}."
        own: Templates that came with the data.

    Returns:
        The prompts.

    Raises:
        ValueError: A template has no placeholder, or a class has no prompts.
    """
    labels = [names[0] for names in class_names]
    source = "templates"
    if isinstance(templates, (str, Path)) and "{" not in str(templates) and Path(templates).is_file():
        source = str(templates)
        templates = _read_file(source)
    if isinstance(templates, Mapping):
        prompts = _own_prompts(labels, templates, source)
        return ClassPrompts(prompts, f"{sum(map(len, prompts))} prompts of {len(prompts)} classes, averaged")
    given = templates if templates is not None else own or DEFAULT_TEMPLATE
    origin = " of the data set" if own is not None and given == own else ""
    functions, texts = read_templates(_with_braces(given))
    prompts = [list(make_prompts(names, functions)) for names in class_names]
    count = len(functions)
    described = f"{count} templates{origin}, averaged" if count > 1 else f"1 template{origin}"
    if count == 1 and texts:
        described += f" {texts[0]!r}"
    return ClassPrompts(prompts, described)


def class_matrix(embedder: Embedder, prompts: ClassPrompts) -> Tensor:
    """Encode the prompts of K classes → (D, K), float32, with columns of length one. Raises as `class_matrices`."""
    (matrix,) = class_matrices(embedder, prompts, [None])
    return matrix


def class_matrices(embedder: Embedder, prompts: ClassPrompts, widths: Sequence[int | None]) -> list[Tensor]:
    """Encode the prompts of K classes once, for several widths.

    Args:
        embedder: The model.
        prompts: The prompts.
        widths: How many of a feature's first numbers are taken, before it is normalised. None: all.

    Returns:
        For each width (width, K), float32, with columns of length one.

    Raises:
        TextTooLongError: A prompt is too long.
        NotFiniteFeaturesError: A feature holds NaN.
    """
    sums: list[Tensor] = []
    items = ((place, prompt) for place, texts in enumerate(prompts.prompts) for prompt in texts)
    for batch in in_batches(items, AT_ONCE):
        features = embedder.texts([prompt for _, prompt in batch])
        places, narrow = torch.tensor([place for place, _ in batch]), [truncated(features, width) for width in widths]
        sums = sums or [torch.zeros(len(prompts.prompts), each.shape[1]) for each in narrow]
        for total, each in zip(sums, narrow, strict=True):
            total.index_add_(0, places, each)
    return [normalize(total, dim=-1).T.contiguous() for total in sums]
