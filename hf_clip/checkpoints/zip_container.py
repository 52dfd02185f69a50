"""A zip file whose entries are what every reader sees, and have the bytes that they were written with.

The format says everything twice, in a directory at the end and before each entry, and lets entries lie anywhere.
Readers differ in what they believe, so a file that says two things is refused. So is one that unpacks to far more than
it has on disk.
"""

import struct
import zipfile
import zlib
from collections.abc import Iterator
from mmap import mmap
from pathlib import Path

from ..model.checked_files import one_line
from .errors import MOST_SHOWN, CheckpointError

LOCAL_HEADER = struct.Struct("<4s5H3L2H")
END_RECORD = struct.Struct("<4s4H2LH")
WIDE_END_LOCATOR = struct.Struct("<4sLQL")
WIDE_END_RECORD = struct.Struct("<4sQ2H2L4Q")
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
ENCRYPTED, SIZES_FOLLOW = 0x2061, 0x08

MOST_DIRECTORY_BYTES = 1 << 22
"""A directory has about 100 bytes for each tensor."""

FREE_BYTES = 1 << 20
MOST_EXPANSION = 32
"""What may be unpacked: this many bytes, and so many for every one of the file. Weights shrink by a tenth or two."""

CHUNK = 1 << 20


class ZipContainer:
    """The entries of a zip file that is also mapped. Raises CheckpointError for one that is damaged or ambiguous."""

    def __init__(self, path: Path, mapping: mmap):
        self.mapping = mapping
        self.unpackable = FREE_BYTES + MOST_EXPANSION * len(mapping)
        self._check_directory_size()
        try:
            self.archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError, OSError) as error:
            raise self._damaged(str(error)) from None
        self.entries = {entry.orig_filename: entry for entry in self.archive.infolist()}
        try:
            self._check_entries()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.archive.close()

    @staticmethod
    def _damaged(reason: str) -> CheckpointError:
        return CheckpointError(f"is truncated or damaged ({one_line(reason, MOST_SHOWN)}); copy or download it again.")

    def _check_directory_size(self) -> None:
        """The record at the very end, and the wider one that PyTorch writes before it, tell how long the directory is.

        zipfile would read a directory of any length, and look for the record among what comes after it.
        """
        end = len(self.mapping) - END_RECORD.size
        record = END_RECORD.unpack_from(self.mapping, end) if end >= 0 else (b"",)
        if record[0] != b"PK\x05\x06" or record[-1]:
            raise self._damaged("the zip file doesn't end with its directory")
        size, locator_at = record[5], end - WIDE_END_LOCATOR.size
        if locator_at >= 0 and self.mapping[locator_at : locator_at + 4] == b"PK\x06\x07":
            record_at = locator_at - WIDE_END_RECORD.size
            if record_at < 0 or WIDE_END_LOCATOR.unpack_from(self.mapping, locator_at)[2] != record_at:
                raise self._damaged("the zip file's last records contradict each other")
            size = WIDE_END_RECORD.unpack_from(self.mapping, record_at)[8]
        if size > MOST_DIRECTORY_BYTES:
            raise CheckpointError(f"is refused: its directory has {size} bytes, far more than a checkpoint needs.")

    def _check_entries(self) -> None:
        if len(self.entries) < len(self.archive.infolist()):
            raise CheckpointError(
                "is refused: it has two entries of the same name, and readers differ in which they see."
            )
        end = 0
        for entry in sorted(self.archive.infolist(), key=lambda entry: entry.header_offset):
            name = one_line(entry.orig_filename, MOST_SHOWN)
            if entry.compress_type not in COMPRESSIONS or entry.flag_bits & ENCRYPTED:
                raise CheckpointError(
                    f"is refused: its {name} is encrypted or compressed in a way that no checkpoint is (method "
                    f"{entry.compress_type}, flags {entry.flag_bits:#x})."
                )
            if entry.header_offset < end or (end == 0 and entry.header_offset != 0):
                raise self._damaged(f"{name} overlaps another entry, or something lies before the first")
            end = self._start(entry) + entry.compress_size
        if end > self.archive.start_dir:
            raise self._damaged("an entry lies outside of the file")

    def _start(self, entry: zipfile.ZipInfo) -> int:
        """Where an entry's bytes begin, after its own header, which must say what the directory says."""
        name, at = entry.orig_filename, entry.header_offset
        if not 0 <= at <= len(self.mapping) - LOCAL_HEADER.size:
            raise self._damaged(f"{one_line(name, MOST_SHOWN)} lies outside of the file")
        signature, _, flags, method, _, _, crc, packed, size, name_length, extra_length = LOCAL_HEADER.unpack_from(
            self.mapping, at
        )
        start = at + LOCAL_HEADER.size + name_length + extra_length
        encoded = self.mapping[at + LOCAL_HEADER.size : at + LOCAL_HEADER.size + name_length]
        own = encoded.decode("utf-8" if flags & 0x800 else "cp437", "replace")
        # Zeros may stand for what follows the bytes, and all ones for what is too large for this place.
        unsaid = {0} if flags & SIZES_FOLLOW else set()
        agree = (
            crc in {entry.CRC, *unsaid}
            and packed in {entry.compress_size, 0xFFFFFFFF, *unsaid}
            and size in {entry.file_size, 0xFFFFFFFF, *unsaid}
        )
        is_whole = entry.compress_type != zipfile.ZIP_STORED or entry.compress_size == entry.file_size
        if (signature, own, method, flags) != (b"PK\x03\x04", name, entry.compress_type, entry.flag_bits):
            agree = False
        if not agree or not is_whole:
            raise self._damaged(f"the directory and the entry {one_line(name, MOST_SHOWN)} contradict each other")
        return start

    def read(self, name: str, most: int) -> bytes:
        """A small entry's bytes, which have their checksum."""
        entry = self.entries[name]
        if entry.file_size > most:
            raise CheckpointError(
                f"is refused: its {one_line(name, MOST_SHOWN)} has {entry.file_size} bytes, far more than a checkpoint "
                f"needs."
            )
        return bytes(self._unpack(entry))

    def _chunks(self, entry: zipfile.ZipInfo) -> Iterator[bytes]:
        """An entry's bytes in parts, however many they would unpack to. Their CRC-32 is compared at the end."""
        name, left = one_line(entry.orig_filename, MOST_SHOWN), entry.file_size
        try:
            with self.archive.open(entry) as file:
                while chunk := file.read(CHUNK):
                    left -= len(chunk)
                    yield chunk
        except zipfile.BadZipFile as error:
            if "CRC" not in str(error):
                raise self._damaged(f"{name}: {error}") from None
            raise CheckpointError(
                f"is damaged: its {name} has not the bytes of which the file keeps the checksum (CRC-32); copy or "
                f"download it again, or save it anew if it was saved with set_crc32_options(False)."
            ) from None
        except (zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError) as error:
            raise self._damaged(f"{name}: {error}") from None
        if left:
            raise self._damaged(f"{name} lacks {left} bytes")

    def _unpack(self, entry: zipfile.ZipInfo) -> bytearray:
        if entry.compress_type != zipfile.ZIP_STORED:
            self.unpackable -= entry.file_size
            if self.unpackable < 0:
                raise CheckpointError(
                    f"is refused: unpacked, it would have more than {MOST_EXPANSION} times the bytes of the file."
                )
        data = bytearray()
        for chunk in self._chunks(entry):
            data += chunk
        return data

    def locate(self, entry: zipfile.ZipInfo, check_sums: bool) -> tuple[mmap | bytearray, int]:
        """A buffer that holds an entry's bytes, and where in it they begin. A stored entry stays in the mapped file.

        check_sums: read a stored entry once to compare its CRC-32; unpacking always does
        """
        if entry.compress_type != zipfile.ZIP_STORED:
            return self._unpack(entry), 0
        if check_sums:
            for _ in self._chunks(entry):
                pass
        return self.mapping, self._start(entry)
