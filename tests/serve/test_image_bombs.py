"""Small files that would take much time or memory: each is refused at once, and honest images of their kind are not."""

import base64
import json
import struct
import threading
import warnings
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, JpegImagePlugin, TiffImagePlugin

from hf_clip.serve.decoding_memory import DecodingMemory
from hf_clip.serve.image_structure import (
    BARE,
    MOST_PARTS,
    MOST_SCANS,
    StructureError,
    check_exif,
    check_structure,
    without_metadata,
)
from hf_clip.serve.request_error import RequestError
from hf_clip.serve.server_process import ignore_image_warnings
from hf_clip.serve.untrusted_image import decoding_bytes, open_untrusted
from hf_clip.zero_shot.features import encode_images

from ..waiting import LONGEST_WAIT, until
from .conftest import as_file

PLAIN = Image.linear_gradient("L").convert("RGB").resize((96, 64))
ENTRIES = json.dumps({"clip": {"visual": {"modelName": "m"}}})
EMPTY_SCAN = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00"
"""A scan of the first component, with no data."""


def saved(kind: str, image: Image.Image = PLAIN, **how: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def tags(*entries: tuple[int, int, int, int], payload: int = 0) -> bytes:
    """EXIF or a TIFF: a directory of (tag, type, count, value), and bytes behind it."""
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return head + b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4) + b"\1" * payload


def overlapping(count: int = 60, payload: int = 30_000) -> bytes:
    """EXIF whose tags all name the same bytes."""
    return tags(*[(1000 + n, 7, payload, 14 + 12 * count) for n in range(count)], payload=payload)


def segment(kind: int, content: bytes) -> bytes:
    return bytes([0xFF, kind]) + struct.pack(">H", len(content) + 2) + content


def in_jpeg(inserted: bytes) -> bytes:
    jpeg = saved("JPEG")
    return jpeg[:2] + inserted + jpeg[2:]


def in_png(inserted: bytes) -> bytes:
    png = saved("PNG")
    return png[:33] + inserted + png[33:]


def in_gif(inserted: bytes) -> bytes:
    gif = saved("GIF", Image.new("1", (8, 8)))
    at = 13 + (6 << (gif[10] & 7))
    assert gif[at : at + 1] in b"!,"
    return gif[:at] + inserted + gif[at:]


def scans(count: int) -> bytes:
    return saved("JPEG", progressive=True)[:-2] + EMPTY_SCAN * count + b"\xff\xd9"


def text_of_exif(exif: bytes) -> bytes:
    text = f"\nexif\n{len(exif):8}\n{exif.hex()}"
    return in_png(chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text.encode())))


def runs(width: int, height: int, padding: int = 0) -> bytes:
    """A BMP with run lengths."""
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 1078) + head + bytes(1024 + padding)


def tiff(*extra: tuple[int, int, int, int], size: int = 64, compression: int = 8) -> bytes:
    """A grey TIFF with one strip, and more tags or other ones."""
    data = zlib.compress(bytes(size * size))
    given = {256: (4, 1, size), 257: (4, 1, size), 258: (3, 1, 8), 259: (3, 1, compression), 262: (3, 1, 1)}
    given |= {277: (3, 1, 1)} | {entry[0]: entry[1:] for entry in extra}
    if 324 not in given:
        given |= {273: (4, 1, 8), 278: (4, 1, size), 279: given.get(279, (4, 1, len(data)))}
    entries = b"".join(struct.pack("<HHII", tag, *rest) for tag, rest in sorted(given.items()))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(given)) + entries + bytes(4)


