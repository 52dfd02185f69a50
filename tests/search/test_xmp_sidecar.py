"""Keywords in sidecars: all that stands in one stays, byte for byte, and what cannot be read is not touched."""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import pytest

from hf_clip.search import xmp_sidecar
from hf_clip.search.xmp_sidecar import SidecarError, add_keywords, is_keyword, merge_keywords, read_keywords, sidecar_of

START = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 4.4.0-Exiv2">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
"""
END = """
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""
NAMES = 'xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
BAG = f"""{START}  <rdf:Description rdf:about="" {NAMES} xmp:Rating="4">
   <!-- by hand --><dc:title><rdf:Alt><rdf:li xml:lang="x-default">A &amp; B&#10;</rdf:li></rdf:Alt></dc:title>
   <dc:subject>
    <rdf:Bag>
     <rdf:li>Cat</rdf:li>
     <rdf:li>R&amp;D</rdf:li>
    </rdf:Bag>
   </dc:subject>
  </rdf:Description>{END}"""
EXISTING = {
    "bag": BAG,
    "sequence": BAG.replace("rdf:Bag", "rdf:Seq"),
    "other prefixes": BAG.replace("rdf:", "r:")
    .replace("xmlns:rdf", "xmlns:r")
    .replace("xmlns:dc", "xmlns:d")
    .replace("dc:", "d:"),
    "default namespace": f"""{START}<Description xmlns="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
        xmlns:d="http://purl.org/dc/elements/1.1/"><d:subject><Bag><li>Cat</li><li>R&amp;D</li></Bag></d:subject>
        </Description>{END}""",
    "second description": BAG.replace(
        "  <rdf:Description", '  <rdf:Description rdf:about="" xmlns:a="b" a:c="/>"/><rdf:Description', 1
    ),
}
WITHOUT = {
    "empty tag": f'{START}<rdf:Description rdf:about="" {NAMES} xmp:Label="a > b />" />{END}',
    "other fields": f"{START}<rdf:Description {NAMES}><xmp:Rating>4</xmp:Rating></rdf:Description>{END}",
    "last child is empty": f"{START}<rdf:Description {NAMES}><xmp:Rating/></rdf:Description>{END}",
    "no description": f"{START}{END}",
    "empty subject": f"{START}<rdf:Description {NAMES}><dc:subject/></rdf:Description>{END}",
    "empty bag": f"{START}<rdf:Description {NAMES}><dc:subject><rdf:Bag /></dc:subject></rdf:Description>{END}",
    "blank subject": f"{START}<rdf:Description {NAMES}><dc:subject> </dc:subject></rdf:Description>{END}",
    "subject elsewhere": f"""{START}<rdf:Description {NAMES}><xmp:History><rdf:Seq><rdf:li><dc:subject><rdf:Bag>
        <rdf:li>of before</rdf:li></rdf:Bag></dc:subject></rdf:li></rdf:Seq></xmp:History></rdf:Description>{END}""",
}
LAUGHS = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
OUTSIDE = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/hostname">]>'
DAMAGED = {
    "cut off": (BAG[:-60].encode(), "it is damaged (unclosed token"),
    "no XML": (b"junk", "it is damaged (syntax error"),
    "empty": (b"", "it is damaged (no element found"),
    "no XMP": (b"<svg/>", "it is no XMP: it has no rdf:RDF"),
    "entities": (BAG.replace(START[:40], LAUGHS + START[:40]).encode(), "it has a DOCTYPE, which no XMP has"),
    "external": (f"{OUTSIDE}{BAG}".encode(), "it has a DOCTYPE, which no XMP has"),
    "undefined entity": (BAG.replace("Cat", "&cat;").encode(), "it is damaged (undefined entity"),
    "no text": (b"\xff\xd8\xff\xe0 a JPEG", "it is no text in UTF-8 or UTF-16"),
    "no bag": (
        f"{START}<rdf:Description {NAMES}><dc:subject>Cat</dc:subject></rdf:Description>{END}".encode(),
        "its dc:subject holds no bag of keywords",
    ),
    "other encoding": (b'<?xml version="1.0" encoding="latin-1"?><a/>', "it says that it is in 'latin-1', but XMP is"),
}


