"""What in a folder is the checkpoint: a file, an index, shards without one, arrays; or a folder further down.

Knows the names that model hubs and libraries give to files. Where only one thing in a folder, or in one folder below,
can be the checkpoint, it is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from odewei.errors import CheckpointError, CheckpointNotFoundError
from odewei.loaders.file_kind import unfinished
from odewei.loaders.remote_path import AnyPath
from odewei.loaders.shard_names import ShardSet, shard_sets
from odewei.loaders.told import tell_once
from odewei.loaders.weights_file import TORCH_SUFFIXES

__all__ = ["INDEX_SUFFIX", "METADATA_NAME", "USUAL_NAMES", "Start", "choose_name", "find_start", "nothing_there"]

INDEX_SUFFIX = ".index.json"
METADATA_NAME = ".metadata"
"""What torch.distributed.checkpoint calls the file that says where everything is."""

USUAL_NAMES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
)
_ONLY_ONE_OF = ((INDEX_SUFFIX,), (".safetensors",), TORCH_SUFFIXES, (".npz",), (".gguf",))
_ARRAYS = ".npy"
_PARTS = ".distcp"
_OF_TRAINING = ("training_args.", "optimizer.", "scheduler.", "scaler.", "rng_state", "random_states")
_MAX_FOLDERS = 200
_MAX_DEPTH = 3  # a cache of a hub: its root, a model, "snapshots", a revision


@dataclass(frozen=True, slots=True)
class Start:
    """What the checkpoint begins at. ``paths`` are the shards of one without an index, else the one file or folder."""

    kind: Literal["file", "index", "shards", "arrays", "distributed"]
    paths: tuple[Path, ...]

    @property
    def path(self) -> Path:
        """The file or folder; of shards the first."""
        return self.paths[0]


def find_start(folder: Path, *, deeper: bool = True) -> Start:
    """What in ``folder`` is the checkpoint, or, if it may lie ``deeper``, in the folders below.

    Raises CheckpointNotFoundError, CheckpointError where several things fit, or some of what belongs there is missing.
    """
    start = _in_folder(folder)
    if start is not None:
        return start
    below = _below(folder, _MAX_DEPTH)
    if below is None or not deeper:
        entries = _entries(folder)
        there = [entry.name for entry in entries if not entry.is_dir()] or [entry.name for entry in entries]
        cure = None if below is None else f"Name the folder below that has one: {str(below.path.parent)!r}"
        raise nothing_there(there, folder, f", *{_ARRAYS}, {METADATA_NAME}", cure)
    tell_once(f"{str(folder)!r} has no checkpoint itself: the one in {str(below.path)!r} is read, the only one below")
    return below


def _in_folder(folder: Path) -> Start | None:
    """What in the folder itself is the checkpoint."""
    for name in USUAL_NAMES:
        if (folder / name).is_file():
            return _start(folder, name)
    names = [entry.name for entry in _entries(folder) if entry.is_file()]
    if METADATA_NAME in names and any(name.lower().endswith(_PARTS) for name in names):
        return Start("distributed", (folder,))
    found = choose_name(names, folder)
    if isinstance(found, ShardSet):
        return Start("shards", tuple(folder / name for name in found.in_order()))
    if found is not None:
        return _start(folder, found)
    return Start("arrays", (folder,)) if any(name.lower().endswith(_ARRAYS) for name in names) else None


def choose_name(names: Sequence[str], folder: AnyPath) -> str | ShardSet | None:
    """The file that the checkpoint begins at, or its shards, if they are all there.

    Raises CheckpointError if several could be it, CheckpointNotFoundError if shards are missing.
    """
    names = [name for name in names if not name.lower().startswith(_OF_TRAINING)]
    for endings in _ONLY_ONE_OF:
        fitting = [name for name in names if name.lower().endswith(endings)]
        sets, others = shard_sets(fitting)
        if len(sets) + len(others) > 1:
            shown = [one.pattern for one in sets] + others
            raise CheckpointError(
                f"the folder has {len(shown)} files that could be the checkpoint: {_brief(shown)}",
                file=str(folder),
                cure="Name the file",
            )
        for one in sets:
            _check_complete(one, folder)
            return one
        for name in others:
            return name
    return None


def _check_complete(found: ShardSet, folder: AnyPath) -> None:
    """Raise CheckpointError unless every shard is there, and no other."""
    if found.pattern.endswith(".gguf"):
        raise CheckpointError(
            f"a GGUF checkpoint in several files ({found.pattern}) is not read",
            file=str(folder),
            cure="Put its files together with llama.cpp: llama-gguf-split --merge FIRST OUT",
        )
    if found.missing:
        lacking = ", ".join(map(str, found.missing[:8])) + (", ..." if len(found.missing) > 8 else "")
        links = [name for name in found.names.values() if isinstance(folder, Path) and not (folder / name).exists()]
        raise CheckpointNotFoundError(
            f"of the {found.count} shards {found.pattern!r} these are missing: {lacking} (there is no index either)",
            file=str(folder / links[0] if links else folder),
            cure="Download the missing shards",
        )
    if found.surplus:
        raise CheckpointError(
            f"there are more shards {found.pattern!r} than their names say: {_brief(found.surplus)}",
            file=str(folder),
            cure="Keep the files of one checkpoint in the folder",
        )


def nothing_there(names: Sequence[str], folder: AnyPath, also: str, cure: str | None = None) -> CheckpointNotFoundError:
    """What to raise for a folder without a checkpoint; ``names`` is what it has."""
    partly = [name for name in names if unfinished(name) is not None]
    broken = [name for name in names if isinstance(folder, Path) and not (folder / name).exists()]
    if cure is not None:
        pass
    elif partly:
        cure = f"A download did not finish ({partly[0]}): run it again, it goes on"
    elif broken:
        cure = f"{broken[0]!r} is a link to a file that does not exist: download the checkpoint again"
    else:
        cure = "Name the folder or file of the checkpoint, or download it"
    return CheckpointNotFoundError(
        f"the folder has no checkpoint: looked for {', '.join(USUAL_NAMES[:4])}, *{INDEX_SUFFIX}, *.safetensors, "
        f"*{', *'.join(TORCH_SUFFIXES)}, *.npz, *.gguf{also}; "
        f"there {'is' if len(names) == 1 else 'are'} {_brief(names)}",
        file=str(folder),
        cure=cure,
    )


def _start(folder: Path, name: str) -> Start:
    return Start("index" if name.endswith(INDEX_SUFFIX) else "file", (folder / name,))


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise CheckpointError(
            f"the folder cannot be looked into: {error.strerror}", file=str(folder), cure="Check that this user may"
        ) from error


def _below(folder: Path, depth: int) -> Start | None:
    """The only checkpoint in the folders below, so many levels deep. Raises CheckpointError for several."""
    revisions = folder / "snapshots"
    main = _revision(folder / "refs" / "main", revisions)
    if main is not None:
        return _in_folder(main) or _below(main, 1)
    if revisions.is_dir():
        folder = revisions
    inners = [entry for entry in _entries(folder) if entry.is_dir() and not entry.name.startswith(".")]
    found: list[tuple[Path, Start | CheckpointError]] = []
    for inner in inners[:_MAX_FOLDERS]:
        try:
            start = _in_folder(inner) or (_below(inner, depth - 1) if depth > 1 else None)
        except CheckpointError as error:
            found.append((inner, error))
        else:
            found += [] if start is None else [(inner, start)]
    if len(found) > 1:
        raise CheckpointError(
            f"the folder has no checkpoint itself, but {len(found)} folders below have: "
            f"{_brief([inner.name for inner, _ in found])}",
            file=str(folder),
            cure=f"Name one of them, such as {str(found[0][0])!r}",
        )
    for _, only in found:
        if isinstance(only, CheckpointError):
            raise only
        return only
    return None


def _revision(reference: Path, revisions: Path) -> Path | None:
    """The folder of the revision that a hub's cache calls main."""
    try:
        name = reference.read_text(encoding="utf-8")[:200].strip()
    except (OSError, ValueError):
        return None
    named = revisions / name
    return named if name and "/" not in name and ".." not in name and named.is_dir() else None


def _brief(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8]) or "no files"
    return f"{shown} and {len(names) - 8} more" if len(names) > 8 else shown
