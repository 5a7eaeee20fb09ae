"""What a checkpoint says about itself: the seam between files and everything else.

Knows files, offsets, dtypes. Knows nothing of modules, streams, threads or asyncio. A loader answers two questions:
where are the bytes of these weights (:meth:`WeightsLoader.locate`), and, for weights that are not in a file as they
are, put them here (:meth:`WeightsLoader.read_into`).
"""

from __future__ import annotations

import itertools
import math
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from odewei.errors import CheckpointError, CheckpointNotFoundError, OptionsError, WeightReadError
from odewei.loaders.file_identity import ctime_to_keep, has_unsteady_ctime, is_still
from odewei.loaders.names import Names, Rename
from odewei.loaders.remote_path import AnyPath, RemotePath

__all__ = ["CheckpointFile", "Span", "WeightInfo", "WeightPart", "WeightsLoader"]


@dataclass(frozen=True, slots=True)
class CheckpointFile:
    """A file as it was when its header was read, so that a change under a running model is noticed.

    ``size`` is in bytes, ``mtime_ns`` in nanoseconds since the epoch; ``path`` is absolute. A remote one is a
    ``RemoteFile``, which cannot be opened but reads.
    """

    path: AnyPath
    size: int
    mtime_ns: int
    inode: int
    ctime_ns: int = field(default=0, compare=False, kw_only=True)
    """When it was last changed in any way; 0 if that would not tell a later change from it."""

    @classmethod
    def stat(cls, path: AnyPath) -> CheckpointFile:
        """The file at ``path`` as it is now; nothing is opened. A remote one is as its loader saw it first.

        Raises CheckpointNotFoundError if there is none, CheckpointError for what is not a regular file: to open a
        pipe or a device can block or have effects.
        """
        if isinstance(path, RemotePath):
            return path.stat()
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _not_found(path) from error
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"a file of the checkpoint cannot be looked at: {getattr(error, 'strerror', None) or error}",
                file=str(path),
                cure="Check the path, and that this user may read it",
            ) from error
        if stat.S_ISDIR(found.st_mode):
            raise CheckpointError(
                "a file was expected here, this is a folder",
                file=str(path),
                cure="Name a file in it, or use open_checkpoint, which picks one",
            )
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(
                "a file of the checkpoint is not a regular file (but a pipe, a socket or a device)",
                file=str(path),
                cure="Copy the weights into a file first",
            )
        return cls(path.absolute(), found.st_size, found.st_mtime_ns, found.st_ino, ctime_ns=ctime_to_keep(found))

    def check_unchanged(self, fd: int, *, weight: str | None = None, at_path: bool = True) -> None:
        """Raise WeightReadError (naming ``weight``) if the open file ``fd`` is not the file whose header was read, or,
        ``at_path``, is not at its path any more: then another one may be there, with which the files still to be opened
        belong.
        """
        now = os.fstat(fd)
        if not self._is_still(now, lambda: os.fstat(fd)):
            raise self._changed(
                f"changed while the model was using it ({self.size} bytes then, {now.st_size} now)", weight
            )
        if not at_path:
            return
        try:
            there = os.stat(self.path)
            is_there = there.st_ino in (self.inode, now.st_ino) or self._is_still(there, lambda: os.stat(self.path))
        except OSError as error:
            raise self._changed(f"taken away while the model was using it ({error.strerror})", weight) from error
        if not is_there:
            raise self._changed("replaced by another one while the model was using it", weight)

    def _is_still(self, now: os.stat_result, look: Callable[[], os.stat_result]) -> bool:
        if (now.st_size, now.st_mtime_ns, now.st_ino) == (self.size, self.mtime_ns, self.inode):
            return True
        return is_still(self.path, self.size, self.mtime_ns, self.inode, self.ctime_ns, now, look)

    @staticmethod
    def last_change(fd: int) -> int:
        """When an open file was last written to, renamed, linked or given other times: nanoseconds, for comparing only.

        Who puts back what was there, the time of writing included, cannot hide it from who was reading meanwhile.
        """
        return os.fstat(fd).st_ctime_ns

    @staticmethod
    def was_touched(fd: int, since: int) -> bool:
        """Whether something was done to an open file after ``last_change`` gave ``since``."""
        return os.fstat(fd).st_ctime_ns != since and not has_unsteady_ctime(lambda: os.fstat(fd))

    @contextmanager
    def steady(self, fd: int, *, weight: str | None = None) -> Iterator[None]:
        """What is read from the open file ``fd`` meanwhile is of the file whose header was read, or WeightReadError
        (naming ``weight``) is raised at the end.
        """
        self.check_unchanged(fd, weight=weight)
        since = self.last_change(fd)
        yield
        self.check_unchanged(fd, weight=weight)
        if self.was_touched(fd, since):
            raise self.touched(weight)

    def touched(self, weight: str | None = None) -> WeightReadError:
        """What to raise when somebody did something to the file while it was read, though it looks as before."""
        return self._changed("changed and put back while it was being read", weight)

    def _changed(self, how: str, weight: str | None) -> WeightReadError:
        return WeightReadError(
            f"the file was {how}",
            weight=weight,
            file=str(self.path),
            cure="Put the original file back, or build the model again from the new one; a model is best saved to "
            "another folder than the one that it streams from",
        )


