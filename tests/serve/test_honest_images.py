"""Images as phones, scanners and screenshots write them: each passes every limit, and has its usual embedding."""

import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_clip.serve.image_structure import check_structure
from hf_clip.zero_shot.features import encode_images

from .test_image_bombs import ENTRIES, PLAIN, box, chunk, exif_of, items, saved, segment

GREY = np.asarray(PLAIN.convert("L"), dtype=np.uint16) * 257


def deep_png() -> bytes:
    """A PNG with 16 bits for each of three colours, which Pillow does not write, in many small chunks of data."""
    rows = np.repeat(GREY[:, :, None], 3, axis=2).astype(">u2")
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows), 0)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *PLAIN.size, 16, 2, 0, 0, 0))
    parts = [chunk(b"IDAT", data[at : at + 100]) for at in range(0, len(data), 100)]
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(parts) + chunk(b"IEND")


def phone_jpeg() -> bytes:
    """Several images in a file, with EXIF, a depth map in many segments, and a film behind them."""
    content = saved("MPO", exif=exif_of(6), save_all=True, append_images=[PLAIN.rotate(90)])
    at = content.index(b"\xff\xdb")
    film = b"\0\0\0\x18ftypmp42" + b"\xff\xda" * 5000
    return (
        content[:at] + segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(60_000)) * 40 + content[at:] + film
    )


def heic() -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    return saved("HEIF", exif=exif_of(6))


HONEST: dict[str, Callable[[], bytes]] = {
    "HEIC": heic,
    "JPEG of a phone": phone_jpeg,
    "JPEG for the web": lambda: saved("JPEG", progressive=True, optimize=True, subsampling=0, restart_marker_blocks=1),
    "JPEG for print": lambda: saved("JPEG", PLAIN.convert("CMYK"), progressive=True, icc_profile=bytes(200_000)),
    "screenshot": lambda: saved("PNG", PLAIN.convert("RGBA"), dpi=(144, 144), icc_profile=bytes(3000)),
    "palette": lambda: saved("PNG", PLAIN.quantize(16), transparency=3),
    "grey PNG of 16 bits": lambda: saved("PNG", Image.fromarray(GREY)),
    "PNG of 16 bits": deep_png,
    "scan, fax": lambda: saved("TIFF", PLAIN.convert("1"), compression="group4", dpi=(600, 600)),
    "scan, rows": lambda: saved("TIFF", tiffinfo={278: 1}),
    "scan, JPEG": lambda: saved("TIFF", compression="jpeg"),
    "scan, pages": lambda: saved("TIFF", save_all=True, append_images=[PLAIN] * 20, compression="tiff_deflate"),
    "scan of 16 bits": lambda: saved("TIFF", Image.fromarray(GREY)),
}


@pytest.mark.parametrize("name", HONEST)
def test_usual_images_pass(client, plain_model, name: str):
    content = HONEST[name]()
    answer = client.post("/predict", files={"entries": (None, ENTRIES), "image": content})
    assert answer.status_code == 200, answer.text
    found: Any = json.loads(answer.json()["clip"])
    assert np.allclose(found, encode_images(*plain_model, content)[0], rtol=0, atol=1e-6)


def test_tiles_of_a_phone_pass():
    """48 megapixels in tiles of 512 x 512, a gain map in as many, thumbnails and blocks of metadata: each an item."""
    tiles = 16 * 12
    check_structure(items(2 * tiles + 10, 60))
    check_structure(items(2 * tiles + 10, 60) + box(b"mdat", bytes(2**20)))