def many_strips(rows: int = MOST_PARTS + 1) -> bytes:
    """A TIFF with a strip for each of very many rows, all of which are the same bytes."""
    entries = [(256, 4, 1, 201), (257, 4, 1, rows), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    after = 10 + 12 * 8 + 4
    entries += [(273, 4, rows, after), (278, 4, 1, 1), (279, 3, rows, after)]
    return tags(*entries, payload=4 * rows)


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", len(content) + 8, kind) + content


def items(count: int, length: int, parts: int = 1) -> bytes:
    """The beginning of a HEIF whose items all lie at the same place."""
    each = b"".join(struct.pack(">HHH", n, 0, parts) + struct.pack(">II", 8, length) * parts for n in range(count))
    places = box(b"iloc", struct.pack(">BBBBBBH", 0, 0, 0, 0, 0x44, 0, count) + each)
    return box(b"ftyp", b"heic" + bytes(4) + b"mif1heic") + box(b"meta", bytes(4) + places) + bytes(20_000)


BOMBS = {
    "scans": (lambda: scans(MOST_SCANS + 1), "is a JPEG with more than 64 scans: save it anew."),
    "arithmetic": (
        lambda: saved("JPEG").replace(b"\xff\xc0\x00\x11", b"\xff\xc9\x00\x11"),
        "is a JPEG with arithmetic coding, which few programs read: save it anew.",
    ),
    "segments": (lambda: in_jpeg(segment(0xEF, b"") * MOST_PARTS), "has more than 20,000 segments."),
    "comments": (lambda: in_jpeg(segment(0xFE, b"") * MOST_PARTS), "has more than 20,000 segments."),
    "filling": (lambda: in_jpeg(b"\xff" * 70_000), "has too much between its segments."),
    "junk": (lambda: in_jpeg(b"\0" * 70_000), "has too much between its segments."),
    "exif of a JPEG": (
        lambda: in_jpeg(segment(0xE1, b"Exif\0\0" + overlapping())),
        "has tags that name the same bytes again and again.",
    ),
    "exif in segments": (
        lambda: in_jpeg(segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 18),
        "has more than 1,048,576 bytes of EXIF: remove them.",
    ),
    "exif of exif": (lambda: in_jpeg(segment(0xE1, b"Exif\0\0" * 10_000)), "has EXIF that is damaged: remove it."),
    "exif behind an extension": (
        lambda: in_jpeg(b"\xff\xf0\xff\0" + segment(0xE1, b"Exif\0\0" + overlapping())),
        "has tags that name the same bytes again and again.",
    ),
    "images of a JPEG": (
        lambda: in_jpeg(segment(0xE2, b"MPF\0" + overlapping())),
        "has tags that name the same bytes again and again.",
    ),
    "exif of a PNG": (
        lambda: in_png(chunk(b"eXIf", overlapping(60, 2**16))),
        "has tags that name the same bytes again and again.",
    ),
    "exif as text": (lambda: text_of_exif(overlapping()), "has tags that name the same bytes again and again."),
    "exif of a WEBP": (
        lambda: saved("WEBP", exif=b"Exif\0\0" + overlapping()),
        "has tags that name the same bytes again and again.",
    ),
    "chunks": (lambda: in_png(chunk(b"abCd") * MOST_PARTS), "has more than 20,000 chunks: save it anew."),
    "chunks behind": (
        lambda: saved("PNG")[:-12] + chunk(b"abCd") * MOST_PARTS,
        "has more than 20,000 chunks: save it anew.",
    ),
    "empty data": (lambda: in_png(chunk(b"IDAT") * MOST_PARTS), "has more than 20,000 chunks: save it anew."),
    "profile": (
        lambda: in_png(chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**24)))),
        "is an image that is damaged or cut off.",
    ),
    "comments of a GIF": (lambda: in_gif(b"!\xfe\1a\0" * 11_000), "has too much before its first frame."),
    "junk of a GIF": (lambda: in_gif(b"\0" * 20_001), "has too much before its first frame."),
    "runs of a BMP": (lambda: runs(100, 100, 2**21), "is a large BMP with run lengths: save it as PNG."),
    "rows of a BMP": (lambda: runs(8000, 8000), "is a large BMP with run lengths: save it as PNG."),
    "tags of a TIFF": (
        lambda: tiff(*[(1000 + n, 7, 600, 0) for n in range(900)]),
        "has tags that name the same bytes again and again.",
    ),
    "many tags": (
        lambda: tags(*[(1000 + n, 3, 1, 0) for n in range(1001)]),
        "has more than 1,000 tags in one directory.",
    ),
    "numbers": (
        lambda: tags((282, 5, 2**18 + 1, 26), payload=2**21 + 8),
        "has tags with more than 2,097,152 bytes of numbers.",
    ),
    "directories": (
        lambda: tags(*[(0x8769, 4, 1, 8)] * 8),
        "has more than 8 directories of tags.",
    ),
    "strips that overlap": (
        lambda: tiff((279, 4, 1, 2**31 - 1)),
        "has strips that name the same bytes again and again.",
    ),
    "tile": (
        lambda: tiff((322, 4, 1, 40_000), (323, 4, 1, 40_000), (324, 4, 1, 8), (325, 4, 1, 99)),
        "has tiles of 40000x40000 pixels, which are larger than the image: save it anew.",
    ),
    "many strips": (many_strips, "has more than 20,000 strips: save it anew."),
    "items that overlap": (lambda: items(100, 20_000), "has items that name the same bytes again and again."),
    "items": (lambda: items(1001, 1), "has more than 1,000 items: save it anew."),
    "parts of items": (lambda: items(2, 1, 12_000), "has items in more than 20,000 parts: save it anew."),
    "boxes": (
        lambda: box(b"ftyp", b"avif" + bytes(4)) + box(b"free", b"") * MOST_PARTS,
        "has more than 20,000 boxes: save it anew.",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_go_off(name: str):
    make, message = BOMBS[name]
    content = make()
    assert len(content) < 2**22
    with pytest.raises(RequestError) as caught:
        open_untrusted(content, "input", 64_000_000)
    assert (caught.value.status, caught.value.message) == (400, f"input {message}")


def test_bomb_is_an_error_in_each_dialect(client):
    content = scans(MOST_SCANS + 1)
    uri = f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"
    message = "is a JPEG with more than 64 scans: save it anew."
    files = {"entries": (None, ENTRIES), "image": content}
    answer = client.post("/predict", files=files)
    assert (answer.status_code, answer.json()) == (400, {"detail": f"image {message}"})
    part = {"type": "image_url", "image_url": {"url": uri}}
    for body, name in (
        ({"input": uri}, "input"),
        ({"input": [{"text": "a"}, {"image": uri}]}, "input[1]"),
        ({"messages": [{"role": "user", "content": [part]}]}, "the image of messages"),
    ):
        answer = client.post("/v1/embeddings", json=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == f"{name} {message}"
        assert answer.json()["error"]["code"] == "invalid_image"


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "a camera"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ExposureTime] = 0.01
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (1.0, 2.0, 3.0)
    return exif


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "MPO"])
def test_honest_images_are_opened_as_a_direct_call_does(client, plain_model, kind: str):
    """With EXIF that turns them, progressive, with several frames and thumbnails."""
    if kind == "AVIF" and "AVIF" not in Image.SAVE:
        pytest.skip("Pillow has no AVIF")
    how: dict[str, Any] = {"exif": exif_of(6)} if kind not in ("GIF", "BMP") else {}
    how |= {"progressive": True} if kind == "JPEG" else {}
    how |= {"save_all": True, "append_images": [PLAIN.rotate(90)]} if kind in ("GIF", "WEBP", "TIFF", "MPO") else {}
    content = saved(kind, **how)
    answer = client.post("/predict", files={"entries": (None, ENTRIES), "image": content})
    assert answer.status_code == 200, answer.text
    found = json.loads(answer.json()["clip"])
    assert np.allclose(found, encode_images(*plain_model, content)[0], rtol=0, atol=1e-6)
    turned = kind not in ("GIF", "BMP")
    assert answer.json()["imageWidth"] == (64 if turned else 96)


