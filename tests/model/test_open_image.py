"""Opening images: whatever their address, turned upright, and one clear error for what is none."""

import base64
import http.server
import os
import subprocess
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import EpsImagePlugin, Image, ImageOps

from hf_clip import HfClipImageProcessor
from hf_clip.data.columns import UnusableRowError
from hf_clip.data.images import open_content
from hf_clip.model.open_image import RASTER_FORMATS, UnreadableImageError, open_image, open_raster


def as_jpeg(image: Image.Image, orientation: int | None = None, quality: int = 95) -> bytes:
    file, exif = BytesIO(), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    image.save(file, "JPEG", quality=quality, exif=exif)
    return file.getvalue()


@pytest.fixture
def jpeg(photographs: dict[str, Image.Image]) -> bytes:
    """An image that lies on its side and says so."""
    return as_jpeg(photographs["chelsea"], orientation=6)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object, **kwargs: object):
            super().__init__(*args, directory=str(tmp_path), **kwargs)  # type: ignore[misc]

        def log_message(self, *args: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_every_way_to_one_image_gives_the_same_pixels(jpeg: bytes, tmp_path: Path, server: str):
    path = tmp_path / "an image.jpg"
    path.write_bytes(jpeg)
    stored = Dataset.from_dict({"image": [{"bytes": jpeg, "path": None}]}, features=Features({"image": ImageFeature()}))
    undecoded = stored.cast_column("image", ImageFeature(decode=False))[0]["image"]
    expected = ImageOps.exif_transpose(Image.open(BytesIO(jpeg)))
    assert expected.height > expected.width
    sources = [str(path), path, jpeg, bytearray(jpeg), BytesIO(jpeg), undecoded, {"bytes": None, "path": str(path)}]
    sources += ["data:image/jpeg;base64," + base64.b64encode(jpeg).decode(), base64.encodebytes(jpeg).decode()]
    sources += [f"{server}/an%20image.jpg"]
    pixels = HfClipImageProcessor()(expected, return_tensors="pt").pixel_values
    for source in sources:
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(expected))
        if isinstance(source, BytesIO):
            source.seek(0)
        assert torch.equal(HfClipImageProcessor()([source], return_tensors="pt").pixel_values, pixels)
    decoded = stored[0]["image"]  # which datasets has turned
    assert torch.equal(HfClipImageProcessor()(decoded, return_tensors="pt").pixel_values, pixels)
    torch_pixels = HfClipImageProcessor(backend="torch")([jpeg, str(path)], return_tensors="pt").pixel_values
    assert (torch_pixels - pixels).abs().max() < 1.1 / 255 / 0.26


def test_image_that_is_given_is_not_turned(jpeg: bytes):
    given = Image.open(BytesIO(jpeg))
    plain = Image.fromarray(np.asarray(given))
    found, expected = (HfClipImageProcessor()(p, return_tensors="pt").pixel_values for p in (given, plain))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(photographs: dict[str, Image.Image], orientation: int):
    data = as_jpeg(photographs["chelsea"], orientation)
    expected = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    assert np.array_equal(np.asarray(open_image(data)), np.asarray(expected))


def test_damaged_exif_data_turns_nothing(photographs: dict[str, Image.Image]):
    data = bytearray(as_jpeg(photographs["chelsea"], 6))
    place = data.index(b"Exif\0\0") + 6
    data[place : place + 20] = b"\xff" * 20
    assert open_image(bytes(data)).size == photographs["chelsea"].size


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation_gives_its_first_frame(photographs: dict[str, Image.Image], form: str):
    first, second = photographs["chelsea"].resize((60, 40)), photographs["coffee"].resize((60, 40))
    file = BytesIO()
    first.save(file, form, save_all=True, append_images=[second], **({"lossless": True} if form == "WEBP" else {}))
    opened = np.asarray(open_image(file.getvalue()).convert("RGB")).astype(int)
    assert np.abs(opened - np.asarray(first)).mean() < np.abs(opened - np.asarray(second)).mean() / 4


