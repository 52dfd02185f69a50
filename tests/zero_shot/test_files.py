"""Many images in order: what is found, what is opened ahead, and what becomes of errors."""

import os
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import pytest
from PIL import Image

from hf_clip import HfClipModel, HfClipProcessor, UnreadableImageError, ZeroShotClassifier
from hf_clip.zero_shot.files import classify_stream, find_images, is_image_name


@pytest.fixture(scope="module")
def classifier(repositories: dict[str, Path]) -> ZeroShotClassifier:
    model = HfClipModel.from_pretrained(repositories["vit"]).eval()
    processor = HfClipProcessor.from_pretrained(repositories["vit"])
    return ZeroShotClassifier(model, processor, ["a cat", "a cup"], progress=False)


def grey(level: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (level, level, 255 - level))


def test_an_endless_stream_is_read_as_it_is_needed(classifier: ZeroShotClassifier):
    begun = []

    def stream() -> Iterator[tuple[str, Image.Image]]:
        for number in count():
            begun.append(number)
            yield str(number), grey(number % 256)

    results = classify_stream(classifier, stream(), batch_size=4, threads=3, opener=lambda image: image)
    assert [result.name for result in islice(results, 10)] == [str(number) for number in range(10)]
    results.close()  # type: ignore[attr-defined]
    assert len(begun) <= 12 + 2 * 4 + 3


def test_results_come_in_the_order_of_the_images_and_not_of_their_opening(classifier: ZeroShotClassifier):
    def opener(number: int) -> Image.Image:
        time.sleep(0.02 * (number % 3 == 0))
        if number == 4:
            raise UnreadableImageError(": there is no file 'x'; check the path.")
        if number == 5:
            raise ValueError("something else.")
        return grey(40 * number)

    items = [(str(number), number) for number in range(7)]
    results = list(classify_stream(classifier, items, top_k=1, batch_size=3, threads=4, opener=opener))
    assert [result.name for result in results] == [name for name, _ in items]
    assert [result.error for result in results][4:6] == ["there is no file 'x'; check the path", "something else"]
    good = [grey(40 * number) for number in (0, 1, 2, 3, 6)]
    found = [result.labels for result in results if result.error is None]
    for (label,), (expected,) in zip(found, classifier.classify(good, top_k=1), strict=True):
        assert label["label"] == expected["label"]
        assert label["score"] == pytest.approx(expected["score"], abs=1e-6)


def test_what_is_no_fault_of_an_image_ends_the_stream(classifier: ZeroShotClassifier):
    def opener(item: object) -> Image.Image:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(classify_stream(classifier, [("0", 0)], opener=opener))


def test_folders_are_searched_and_what_is_named_is_taken(tmp_path: Path):
    for name in ("b/2.PNG", "b/10.jpeg", "a.webp", "notes.txt", ".hidden/x.png", "b/.x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "b" / "again").symlink_to(tmp_path, target_is_directory=True)
    inside = [str(tmp_path / name) for name in ("a.webp", "b/10.jpeg", "b/2.PNG")]
    others = ["https://example.org/x", str(tmp_path / "notes.txt"), "nowhere.png"]
    assert find_images([others[0], tmp_path, *others[1:]]) == [others[0], *inside, *others[1:]]
    with pytest.raises(FileNotFoundError, match="has no images: no file in it, or in its folders, is named as one"):
        find_images([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("name", "is_image"), [("x.JPG", True), ("x.tif", True), ("x.eps", False), ("x.pdf", False), ("jpg", False)]
)
def test_images_are_told_by_their_names(name: str, is_image: bool):
    assert is_image_name(name) is is_image


def test_pipe_named_as_an_image_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    (tmp_path / "nowhere.png").symlink_to("none.png")
    grey(1).save(tmp_path / "image.png")
    assert find_images([tmp_path]) == [str(tmp_path / name) for name in ("image.png", "nowhere.png")]


def test_folder_that_may_not_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "locked").mkdir()
    grey(1).save(tmp_path / "image.png")
    scan = os.scandir

    def refuse(place: str) -> object:
        if str(place).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(place))
        return scan(place)

    monkeypatch.setattr(os, "scandir", refuse)
    assert find_images([tmp_path]) == [str(tmp_path / "image.png"), str(tmp_path / "locked")]
    with pytest.raises(PermissionError):
        find_images([tmp_path / "locked"])
