"""Damage to the files of a model, drawn at random: each function takes the whole bytes and returns others.

What no reader can notice is not drawn. A safetensors file, and a `torch.save` file of before PyTorch 1.6, keep no
checksum: a changed byte among their tensors' elements makes another model, as sound as the first. Such a flip is
noticed only where the file's sha256 is known, see `test_sums`.
"""

import io
import json
import pickletools
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

from .hand_made import word

NESTED = word("lol") + b"\x85" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(30))
SNIPPETS = [
    *(b"cos\nsystem\n", b"(S'x'\nios\nsystem\n", word("x") + b"\x85R", b"\x82\x01", b")R", b"b", b"}b", b"Q", b"NQ"),
    *(b"2\x86" * 30, b"h\x00h\x00\x86", b"]" * 1000, b"(" * 100, b"u", b"K\x00", b"K\x01", b"J\xff\xff\xff\x7f"),
    *(
        b"\x8a\x09" + b"\xff" * 8 + b"\x7f",
        b"G\x7f\xf0\0\0\0\0\0\0",
        b"r\xff\xff\xff\x7f",
        b"j\xff\xff\xff\x7f",
        NESTED,
    ),
    *(b"X\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 8, b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nHalfStorage\n"),
    *(word("a" * 100_000), b"c__torch__.x\nY\n", b")\x81", b"\x8f", b"\x93", b"\x95" + b"\xff" * 8, b"1", b"0", b"."),
]


def flip(data: bytes, draw: random.Random, among: list[tuple[int, int]] | None = None) -> bytes:
    """Change one to three bytes within the given ranges."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        start, end = draw.choice(among or [(0, len(data))])
        changed[draw.randrange(start, end)] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
    return bytes(changed)


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(1, len(data))]


def shift(data: bytes, draw: random.Random) -> bytes:
    """Leave out a run of bytes, put one in, or put one in twice."""
    at, length = draw.randrange(len(data)), draw.choice((1, 2, 8, 64, 4096))
    new = draw.choice((b"", draw.randbytes(length), data[at : at + length] * 2))
    return data[:at] + new + data[at + (length if draw.random() < 0.7 else 0) :]


def _headers(data: bytes) -> list[tuple[int, int]]:
    """The parts of a zip file that are not its entries' bytes: their headers, and the directory as often as those."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        starts = [entry.header_offset for entry in archive.infolist()]
        directory = archive.start_dir
    return [(start, start + 40) for start in starts] + [(directory, len(data)), (len(data) - 120, len(data))] * len(
        starts
    )


def _rewritten(data: bytes, change: Callable[[dict[str, bytes]], None], compress: bool = False) -> bytes:
    """The same archive with other entries, whose checksums are right."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    change(entries)
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return out.getvalue()


def _swap_entries(data: bytes, draw: random.Random) -> bytes:
    """Exchange the places, or the bytes, of two entries of one size; what is said of them stays."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        sizes: dict[int, list[int]] = {}
        for entry in archive.infolist():
            extra = struct.unpack_from("<H", data, entry.header_offset + 28)[0]
            start = entry.header_offset + 30 + len(entry.filename.encode()) + extra
            sizes.setdefault(entry.file_size, []).append(start)
        if draw.random() < 0.5:
            directory, offset = bytearray(data), archive.start_dir
            places = []
            while data[offset : offset + 4] == b"PK\x01\x02":
                places.append(offset + 42)
                offset += 46 + sum(struct.unpack_from("<3H", data, offset + 28))
            first, second = draw.sample(places, 2)
            directory[first : first + 4], directory[second : second + 4] = (
                data[second : second + 4],
                data[first : first + 4],
            )
            return bytes(directory)
    size, starts = draw.choice([(size, starts) for size, starts in sizes.items() if len(starts) > 1 and size > 100])
    first, second = draw.sample(starts, 2)
    changed = bytearray(data)
    changed[first : first + size], changed[second : second + size] = (
        data[second : second + size],
        data[first : first + size],
    )
    return bytes(changed)


