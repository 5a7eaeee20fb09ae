"""What the demonstration needs beside odewei: other packages, and room on the disk. Each lack is one clear error."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from odewei.errors import OdeweiError
from odewei.scheduler.budget import format_nbytes

__all__ = ["default_cache_dir", "need_disk", "need_folder", "need_package"]

_DISK_RESERVE_BYTES = 64 * 1024**2


def need_package(module: str, cure: str) -> Path:
    """The folder of an installed package, which is not imported. Raises OdeweiError with ``cure`` if it is missing."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise OdeweiError(f"the package {module} is not installed", cure=cure)
    return Path(spec.submodule_search_locations[0])


def need_disk(folder: Path, nbytes: int, cure: str) -> None:
    """Raise OdeweiError unless the disk that ``folder`` is on (or will be on) has room for ``nbytes`` more."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes + _DISK_RESERVE_BYTES:
        raise OdeweiError(
            f"the disk has {format_nbytes(free)} free, {format_nbytes(nbytes)} are needed", file=str(folder), cure=cure
        )


def need_folder(folder: Path, cure: str) -> None:
    """Make ``folder`` if it is not there. Raises OdeweiError unless files can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OdeweiError(f"the folder cannot be made ({error.strerror})", file=str(folder), cure=cure) from error
    if not os.access(folder, os.W_OK):
        raise OdeweiError("the folder cannot be written to", file=str(folder), cure=cure)


def default_cache_dir() -> Path:
    """Where checkpoints that can be made again are kept: ``$XDG_CACHE_HOME/odewei``, else ``~/.cache/odewei``.

    A relative ``XDG_CACHE_HOME`` is ignored, as the XDG Base Directory Specification asks.
    """
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (configured if configured.is_absolute() else Path.home() / ".cache") / "odewei"