def test_modes_are_kept(tmp_path: Path, photographs: dict[str, Image.Image]):
    for mode in ("L", "P", "RGBA", "1", "LA", "I;16"):
        image = photographs["chelsea"].convert("L" if mode == "I;16" else mode)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image).astype(np.uint16) * 200)
        image.save(tmp_path / "image.png")
        assert open_image(tmp_path / "image.png").mode == mode


def test_bad_images_are_named_by_their_place(jpeg: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    good = Image.new("RGB", (40, 30))
    truncated = jpeg[: len(jpeg) // 2]
    (tmp_path / "notes.jpg").write_text("no image")
    cases: list[tuple[object, str]] = [
        (truncated, r"images\[1\] cannot be opened \(.*truncated"),
        (b"no image at all", r"images\[1\] cannot be opened"),
        (str(tmp_path / "notes.jpg"), r"images\[1\] cannot be opened \('.*', cannot identify"),
        (str(tmp_path / "none.jpg"), r"images\[1\]: there is no file '.*none.jpg'; check the path"),
        ("bücher.jpg", r"images\[1\]: there is no file 'bücher.jpg'; check the path"),
        (tmp_path, r"images\[1\] cannot be opened"),
        ({"bytes": None, "path": None}, r"images\[1\] cannot be opened \(an image's row needs"),
        (Image.new("RGB", (0, 30)), r"images\[1\] has 0x30 pixels"),
        (Image.open(BytesIO(truncated)), r"images\[1\] \(mode RGB, \d+x\d+\) cannot be processed: .*truncated"),
        (good.convert("LA").convert("La"), r"images\[1\] \(mode La, 40x30\) cannot be processed"),
        ("http://127.0.0.1:9/nobody.jpg", r"images\[1\] cannot be opened \('http:.*refused"),
    ]
    for bad, message in cases:
        for threads in (1, 2):
            with pytest.raises(ValueError, match=message):
                HfClipImageProcessor()([good, bad], num_threads=threads)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60_000)
    with pytest.raises(ValueError, match=r"images\[1\] is too large: .* raise PIL.Image.MAX_IMAGE_PIXELS"):
        HfClipImageProcessor()([good, jpeg])


@pytest.mark.parametrize(("form", "at", "damage"), [("DDS", 80, 0), ("BLP", 4, 255)])
def test_decoder_that_does_not_know_what_to_do_is_an_unreadable_image(form: str, at: int, damage: int):
    file = BytesIO()
    Image.new("P" if form == "BLP" else "RGB", (8, 8)).save(file, form)
    data = bytearray(file.getvalue())
    data[at : at + 4] = [damage] * 4
    with pytest.raises(UnreadableImageError, match="the image cannot be opened") as caught:
        open_image(bytes(data))
    assert isinstance(caught.value.__cause__, NotImplementedError)


def test_draft_decodes_less_and_stays_near(photographs: dict[str, Image.Image]):
    large = photographs["astronaut"].resize((2400, 1800), Image.Resampling.LANCZOS)
    data = as_jpeg(large, orientation=6)
    assert min(open_image(data, draft=224).size) == 450
    exact, quick = (HfClipImageProcessor(draft=draft)(data).pixel_values[0] for draft in (False, True))
    assert not np.array_equal(exact, quick)
    assert np.abs(exact - quick).mean() < 0.02
    small = as_jpeg(photographs["astronaut"])  # less than twice as large as needed on its shorter side after a halving
    assert open_image(small, draft=288).size == photographs["astronaut"].size


# --- formats ---------------------------------------------------------------------------------------------------------


def encoded(image: Image.Image, form: str) -> bytes | None:
    """None where Pillow cannot write this mode."""
    file = BytesIO()
    try:
        image.save(file, form)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return file.getvalue()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_every_kind_of_image_file_that_pillow_writes_is_opened(photographs: dict[str, Image.Image]):
    Image.init()
    small, opened = photographs["chelsea"].resize((48, 32)), set()
    for form in sorted(set(Image.SAVE) - {"EPS", "PDF", "PALM"}):  # Pillow opens neither PDF nor PALM
        for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "F"):
            image = small.convert("L").convert(mode) if mode in ("I;16", "F") else small.convert(mode)
            if (data := encoded(image, form)) is None:
                continue
            with Image.open(BytesIO(data)) as expected:
                expected.load()
                assert np.array_equal(np.asarray(open_raster(BytesIO(data)).copy()), np.asarray(expected)), (form, mode)
                opened.add(expected.format)
    assert opened >= {"BMP", "GIF", "ICO", "JPEG", "PCX", "PNG", "PPM", "SGI", "TGA", "TIFF"}