def test_scans_of_a_thumbnail_and_behind_the_end_do_not_count():
    jpeg = saved("JPEG", progressive=True)
    thumbnail = segment(0xE1, b"Exif\0\0" + tags((274, 3, 1, 1)) + EMPTY_SCAN * 200)
    content = jpeg[:2] + thumbnail + jpeg[2:] + EMPTY_SCAN * 200
    assert open_untrusted(content, "input", 10_000).size == (96, 64)


def test_markers_without_a_length_are_those_of_pillow():
    bare = {marker & 255 for marker, (*_, read) in JpegImagePlugin.MARKER.items() if read is None}
    assert bare == BARE - {0x01}
    assert {marker & 255 for marker in JpegImagePlugin.MARKER} == {*range(0xC0, 0xFF)}


@pytest.mark.parametrize("between", [b"", b"!\1\0", b"!\xff\x0bNETSCAPE2.0\0"], ids=["comment", "empty", "loop"])
def test_comment_of_a_gif_takes_no_time_and_its_transparency_is_kept(between: bytes):
    """Also where Pillow would read on behind the end of a block."""
    image = PLAIN.quantize(8)
    gif = saved("GIF", image, transparency=3)
    at = gif.index(b"!\xf9")
    comment = b"!\xfe" + (b"\xff" + b"a" * 255) * 15_000 + b"\0"
    found = open_untrusted(gif[:at] + comment + between + comment[:258] + b"\0" + gif[at:], "input", 10_000)
    with Image.open(BytesIO(gif)) as expected:
        assert np.array_equal(np.asarray(found.convert("RGBA")), np.asarray(expected.convert("RGBA")))
    assert found.info["transparency"] == 3
    assert "comment" not in found.info


@pytest.mark.parametrize("order", ["II", "MM"])
@pytest.mark.parametrize("kind", [3, 4, 16])
def test_directories_within_tags_are_followed(order: str, kind: int):
    """Whatever integer says where they are."""
    sign = "<" if order == "II" else ">"
    many = struct.pack(sign + "H", 1001) + bytes(12 * 1001)
    head = order.encode() + struct.pack(sign + "HIH", 42, 8, 1)
    value = {3: struct.pack(sign + "HH", 34, 0), 4: struct.pack(sign + "I", 34), 16: struct.pack(sign + "I", 26)}[kind]
    exif = head + struct.pack(sign + "HHI", 0x8769, kind, 1) + value + bytes(4) + struct.pack(sign + "Q", 34) + many
    with pytest.raises(StructureError, match="has more than 1,000 tags"):
        check_exif(exif)


