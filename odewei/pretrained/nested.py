"""From a folder around a checkpoint to the checkpoint's own: the hub's cache of a repository, or a folder in a folder.

Knows names of files and folders only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from odewei.errors import CheckpointNotFoundError

__all__ = ["settle"]

_log = logging.getLogger("odewei")
_DEPTH = 2
_MOST_ENTRIES = 200
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".npz")


def settle(folder: Path, revision: str | None, subfolder: str, marks: Sequence[str]) -> Path:
    """The folder itself, or the only one in it, at most two folders deeper, that has a file of ``marks``.

    Of the hub's cache it is the snapshot of ``revision``, or the main one. Raises CheckpointNotFoundError where there
    are several.
    """
    if _has(folder / subfolder, (*marks, "config.json", "model_index.json", "adapter_config.json")):
        return folder
    if (folder / "snapshots").is_dir():
        found = _snapshot(folder, revision)
        _log.info("%s is a repository in the cache of the hub: its snapshot %s is read", folder, found.name)
        return found
    if any(name.suffix in _WEIGHTS for name in _few(folder)):
        return folder  # a checkpoint that lacks its configuration, which is said later
    inner = list(_inside(folder, subfolder, marks, _DEPTH))
    if len(inner) > 1:
        told = ", ".join(str(one.relative_to(folder)) for one in inner[:8]) + ", ..." * (len(inner) > 8)
        raise CheckpointNotFoundError(
            f"the folder is no checkpoint, but {len(inner)} of the folders in it are: {told}",
            file=str(folder),
            cure="Name one of them",
        )
    if not inner:
        return folder
    found = _snapshot(inner[0], revision) if (inner[0] / "snapshots").is_dir() else inner[0]
    _log.info("%s is read: it is the only checkpoint in the folder %s", found, folder)
    return found


def _inside(folder: Path, subfolder: str, marks: Sequence[str], depth: int) -> Iterator[Path]:
    for entry in _few(folder):
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        if _has(entry / subfolder, marks) or (entry / "snapshots").is_dir():
            yield entry
        elif depth > 1:
            yield from _inside(entry, subfolder, marks, depth - 1)


def _snapshot(repository: Path, revision: str | None) -> Path:
    """The snapshot of the revision: a commit, or what a branch or tag is at."""
    snapshots = sorted(entry for entry in (repository / "snapshots").iterdir() if entry.is_dir())
    commit = revision or "main"
    at = repository / "refs" / commit
    if at.is_file() and at.resolve().is_relative_to((repository / "refs").resolve()):
        commit = at.read_text(encoding="utf-8", errors="replace").strip()
    for snapshot in snapshots:
        if snapshot.name == commit:
            return snapshot
    if revision is None and len(snapshots) == 1:
        return snapshots[0]
    told = ", ".join(snapshot.name for snapshot in snapshots[:8]) or "none"
    raise CheckpointNotFoundError(
        f"the cache of this repository has no snapshot of {revision or 'main'!r}; there are: {told}",
        file=str(repository),
        cure="Give one of them as revision=, or download the repository again",
    )


def _has(folder: Path, marks: Sequence[str]) -> bool:
    return any((folder / mark).is_file() for mark in marks)


def _few(folder: Path) -> list[Path]:
    """What is in the folder, in the order of names; nothing of one that is far larger than any checkpoint's."""
    if not folder.is_dir():
        return []
    entries = []
    for entry in folder.iterdir():
        entries.append(entry)
        if len(entries) > _MOST_ENTRIES:
            return []
    return sorted(entries)
