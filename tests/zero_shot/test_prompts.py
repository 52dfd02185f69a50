"""Labels and templates: what is taken, what they become, and what is refused."""

import enum
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset

from conversion.reference import load_open_clip_module
from hf_clip.zero_shot.prompts import TEMPLATE_SETS, LabelError, make_prompts, read_labels, read_templates


def prompts_of(templates: object, name: str = "cat") -> list[str]:
    return list(make_prompts([name], read_templates(templates)[0]))


def test_templates_in_every_form(tmp_path: Path):
    (tmp_path / "templates.txt").write_text("# drawings\na sketch of a {}\n\n  a cartoon {}  \n", encoding="utf-8")
    assert prompts_of("a photo of a {}.") == ["a photo of a cat."]
    assert prompts_of(["{}", "two {}s"]) == ["cat", "two cats"]
    assert prompts_of(lambda name: name.upper()) == ["CAT"]
    assert prompts_of([str.title, "{}"]) == ["Cat", "cat"]
    for path in (tmp_path / "templates.txt", str(tmp_path / "templates.txt")):
        assert prompts_of(path) == ["a sketch of a cat", "a cartoon cat"]
    assert prompts_of("imagenet_7")[0] == "itap of a cat."
    assert prompts_of("a {{}} of {}", "set {1}") == ["a {} of set {1}"]


def test_sets_have_what_was_published():
    eighty = TEMPLATE_SETS["imagenet_80"]
    assert len(set(eighty)) == len(eighty) == 80
    assert (eighty[0], eighty[-1]) == ("a bad photo of a {}.", "a tattoo of the {}.")
    assert len(TEMPLATE_SETS["imagenet_7"]) == 7
    assert set(TEMPLATE_SETS["imagenet_7"]) < set(eighty)
    cifar = TEMPLATE_SETS["cifar_18"]
    assert len(set(cifar)) == 18
    assert {"a photo of a {}.", "a black and white photo of the {}.", "a photo of the big {}."} <= set(cifar)
    for templates in TEMPLATE_SETS.values():
        for template in templates:
            assert template.count("{}") == 1


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("imagenet_80", "OPENAI_IMAGENET_TEMPLATES"), ("imagenet_7", "SIMPLE_IMAGENET_TEMPLATES")],
)
def test_sets_equal_those_of_open_clip(ours: str, theirs: str):
    module = load_open_clip_module("zero_shot_metadata") or pytest.skip("needs open_clip: pip install --no-deps")
    assert list(TEMPLATE_SETS[ours]) == [template("{}") for template in getattr(module, theirs)]


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ("a photo of", r"'a photo of' has no placeholder \{\} for the label"),
        (["{}", "a photo of a cat"], "'a photo of a cat' has no placeholder"),
        ("imagenet_9", r"has no placeholder .* the name of a set \(simple, imagenet_80, imagenet_7, cifar_18\)"),
        ("a photo of a {label}", r"cannot be filled in \(KeyError: 'label'\)"),
        ("{} and {}", "cannot be filled in"),
        ("a { of {}", "cannot be filled in"),
        ("a {.name}", "cannot be filled in"),
        ("long " * 100, "has no placeholder"),
        ([], "There are no templates"),
        (3, "templates is a int"),
        ([3], "The template 3 is no text and no function"),
        pytest.param(Path("no such file"), "The templates 'no such file' cannot be read", id="missing file"),
    ],
)
def test_bad_templates_are_refused(templates: object, message: str):
    with pytest.raises(ValueError, match=message):
        read_templates(templates)


