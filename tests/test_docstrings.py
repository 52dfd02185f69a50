"""The reference pages are made of docstrings: every public name has one, and it explains every argument."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedConfig

import hf_clip
from hf_clip.evaluation import metrics
from hf_clip.model.tensor_steps import Steps
from hf_clip.zero_shot import features

from .doc_blocks import ROOT

ALWAYS_EXPLAINED = {
    "encode_image",
    "encode_text",
    "forward",
    "from_merges",
    "from_pretrained",
    "from_variant",
    "from_vocabulary_file",
    "get_image_features",
    "get_text_features",
    "optimize_for_inference",
    "train_from_iterator",
}
"""Methods that need `Args:` of their own even where transformers has a method of that name."""

CLASSES = [getattr(hf_clip, name) for name in hf_clip.__all__ if isinstance(getattr(hf_clip, name), type)]
FUNCTIONS = [getattr(hf_clip, name) for name in hf_clip.__all__ if inspect.isfunction(getattr(hf_clip, name))]
FUNCTIONS += [features.encode_images, features.encode_texts]
FUNCTIONS += [
    value
    for name, value in vars(metrics).items()
    if inspect.isfunction(value) and value.__module__ == metrics.__name__ and not name.startswith("_")
]


def is_ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "hf_clip"


def section(docstring: str | None, title: str) -> str:
    """The indented lines below `title:` in a Google-style docstring."""
    lines = inspect.cleandoc(docstring or "").split("\n")
    if f"{title}:" not in lines:
        return ""
    rest = lines[lines.index(f"{title}:") + 1 :]
    end = next((index for index, line in enumerate(rest) if line and not line.startswith(" ")), len(rest))
    return "\n".join(rest[:end])


def explained(docstring: str | None, title: str = "Args") -> set[str]:
    return set(re.findall(r"^    \*{0,2}(\w+)(?: \(.*?\))?: +\S", section(docstring, title), flags=re.MULTILINE))


def parameters(function: Callable[..., Any]) -> set[str]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    found = inspect.signature(function).parameters.values()
    return {parameter.name for parameter in found if parameter.kind not in variadic} - {"self", "cls"}


def public_methods(kind: type) -> list[tuple[str, Callable[..., Any], bool]]:
    """Name, function, and whether a class of another library defines the method too."""
    found = {}
    for base in reversed([base for base in kind.__mro__ if is_ours(base)]):
        for name, value in vars(base).items():
            function = getattr(value, "__func__", value)
            if inspect.isfunction(function) and not name.startswith("_"):
                found[name] = function
    foreign = [base for base in kind.__mro__ if not is_ours(base)]
    return [(name, function, any(name in vars(base) for base in foreign)) for name, function in sorted(found.items())]


DIRECTIVE = re.compile(
    r"^\.\. auto(?P<kind>function|class|exception|module):: (?P<path>\S+)(?P<rest>(?:\n +:.*)*)", re.M
)


def named(path: str) -> Any:
    """The object of a dotted path, whose first parts are a module."""
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if not ".".join(parts[:count]).startswith(str(error.name)):
                raise
        else:
            for part in parts[count:]:
                found = inspect.getattr_static(found, part)
            return found
    raise ModuleNotFoundError(path)


def shown_on(page: Path) -> Iterator[str]:
    """Paths of the functions, classes and methods of which a page of the reference is made."""
    for found in DIRECTIVE.finditer(page.read_text(encoding="utf-8")):
        path, members = found["path"], re.search(r":members:(.*)", found["rest"])
        if found["kind"] != "module":
            yield path
        if members and members[1].strip():
            yield from (f"{path}.{name.strip()}" for name in members[1].split(","))
        elif members:
            own = vars(named(path)).items()
            yield from (f"{path}.{name}" for name, value in own if name[0] != "_" and is_public(value, path))


def is_public(value: Any, path: str) -> bool:
    function = getattr(value, "__func__", value)
    is_code = inspect.isfunction(function) or inspect.isclass(function)
    return is_code and path in (function.__module__, f"{function.__module__}.{function.__qualname__.partition('.')[0]}")


REFERENCE = sorted((ROOT / "docs" / "reference").glob("*.md"))


def test_sections_are_read_as_written():
    docstring = """Do it.

    Args:
        first: One
            word: not an argument.
        second (int): Two.
        *more: Others.
        empty:

    Returns:
        third: No argument.
    """
    assert explained(docstring) == {"first", "second", "more"}
    assert explained("No sections.") == set()


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_function_explains_its_arguments(function: Callable[..., Any]):
    assert function.__doc__
    assert parameters(function) <= explained(function.__doc__)
    assert section(function.__doc__, "Returns")


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_methods_explain_their_arguments(kind: type):
    for name, function, is_foreign in public_methods(kind):
        assert inspect.getdoc(getattr(kind, name)), name
        if name in ALWAYS_EXPLAINED or not is_foreign:
            assert function.__doc__, name
            assert parameters(function) <= explained(function.__doc__), name


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_class_explains_what_it_is_made_of(kind: type):
    assert vars(kind).get("__doc__")
    if issubclass(kind, PreTrainedConfig):
        fields = {name for name in vars(kind)["__annotations__"] if "ClassVar" not in str(kind.__annotations__[name])}
        assert fields <= explained(kind.__doc__)
    elif dataclasses.is_dataclass(kind):
        assert {field.name for field in dataclasses.fields(kind)} <= explained(kind.__doc__, "Attributes")
    elif issubclass(kind, Exception):
        attributes = explained(kind.__doc__, "Attributes")
        assert attributes
        assert parameters(kind.__init__) - {"message"} <= attributes
    elif is_ours(kind) and "__init__" in vars(kind):
        assert parameters(kind.__init__) <= explained(kind.__doc__)


def unexplained(found: Any) -> set[str]:
    """Arguments, attributes and the result that a docstring leaves out."""
    found = getattr(found, "__func__", found)
    doc = found.__doc__
    if not inspect.isclass(found):
        result = inspect.signature(found).return_annotation
        has_result = result in (None, "None") or section(doc, "Returns") or section(doc, "Yields")
        return parameters(found) - explained(doc) | (set() if has_result else {"Returns"})
    fields = {field.name for field in dataclasses.fields(found)} if dataclasses.is_dataclass(found) else set()
    fields |= set(getattr(found, "model_fields", ()))  # pydantic's
    if fields:
        return fields - explained(doc, "Attributes")
    return parameters(found.__init__) - explained(doc) if "__init__" in vars(found) else set()


def test_pages_of_the_reference_are_read():
    shown = {path for page in REFERENCE for path in shown_on(page)}
    assert "hf_clip.HfClipModel.encode_image" in shown
    assert "hf_clip.evaluation.metrics.recall_at_k" in shown
    assert "hf_clip.zero_shot.embedding_head.EmbeddingHead.score" in shown


@pytest.mark.parametrize("page", REFERENCE, ids=lambda page: page.stem)
def test_what_the_reference_shows_is_explained(page: Path):
    for path in shown_on(page):
        found = named(path)
        assert inspect.getdoc(getattr(found, "__func__", found)), path
        if not (inspect.isclass(found) and issubclass(found, (PreTrainedConfig, Exception))):  # see above
            assert not unexplained(found), path


def test_image_processor_explains_its_settings():
    settings = {*Steps.__dataclass_fields__, "backend", "num_threads", "draft"}
    assert settings <= explained(hf_clip.HfClipImageProcessor.__doc__)
