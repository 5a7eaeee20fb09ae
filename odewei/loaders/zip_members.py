"""Where a member's bytes lie in a zip archive, and how they come out of it in bounded memory.

The format: APPNOTE.TXT 6.3 of PKWARE. Knows archives and bytes; what the members mean is not known here.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

__all__ = ["MAX_DEFLATE_RATIO", "check_disjoint", "check_sums", "data_offset", "inflate", "read_stored"]

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, length of the extra field
_PIECE_NBYTES = 1 << 18

MAX_DEFLATE_RATIO = 1032
"""A deflated byte holds no more bytes than this: 258 take two bits at least (https://zlib.net/zlib_tech.html)."""


def data_offset(member: zipfile.ZipInfo, stream: BinaryIO, file_nbytes: int) -> int:
    """First byte of a member's data. The directory does not say; the header before the data does.

    Raises BadZipFile if there is no such header, or it is of another member, or the data would reach beyond the file;
    struct.error at its end.
    """
    stream.seek(member.header_offset)
    signature, name_nbytes, extra_nbytes = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
    begin = member.header_offset + _LOCAL_HEADER.size + name_nbytes + extra_nbytes
    if signature != b"PK\x03\x04" or begin + member.compress_size > file_nbytes:
        raise zipfile.BadZipFile(f"entry {member.filename!r} is not where the directory says")
    name = stream.read(name_nbytes)
    if name.decode("utf-8" if member.flag_bits & 0x800 else "cp437", "replace") != member.orig_filename:
        raise zipfile.BadZipFile(f"entry {member.filename!r} has another name where its data are")
    return int(begin)


def check_disjoint(members: Sequence[tuple[zipfile.ZipInfo, int]]) -> None:
    """Raise BadZipFile if two members share bytes of the file: that is how small archives claim to hold very much.

    Each member comes with its ``data_offset``.
    """
    end, before = 0, ""
    for member, begin in sorted(members, key=lambda item: item[0].header_offset):
        if member.header_offset < end:
            raise zipfile.BadZipFile(f"entry {member.filename!r} overlaps {before!r}")
        end, before = begin + member.compress_size, member.filename


def read_stored(member: zipfile.ZipInfo, stream: BinaryIO, begin: int) -> bytes:
    """The bytes of a stored member, whose data begin there. Raises BadZipFile if they do not have its checksum.

    A checksum of 0 is none: torch writes that where ``set_crc32_options(False)`` was asked for.
    """
    stream.seek(begin)
    found = stream.read(member.file_size)
    if len(found) != member.file_size or (member.CRC and zlib.crc32(found) != member.CRC):
        raise zipfile.BadZipFile(f"entry {member.filename!r} does not have its checksum")
    return found


def check_sums(stream: BinaryIO, on_bytes: Callable[[int], object] = lambda nbytes: None) -> bool:
    """Compare the entries of an archive with the CRC-32 that it has of each; whether it has any. ``on_bytes`` is told
    how many bytes of the file are done.

    An entry whose sum is 0 has none, see ``read_stored``. Raises BadZipFile for the first entry that has another, or is
    not all there, zlib.error for one that cannot be inflated.
    """
    has_any = False
    with zipfile.ZipFile(stream) as archive:
        for member in archive.infolist():
            done = 0
            if member.CRC:
                has_any = True
                with archive.open(member) as entry:
                    while piece := entry.read(_PIECE_NBYTES):  # raises at the end
                        count = min(len(piece), member.compress_size - done)  # of a deflated one, roughly
                        done += count
                        on_bytes(count)
            on_bytes(member.compress_size - done)
    return has_any


def inflate(stream: BinaryIO, nbytes: int) -> Iterator[bytes]:
    """The next ``nbytes`` (deflated) bytes of the stream, inflated, in pieces of at most 256 KiB.

    Ends where the data ends. Raises zlib.error for what is not deflated data, or ends within it.
    """
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    waiting = b""
    while not inflater.eof:
        if not waiting:
            waiting = stream.read(min(nbytes, _PIECE_NBYTES))
            nbytes -= len(waiting)
        piece = inflater.decompress(waiting, _PIECE_NBYTES)
        if not waiting and not piece:
            raise zlib.error("the deflated data ends too early")
        waiting = inflater.unconsumed_tail
        if piece:
            yield piece