def test_all_formats_but_those_that_are_more_than_pixels_are_opened():
    """A format that a later Pillow brings stands here first: is it pixels, and opened by Pillow alone?"""
    Image.init()
    left_out = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
    assert left_out >= set(Image.ID) - RASTER_FORMATS
    assert not left_out & RASTER_FORMATS


def postscript() -> bytes:
    data = encoded(Image.new("RGB", (64, 48), "red"), "EPS")
    assert data is not None
    return data


def iptc(content: bytes) -> bytes:
    """An IPTC file of 64x48 grey pixels, whose content Pillow opens as an image of its own."""

    def entry(record: int, number: int, data: bytes) -> bytes:
        return bytes([0x1C, record, number]) + len(data).to_bytes(2, "big") + data

    about = [(60, b"\1\0"), (20, (64).to_bytes(2, "big")), (30, (48).to_bytes(2, "big")), (120, b"\x05")]
    start = b"".join(entry(3, number, data) for number, data in about)
    return start + b"".join(entry(8, 10, content[at : at + 8000]) for at in range(0, len(content), 8000))


@pytest.mark.parametrize("kind", ["EPS", "EPS with a preview", "IPTC"])
def test_no_image_file_starts_another_program(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = postscript()
    if kind == "EPS with a preview":
        data = b"\xc5\xd0\xd3\xc6" + (32).to_bytes(4, "little") + len(data).to_bytes(4, "little") + bytes(20) + data
    elif kind == "IPTC":
        data = iptc(data)
    started, programs = tmp_path / "started", tmp_path / "programs"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\necho started >> {started}\nexit 1\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    for plugin in ("gs_binary", "gs_windows_binary"):
        monkeypatch.setattr(EpsImagePlugin, plugin, "gs" if plugin == "gs_binary" else None)
    with Image.open(BytesIO(data)) as opened, pytest.raises((OSError, subprocess.CalledProcessError)):
        opened.load()
    assert started.exists()  # so Pillow by itself would have
    started.unlink()
    for name in ("a.jpg", "a.eps", "a"):
        (tmp_path / name).write_bytes(data)
    paths = [str(tmp_path / name) for name in ("a.jpg", "a.eps", "a")]
    ways = [
        *paths,
        Path(paths[0]),
        data,
        BytesIO(data),
        {"bytes": data, "path": None},
        {"bytes": None, "path": paths[0]},
    ]
    ways += ["data:image/jpeg;base64," + base64.b64encode(data).decode(), base64.b64encode(data).decode()]
    for way in ways:
        for processor in (HfClipImageProcessor(), HfClipImageProcessor(backend="torch")):
            with pytest.raises(UnreadableImageError, match="cannot identify image file: .*PostScript.*not opened"):
                processor(way)
    with pytest.raises(UnusableRowError, match=r"^its image cannot be opened \(cannot identify image file: "):
        open_content(data)
    assert not started.exists()


def test_file_that_cannot_be_wound_back_is_opened(jpeg: bytes):
    class Pipe:
        def __init__(self) -> None:
            self.file = BytesIO(jpeg)

        def read(self, size: int = -1) -> bytes:
            return self.file.read(size)

    assert np.array_equal(np.asarray(open_image(Pipe())), np.asarray(open_image(jpeg)))
