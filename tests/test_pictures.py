"""Opening pictures: whatever their address, turned upright, and one clear error for what is none."""

import base64
import http.server
import threading
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image, ImageOps

from hf_clip import HfClipImageProcessor
from hf_clip.pictures_hf_clip import open_picture


def as_jpeg(picture: Image.Image, orientation: int | None = None, quality: int = 95) -> bytes:
    file, exif = BytesIO(), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    picture.save(file, "JPEG", quality=quality, exif=exif)
    return file.getvalue()


@pytest.fixture
def jpeg(photographs: dict[str, Image.Image]) -> bytes:
    """A picture that lies on its side and says so."""
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


def test_every_way_to_one_picture_gives_the_same_pixels(jpeg: bytes, tmp_path: Path, server: str):
    path = tmp_path / "a picture.jpg"
    path.write_bytes(jpeg)
    stored = Dataset.from_dict({"image": [{"bytes": jpeg, "path": None}]}, features=Features({"image": ImageFeature()}))
    undecoded = stored.cast_column("image", ImageFeature(decode=False))[0]["image"]
    expected = ImageOps.exif_transpose(Image.open(BytesIO(jpeg)))
    assert expected.height > expected.width
    sources = [str(path), path, jpeg, bytearray(jpeg), BytesIO(jpeg), undecoded, {"bytes": None, "path": str(path)}]
    sources += ["data:image/jpeg;base64," + base64.b64encode(jpeg).decode(), base64.encodebytes(jpeg).decode()]
    sources += [f"{server}/a%20picture.jpg"]
    pixels = HfClipImageProcessor()(expected, return_tensors="pt").pixel_values
    for source in sources:
        assert np.array_equal(np.asarray(open_picture(source)), np.asarray(expected))
        if isinstance(source, BytesIO):
            source.seek(0)
        assert torch.equal(HfClipImageProcessor()([source], return_tensors="pt").pixel_values, pixels)
    decoded = stored[0]["image"]  # which datasets has turned
    assert torch.equal(HfClipImageProcessor()(decoded, return_tensors="pt").pixel_values, pixels)
    torch_pixels = HfClipImageProcessor(backend="torch")([jpeg, str(path)], return_tensors="pt").pixel_values
    assert (torch_pixels - pixels).abs().max() < 1.1 / 255 / 0.26


def test_picture_that_is_given_is_not_turned(jpeg: bytes):
    given = Image.open(BytesIO(jpeg))
    plain = Image.fromarray(np.asarray(given))
    found, expected = (HfClipImageProcessor()(p, return_tensors="pt").pixel_values for p in (given, plain))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(photographs: dict[str, Image.Image], orientation: int):
    data = as_jpeg(photographs["chelsea"], orientation)
    expected = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    assert np.array_equal(np.asarray(open_picture(data)), np.asarray(expected))


def test_damaged_exif_data_turns_nothing(photographs: dict[str, Image.Image]):
    data = bytearray(as_jpeg(photographs["chelsea"], 6))
    place = data.index(b"Exif\0\0") + 6
    data[place : place + 20] = b"\xff" * 20
    assert open_picture(bytes(data)).size == photographs["chelsea"].size


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation_gives_its_first_frame(photographs: dict[str, Image.Image], form: str):
    first, second = photographs["chelsea"].resize((60, 40)), photographs["coffee"].resize((60, 40))
    file = BytesIO()
    first.save(file, form, save_all=True, append_images=[second], **({"lossless": True} if form == "WEBP" else {}))
    opened = np.asarray(open_picture(file.getvalue()).convert("RGB")).astype(int)
    assert np.abs(opened - np.asarray(first)).mean() < np.abs(opened - np.asarray(second)).mean() / 4


def test_modes_are_kept(tmp_path: Path, photographs: dict[str, Image.Image]):
    for mode in ("L", "P", "RGBA", "1", "LA", "I;16"):
        picture = photographs["chelsea"].convert("L" if mode == "I;16" else mode)
        if mode == "I;16":
            picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 200)
        picture.save(tmp_path / "picture.png")
        assert open_picture(tmp_path / "picture.png").mode == mode


def test_bad_pictures_are_named_by_their_place(jpeg: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    good = Image.new("RGB", (40, 30))
    truncated = jpeg[: len(jpeg) // 2]
    (tmp_path / "notes.jpg").write_text("no picture")
    cases: list[tuple[object, str]] = [
        (truncated, r"images\[1\] cannot be opened \(.*truncated"),
        (b"no picture at all", r"images\[1\] cannot be opened"),
        (str(tmp_path / "notes.jpg"), r"images\[1\] cannot be opened \('.*', cannot identify"),
        (str(tmp_path / "none.jpg"), r"images\[1\]: there is no file '.*none.jpg'; check the path"),
        (tmp_path, r"images\[1\] cannot be opened"),
        ({"bytes": None, "path": None}, r"images\[1\] cannot be opened \(a picture's row needs"),
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


def test_draft_decodes_less_and_stays_near(photographs: dict[str, Image.Image]):
    large = photographs["astronaut"].resize((2400, 1800), Image.Resampling.LANCZOS)
    data = as_jpeg(large, orientation=6)
    assert min(open_picture(data, draft=224).size) == 450
    exact, quick = (HfClipImageProcessor(draft=draft)(data).pixel_values[0] for draft in (False, True))
    assert not np.array_equal(exact, quick)
    assert np.abs(exact - quick).mean() < 0.02
    small = as_jpeg(photographs["astronaut"])  # less than twice as large as needed on its shorter side after a halving
    assert open_picture(small, draft=288).size == photographs["astronaut"].size