def test_files_that_are_cut_off_anywhere_do_not_confuse_the_check():
    whole = [saved(kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "AVIF") if kind in Image.SAVE]
    whole += [in_jpeg(segment(0xE1, b"Exif\0\0" + overlapping(2, 40))), items(3, 10), runs(4, 4)]
    for content in whole:
        for end in {*range(min(len(content), 400)), *range(400, len(content), 97)}:
            check_structure(content[:end])
            without_metadata(content[:end])


def test_pixels_up_to_the_limit_are_opened_whatever_pillow_allows(client_with, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    client = client_with(most_pixels=10_000)
    for side, status in ((100, 200), (101, 413)):
        files = {"entries": (None, ENTRIES), "image": as_file(Image.new("RGB", (side, 100)))}
        answer = client.post("/predict", files=files)
        assert answer.status_code == status
    assert answer.json()["detail"] == "image has too many pixels: at most 10,000 are allowed; scale it down."
    assert Image.MAX_IMAGE_PIXELS == 10_000


@pytest.mark.parametrize(
    ("kind", "mode", "how", "each"),
    [
        ("JPEG", "RGB", {}, 8),
        ("JPEG", "RGB", {"progressive": True}, 10),
        ("JPEG", "CMYK", {"progressive": True}, 12),
        ("WEBP", "RGB", {}, 16),
        ("TIFF", "RGB", {}, 7),
        ("TIFF", "F", {}, 8),
        ("PNG", "RGBA", {}, 8),
    ],
)
def test_kinds_that_take_more_memory_may_have_fewer_pixels(kind: str, mode: str, how: dict, each: int):
    content = saved(kind, PLAIN.convert("L").convert(mode) if mode == "F" else PLAIN.convert(mode), **how)
    with Image.open(BytesIO(content)) as image:
        assert decoding_bytes(image) == each * 96 * 64
    allowed = 96 * 64 * each // 8
    assert open_untrusted(content, "input", max(allowed, 96 * 64)).size == (96, 64)
    if each > 8:
        with pytest.raises(
            RequestError, match=rf"too many pixels for an image of its kind \({kind}, {mode}\)"
        ) as caught:
            open_untrusted(content, "input", allowed - 1)
        assert caught.value.status == 413
        assert f"at most {8 * (allowed - 1) // each:,} are allowed" in caught.value.message


def test_images_are_decoded_at_the_same_time_as_far_as_there_is_room():
    memory, order = DecodingMemory(100), []

    def decode(name: str, count: int) -> None:
        with memory.holding(count):
            assert memory.held <= 100 or memory.held == count
            order.append(name)

    with memory.holding(60):
        with memory.holding(40):
            assert memory.held == 100
        large = threading.Thread(target=decode, args=("large", 500))
        large.start()
        until(memory._turn.locked, "the large one's turn")
        small = threading.Thread(target=decode, args=("small", 10))
        small.start()  # there is room for it, and the large one came first
        small.join(0.05)
        assert order == []
    large.join(LONGEST_WAIT)
    small.join(LONGEST_WAIT)
    assert order == ["large", "small"]
    assert memory.held == 0


def test_warnings_of_strange_images_are_neither_shown_nor_remembered():
    """An orientation of several numbers, whose count Pillow puts into the warning."""
    strange = [
        in_jpeg(segment(0xE1, b"Exif\0\0" + tags((274, 3, count, 26), payload=2 * count))) for count in range(3, 9)
    ]
    known = TiffImagePlugin.__dict__.setdefault("__warningregistry__", {})
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        for content in strange[:2]:
            open_untrusted(content, "input", 10_000)
        assert ["too many entries: 3" in str(one.message) for one in shown] == [True, False]
        ignore_image_warnings()
        known.clear()
        for content in strange:
            assert open_untrusted(content, "input", 10_000).size == (96, 64)
        assert len(shown) == 2
        assert known.keys() <= {"version"}


def test_nothing_is_held_once_images_are_decoded_or_refused(client_with, images):
    client = client_with()
    for content in (as_file(images[0]), as_file(images[0])[:-100], b"x"):
        client.post("/predict", files={"entries": (None, ENTRIES), "image": content})
    assert client.app.state.server.encoder._decoding.held == 0
