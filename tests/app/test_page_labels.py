"""Labels, templates and uploads of a page: what is read, and what is refused in one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_clip import ZeroShotClassifier
from hf_clip.app import page_labels
from hf_clip.app.page_labels import chosen_templates, label_images, open_upload, small_copy, split_labels
from hf_clip.app.page_markup import label_cards
from hf_clip.app.page_model import CLASSIFIERS_KEPT, PageError, PageModel

from ..search.conftest import make_image
from .conftest import LABELS


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("a cat\n\n a dog \n", ["a cat", "a dog"]),
        ("a cat, a dog,", ["a cat", "a dog"]),
        ("a cat, black\na dog", ["a cat, black", "a dog"]),
        ("a cat\na cat\na dog", ["a cat", "a dog"]),
        ("\ufeffa cat\n\u200b\na dog", ["a cat", "a dog"]),
    ],
)
def test_labels_stand_on_lines_or_between_commas(text: str, labels: list[str]):
    assert split_labels(text) == labels


def test_labels_that_are_files_are_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "labels.txt").write_text("secret\n")
    monkeypatch.chdir(tmp_path)
    assert split_labels("labels.txt") == ["labels.txt"]
    with pytest.raises(PageError, match="needs {} once"):
        chosen_templates("own", "labels.txt")


def test_template_choices():
    assert chosen_templates("simple") == ["a photo of a {}."]
    assert len(chosen_templates("imagenet_80")) == 80
    assert chosen_templates("{}") == ["{}"]
    assert chosen_templates("own", "a drawing of a {}.\n\na {} here\n") == ["a drawing of a {}.", "a {} here"]


@pytest.mark.parametrize(
    ("labels", "choice", "own", "said"),
    [
        ("", "simple", "", "There are no labels: write some, one on each line or with commas between them."),
        (" ,, ", "simple", "", "There are no labels: write some, one on each line or with commas between them."),
        (
            ",".join(map(str, range(1001))),
            "simple",
            "",
            "There are 1,001 labels, and the page takes 1,000: give fewer, or use `hf-clip classify`, which takes any "
            "number.",
        ),
        ("a" * 100_001, "simple", "", "The labels have 100,001 letters, and the page takes 100,000: give fewer."),
        ("cat", "own", " \n", "There are no templates: write one on each line, such as: a drawing of a {}."),
        (
            "cat",
            "own",
            "a {:>999999999}",
            "The template 'a {:>999999999}' needs {} once, where the label belongs, and no other braces.",
        ),
        (
            "cat",
            "own",
            "{} and {}",
            "The template '{} and {}' needs {} once, where the label belongs, and no other braces.",
        ),
        ("cat", "own", "{}\n" * 101, "There are 101 templates, and the page takes 100: give fewer."),
    ],
)
def test_what_cannot_be_used_is_said(page: PageModel, page_files: Path, labels: str, choice: str, own: str, said: str):
    with pytest.raises(PageError) as error:
        label_images(page, [str(page_files / "photos" / "photo-0.png")], labels, choice, own)
    assert str(error.value) == said


def test_images_that_cannot_be_used(page: PageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(PageError, match="^There is no image: drop one, or choose a file.$"):
        label_images(page, None, "cat")
    with pytest.raises(PageError, match="^There are 33 images, and the page takes 32 at once: give fewer, or use "):
        label_images(page, ["x"] * 33, "cat")
    (tmp_path / "notes.png").write_text("no image")
    with pytest.raises(PageError, match="^notes.png cannot be opened: it is damaged, or no image. Choose another.$"):
        open_upload(str(tmp_path / "notes.png"))
    make_image(0).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    with pytest.raises(PageError, match="^cut.png cannot be opened"):
        open_upload(str(tmp_path / "cut.png"))
    Image.new("1", (15_000, 12_000)).save(tmp_path / "bomb.png")
    with pytest.raises(PageError, match="^bomb.png has more than the 64 million pixels that the page takes: scale it "):
        open_upload(str(tmp_path / "bomb.png"))
    monkeypatch.setattr(page_labels, "MOST_PIXELS", 1_000_000)
    Image.new("1", (2000, 1000)).save(tmp_path / "large.png")
    with pytest.raises(PageError, match="^large.png has 2 million pixels, and the page takes 1: scale it down.$"):
        open_upload(str(tmp_path / "large.png"))


def test_scores_are_those_of_the_classifier(page: PageModel, page_files: Path):
    paths = [str(page_files / "photos" / f"photo-{seed}.png") for seed in range(2)]
    found = label_images(page, paths, "\n".join(LABELS), "{}", with_none=False)
    classifier = ZeroShotClassifier(page.model, page.processor, LABELS, "{}", progress=False)
    expected = [[(entry["label"], entry["score"]) for entry in ranked] for ranked in classifier.classify(paths)]
    assert [image.name for image in found] == ["photo-0.png", "photo-1.png"]
    for image, scores in zip(found, expected, strict=True):
        assert [label for label, _ in image.scores] == [label for label, _ in scores]
        assert [score for _, score in image.scores] == pytest.approx([score for _, score in scores], abs=1e-5)


def test_a_broken_upload_does_not_stop_the_others(page: PageModel, page_files: Path, tmp_path: Path):
    (tmp_path / "<b>.png").write_text("no image")
    paths = [str(page_files / "photos" / "photo-0.png"), str(tmp_path / "<b>.png")]
    paths.append(str(page_files / "photos" / "photo-1.png"))
    found = label_images(page, paths, "\n".join(LABELS), "{}")
    line = "<b>.png cannot be opened: it is damaged, or no image. Choose another."
    assert [(image.name, bool(image.scores), image.problem) for image in found] == [
        *(("photo-0.png", True, None), ("<b>.png", False, line), ("photo-1.png", True, None))
    ]
    shown = label_cards(found, 0.0)
    assert shown.count('<article class="card">') == 3
    assert shown.count('<ul class="bars">') == 2
    assert f'<p class="problem" role="alert">{line.replace("<b>", "&lt;b&gt;")}</p>' in shown
    with pytest.raises(PageError, match="^<b>.png cannot be opened"):
        label_images(page, paths[1:2], "\n".join(LABELS))


def test_an_image_may_show_none_of_the_labels(page: PageModel, page_files: Path):
    found = label_images(page, [str(page_files / "photos" / "photo-0.png")], "thing, cat", "{}")[0]
    assert {label for label, _ in found.scores} == {"thing", "cat", None}  # a label is no background of itself
    assert sum(score for _, score in found.scores) == pytest.approx(1, abs=1e-4)


def test_labels_are_encoded_once(page: PageModel, monkeypatch: pytest.MonkeyPatch):
    first = page.classifier(["one", "two"], ["{}"], ())
    made: list[Any] = []
    monkeypatch.setattr(page.model, "forward", lambda **given: made.append(given))
    assert page.classifier(["one", "two"], ["{}"], ()) is first
    assert made == []


def test_old_labels_are_forgotten(page: PageModel):
    first = page.classifier(["first"], ["{}"], ())
    for number in range(CLASSIFIERS_KEPT):
        page.classifier([f"label {number}"], ["{}"], ())
    assert page.classifier(["first"], ["{}"], ()) is not first


def test_copies_to_show():
    image = Image.new("RGB", (2000, 1000), "red")
    assert small_copy(image).startswith(b"\xff\xd8")
    tiny = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    assert small_copy(tiny).startswith(b"\x89PNG")
    assert small_copy(Image.new("LA", (500, 500))).startswith(b"\x89PNG")