def _not_found(path: Path) -> CheckpointNotFoundError:
    """What to raise for a path that leads to no file."""
    problem, cure = "a file of the checkpoint does not exist", "Check the path, or download the checkpoint again"
    if os.path.islink(path):
        problem = f"a file of the checkpoint is a link to {os.readlink(path)[:500]!r}, which does not exist"
        cure = "Download the checkpoint again: the cache that the link leads into has lost the file, or was moved"
    elif (parent := next((one for one in path.parents if os.path.exists(one)), None)) and not parent.is_dir():
        problem = f"a file of the checkpoint does not exist: {str(parent)!r}, where it should be, is a file itself"
        cure = f"Name {str(parent)!r}, if that is the checkpoint"
    return CheckpointNotFoundError(problem, file=str(path), cure=cure)


@dataclass(frozen=True, slots=True)
class Span:
    """Where bytes are: ``nbytes`` bytes from ``offset`` on in ``file``."""

    file: CheckpointFile
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class WeightInfo:
    """One tensor of a checkpoint, as stored.

    ``stride`` is None for a contiguous tensor, else in elements. ``span`` is None when the bytes are not in a file as
    they are; then the loader's ``read_into`` delivers them. The stored bytes begin with the tensor's first element.
    ``name`` is the checkpoint's, also where a loader has the weight under another.

    A weight that is gathered from several has ``parts``, no span and no stride; the parts fill it, each element once.
    ``wanted`` is the dtype that this weight is to be cast to, where the loader knows it of each by itself; it counts
    where neither the ``dtype`` of the model's options nor that of the loader is given.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    span: Span | None
    stride: tuple[int, ...] | None = None
    parts: tuple[WeightPart, ...] = ()
    wanted: torch.dtype | None = None

    @property
    def file(self) -> str | None:
        """The file that the weight, or its first part that is in a file, is in: for messages."""
        if self.span is not None:
            return str(self.span.file.path)
        return next((part.source.file for part in self.parts if part.source.file is not None), None)

    @property
    def nbytes(self) -> int:
        """Bytes from the first to the last stored element; more than numel * itemsize when strides leave gaps."""
        if 0 in self.shape:
            return 0
        if self.stride is None:
            count = 1
            for size in self.shape:
                count *= size
        else:
            count = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return count * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class WeightPart:
    """Where one weight of the checkpoint goes in a gathered one of the same dtype.

    Its element at (i, j, ...) goes to element ``offset + i * stride[0] + j * stride[1] + ...`` of the gathered weight,
    which is contiguous.
    """

    source: WeightInfo
    offset: int
    stride: tuple[int, ...]

    @property
    def is_one_run(self) -> bool:
        """Whether the source's bytes, as they are, are one stretch of the gathered weight's."""
        return self.source.stride is None and self.run_count <= 1

    @property
    def run_count(self) -> int:
        """How many stretches ``runs`` gives."""
        return math.prod(self.source.shape[: self._outer])

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """The stretches of a contiguous source: (first byte in it, first byte in the gathered weight, bytes)."""
        shape, outer, item = self.source.shape, self._outer, self.source.dtype.itemsize
        nbytes = math.prod(shape[outer:]) * item
        for number, index in enumerate(itertools.product(*map(range, shape[:outer]))):
            at = self.offset + sum(place * step for place, step in zip(index, self.stride[:outer], strict=True))
            yield number * nbytes, at * item, nbytes

    @property
    def _outer(self) -> int:
        """How many of the first dimensions it takes to get from one stretch to the next."""
        expected = 1
        for outer in range(len(self.stride), 0, -1):
            size = self.source.shape[outer - 1]
            if size != 1 and self.stride[outer - 1] != expected:
                return outer
            expected *= size
        return 0


class WeightsLoader(ABC):
    """A checkpoint whose weights are known by name before they are read.

    ``device`` and ``dtype`` are wishes of whoever made the loader: the execution device, and the floating dtype to
    cast to (None: as stored). ``rename`` and ``prefix`` lead from the checkpoint's names to the model's, see ``Names``.
    A loader is itself a plain callable ``(module_name, weight_names) -> {name: tensor}``.
    Methods may be called from any thread.
    """

    def __init__(
        self,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        rename: Rename | None = None,
        prefix: str = "",
    ) -> None:
        if dtype is not None and not (dtype.is_floating_point and dtype.itemsize >= 2):
            raise OptionsError(
                f"dtype={dtype} is not something that weights can be cast to on the way",
                cure="Use torch.float16, bfloat16, float32 or float64, or None for the dtypes of the checkpoint",
            )
        self.device = None if device is None else torch.device(device)
        self.dtype = dtype
        self._names = Names(rename, prefix)

    @property
    def place(self) -> Path | None:
        """The file that the checkpoint begins at; None if it is in no file, so that nothing can be kept beside it."""
        return None

    @property
    def is_as_loaded(self) -> bool:
        """Whether the weights are what the model's ``load_state_dict`` makes of them: then its hooks do not run."""
        return False

    def values(self) -> Mapping[str, object]:
        """What the checkpoint holds besides tensors, by the model's names: a module's extra state, an epoch."""
        return {}

    def metadata(self) -> Mapping[str, Mapping[str, object]]:
        """Versions that ``state_dict()`` kept for each module, by the module's name; empty where there are none."""
        return {}

    @abstractmethod
    def weights(self) -> Mapping[str, WeightInfo]:
        """Every weight of the checkpoint by the model's name. Reads headers at most, never weights; the answer does not
        change. It may be a ``KnownWeights``, which raises where somebody asks for a tensor that cannot be read.

        Raises CheckpointError when headers or indexes cannot be used.
        """

    @abstractmethod
    def read_into(self, info: WeightInfo, buffer: memoryview) -> None:
        """Fill ``buffer`` (exactly ``info.nbytes`` writable bytes) with the stored bytes of one weight.

        The plain, synchronous way: one weight at a time, called in a reader thread. Weights that have a span are
        usually read faster, without this method. Raises WeightReadError.
        """

    def locate(self, names: Iterable[str]) -> dict[str, WeightInfo]:
        """Those of ``names`` that the checkpoint has, with the place of their bytes.

        Raises CheckpointError for one that it has, but not as a tensor that can be read.
        """
        known = self.weights()
        return {name: known[name] for name in names if name in known}

    def __call__(self, module_name: str, weight_names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Read the named weights into fresh host memory, as stored or in ``self.dtype``; unknown names are left out."""
        from odewei.loaders.tensors import read_tensor

        return {name: read_tensor(self, info) for name, info in self.locate(weight_names).items()}

    def close(self) -> None:  # noqa: B027, most loaders keep nothing open
        """Close what is open. May be called twice; the loader opens again what it needs when it is used again."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__} device={self.device} dtype={self.dtype}>"
