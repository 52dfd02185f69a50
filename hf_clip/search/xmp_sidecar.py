"""Keywords in XMP sidecars: `photo.jpg.xmp` beside `photo.jpg`, where dc:subject holds them as a bag.

A sidecar holds what other programs know of an image: ratings, edits, places. Keywords are put into its text at one
place, and all other bytes stay as they are. It is read by expat, with a DOCTYPE refused, so that no entity is defined
and nothing else is opened. (XMP specification part 1, ISO 16684-1; part 3 on sidecars.)
"""

import os
import re
import shutil
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat
from xml.sax.saxutils import escape

from ..checkpoints.whole_file import whole_file

DC, RDF = "http://purl.org/dc/elements/1.1/", "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
SUBJECT = f"{DC} subject"
ROOT, DESCRIPTION, ITEM = f"{RDF} RDF", f"{RDF} Description", f"{RDF} li"
CONTAINERS = {f"{RDF} {kind}" for kind in ("Bag", "Seq", "Alt")}

MOST_BYTES = 64 << 20
"""Largest sidecar that is read."""

NEW = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">\n'
    f' <rdf:RDF xmlns:rdf="{RDF}">\n'
    '  <rdf:Description rdf:about=""/>\n'
    " </rdf:RDF>\n"
    "</x:xmpmeta>\n"
    '<?xpacket end="w"?>\n'
)

START_TAG = re.compile(rb"""<(?:[^"'>]|"[^"]*"|'[^']*')*>""")
FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class SidecarError(ValueError):
    """A sidecar cannot be read, or keywords not be put into it. It is as it was."""


@dataclass
class _Element:
    """An element that matters: where its start tag begins, and where its end does."""

    name: str
    start: int
    end: int = -1
    has_content: bool = False


@dataclass
class _Found:
    """What a sidecar's text holds, as places in its bytes."""

    keywords: list[str] = field(default_factory=list)
    root: _Element | None = None
    description: _Element | None = None
    subject: _Element | None = None
    container: _Element | None = None


class _Reader:
    """Finds dc:subject, and where keywords belong."""

    def __init__(self) -> None:
        self.found, self.path = _Found(), list[_Element]()
        self.text: list[str] | None = None
        self.parser = expat.ParserCreate("utf-8", " ")
        self.parser.StartElementHandler = self.start
        self.parser.EndElementHandler = self.end
        self.parser.CharacterDataHandler = self.characters
        self.parser.StartDoctypeDeclHandler = self.refuse
        self.parser.XmlDeclHandler = self.declare

    def refuse(self, *_: object) -> None:
        raise SidecarError("it has a DOCTYPE, which no XMP has")

    def declare(self, version: str, encoding: str | None, standalone: int) -> None:
        if encoding is not None and not encoding.lower().startswith(("utf-8", "utf-16", "us-ascii")):
            raise SidecarError(f"it says that it is in {encoding!r:.40}, but XMP is in UTF-8 or UTF-16")

    def start(self, name: str, _: dict[str, str]) -> None:
        element = _Element(name, self.parser.CurrentByteIndex)
        if self.path:
            self.path[-1].has_content = True
        self.path.append(element)
        above = [inner.name for inner in self.path[:-1]]
        found = self.found
        if name == ROOT:
            found.root = found.root or element
        elif name == DESCRIPTION and above[-1:] == [ROOT]:
            found.description = found.description or element
        elif name == SUBJECT and above[-2:] == [ROOT, DESCRIPTION]:
            found.subject = found.subject or element
        elif name in CONTAINERS and above[-3:] == [ROOT, DESCRIPTION, SUBJECT]:
            if self.path[-2] is found.subject:
                found.container = found.container or element
        elif name == ITEM and above[-4:-1] == [ROOT, DESCRIPTION, SUBJECT]:
            self.text = []

    def characters(self, text: str) -> None:
        if self.path and text.strip():
            self.path[-1].has_content = True
        if self.text is not None:
            self.text.append(text)

    def end(self, name: str) -> None:
        self.path.pop().end = self.parser.CurrentByteIndex
        if name == ITEM and self.text is not None:
            self.found.keywords.append("".join(self.text))
            self.text = None

    def read(self, content: bytes) -> _Found:
        try:
            self.parser.Parse(content, True)
        except expat.ExpatError as error:
            raise SidecarError(f"it is damaged ({error})") from None
        return self.found


def sidecar_of(image: str | Path) -> str:
    """The sidecar of an image, as digiKam and darktable name it."""
    return f"{os.fspath(image)}.xmp"


def is_keyword(text: str) -> bool:
    """Whether a text can be written into XML as one keyword."""
    return bool(text.strip()) and FORBIDDEN.search(text) is None


def _same(keyword: str) -> str:
    """What two spellings of a keyword have in common."""
    return unicodedata.normalize("NFC", keyword).strip().casefold()


