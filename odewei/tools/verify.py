"""Whether a checkpoint is whole: every header, every span and, where sums are known, every byte.

Knows files and loaders; nothing of models. The first fault ends nothing: each file is looked at, and the report names
all that is wrong.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from odewei.errors import CheckpointError, CorruptCheckpointError, OdeweiError, OptionsError
from odewei.loaders.base import CheckpointFile, WeightInfo
from odewei.loaders.checkpoint_index import read_index
from odewei.loaders.distributed import NO_TENSOR
from odewei.loaders.file_loader import open_header
from odewei.loaders.folders import METADATA_NAME, Start
from odewei.loaders.known_weights import KnownWeights
from odewei.loaders.numpy_file import NumpyLoader, arrays_in
from odewei.loaders.open_checkpoint import choose, open_checkpoint
from odewei.loaders.remote_path import as_place
from odewei.loaders.sums import SUMS_NAME, KnownSum, find_sum, format_sum, hash_file, read_sums, wrong_sum
from odewei.loaders.torch_file import TorchLoader
from odewei.loaders.weights_file import open_weights_file
from odewei.loaders.zip_members import check_sums
from odewei.tools.verify_report import FileReport, VerifyReport

__all__ = ["FileReport", "OnProgress", "Sums", "VerifyReport", "verify", "write_sums"]

Sums = Literal["beside"] | str | os.PathLike[str] | Mapping[str, str] | None
OnProgress = Callable[[Path, int, int], object]
"""Told of a file that is being read, how many bytes of all files are done, and how many there are."""


def verify(
    path: str | os.PathLike[str], *, sums: Sums = "beside", on_progress: OnProgress | None = None
) -> VerifyReport:
    """Check every header and span of the checkpoint that ``open_checkpoint(path)`` would open, and with ``sums`` every
    byte. The bytes are always read again, in the caller's thread.

    ``sums``: "beside" compares each file with the sum that is kept beside it, if one is (``odewei.loaders.sums`` says
    where), else the entries of an archive (.npz, .pt) with its own; a path names a list as ``sha256sum`` writes it, a
    mapping has hexadecimal SHA-256 sums, both by names relative to the checkpoint's folder, and every file has to be in
    it; None looks at headers and spans only.

    What is wrong with files is in the report. Raises CheckpointError only for what is no checkpoint at all, or a list
    of sums that cannot be read, OptionsError for ``sums`` that are none.
    """
    start = _start(path)
    return VerifyReport(Path(path), _look(start, _lookup(sums, _folder(start)), on_progress))


def write_sums(path: str | os.PathLike[str], *, on_progress: OnProgress | None = None) -> Path:
    """Write the SHA256SUMS of a checkpoint, its index included, into its folder. Returns where.

    Its headers, and sums that are known already, are checked first. Raises CheckpointError if anything is wrong with
    them, OptionsError if there is a SHA256SUMS: what was right once is not replaced by what is there now.
    """
    start = _start(path)
    target = _folder(start) / SUMS_NAME
    if os.path.lexists(target):
        raise OptionsError(f"{target} is there already", cure="Compare with it (odewei verify), or remove it first")
    report = VerifyReport(Path(path), _look(start, _beside, on_progress, hash_all=True))
    if not report.ok:
        raise CorruptCheckpointError(
            f"no sums are written for a checkpoint that is not whole: {report.problems[0]}", file=str(path)
        )
    lines = [format_sum(_name(file.path, target.parent), str(file.sha256)) for file in report.files]
    unfinished = target.with_name(f".{SUMS_NAME}.{os.getpid()}.unfinished")
    try:
        unfinished.write_bytes(os.fsencode("".join(lines)))
        os.link(unfinished, target)  # unlike a rename, it never replaces anything
    except OSError as error:
        raise CheckpointError(
            f"the sums cannot be written: {error.strerror or error}",
            file=str(target),
            cure="Check that this user may write into the checkpoint's folder",
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return target


class _Looked:
    """What is known so far of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: CheckpointFile | None = None
        self.weights: int | None = None
        self.sha256: str | None = None
        self.known: KnownSum | None = None
        self.may_be_archive = False
        self.has_own = False  # sums, of its entries
        self.problems: list[str] = []
        with self.noting():
            self.file = CheckpointFile.stat(path)

    @property
    def nbytes(self) -> int:
        return 0 if self.file is None else self.file.size

    @contextmanager
    def noting(self) -> Iterator[None]:
        """What is wrong becomes a problem of this file."""
        try:
            yield
        except OdeweiError as error:
            self.problems.append(str(error))

    def report(self) -> FileReport:
        source = str(self.known.source) if self.known is not None else str(self.path) if self.has_own else None
        return FileReport(self.path, self.nbytes, self.weights, self.sha256, source, tuple(self.problems))


_Lookup = Callable[[Path], KnownSum | None] | None
"""Where the sum of a file is; None: bytes are not looked at."""