def test_file_without_templates_is_refused(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    with pytest.raises(ValueError, match="has no templates; write one per line"):
        read_templates(tmp_path / "empty.txt")
    (tmp_path / "bad.txt").write_text("a {}\na photo\n")
    with pytest.raises(ValueError, match="bad.txt: The template 'a photo' has no placeholder"):
        read_templates(tmp_path / "bad.txt")


def test_template_that_makes_no_text_is_refused():
    with pytest.raises(ValueError, match="A template made 3 of a label"):
        list(make_prompts(["cat"], read_templates(lambda name: len(name))[0]))


def test_labels_in_every_form():
    assert read_labels(["cat", "dog"]) == {"cat": ["cat"], "dog": ["dog"]}
    assert read_labels((["cat", "kitten"], "dog")) == {"cat": ["cat", "kitten"], "dog": ["dog"]}
    assert read_labels({"n01": ["cat", "kitten"], "n02": "dog"}) == {"n01": ["cat", "kitten"], "n02": ["dog"]}
    assert read_labels(ClassLabel(names=["cat", "dog"])) == {"cat": ["cat"], "dog": ["dog"]}
    assert read_labels(name for name in "ab") == {"a": ["a"], "b": ["b"]}
    assert read_labels(pd.Index(["a", "b"])) == read_labels(pd.Series(["a", "b"])) == {"a": ["a"], "b": ["b"]}


class Kind(str, enum.Enum):
    CAT = "cat"
    DOG = "dog"


@pytest.mark.parametrize(
    "labels",
    [
        np.array(["cat", "dog"]),
        np.array(["cat", "dog"], dtype=object),
        [np.str_("cat"), np.str_("dog")],
        np.array([["cat"], ["dog"]]),
        {np.str_("cat"): np.str_("cat"), np.str_("dog"): np.array(["dog"])},
        {np.str_("cat"): np.array("cat").item(), "dog": ["dog"]},
        list(Kind),
        Dataset.from_dict({"label": ["cat", "dog"]})["label"],
    ],
    ids=["array", "objects", "scalars", "rows", "mapping", "item", "enumeration", "column"],
)
def test_labels_come_back_as_plain_texts(labels: object):
    found = read_labels(labels)
    assert found == {"cat": ["cat"], "dog": ["dog"]}
    assert {type(text) for label, names in found.items() for text in (label, *names)} == {str}


def test_templates_come_back_as_plain_texts():
    functions, texts = read_templates(np.array(["a {}", "the {}"]))
    assert texts == ["a {}", "the {}"]
    assert {type(text) for text in [*texts, *make_prompts(["cat"], functions)]} == {str}


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("cat", "labels is 'cat', but a list of labels is needed"),
        (7, "labels is 7, but a list"),
        (np.array("cat"), r"labels is array\('cat'.*, but a list"),
        (np.array([1, 2]), r"Label 0 is .*1.*, but a text"),
        ([b"cat"], "Label 0 is b'cat', but a text"),
        ([], "There are no labels"),
        (["cat", ""], "Label 1 is '', but a text with at least one letter"),
        (["cat", "  "], "Label 1 is '  '"),
        (["cat", None], "Label 1 is None"),
        ([["cat"], []], r"Label 1 .* has no names|Label 1 \(None\) has no names"),
        (["cat", "dog", "cat"], "The label 'cat' appears twice"),
        ([["cat", "pet"], ["dog", "pet"]], "The name 'pet' stands for both 'cat' and 'dog'"),
        ([["cat", "cat"]], "The name 'cat' stands twice for 'cat'"),
        ({"": "cat"}, r"Label 0 is \{'': 'cat'\}"),
        ({"id2label": {"0": "cat"}}, r"Label 0 is \{'id2label': \{'0': 'cat'\}\}, but a text"),
        ({0: "cat"}, r"Label 0 is \{0: 'cat'\}, but a text"),
    ],
)
def test_bad_labels_are_refused(labels: object, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        read_labels(labels)
    if isinstance(caught.value, LabelError):
        assert caught.value.index in (0, 1, 2)


@pytest.mark.parametrize(
    ("labels", "index"),
    [(["cat", "dog", ""], 2), ([["cat"], []], 1), (["cat", "dog", "cat"], 2), ([["cat", "pet"], ["dog", "pet"]], 1)],
)
def test_bad_label_is_told_by_its_place(labels: list, index: int):
    with pytest.raises(LabelError) as caught:
        read_labels(labels)
    assert caught.value.index == index
