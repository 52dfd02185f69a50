"""What holds for every test of this folder, which all come from transformers' own test mixins.

`inapplicable` of a test class names the tests that cannot hold here, with the reason. They run all the same, and must
fail: one that passes, is skipped or doesn't exist any more is a stale entry, which fails. `inapplicable_in` does so for
one version, by its number.
"""

import unittest
from collections.abc import Iterator
from contextlib import nullcontext
from fnmatch import fnmatch
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

FOREIGN_MARKS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "generate",
    "torch_compile_test",
    "torch_export_test",
)

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"

LISTED = pytest.StashKey[str]()


def listed(cls: type | None) -> dict[str, str]:
    """The tests of a class that cannot hold in this version, with the reasons."""
    minor = ".".join(transformers.__version__.split(".")[:2])
    return getattr(cls, "inapplicable", {}) | getattr(cls, "inapplicable_in", {}).get(minor, {})


def pytest_configure(config: pytest.Config) -> None:
    for mark in FOREIGN_MARKS:
        config.addinivalue_line("markers", f"{mark}: transformers' own")


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """Everything here is slow, and collecting it already takes transformers' tests, from the index at first."""
    return True if config.getoption("markexpr") == "not slow" else None


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.slow)
    # Warnings are errors in our own tests, whose code we can change; these ones warn on purpose and by chance.
    item.add_marker(pytest.mark.filterwarnings("default"))
    for pattern, reason in listed(item.cls).items():
        if fnmatch(item.name, pattern):
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
            item.stash[LISTED] = reason


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse entries without a test, in the version that is pinned; others have some tests more or less."""
    if f"transformers=={transformers.__version__}\n" not in CONSTRAINTS.read_text():
        return
    for cls in {item.cls for item in items if item.cls is not None}:
        for pattern in listed(cls):
            if not any(fnmatch(name, pattern) for name in dir(cls)):
                raise pytest.UsageError(f"{cls.__name__}.inapplicable names {pattern}, but there is no such test.")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if LISTED in item.stash and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"[listed, but skipped] {item.stash[LISTED]}"
    return report


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are so small that threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def warnings_are_logged() -> Iterator[None]:
    """As by default, since some tests read them."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    yield
    transformers.logging.set_verbosity(verbosity)


@pytest.fixture(autouse=True)
def subtests_fail_what_is_listed(request: pytest.FixtureRequest) -> Iterator[None]:
    """A listed test fails by its first subtest that does, as if it had none."""
    if LISTED not in request.node.stash:
        yield
        return
    with patch.object(unittest.TestCase, "subTest", lambda self, *args, **kwargs: nullcontext()):
        yield


@pytest.fixture(autouse=True)
def names_of_our_models() -> Iterator[None]:
    """The mixins find out by name which models have no loss and which take labels, where registering doesn't reach.

    HfClipModel stays out: it has a loss, and the tests of training pass over what stands among the base models.
    """
    towers = {"hf_clip_text": "HfClipTextModel", "hf_clip_vit": "HfClipViTModel", "hf_clip_resnet": "HfClipResNetModel"}
    heads = {"hf_clip": "HfClipForImageClassification"}
    with (
        patch.dict(MODEL_MAPPING_NAMES, towers),
        patch.dict(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, heads),
    ):
        yield