def _look(
    start: Start, lookup: _Lookup, on_progress: OnProgress | None, *, hash_all: bool = False
) -> tuple[FileReport, ...]:
    """Look at all files of the checkpoint: the headers of each, then the bytes of those whose sums are known."""
    found = _headers(start)
    nbytes, done = sum(one.nbytes for one in found), 0
    for one in found:
        before = done

        def on_bytes(count: int, place: Path = one.path) -> None:
            nonlocal done
            done += count
            if on_progress is not None:
                on_progress(place, done, nbytes)

        if one.file is None:
            continue
        with one.noting():
            one.known = None if lookup is None else lookup(one.path)
            if one.known is not None or hash_all:
                one.sha256 = hash_file(one.file, on_bytes)
                if one.known is not None and one.known.sha256 != one.sha256:
                    raise wrong_sum(one.path, one.known, one.sha256)
            if one.known is None and one.may_be_archive and lookup is not None:
                _check_entries(one, on_bytes if one.sha256 is None else lambda count: None)
        done = before + one.nbytes
    return tuple(one.report() for one in found)


def _check_entries(one: _Looked, on_bytes: Callable[[int], object]) -> None:
    """Compare an archive whose header is right with its own sums. Raises CheckpointError."""
    assert one.file is not None
    with open_header(one.file) as stream:
        if stream.read(2) != b"PK":
            return  # a .npy file, or torch's old format
        one.has_own = True
        try:
            one.has_own = check_sums(stream, on_bytes)
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
            raise CorruptCheckpointError(
                f"an entry of the archive does not have its checksum: {error}",
                file=str(one.path),
                cure="Download the file again",
            ) from error


def _headers(start: Start) -> list[_Looked]:
    """Every file of the checkpoint, with what its headers say."""
    if start.kind == "index":
        return _shards(start.path)
    if start.kind == "distributed":
        return _distributed(start.path)
    found = [_Looked(path) for path in (arrays_in(start.path) if start.kind == "arrays" else start.paths)]
    for one in found:
        _open(one)
    if start.kind == "shards" and not any(one.problems for one in found):
        with found[0].noting():
            open_checkpoint(start.path.parent).weights()  # no name twice
    return found


def _distributed(folder: Path) -> list[_Looked]:
    """The metadata and the files beside them; what the headers say of any of them is a problem of the metadata."""
    found = [_Looked(folder / METADATA_NAME)]
    with found[0].noting():
        loader = open_checkpoint(folder)
        known = loader.weights()
        found[0].weights = len(known)
        refused = known.refused.values() if isinstance(known, KnownWeights) else ()
        found[0].problems += [str(error) for error in refused if error.problem != NO_TENSOR]
    return found + [_Looked(path) for path in sorted(folder.iterdir()) if path.suffix == ".distcp"]


def _shards(start: Path) -> list[_Looked]:
    """The index and its shards; a weight that the index promises and a shard lacks is a problem of the shard."""
    first = _Looked(start)
    if first.problems:
        return [first]
    try:
        index = read_index(start, start.parent)
    except OdeweiError as error:
        first.problems.append(str(error))
        return [first]
    found = [first]
    for shard, names in index.by_shard().items():
        assert isinstance(shard, Path), "the folder is local"
        one = _Looked(shard)
        has = _open(one)
        missing = [] if has is None else [name for name in names if name not in has]  # refused ones are there
        if missing:
            shown = ", ".join(map(repr, missing[:5]))
            one.problems.append(
                f"{len(missing)} of the {len(names)} weights that {start.name!r} promises are not in the shard "
                f"(file {str(shard)!r}): {shown}"
            )
        found.append(one)
    return found


def _open(one: _Looked) -> Mapping[str, WeightInfo] | None:
    """The weights of one file, or None, and why in its problems."""
    if one.file is None:
        return None
    try:
        loader = open_weights_file(one.path)
        has = loader.weights()
    except OdeweiError as error:
        one.problems.append(str(error))
        return None
    one.weights = len(has)
    one.may_be_archive = isinstance(loader, NumpyLoader | TorchLoader)
    return has


def _start(path: str | os.PathLike[str]) -> Start:
    """What the checkpoint begins at. Raises CheckpointError, OptionsError for a URL."""
    place = as_place(path)
    if not isinstance(place, Path):
        raise OptionsError("only a local checkpoint can be verified", file=str(place), cure="Download it first")
    return choose(place, deeper=False)  # sums are by names that begin at the folder


def _folder(start: Start) -> Path:
    return start.path if start.kind in ("arrays", "distributed") else start.path.parent


def _name(path: Path, folder: Path) -> str:
    """What a list of sums in ``folder`` calls the file."""
    return path.relative_to(folder).as_posix()


def _beside(path: Path) -> KnownSum | None:
    return find_sum(path)


def _lookup(sums: Sums, folder: Path) -> _Lookup:
    """How the sum of a file is found. Raises CheckpointError, OptionsError."""
    if sums is None:
        return None
    if isinstance(sums, str) and sums == "beside":
        return _beside
    if isinstance(sums, str | os.PathLike):
        source, known = Path(sums), read_sums(Path(sums))
    elif isinstance(sums, Mapping):
        source, known = Path("sums"), {str(name): str(digest).lower() for name, digest in sums.items()}
    else:
        raise OptionsError(
            f"sums={sums!r} is neither a list nor a mapping of sums", cure="Give 'beside', a path, a mapping or None"
        )

    def of(path: Path) -> KnownSum:
        name = _name(path, folder)
        if name not in known:
            raise CheckpointError(
                f"the list of sums {source.name!r} has none for {name!r}",
                file=str(path),
                cure="Give a list with every file of the checkpoint",
            )
        return KnownSum(known[name], source)

    return of
