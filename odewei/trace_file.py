"""The file that keeps the order of a model's layers beside its checkpoint.

Knows files and names. It is JSON, ``{"format": "odewei-trace", "version": 1, "modules": [name, ...], "order": [index,
...]}``: ``order`` has indexes into ``modules``, which are distinct. Nothing in it is trusted.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from odewei.errors import CheckpointError, TraceError
from odewei.loaders.base import CheckpointFile
from odewei.loaders.file_loader import open_header
from odewei.loaders.json_pairs import no_duplicates
from odewei.trace_map import LONGEST

__all__ = ["parse_trace", "read_trace", "trace_path", "write_trace"]

_FORMAT, _VERSION = "odewei-trace", 1
_MAX_NBYTES = 1 << 27
_MAX_VALUES = 2 * LONGEST + 1024  # before anything is made of them
_CURE = "Save it again with odewei.save_trace, or delete it"


def trace_path(place: Path) -> Path:
    """Where the order is kept for a checkpoint that begins at ``place``."""
    return place.with_name(f"{place.name}.odewei-trace.json")


def write_trace(path: Path, modules: Sequence[str]) -> None:
    """Write the order, or leave what is there as it is. Raises TraceError."""
    if len(modules) > LONGEST:
        raise TraceError(
            f"an order of {len(modules)} modules is too long to be kept", cure=f"Trace one pass: at most {LONGEST}"
        )
    index = {name: number for number, name in enumerate(dict.fromkeys(modules))}
    order = [index[name] for name in modules]
    content = {"format": _FORMAT, "version": _VERSION, "modules": list(index), "order": order}
    text = json.dumps(content, separators=(",", ":")).encode()
    unfinished = path.with_name(f".odewei-trace-{secrets.token_hex(8)}")
    try:
        try:
            with open(unfinished, "xb") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
            raise
    except (OSError, ValueError) as error:
        raise TraceError(
            f"the order of the layers cannot be saved: {getattr(error, 'strerror', None) or error}",
            file=str(path),
            cure="Pass save_trace and load_trace the path of a file in a folder that this user may write to",
        ) from error


def read_trace(path: Path) -> tuple[str, ...]:
    """The names of the modules in the order of entering. Raises TraceError; no file at all is one too."""
    try:
        file = CheckpointFile.stat(path)
        if file.size > _MAX_NBYTES:
            raise TraceError(f"a file of {file.size} bytes is no saved order", file=str(path), cure=_CURE)
        with open_header(file) as stream:
            text = stream.read(file.size)
    except CheckpointError as error:
        raise TraceError(
            f"the saved order of the layers cannot be read: {error.problem}",
            file=str(path),
            cure="Check the path, or save it with odewei.save_trace first",
        ) from error
    try:
        return parse_trace(text)
    except (ValueError, RecursionError) as error:
        raise TraceError(f"the saved order of the layers is damaged: {error}", file=str(path), cure=_CURE) from error


def parse_trace(text: bytes) -> tuple[str, ...]:
    """The order in the content of a file. Pure. Raises ValueError (RecursionError for JSON that is too deep)."""
    if sum(map(text.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise ValueError(f"it has more than {_MAX_VALUES} values")
    found = json.loads(text.decode("utf-8"), object_pairs_hook=no_duplicates)
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise ValueError(f"it does not say format {_FORMAT!r}")
    if found.get("version") != _VERSION:
        raise ValueError(f"its version is {str(found.get('version'))[:50]}, this odewei reads version {_VERSION}")
    modules, order = found.get("modules"), found.get("order")
    if not isinstance(modules, list) or not all(isinstance(name, str) for name in modules):
        raise ValueError("its modules are not a list of names")
    if len(set(modules)) != len(modules):
        raise ValueError("a module occurs twice in its modules")
    if not isinstance(order, list) or len(order) > LONGEST:
        raise ValueError(f"its order is not a list of at most {LONGEST} numbers")
    if not all(type(number) is int and 0 <= number < len(modules) for number in order):
        raise ValueError("its order has something that is no index into its modules")
    return tuple(modules[number] for number in order)
