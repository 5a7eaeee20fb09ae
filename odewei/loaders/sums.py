"""SHA-256 sums of the files of a checkpoint: where they are kept, and whether a file has the one it should have.

Knows files and bytes. A sum is looked for in this order, each in the file's own folder and then in two above it:

1. ``SHA256SUMS``, as ``sha256sum`` writes it and ``sha256sum --check`` reads it, names relative to its folder;
2. the cache of the Hugging Face hub: a file that git keeps by LFS is a link to a blob whose name is its SHA-256. A name
   of 40 digits is the id of a git blob, a SHA-1, and no sum;
3. ``.cache/huggingface/download/NAME.metadata``, which the hub's client writes where it downloads into a folder: its
   second line is the name that the blob would have.

A sum proves as much as the place it comes from: against damage all three serve; against somebody who can write to the
folder only a SHA256SUMS that was fetched from elsewhere does.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, NoReturn

from odewei.errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, OptionsError
from odewei.loaders.base import CheckpointFile

__all__ = [
    "SUMS_NAME",
    "KnownSum",
    "Verify",
    "as_verify",
    "check_sum",
    "find_sum",
    "format_sum",
    "hash_file",
    "read_sums",
    "wrong_sum",
]

Verify = Literal["none", "size", "sha256"]

SUMS_NAME = "SHA256SUMS"
_FOLDERS_ABOVE = 2
_MAX_SUMS_NBYTES = 16 << 20
_MAX_METADATA_NBYTES = 4096
_PIECE_NBYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)")
_ESCAPED = {"\\\\": "\\", "\\n": "\n", "\\r": "\r"}


@dataclass(frozen=True, slots=True)
class KnownSum:
    """The SHA-256 that a file should have, in lower case, and where that is written."""

    sha256: str
    source: Path


def as_verify(value: object) -> Verify:
    """``value`` if it is one that the keyword ``verify`` can have. Raises OptionsError."""
    if value not in ("none", "size", "sha256"):
        raise OptionsError(f"verify={value!r} is not known", cure="Use one of 'none', 'size', 'sha256'")
    return value


def read_sums(path: Path) -> dict[str, str]:
    """The sums in a file such as ``sha256sum`` writes, by name. Raises CheckpointError."""
    file = CheckpointFile.stat(path)
    if file.size > _MAX_SUMS_NBYTES:
        raise CorruptCheckpointError(
            f"a file of {file.size} bytes is no list of sums", file=str(path), cure="Write it with sha256sum"
        )
    try:
        with open(path, "rb") as stream:
            text = stream.read(_MAX_SUMS_NBYTES).decode("utf-8", "surrogateescape")
    except OSError as error:
        raise _unreadable(path, error) from error
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines() if "\r\n" in text else text.split("\n"), 1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            _bad_line(path, number, "is no sum and name as sha256sum writes them")
        escaped, digest, name = match.groups()
        name = re.sub(r"\\[\\nr]", lambda found: _ESCAPED[found[0]], name) if escaped else name
        name = str(PurePosixPath(name))
        if found.setdefault(name, digest.lower()) != digest.lower():
            _bad_line(path, number, f"gives {name[:200]!r} another sum than a line before")
    return found


def format_sum(name: str, sha256: str) -> str:
    """One line of a SHA256SUMS, as sha256sum would write it."""
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{'' if escaped == name else chr(92)}{sha256}  {escaped}\n"


def find_sum(path: Path) -> KnownSum | None:
    """The sum that is kept for the file at ``path``, or None. Raises CheckpointError for a list that cannot be read."""
    path = Path(os.path.abspath(path))
    places = [(folder, path.relative_to(folder).as_posix()) for folder in path.parents[: _FOLDERS_ABOVE + 1]]
    for folder, name in places:
        sums = folder / SUMS_NAME
        if sums != path and sums.is_file() and (digest := read_sums(sums).get(name)) is not None:
            return KnownSum(digest, sums)
    blob = Path(os.path.realpath(path))
    if path.is_symlink() and _SHA256.fullmatch(blob.name):
        return KnownSum(blob.name.lower(), blob)
    for folder, name in places:
        metadata = folder / ".cache" / "huggingface" / "download" / f"{name}.metadata"
        if (digest := _of_metadata(metadata)) is not None:
            return KnownSum(digest, metadata)
    return None


def hash_file(file: CheckpointFile, on_bytes: Callable[[int], object] = lambda nbytes: None) -> str:
    """The SHA-256 of the file's bytes; ``on_bytes`` is told of each piece that was read, with its length.

    Raises CheckpointError, also when the file is not what it was when ``file`` was made, before or after.
    """
    from odewei.loaders.file_loader import open_header

    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE_NBYTES))
    with open_header(file) as stream:
        while count := stream.readinto(buffer):  # type: ignore[attr-defined]
            digest.update(buffer[:count])
            on_bytes(count)
    return digest.hexdigest()


def check_sum(file: CheckpointFile) -> None:
    """Raise CorruptCheckpointError unless the file has the sum that is kept for it, CheckpointError if none is kept.

    A file is read once in a process for this, as long as size, time and inode stay the same. Any thread.
    """
    path = _local(file)
    known = find_sum(path)
    if known is None:
        raise CheckpointError(
            "verify='sha256', and no sum is kept for a file",
            file=str(file.path),
            cure=f"Put a {SUMS_NAME} beside it (`odewei verify --write-sums` makes one), or use verify='size'",
        )
    found = _hashed.of(file)
    if found != known.sha256:
        raise wrong_sum(path, known, found)


def wrong_sum(path: Path, known: KnownSum, found: str) -> CorruptCheckpointError:
    """What to raise, or to report, for a file that has another sum than it should."""
    return CorruptCheckpointError(
        f"the SHA-256 of the file is not the one that {known.source.name!r} has for it: expected {known.sha256}, "
        f"found {found}",
        file=str(path),
        cure="Download the file again",
    )


class _Hashed:
    """The sums that this process has computed, by what tells a file from another and from itself changed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[tuple[int, ...], tuple[threading.Lock, list[str]]] = {}

    def of(self, file: CheckpointFile) -> str:
        """The file's sum; two threads that ask at once read it once."""
        try:
            device = os.stat(file.path).st_dev
        except OSError as error:
            raise _unreadable(_local(file), error) from error
        with self._lock:
            lock, found = self._files.setdefault((device, file.inode, file.size, file.mtime_ns), (threading.Lock(), []))
        with lock:
            if not found:
                found.append(hash_file(file))
            return found[0]


_hashed = _Hashed()


def _local(file: CheckpointFile) -> Path:
    assert isinstance(file.path, Path), "loaders refuse verify='sha256' for remote files"
    return file.path


def _of_metadata(path: Path) -> str | None:
    """The sum in a file that the hub's client has left beside a download, or None."""
    try:
        if CheckpointFile.stat(path).size > _MAX_METADATA_NBYTES:
            return None
        lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    except (CheckpointNotFoundError, CheckpointError, OSError):
        return None  # it is the hub's, not the checkpoint's: one that cannot be read is none
    return lines[1].strip().lower() if len(lines) > 1 and _SHA256.fullmatch(lines[1].strip()) else None


def _bad_line(path: Path, number: int, problem: str) -> NoReturn:
    raise CorruptCheckpointError(
        f"line {number} of the list of sums {problem}", file=str(path), cure="Write it again with sha256sum"
    )


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"the file cannot be read: {error.strerror or error}",
        file=str(path),
        cure="Check that the file is there and that this user may read it",
    )