def _lose_entry(data: bytes, draw: random.Random) -> bytes:
    def change(entries: dict[str, bytes]) -> None:
        name = draw.choice(list(entries))
        content = entries.pop(name)
        if draw.random() < 0.5:
            entries[draw.choice((name + "x", name))] = content[: len(content) // 2]

    return _rewritten(data, change, compress=draw.random() < 0.3)


def archive(data: bytes, draw: random.Random) -> bytes:
    kinds = (flip, cut, shift, _swap_entries, _lose_entry, lambda d, r: flip(d, r, _headers(d)))
    return draw.choices(kinds, (2, 1, 1, 2, 1, 4))[0](data, draw)


def mutate_pickle(pickled: bytes, draw: random.Random) -> bytes:
    """Leave out, double, exchange, change or insert opcodes."""
    starts = [position for _, _, position in pickletools.genops(pickled)]
    opcodes = [pickled[start:end] for start, end in zip(starts, [*starts[1:], len(pickled)], strict=True)]
    for _ in range(draw.randint(1, 3)):
        at, other = draw.randrange(1, len(opcodes)), draw.randrange(1, len(opcodes))
        match draw.randrange(6):
            case 0:
                opcodes[at] = b""
            case 1:
                opcodes[at] *= 2
            case 2:
                opcodes[at], opcodes[other] = opcodes[other], opcodes[at]
            case 3:
                opcodes[at] = flip(opcodes[at], draw) if opcodes[at] else b"N"
            case 4:
                opcodes[at] = draw.choice(pickletools.opcodes).code.encode("latin-1") + opcodes[at][1:]
            case _:
                opcodes.insert(at, draw.choice(SNIPPETS))
    return b"".join(opcodes)


def pickle_of_archive(data: bytes, draw: random.Random) -> bytes:
    """A pickle that was written so, as far as checksums tell."""

    def change(entries: dict[str, bytes]) -> None:
        (name,) = [name for name in entries if name.endswith("data.pkl")]
        entries[name] = mutate_pickle(entries[name], draw)

    return _rewritten(data, change, compress=draw.random() < 0.3)


def _legacy_pickles(data: bytes) -> list[tuple[int, int]]:
    stream, ranges = io.BytesIO(data), []
    for _ in range(5):
        start = stream.tell()
        list(pickletools.genops(stream))
        ranges.append((start, stream.tell()))
    return ranges


def legacy(data: bytes, draw: random.Random) -> bytes:
    ranges = _legacy_pickles(data)
    match draw.randrange(5):
        case 0:
            return cut(data, draw)
        case 1:
            return data + draw.randbytes(draw.randint(1, 10))
        case 2:
            return flip(data, draw, ranges)
        case _:
            start, end = ranges[draw.choice((3, 3, 3, 4, 0, 2))]
            return data[:start] + mutate_pickle(data[start:end], draw) + data[end:]


def json_value(draw: random.Random) -> object:
    """A value that nobody expects."""
    deep: object = 1
    for _ in range(draw.choice((3, 200, 800))):
        deep = [deep] if draw.random() < 0.5 else {"a": deep}
    return draw.choice(
        (
            *(None, True, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 1e308, -0.5, float("nan"), "", "cat", "x" * 100_000),
            *([], {}, [None], {"a": 1}, [[]] * 3, ["a"] * 1000, deep, "\ud800", "\x1b[2J\n", "../../x"),
        )
    )


def mutate_json(value: object, draw: random.Random) -> object:
    """Replace one value somewhere within, leave it out, or put one beside it."""
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key, changed = draw.choice(list(value)), dict(value)
        match draw.randrange(8):
            case 0:
                del changed[key]
            case 1:
                changed[draw.choice(("", "x" * 10_000, key + "x"))] = json_value(draw)
            case _:
                changed[key] = mutate_json(value[key], draw)
        return changed
    if isinstance(value, list) and value and draw.random() < 0.7:
        at = draw.randrange(len(value))
        return [*value[:at], mutate_json(value[at], draw), *value[at + 1 :]]
    return json_value(draw)


def safetensors(data: bytes, draw: random.Random) -> bytes:
    (length,) = struct.unpack_from("<Q", data)
    header, payload = data[8 : 8 + length], data[8 + length :]
    match draw.randrange(7):
        case 0:
            return cut(data, draw)
        case 1:
            return (
                struct.pack("<Q", draw.choice((0, 1, length - 1, length + 8, 2**31, 2**40, 2**63, 2**64 - 1)))
                + data[8:]
            )
        case 2:
            return data + draw.randbytes(draw.choice((1, 8, 1000)))
        case 3:
            return flip(data, draw, [(8, 8 + length)])
        case 4:
            values = json.loads(header)
            entry = values[draw.choice([name for name in values if name != "__metadata__"])]
            entry[draw.choice(list(entry))] = draw.choice(
                ("F32", "F16", "BF16", "I32", "U8", "F8_E4M3", [2**62, 0], [1] * 1000, [0, 2**63], [4, 4], [])
            )
            changed = json.dumps(values).encode()
        case 5:
            values = json.loads(header)
            first, second = draw.sample([name for name in values if name != "__metadata__"], 2)
            field = draw.choice(("dtype", "shape", "data_offsets"))
            values[first][field], values[second][field] = values[second][field], values[first][field]
            changed = json.dumps(values).encode()
        case _:
            changed = json.dumps(mutate_json(json.loads(header), draw)).encode()
    return struct.pack("<Q", len(changed)) + changed + payload


def folder(path: Path, draw: random.Random) -> None:
    """Change the files of a model's folder in place: their JSON, or that they are there."""
    names = sorted(file.name for file in path.iterdir() if file.suffix == ".json")
    file = path / draw.choice(names)
    match draw.randrange(8):
        case 0:
            file.unlink()
        case 1:
            file.write_bytes(cut(file.read_bytes(), draw))
        case 2:
            file.write_bytes(flip(file.read_bytes(), draw))
        case 3:
            file.write_text(draw.choice(("", "null", "[]", "7", "[" * 100_000, '"' * 3, "{" * 10, "\ufeff{}")))
        case 4:
            (
                path
                / draw.choice(("open_clip_config.json", "vocab.json", "model.safetensors.index.json", "merges.txt"))
            ).write_text(json.dumps(json_value(draw)))
        case _:
            values = json.loads(file.read_text(encoding="utf-8"))
            for _ in range(draw.randint(1, 2)):
                values = mutate_json(values, draw)
            file.write_text(json.dumps(values), encoding="utf-8")
