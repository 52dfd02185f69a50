"""Resizing with hf-processors-rs: what it is asked for, that it is asked only where it is exact, and that its bits are
Pillow's. Where the package is not installed, one that resizes with Pillow stands in for it.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.dynamic_module_utils import get_imports

from hf_clip import HfClipImageProcessor
from hf_clip.model import rust_resize
from hf_clip.model.resize import Layout, cut_centre, scale_and_cut, shorter_side_to
from hf_clip.model.rust_resize import PACKAGE, ThreadsOfParent, scale_and_cut_in_rust


class StandIn:
    """What `AutoImageProcessor.from_dict` returns: it resizes with Pillow, and cuts as transformers does."""

    calls = 0

    def __init__(self, settings: dict, backend: str):
        assert backend == "pil"
        assert not any(settings[name] for name in ("do_rescale", "do_normalize", "do_convert_rgb"))
        self.settings = settings

    def __call__(self, pixels: np.ndarray, num_threads: int, input_data_format: str) -> np.ndarray:
        type(self).calls += 1
        assert input_data_format == "channels_last"
        image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])
        side = self.settings["size"].get("shortest_edge")
        size = (
            shorter_side_to(image.size, side) if side else tuple(self.settings["size"][n] for n in ("width", "height"))
        )
        levels = np.asarray(image.resize(size, self.settings["resample"])).reshape(size[1], size[0], -1)
        if self.settings["do_center_crop"]:
            height, width = (self.settings["crop_size"][name] for name in ("height", "width"))
            top, left = (size[1] - height) // 2, (size[0] - width) // 2
            levels = levels[top : top + height, left : left + width]
        return np.ascontiguousarray(levels.transpose(2, 0, 1)[None], dtype=np.float32)


class OneBitOff(StandIn):
    def __call__(self, *given: object, **settings: object) -> np.ndarray:
        levels = super().__call__(*given, **settings)
        levels[0, 0, -1, -1] += 1
        return levels


def forget() -> None:
    for cached in (rust_resize.is_exact, rust_resize._processor):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Each test asks anew whether the package is there."""
    forget()
    yield
    forget()


def install(monkeypatch: pytest.MonkeyPatch, processor: type[StandIn]) -> None:
    module = ModuleType(PACKAGE)
    module.AutoImageProcessor = SimpleNamespace(from_dict=processor)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, PACKAGE, module)
    monkeypatch.setattr(rust_resize, "ThreadsOfParent", SimpleNamespace(are_lost=False))
    monkeypatch.setattr(StandIn, "calls", 0)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, StandIn)


