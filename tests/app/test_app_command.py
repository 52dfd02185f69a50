"""`hf-clip app`: what it refuses, each in one line and before a page is served."""

import shutil
import sys
from pathlib import Path

import pytest

from hf_clip.app.page_model import PageModel
from hf_clip.commands import program


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """Runs the command and returns what it says."""

    def run(*words: object) -> str:
        assert program.main(["app", *map(str, words), "--port", "0"]) == 1
        found = capsys.readouterr()
        assert found.out == ""
        assert found.err.count("\n") == 1
        return found.err

    return run


def test_index_of_another_model(digits: Path, page_files: Path, refused):
    said = refused(digits / "resnet", "--index", page_files / "index")
    assert f"error: The index {page_files / 'index'} was made of another model ({digits / 'vit'}) than " in said


def test_no_index_there(digits: Path, tmp_path: Path, refused):
    assert refused(digits / "vit", "--index", tmp_path / "none") == (
        f"error: There is no index at {tmp_path / 'none'}: make one with `hf-clip index FOLDER --model MODEL`, or name "
        f"another with --index.\n"
    )


def test_model_without_an_image_processor(digits: Path, tmp_path: Path, refused):
    folder = tmp_path / "model"
    shutil.copytree(digits / "vit", folder, ignore=shutil.ignore_patterns("*processor*"))
    assert refused(folder) == (
        f"error: {folder} has no image processor (processor_config.json or preprocessor_config.json); save the model's "
        f"processor there: processor.save_pretrained({str(folder)!r}).\n"
    )


def test_no_model_there(tmp_path: Path, refused):
    assert str(tmp_path / "none") in refused(tmp_path / "none")


def test_gradio_is_missing(digits: Path, refused, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert refused(digits / "vit") == (
        'error: The page needs gradio, which this Python does not have: pip install "hf-clip[app]"\n'
    )


def test_processor_without_texts(page: PageModel):
    with pytest.raises(ValueError, match="^A page needs a processor of images and texts, and small has only a "):
        PageModel(page.model, page.processor.image_processor, "small")


def test_examples_are_captions_of_the_index(page: PageModel, digits: Path, tmp_path: Path):
    from hf_clip.search.image_index import ImageIndex

    assert page.examples() == []
    index = ImageIndex.open(tmp_path / "index", model=page.model, processor=page.processor)
    index.add_data_set(str(digits / "pairs"), split="held_out_images")
    found = PageModel(page.model, page.processor, "small", index).examples()
    assert len(found) == 3
    assert all(" paper" in caption for caption in found)
