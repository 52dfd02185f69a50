"""A page computes in one thread, whichever of Gradio's threads asks."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.nn.modules.module import register_module_forward_pre_hook

from hf_clip.app import page_model
from hf_clip.app.page_labels import label_images
from hf_clip.app.page_layout import Searches, or_problem
from hf_clip.app.page_model import PageModel

from .conftest import LABELS


@pytest.fixture
def computing() -> Iterator[set[threading.Thread]]:
    """The threads in which a part of a model computes."""
    found: set[threading.Thread] = set()
    handle = register_module_forward_pre_hook(lambda *given: found.add(threading.current_thread()))
    yield found
    handle.remove()


def test_one_thread_computes_for_all(page: PageModel, page_files: Path, computing: set[threading.Thread]):
    image, searches = str(page_files / "photos" / "photo-1.png"), Searches(page)
    asked = [
        lambda: or_problem(page, lambda: label_images(page, [image], "\n".join(LABELS), "{}")),
        lambda: searches.run("a red one", None, "", 5, 0, True),
        lambda: searches.run("", image, "", 5, 0, True),
    ]
    for ask in asked:
        with ThreadPoolExecutor(1) as asking:
            assert 'class="problem"' not in str(asking.submit(ask).result())
    assert computing == {page.computing.run(threading.current_thread)}


def test_thread_that_loads_is_the_one_that_computes(digits: Path, page_files: Path, monkeypatch: pytest.MonkeyPatch):
    loading = []
    copy = page_model.copy_to_memory
    monkeypatch.setattr(
        page_model, "copy_to_memory", lambda model: loading.append(threading.current_thread()) or copy(model)
    )
    for index in (None, str(page_files / "index")):
        page = PageModel.load(str(digits / "vit"), index)
        assert loading.pop() is page.computing.run(threading.current_thread)
