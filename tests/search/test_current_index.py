"""An index that is open for long, while others remove it and make it anew."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_clip.search.current_index import CurrentIndex

from .conftest import make_image


def test_index_that_is_made_anew_while_it_is_opened(
    tmp_path: Path, photos: Path, new_index: Callable[..., Any], small_model: tuple[Any, Any, str]
):
    """Between opening the tables and the first search, a server loads a model for seconds."""
    new_index().add(photos)
    opened = new_index()
    shutil.rmtree(tmp_path / "index")
    other = tmp_path / "other"
    other.mkdir()
    make_image(50).save(other / "new.png")
    new_index().add(other)
    current = CurrentIndex(opened)
    assert [Path(found.path).name for found in current.get().search("three", top=9)] == ["new.png"]
    assert current.get() is current.get(), "it is not opened at each search"
    assert current.get() is not opened
