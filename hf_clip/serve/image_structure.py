"""Refuse files that are small and whose decoding takes long: many scans of a JPEG, many chunks, tags that overlap.

Pillow bounds an image's pixels. What stands around them it reads without a bound: it goes through segments, chunks and
blocks in Python, and copies the value of each tag of EXIF or TIFF, although a thousand tags may name the same
megabytes. Here the file's skeleton is walked first, in the order in which Pillow walks it, and given up at the first
excess. Nothing is decoded.
"""

import re
import struct
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

MOST_SCANS = 64
"""Scans of a JPEG. Each goes over all pixels, and may have no data. Progressive files have about 10."""

MOST_PARTS = 20_000
"""Segments, chunks or blocks, which Pillow goes through one by one. PNGs have one for each 8 KiB or more."""

MOST_FILLING = 65_536
"""Bytes between the segments of a JPEG, which Pillow reads one by one."""

MOST_RUNS, MOST_RUN_PIXELS = 2 * 2**20, 2**23
"""Bytes and pixels of a BMP with run lengths, which Pillow decodes in Python."""

MOST_ITEMS = 1000
"""Items of an AVIF or HEIF: tiles, and blocks of metadata. libheif has the same limit; phones write about 200."""

MOST_EXIF = 2**20
"""Bytes of EXIF. Cameras write up to 64 KiB, and programs a little more."""

MOST_TAGS = 1000
"""Tags of one directory."""

MOST_NUMBERS = 2 * 2**20
"""Bytes of tags that hold numbers, each of which becomes an object in Python: a strip's offset, or a part of a GPS
place."""

SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
"""Bytes of one value of a tag, by TIFF's number of its type."""

NUMBERS = SIZES.keys() - {1, 2, 6, 7}
INTEGERS = {3: "H", 4: "L", 8: "H", 9: "L", 13: "L", 16: "Q", 17: "Q", 18: "Q"}

DIRECTORIES = frozenset({0x8769, 0x8825, 0xA005})
"""Tags that hold the place of a directory of EXIF, of GPS, and of interoperability."""

MOST_DIRECTORIES = 8

TILE_WIDTH, TILE_LENGTH = 322, 323
BYTE_COUNTS = (279, 325)
"""Tags that hold how many bytes each strip or tile has."""

MOST_TILE = 2**24
"""Pixels of a tile of a TIFF, which are decoded although the image may be smaller."""

MOST_TIMES_READ = 16
"""How often a TIFF's strips may name the same bytes: a tile of one colour may stand in many places."""

SEGMENT = re.compile(rb"\xff([\x01-\xfe])")
AFTER_DATA = re.compile(rb"\xff([\x01-\xcf\xd8-\xfe])")
BARE = frozenset({0x01, 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)})
"""Markers behind which Pillow reads no length. libjpeg refuses those that it does not take for bare too."""

SCAN, END = 0xDA, 0xD9
ARITHMETIC = frozenset({0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})
"""Frames with arithmetic coding, whose bits may stand for thousands of coefficients each."""


class StructureError(ValueError):
    """A file would take much more time or memory than its pixels.

    The message follows the image's name.
    """


def check_structure(content: bytes) -> None:
    """Raise StructureError if opening a file, or decoding it, could take far longer than its pixels explain."""
    for signs, check in CHECKS:
        if signs.match(content):
            check(content)


def check_exif(exif: bytes) -> None:
    """Raise StructureError if EXIF, with or without the letters "Exif" before it, holds more than it could need."""
    if len(exif) > MOST_EXIF:
        raise StructureError(f"has more than {MOST_EXIF:,} bytes of EXIF: remove them.")
    for _ in range(2):
        exif = exif.removeprefix(b"Exif\0\0")
    if exif.startswith(b"Exif\0\0"):  # Pillow takes them off one by one
        raise StructureError("has EXIF that is damaged: remove it.")
    check_tags(exif)


def check_tags(content: bytes) -> None:
    """Raise StructureError if the tags of a TIFF or of EXIF hold more bytes than there are, or very many numbers."""
    order = {b"II": "<", b"MM": ">"}.get(content[:2])
    if order is None or len(content) < 16:
        return
    is_big = content[2] == 43  # BigTIFF, as Pillow recognises it
    held = numbers = 0
    directories = [struct.unpack_from(order + "Q", content, 8)[0] if is_big else _long(content, 4, order)]
    for start in directories:
        for tag in _tags(content, start, order, is_big):
            held += tag.size
            numbers += tag.size if tag.kind in NUMBERS else 0
            if held > 2 * len(content) + MOST_FILLING:
                raise StructureError("has tags that name the same bytes again and again.")
            if numbers > MOST_NUMBERS:
                raise StructureError(f"has tags with more than {MOST_NUMBERS:,} bytes of numbers.")
            if tag.number in DIRECTORIES and tag.kind in INTEGERS:
                directories += struct.unpack_from(order + INTEGERS[tag.kind], content, tag.place)
        if len(directories) > MOST_DIRECTORIES:
            raise StructureError(f"has more than {MOST_DIRECTORIES} directories of tags.")