def keywords_of(content: bytes) -> list[str]:
    """As another program reads them."""
    tree = ElementTree.fromstring(content)
    rdf = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
    (subject,) = tree.findall(f"./{rdf}RDF/{rdf}Description/{{http://purl.org/dc/elements/1.1/}}subject")
    return [item.text or "" for item in subject.findall(f"./*/{rdf}li")]


@pytest.mark.parametrize("kind", EXISTING)
def test_keywords_are_added_and_every_other_byte_stays(kind: str):
    before = EXISTING[kind].encode()
    merged = merge_keywords(before, ["beach", "CAT", "r&d", "<snow>", "beach"])
    assert keywords_of(merged) == ["Cat", "R&D", "beach", "<snow>"]
    added = re.search(rb"<(\w+:)?li>beach</(\w+:)?li><(\w+:)?li>&lt;snow&gt;</(\w+:)?li>", merged)
    assert added is not None
    assert merged[: added.start()] + merged[added.end() :] == before
    assert merge_keywords(merged, ["Beach", "cat"]) == merged


@pytest.mark.parametrize("kind", WITHOUT)
def test_bag_is_made_where_there_is_none(kind: str):
    merged = merge_keywords(WITHOUT[kind].encode(), ["beach", "snow"])
    assert keywords_of(merged) == ["beach", "snow"]
    for line in re.findall(r'xmp:Label="[^"]*"|<xmp:Rating>4|<xmp:Rating/>|of before|<\?xpacket.*\?>', WITHOUT[kind]):
        assert line in merged.decode()
    assert merge_keywords(merged, ["snow"]) == merged


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_encoding_stays(encoding: str):
    text = f'<?xml version="1.0" encoding="{encoding.removesuffix("-sig")}"?>{BAG[BAG.index(">") + 1 :]}'
    merged = merge_keywords(text.encode(encoding), ["Müsli"])
    assert keywords_of(merged) == ["Cat", "R&D", "Müsli"]
    assert merged.decode(encoding).replace("<rdf:li>Müsli</rdf:li>", "") == text


@pytest.mark.parametrize("kind", DAMAGED)
def test_sidecar_that_cannot_be_read_is_left_as_it_is(kind: str, tmp_path: Path):
    content, problem = DAMAGED[kind]
    sidecar = tmp_path / "photo.jpg.xmp"
    sidecar.write_bytes(content)
    with pytest.raises(SidecarError, match=re.escape(f"the sidecar photo.jpg.xmp stays as it is: {problem}")):
        add_keywords(sidecar, ["beach"])
    assert sidecar.read_bytes() == content
    assert list(tmp_path.iterdir()) == [sidecar]


def test_sidecar_is_made_and_written_only_where_something_is_new(tmp_path: Path):
    sidecar = Path(sidecar_of(tmp_path / "photo.jpg"))
    assert sidecar.name == "photo.jpg.xmp"
    assert add_keywords(sidecar, ["beach", "snow"])
    assert keywords_of(sidecar.read_bytes()) == read_keywords(sidecar) == ["beach", "snow"]
    os.chmod(sidecar, 0o640)
    os.utime(sidecar, ns=(1, 1))
    assert not add_keywords(sidecar, ["Snow"])
    assert sidecar.stat().st_mtime_ns == 1
    assert add_keywords(sidecar, ["sun"])
    assert stat.S_IMODE(sidecar.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [sidecar]


def test_link_to_a_sidecar_stays_a_link(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "a.xmp", tmp_path / "a.xmp"
    link.symlink_to(target)
    add_keywords(link, ["beach"])
    assert link.is_symlink()
    assert read_keywords(target) == ["beach"]


def test_sidecar_of_before_stays_where_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sidecar = tmp_path / "a.xmp"
    sidecar.write_text(BAG)

    @contextmanager
    def fill_up(path: Path) -> Iterator[Path]:
        with whole_file(path) as unfinished:
            yield unfinished
            raise OSError(28, "No space left on device")

    whole_file = xmp_sidecar.whole_file
    monkeypatch.setattr(xmp_sidecar, "whole_file", fill_up)
    with pytest.raises(OSError, match="No space left"):
        add_keywords(sidecar, ["beach"])
    assert sidecar.read_text() == BAG
    assert list(tmp_path.iterdir()) == [sidecar]


@pytest.mark.parametrize(("text", "expected"), [("a cat", True), (" ", False), ("a\x00", False), ("a\nb", False)])
def test_what_can_be_a_keyword(text: str, expected: bool):
    assert is_keyword(text) is expected