def _decode(content: bytes) -> tuple[str, str]:
    """A sidecar's text, and its encoding, which XMP says by its first bytes: UTF-8 or UTF-16."""
    encoding = "utf-8"
    if content.startswith((b"\xff\xfe", b"<\0")):
        encoding = "utf-16-le"
    elif content.startswith((b"\xfe\xff", b"\0<")):
        encoding = "utf-16-be"
    try:
        return content.decode(encoding), encoding
    except UnicodeDecodeError:
        raise SidecarError("it is no text in UTF-8 or UTF-16") from None


def _list_items(keywords: Iterable[str], prefix: str) -> bytes:
    lines = (f"<{prefix}li>{escape(keyword)}</{prefix}li>" for keyword in keywords)
    return "".join(lines).encode()


def _replace_end(content: bytes, element: _Element, inner: bytes) -> bytes:
    """Put something at the end of an element, which may be one of an empty tag `<a/>`."""
    match = START_TAG.match(content, element.start)
    assert match is not None  # expat has read it
    if not match[0].endswith(b"/>"):
        return content[: element.end] + inner + content[element.end :]
    name = re.match(rb"<([^\s/>]+)", match[0])
    assert name is not None
    return content[: match.end() - 2] + b">" + inner + b"</" + name[1] + b">" + content[match.end() :]


def merge_keywords(content: bytes, keywords: Iterable[str]) -> bytes:
    """Put keywords into a sidecar's bytes.

    Args:
        content: A whole sidecar.
        keywords: What to add. What is there already, in whatever case, is not added again.

    Returns:
        The bytes with the keywords; the same bytes if there is nothing to add.

    Raises:
        SidecarError: It is no XMP, is damaged, or has a DOCTYPE.
    """
    text, encoding = _decode(content)
    plain = text.encode()
    found = _Reader().read(plain)
    if found.root is None:
        raise SidecarError("it is no XMP: it has no rdf:RDF")
    known = {_same(keyword) for keyword in found.keywords}
    by_spelling: dict[str, str] = {}
    for keyword in keywords:
        by_spelling.setdefault(_same(keyword), keyword.strip())
    new = [keyword for spelling, keyword in by_spelling.items() if spelling not in known]
    if not new:
        return content
    merged = _put(plain, found, new)
    return merged.decode().encode(encoding)


def _put(plain: bytes, found: _Found, new: list[str]) -> bytes:
    """Put keywords at the end of the bag, or a bag where there is none."""
    if found.container is not None:
        tag = re.match(rb"<(?:([^\s/>:]+):)?", plain[found.container.start : found.container.start + 200])
        assert tag is not None
        prefix = f"{tag[1].decode()}:" if tag[1] else ""
        return _replace_end(plain, found.container, _list_items(new, prefix))
    bag = f'<rdf:Bag xmlns:rdf="{RDF}">'.encode() + _list_items(new, "rdf:") + b"</rdf:Bag>"
    if found.subject is not None:
        if found.subject.has_content:
            raise SidecarError("its dc:subject holds no bag of keywords")
        return _replace_end(plain, found.subject, bag)
    subject = f'<dc:subject xmlns:dc="{DC}">'.encode() + bag + b"</dc:subject>"
    if found.description is not None:
        return _replace_end(plain, found.description, subject)
    assert found.root is not None
    start = f'<rdf:Description xmlns:rdf="{RDF}" rdf:about="">'.encode()
    return _replace_end(plain, found.root, start + subject + b"</rdf:Description>")


def read_keywords(sidecar: str | Path) -> list[str]:
    """The keywords of a sidecar.

    Args:
        sidecar: The file.

    Returns:
        Its `dc:subject`, in the order of the file.

    Raises:
        FileNotFoundError: There is none.
        SidecarError: It cannot be read.
    """
    text, _ = _decode(_read(Path(sidecar)))
    return _Reader().read(text.encode()).keywords


def _read(sidecar: Path) -> bytes:
    if sidecar.stat().st_size > MOST_BYTES:
        raise SidecarError(f"it has more than {MOST_BYTES >> 20} MiB")
    return sidecar.read_bytes()


def add_keywords(sidecar: str | Path, keywords: Iterable[str]) -> bool:
    """Add keywords to a sidecar, or write one. It is written whole or not at all.

    Args:
        sidecar: The file. A link to one stays a link.
        keywords: What to add.

    Returns:
        Whether the file was written: False if it has all the keywords.

    Raises:
        SidecarError: The sidecar that is there cannot be read; it is as it was.
        OSError: It cannot be written.
    """
    place = Path(os.path.realpath(sidecar))
    keywords = list(keywords)
    if unusable := [keyword for keyword in keywords if not is_keyword(keyword)]:
        raise SidecarError(f"{unusable[0]!r:.60} is no keyword that XML can hold")
    is_there = place.exists()
    try:
        content = _read(place) if is_there else NEW.encode()
        merged = merge_keywords(content, keywords)
    except SidecarError as error:
        raise SidecarError(f"the sidecar {os.path.basename(sidecar)} stays as it is: {error}") from None
    if merged == content:
        return False
    with whole_file(place) as unfinished:
        unfinished.write_bytes(merged)
        if is_there:
            shutil.copymode(place, unfinished)
    return True


__all__ = ["SidecarError", "add_keywords", "is_keyword", "merge_keywords", "read_keywords", "sidecar_of"]