def _long(content: bytes, place: int, order: str) -> int:
    return int(struct.unpack_from(order + "L", content, place)[0])


class _Tag(NamedTuple):
    number: int
    kind: int
    size: int  # in bytes
    place: int  # of the value


def _tags(content: bytes, start: int, order: str, is_big: bool) -> Iterator[_Tag]:
    """The tags of a directory, up to one whose value lies outside of the file: Pillow reads no further."""
    entry = struct.Struct(order + ("HHQQ" if is_big else "HHLL"))
    head = struct.Struct(order + ("Q" if is_big else "H"))
    if start + head.size > len(content):
        return
    [count] = head.unpack_from(content, start)
    start += head.size
    inline = 8 if is_big else 4
    for place in range(start, start + min(count, MOST_TAGS) * entry.size, entry.size):
        if place + entry.size > len(content):
            return
        number, kind, length, value = entry.unpack_from(content, place)
        size = SIZES.get(kind, 0) * length
        if size > inline and value + size > len(content):
            return
        yield _Tag(number, kind, size, value if size > inline else place + entry.size - inline)
    if count > MOST_TAGS:
        raise StructureError(f"has more than {MOST_TAGS:,} tags in one directory.")


def check_strips(image: Any, length: int) -> None:
    """Raise StructureError if the strips or tiles of an open TIFF are many, larger than the image, or overlap.

    Args:
        image: What Pillow has opened, of any format, and not loaded.
        length: Bytes of the file.
    """
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return
    if len(image.tile) > MOST_PARTS:
        raise StructureError(f"has more than {MOST_PARTS:,} strips: save it anew.")
    width, height = tags.get(TILE_WIDTH, 1), tags.get(TILE_LENGTH, 1)
    if width * height > max(image.width * image.height, MOST_TILE):
        raise StructureError(f"has tiles of {width}x{height} pixels, which are larger than the image: save it anew.")
    counts = [tags.get(number, ()) for number in BYTE_COUNTS]
    if sum(sum(count) if isinstance(count, tuple) else count for count in counts) > MOST_TIMES_READ * length:
        raise StructureError("has strips that name the same bytes again and again.")


def _check_jpeg(content: bytes) -> None:
    exif, scan = bytearray(), -1
    filling, place = 0, 2
    for _ in range(MOST_PARTS):
        found = SEGMENT.search(content, place, place + 2 * MOST_FILLING)
        filling += (found.end() if found else len(content)) - place
        if filling > MOST_FILLING:
            raise StructureError("has too much between its segments.")
        if found is None:
            return
        kind, place = found[1][0], found.end()
        filling -= 2
        if kind == SCAN:
            scan = place
            break
        if kind in BARE:
            continue
        if kind in ARITHMETIC:
            raise StructureError("is a JPEG with arithmetic coding, which few programs read: save it anew.")
        length = int.from_bytes(content[place : place + 2], "big")
        part = content[place + 2 : place + length]
        if kind == 0xE1 and part.startswith(b"Exif\0\0"):
            exif += part[6:] if exif else part
        elif kind == 0xE2 and part.startswith(b"MPF\0"):
            check_tags(part[4:])
        place += max(length, 2)
    else:
        raise StructureError(f"has more than {MOST_PARTS:,} segments.")
    check_exif(bytes(exif))
    if content.count(b"\xff\xda") > MOST_SCANS and len([*islice(_scans(content, scan), MOST_SCANS + 1)]) > MOST_SCANS:
        raise StructureError(f"is a JPEG with more than {MOST_SCANS} scans: save it anew.")


def _scans(content: bytes, place: int) -> Iterator[int]:
    """Where the scans of a JPEG begin, up to its end: letters of a scan in other segments or behind it do not count.

    Markers below 0xC0 have no length here, since libjpeg skips only their two bytes within a scan.
    """
    kind = SCAN
    while kind != END:
        if kind == SCAN:
            yield place
        if kind >= 0xC0 and kind not in BARE:
            place += int.from_bytes(content[place : place + 2], "big")
        found = AFTER_DATA.search(content, place)
        if found is None:
            return
        kind, place = found[1][0], found.end()


def _check_png(content: bytes) -> None:
    place = 8
    for _ in range(MOST_PARTS):
        if place + 8 > len(content) or content[place + 4 : place + 8] == b"IEND":
            return
        place += 12 + int.from_bytes(content[place : place + 4], "big")
    raise StructureError(f"has more than {MOST_PARTS:,} chunks: save it anew.")


