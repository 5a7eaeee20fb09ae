"""What a file is by its first bytes, whatever its name says: which reader is right for it, or why none is.

Knows the beginnings of formats. A download often ends with something else under the right name: a pointer, a web page,
the answer of a server, an archive of the files. Then "the header is wrong" helps nobody; what the file is does.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from typing import Literal

from odewei.errors import CheckpointError, CorruptCheckpointError
from odewei.loaders.base import CheckpointFile
from odewei.loaders.file_loader import open_header
from odewei.loaders.remote_file import RemoteFile

__all__ = ["LEGACY_MAGIC", "LEGACY_STARTS", "UNFINISHED", "ZIP_START", "FileKind", "kind_of", "look_at", "unfinished"]

Reader = Literal["safetensors", "torch", "numpy", "gguf", "index"]

ZIP_START = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_STARTS = tuple(
    start + b"\x8a\x0a" + LEGACY_MAGIC.to_bytes(10, "little") for start in (b"\x80\x02", b"\x80\x03", b"")
)
"""How the magic number begins a file, in the usual protocols."""

UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp")
"""What programs that download put behind the name until they are done."""

_HEAD_NBYTES = 4096
_MANY_ZEROS = 512
_MAX_HEADER_NBYTES = 100_000_000  # of safetensors
_AGAIN = "Download the file again"
_LOG_IN = (
    "Download the file itself, with the client of the model hub or from its 'resolve' address; log in and accept the "
    "licence first if the model asks for that"
)
_READERS: dict[Reader, tuple[str, str]] = {
    "safetensors": ("a safetensors file", "SafetensorsLoader"),
    "torch": ("a file of torch.save", "TorchLoader"),
    "numpy": ("a file of NumPy", "NumpyLoader"),
    "gguf": ("a GGUF file", "GgufLoader"),
    "index": ("an index of shards", "ShardedWeightsLoader"),
}
_PACKED = (
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
    (b"\xfd7zXZ\x00", "xz", "unxz"),
    (b"BZh", "bzip2", "bunzip2"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip", "7z x"),
    (b"Rar!", "RAR", "unrar x"),
)
_OTHERS = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras, .h5)", "Convert it with the library that wrote it"),
    (b"lmgg", "a file of ggml from before GGUF", "Convert it to GGUF with llama.cpp"),
    (b"fmgg", "a file of ggml from before GGUF", "Convert it to GGUF with llama.cpp"),
    (b"tjgg", "a file of ggml from before GGUF", "Convert it to GGUF with llama.cpp"),
    (b"%PDF", "a PDF document", "Name the file of the weights"),
    (b"\x89PNG", "a picture", "Name the file of the weights"),
    (b"\xff\xd8\xff", "a picture", "Name the file of the weights"),
)


@dataclass(frozen=True, slots=True)
class FileKind:
    """What a file is, in words, and the kind of reader for it; None, and what to do about it, if there is none."""

    what: str
    reader: Reader | None = None
    cure: str = _AGAIN
    is_whole: bool = True

    def error(self, file: CheckpointFile, wanted: str = "weights") -> CheckpointError:
        """What to raise where ``wanted`` was expected in the file."""
        cure = self.cure
        if self.reader is not None:
            cure = f"Use {_READERS[self.reader][1]}, or open_checkpoint, which looks at what a file is"
        kind = CheckpointError if self.is_whole else CorruptCheckpointError
        return kind(f"this is {self.what}, not {wanted}", file=str(file.path), cure=cure)


def unfinished(name: str) -> str | None:
    """The name that a file will have when its download is done; None if its name does not say that it is not."""
    ending = next((ending for ending in UNFINISHED if name.lower().endswith(ending)), None)
    return None if ending is None else name[: -len(ending)]


def look_at(file: CheckpointFile) -> FileKind | None:
    """What the file is; None where its first bytes do not tell. Raises CheckpointError if it cannot be read."""
    if isinstance(file, RemoteFile):
        return None  # its reader asks for more than the first bytes at once
    with open_header(file) as stream:
        head = stream.read(_HEAD_NBYTES)
        if not head.startswith(ZIP_START):
            return kind_of(head, file.size)
        try:
            with zipfile.ZipFile(stream) as archive:
                return _of_archive([member.orig_filename for member in archive.infolist()])
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, OSError):
            return None  # cut short, or worse: its reader says how


def kind_of(head: bytes, nbytes: int) -> FileKind | None:
    """What a file of ``nbytes`` bytes that begins with ``head`` is. Pure."""
    if not nbytes:
        return FileKind(
            "an empty file (truncated: expected at least 8 bytes, it has 0)",
            is_whole=False,
            cure="Download the file again, or copy it again: that did not finish",
        )
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return FileKind(
            "a pointer of git-LFS, which stands for the file",
            cure="Fetch the file itself: git lfs pull in the repository, or download it with the hub's client",
        )
    for start, what, cure in _OTHERS:
        if head.startswith(start):
            return FileKind(what, cure=cure)
    for start, name, program in _PACKED:
        if head.startswith(start):
            return FileKind(f"a file packed with {name}", cure=f"Unpack it first ({program})")
    if head[257:262] == b"ustar":
        return FileKind("a tar archive", cure="Unpack it first (tar -xf), and name the folder or file that was in it")
    return _of_weights(head, nbytes) or _of_text(head)


def _of_weights(head: bytes, nbytes: int) -> FileKind | None:
    """The formats that are read."""
    reader: Reader | None = None
    if head.startswith(ZIP_START):
        return FileKind("a zip archive, as torch.save writes them", "torch")
    if head.startswith(LEGACY_STARTS):
        reader = "torch"
    elif head.startswith((b"\x93NUMPY", b"PK\x05\x06")):
        reader = "numpy"
    elif head.startswith(b"GGUF"):
        reader = "gguf"
    elif 2 <= int.from_bytes(head[:8], "little") <= _MAX_HEADER_NBYTES and head[8:9] == b"{":
        reader = "safetensors"
    if reader is not None:
        return FileKind(_READERS[reader][0], reader)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return FileKind(
            "a pickle that torch.save has not written; it was not run",
            cure="Load it where you trust it, and save its tensors with torch.save or safetensors",
        )
    if len(head) >= _MANY_ZEROS and not head.strip(b"\0"):
        return FileKind("zeros where a header should be: an unfinished download or copy", is_whole=False)
    return None


def _of_text(head: bytes) -> FileKind | None:
    """Pages, answers of servers, other text."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<script")):
        return FileKind("a web page (HTML)", cure=_LOG_IN)
    if start.startswith((b"<?xml", b"<error")):
        return FileKind(f"the answer of a server (XML: {_shown(head)})", cure=_LOG_IN)
    if not _is_text(head):
        return None
    if start.startswith((b"{", b"[")):
        if b'"weight_map"' in head:
            return FileKind("an index of shards", "index")
        return FileKind(f"a JSON text ({_shown(head)})", cure=f"Name the file of the weights. {_LOG_IN}")
    return FileKind(f"a text ({_shown(head)})", cure=f"Name the file of the weights. {_LOG_IN}")


def _of_archive(names: list[str]) -> FileKind | None:
    """What a zip archive with these entries is."""
    ends = [name.rpartition("/")[2].lower() for name in names if not name.endswith("/")]
    if not ends:
        return None  # it begins with an entry that its directory does not have
    if "data.pkl" in ends:
        return FileKind("a file of torch.save", "torch")
    if all(end.endswith(".npy") for end in ends):
        return FileKind("an archive of NumPy", "numpy")
    shown = ", ".join(name[:60] for name in names[:4]) + (", ..." if len(names) > 4 else "")
    return FileKind(f"a zip archive of other files ({shown})", cure="Unpack it first (unzip), and name what was in it")


def _is_text(head: bytes) -> bool:
    """Whether it could be a text, as far as its first bytes go."""
    return len(head) >= 8 and all(byte >= 0x20 or byte in b"\t\r\n\f" for byte in head) and _decodes(head)


def _decodes(head: bytes) -> bool:
    try:
        head[:-3].decode()  # a letter may be cut at the end
    except UnicodeDecodeError:
        return False
    return True


def _shown(head: bytes) -> str:
    text = " ".join(head[:200].decode("utf-8", "replace").split())
    return repr(text if len(text) <= 80 else f"{text[:80]}…")