def noise(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    levels = np.random.default_rng(0).integers(-100, 356, (size[1], size[0], 3)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(levels).convert(mode)


def square(image: Image.Image, side: int) -> Layout:
    new_size = shorter_side_to(image.size, side)
    return Layout(new_size, cut_centre(new_size, (side, side)))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("resample", [2, 3])
def test_every_offset_of_the_crop_is_that_of_the_original(stand_in: None, mode: str, resample: int):
    """Margins of an odd number of pixels are halved otherwise by the package, which is then told not to cut."""
    odd = 0
    for width in range(64, 96):
        image = noise((width, 64), mode)
        layout = square(image, 32)
        found = scale_and_cut_in_rust(image, layout, resample)
        expected = np.asarray(scale_and_cut(image, layout, resample)).reshape(32, 32, -1).transpose(2, 0, 1)
        assert found is not None
        assert np.array_equal(found, expected)
        odd += layout.box[0] != (layout.size[0] - 32) // 2
    assert odd


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_processor_uses_it_and_has_the_same_pixels(monkeypatch: pytest.MonkeyPatch, mode: str):
    images = [noise((300, 240), mode), noise((229, 301), mode), noise((100, 80), mode)]
    expected = HfClipImageProcessor()(images, return_tensors="pt").pixel_values
    forget()
    install(monkeypatch, StandIn)
    assert rust_resize.is_exact()
    before = StandIn.calls
    for threads in (1, 2):
        found = HfClipImageProcessor()(images, num_threads=threads, return_tensors="pt").pixel_values
        assert torch.equal(found, expected)
    assert torch.equal(HfClipImageProcessor()(images[0], return_tensors="pt").pixel_values[0], expected[0])
    assert StandIn.calls - before == 7
    for settings_ in (
        {"fit": "squash"},
        {"do_normalize": False},
        {"do_convert_rgb": False, "image_mean": 0.5, "image_std": 0.5},
    ):
        with_it = HfClipImageProcessor(**settings_)(images[:2])["pixel_values"]
        with monkeypatch.context() as without:
            without.setattr(rust_resize, "is_exact", lambda: False)
            assert np.array_equal(
                np.stack(with_it), np.stack(HfClipImageProcessor(**settings_)(images[:2])["pixel_values"])
            )


@pytest.mark.parametrize("processor", [OneBitOff, None])
def test_other_bits_and_errors_leave_it_to_pillow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, processor: type[StandIn] | None
):
    install(monkeypatch, processor or (lambda settings, backend: 1 / 0))  # type: ignore[arg-type]
    image = noise((300, 240))
    with caplog.at_level(logging.WARNING, rust_resize.logger.name):
        assert scale_and_cut_in_rust(image, square(image, 224), 3) is None
        assert scale_and_cut_in_rust(image, square(image, 224), 3) is None
    assert len(caplog.records) == 1
    assert "hf-processors-rs is not used, because it does not do what Pillow does here" in caplog.text


def test_what_it_cannot_do_is_left_to_pillow(stand_in: None, monkeypatch: pytest.MonkeyPatch):
    image = noise((300, 240))
    layout = square(image, 224)
    assert scale_and_cut_in_rust(image, layout, 3) is not None
    for mode in ("RGBA", "LA", "P", "1", "CMYK", "HSV", "I", "F"):
        given_image = image.convert("RGBA").convert(mode) if mode == "LA" else image.convert(mode)
        assert scale_and_cut_in_rust(given_image, layout, 3) is None
    for resample in (0, 1, 4, 5):
        assert scale_and_cut_in_rust(image, layout, resample) is None
    tall, wide, small = noise((100, 240)), noise((700, 240)), noise((20, 20))
    with monkeypatch.context() as newer:  # where the order of the passes is another, or unknown
        for order in (True, None):
            newer.setattr(rust_resize, "height_comes_first", lambda *_, order=order: order)
            assert scale_and_cut_in_rust(tall, Layout((50, 120), (0, 0, 50, 120)), 3) is None
    assert scale_and_cut_in_rust(wide, square(wide, 224), 3) is None  # most of it is removed
    assert scale_and_cut_in_rust(small, Layout((10, 10), (-2, -2, 12, 12)), 3) is None  # black margins
    assert scale_and_cut_in_rust(small, Layout((20, 20), (0, 0, 9, 9)), 3) is None  # nothing to resize
    monkeypatch.setattr(rust_resize, "MOST_PIXELS_READ", 1000)
    assert scale_and_cut_in_rust(image, layout, 3) is None


def test_child_of_a_process_that_had_imported_it_uses_pillow(monkeypatch: pytest.MonkeyPatch):
    """Its threads are not in the child, which would wait for them forever."""
    image = noise((300, 240))

    def is_used_in_child() -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads, by Python 3.12
            child = os.fork()
        if child == 0:
            os._exit(int(ThreadsOfParent.are_lost))
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    monkeypatch.delitem(sys.modules, PACKAGE, raising=False)
    assert is_used_in_child()
    install(monkeypatch, StandIn)
    assert not is_used_in_child()
    assert scale_and_cut_in_rust(image, square(image, 224), 3) is not None
    monkeypatch.setattr(rust_resize, "ThreadsOfParent", SimpleNamespace(are_lost=True))
    assert scale_and_cut_in_rust(image, square(image, 224), 3) is None


def test_remote_code_does_not_require_it():
    assert "numpy" in get_imports(rust_resize.__file__)
    assert PACKAGE not in get_imports(rust_resize.__file__)


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(1, 500), st.integers(1, 500)),
    side=st.sampled_from([5, 16, 50, 224]),
    resample=st.sampled_from([2, 3]),
    mode=st.sampled_from(["L", "RGB"]),
    contrast=st.booleans(),
)
def test_package_has_pillows_bits(size, side, resample, mode, contrast):
    pytest.importorskip(PACKAGE)
    if contrast:
        image = Image.fromarray(np.random.default_rng(0).choice([0, 255], (*size[::-1], 3)).astype(np.uint8)).convert(
            mode
        )
    else:
        image = noise(size, mode)
    layout = square(image, side)
    found = scale_and_cut_in_rust(image, layout, resample)
    if found is not None:
        expected = np.asarray(scale_and_cut(image, layout, resample)).reshape(side, side, -1)
        assert np.array_equal(found, expected.transpose(2, 0, 1))


def test_package_is_used_for_photographs(photographs: dict[str, Image.Image]):
    pytest.importorskip(PACKAGE)
    assert rust_resize.is_exact()
    for name in ("chelsea", "coffee", "portrait", "camera", "astronaut"):
        image = photographs[name]
        layout = square(image, 224)
        found = scale_and_cut_in_rust(image, layout, 3)
        expected = np.asarray(scale_and_cut(image, layout, 3)).reshape(224, 224, -1)
        assert found is not None
        assert np.array_equal(found, expected.transpose(2, 0, 1))