def _check_bmp(content: bytes) -> None:
    if int.from_bytes(content[30:34], "little") not in (1, 2):
        return
    width, height = (abs(int.from_bytes(content[at : at + 4], "little", signed=True)) for at in (18, 22))
    if len(content) > MOST_RUNS or width * height > MOST_RUN_PIXELS:
        raise StructureError("is a large BMP with run lengths: save it as PNG.")


def _boxes(content: bytes, place: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The boxes of AVIF and HEIF: their kinds, and where what they hold begins and ends."""
    for _ in range(MOST_PARTS):
        if place + 8 > end:
            return
        size, head = int.from_bytes(content[place : place + 4], "big"), 8
        if size == 1:
            size, head = int.from_bytes(content[place + 8 : place + 16], "big"), 16
        after = end if size == 0 else min(place + size, end)
        if after < place + head:
            return
        yield content[place + 4 : place + 8], place + head, after
        place = after
    raise StructureError(f"has more than {MOST_PARTS:,} boxes: save it anew.")


def _check_boxes(content: bytes) -> None:
    for kind, start, end in _boxes(content, 0, len(content)):
        for inner, place, after in _boxes(content, start + 4, end) if kind == b"meta" else ():
            if inner == b"iloc":
                _check_items(content[place:after], len(content))


def _check_items(content: bytes, most: int) -> None:
    """Raise StructureError if the items of an AVIF or HEIF are too many, or hold more bytes together than there are."""
    if len(content) < 8:
        return
    version, [first, second] = content[0], content[4:6]
    sizes = [first >> 4, first & 15, second >> 4, second & 15 if version else 0]  # of offset, length, base, index
    wide = 4 if version == 2 else 2
    place, held, left = 6 + wide, 0, MOST_PARTS
    count = int.from_bytes(content[6:place], "big")
    if count > MOST_ITEMS:
        raise StructureError(f"has more than {MOST_ITEMS:,} items: save it anew.")
    entry = sizes[3] + sizes[0] + sizes[1]
    for _ in range(count):
        place += wide + (2 if version else 0) + 2 + sizes[2]
        extents = int.from_bytes(content[place : place + 2], "big")
        place, left = place + 2, left - extents
        if left < 0:
            raise StructureError(f"has items in more than {MOST_PARTS:,} parts: save it anew.")
        for _ in range(extents):
            if place + entry > len(content):
                break
            held += int.from_bytes(content[place + entry - sizes[1] : place + entry], "big") or most
            place += entry
    if held > 2 * most:
        raise StructureError("has items that name the same bytes again and again.")


def without_metadata(content: bytes) -> bytes:
    """A file without what Pillow would spend its time on before the pixels: see `_without_exif`, `_without_comments`.

    Raises:
        StructureError: There is too much of it.
    """
    if content[4:12] in (b"ftypavif", b"ftypavis", b"ftypmif1", b"ftypmsf1"):
        return _without_exif(content)
    return _without_comments(content) if content.startswith(b"GIF8") else content


def _without_exif(content: bytes) -> bytes:
    """An AVIF whose EXIF is hidden: Pillow reads all of its tags, and then turns as the container says."""
    found: bytearray | None = None
    for kind, start, end in _boxes(content, 0, len(content)):
        part = content[start:end] if kind in (b"meta", b"moov") else b""
        if b"Exif" in part:  # XMP is hidden with it, where Pillow would look for the orientation then
            found = bytearray(content) if found is None else found
            found[start:end] = part.replace(b"Exif", b"none").replace(b"cdsc", b"none")
    return content if found is None else bytes(found)


def _without_comments(content: bytes) -> bytes:
    """A GIF of whose extensions before the first frame only the one about transparency is left.

    Pillow joins the blocks of a comment in a time that is quadratic.
    """
    place = start = 13 + ((6 << (content[10] & 7)) if len(content) > 10 and content[10] & 128 else 0)
    kept, parts = b"", 0
    while content[place : place + 1] not in (b"", b",", b";"):
        begin, is_extension = place, content[place] == 0x21
        place += 2 if is_extension else 1
        while is_extension and place < len(content) and parts <= MOST_PARTS:
            length = content[place]
            place, parts = place + 1 + length, parts + 1
            if length == 0:
                break
        parts += 1
        if parts > MOST_PARTS:
            raise StructureError("has too much before its first frame.")
        if content[begin : begin + 3] == b"!\xf9\4" and place - begin == 8:
            kept += content[begin:place]
    return content[:start] + kept + content[place:]


CHECKS: list[tuple[re.Pattern[bytes], Callable[[bytes], None]]] = [
    (re.compile(rb"\xff\xd8"), _check_jpeg),
    (re.compile(rb"\x89PNG"), _check_png),
    (re.compile(rb"BM"), _check_bmp),
    (re.compile(rb"II|MM"), check_tags),
    (re.compile(rb"....ftyp", re.DOTALL), _check_boxes),
]


__all__ = ["StructureError", "check_exif", "check_strips", "check_structure", "check_tags", "without_metadata"]
