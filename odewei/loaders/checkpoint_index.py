"""The index of a checkpoint in several files (``*.index.json``): which weight is in which file.

Pure apart from reading the index itself. Names of files in an index are not trusted: they are checked as text, before
anything is opened. A symbolic link that lies in the folder is followed; the caches of model hubs are made of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PureWindowsPath
from typing import NoReturn

from odewei.errors import CheckpointNotFoundError, CorruptCheckpointError, UnsafeCheckpointError
from odewei.loaders.base import CheckpointFile
from odewei.loaders.file_kind import kind_of
from odewei.loaders.file_loader import open_header
from odewei.loaders.json_pairs import JsonText
from odewei.loaders.remote_path import AnyPath, as_place, is_url

__all__ = ["CheckpointIndex", "check_shard_name", "parse_index", "read_index"]

_MAX_INDEX_NBYTES = 100_000_000
_MAX_KEYS = 1000
_EXPLAINING_NBYTES = 4096
_MAX_SHARD_NAME = 1000
_MAX_VALUE_NBYTES = 1 << 20  # of what is beside the mapping: it is read over
_CURE = "Download the index again"


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """``shards[weight]`` is the file that holds the weight; ``path`` is where the index was read."""

    path: AnyPath
    shards: Mapping[str, AnyPath]

    def by_shard(self) -> dict[AnyPath, list[str]]:
        """The names of the weights in each shard, in the order of the index."""
        names: dict[AnyPath, list[str]] = {}
        for weight, shard in self.shards.items():
            names.setdefault(shard, []).append(weight)
        return names

    def check_shards(self) -> None:
        """Raise CheckpointNotFoundError for the first shard that is not there."""
        for shard, names in self.by_shard().items():
            try:
                CheckpointFile.stat(shard)
            except CheckpointNotFoundError as error:
                raise CheckpointNotFoundError(
                    f"shard {shard.name!r}, which holds {len(names)} of the {len(self.shards)} weights of "
                    f"{self.path.name!r}, does not exist",
                    file=str(shard),
                    cure="Download the missing shard, or name the folder that the shards are in",
                ) from error


def read_index(
    path: str | os.PathLike[str], weights_dir: str | os.PathLike[str], weights_mapping_key: str = "weight_map"
) -> CheckpointIndex:
    """The index at ``path`` with its shards in ``weights_dir``, none of which is looked at.

    Raises CheckpointNotFoundError, CorruptCheckpointError, UnsafeCheckpointError.
    """
    place = as_place(path)
    file = CheckpointFile.stat(place)
    if file.size > _MAX_INDEX_NBYTES:
        raise CorruptCheckpointError(
            f"an index of {file.size} bytes is no index", file=str(path), cure="Name the *.index.json file"
        )
    with open_header(file) as stream:
        text = stream.read()
    kind = kind_of(text[:_EXPLAINING_NBYTES], file.size)
    if kind is not None and text.lstrip()[:1] not in (b"{", b"["):
        raise kind.error(file, "an index of shards (JSON)")
    return parse_index(text, place, as_place(weights_dir), weights_mapping_key)


def parse_index(text: bytes, path: AnyPath, weights_dir: AnyPath, weights_mapping_key: str) -> CheckpointIndex:
    """The index in ``text``; ``path`` is for messages. Pure."""
    keys: list[str] = []
    shards: dict[str, AnyPath] | None = None
    try:
        found = JsonText(text)
        if not found.is_at(b"{"):
            _refuse(path, f"the index is a JSON {_kind(found)}, not an object")
        for key in found.pairs():
            if key in keys or len(keys) == _MAX_KEYS:
                raise ValueError(f"the name {key[:200]!r} occurs twice, or is one of more than {_MAX_KEYS}")
            keys.append(key)
            if key != weights_mapping_key:
                found.value(_MAX_VALUE_NBYTES)
            elif not found.is_at(b"{"):
                _refuse(path, f"{weights_mapping_key!r} of the index is a {_kind(found)}, not an object")
            else:
                shards = _shards(found, path, weights_dir)
        found.end()
    except (ValueError, RecursionError) as error:
        _refuse(path, f"the index is not JSON that can be trusted: {error}", cause=error)
    if shards is None:
        names = ", ".join(map(repr, keys[:10])) or "none"
        cure = f"Name the right key as weights_mapping_key (the index has: {names}), or download it again"
        _refuse(path, f"the index has no {weights_mapping_key!r}", cure=cure)
    return CheckpointIndex(path, shards)


def _shards(found: JsonText, path: AnyPath, weights_dir: AnyPath) -> dict[str, AnyPath]:
    """The mapping of weights to files; each name of a file is checked, and kept once."""
    checked: dict[str, AnyPath] = {}
    shards: dict[str, AnyPath] = {}
    for weight in found.pairs():
        if weight in shards:
            raise ValueError(f"the name {weight[:200]!r} occurs twice")
        if not found.is_at(b'"'):
            raise CorruptCheckpointError(
                f"the index maps a weight to a {_kind(found)} instead of the name of a file",
                weight=weight,
                file=str(path),
                cure=_CURE,
            )
        shard = found.string()
        if shard not in checked:
            check_shard_name(shard, index=path)
            checked[shard] = weights_dir / shard
        shards[weight] = checked[shard]
    return shards


def _kind(found: JsonText) -> str:
    """What Python calls the value that comes next."""
    return type(found.value(_MAX_VALUE_NBYTES)).__name__


def check_shard_name(name: str, *, index: AnyPath) -> None:
    """Raise UnsafeCheckpointError unless ``name`` stays in its folder, on any system, as far as the text tells.

    Raises CorruptCheckpointError for a name that cannot be a file at all.
    """
    windows = PureWindowsPath(name)  # splits at both kinds of slash, so it sees what any system would see
    if windows.drive or windows.root or name.startswith("/"):
        what = "is absolute"
    elif is_url(name):
        what = "leads to a place of its own"
    elif ".." in windows.parts:
        what = "leads out of its folder"
    elif "\0" in name or not windows.parts or len(name) > _MAX_SHARD_NAME:
        _refuse(index, f"shard name {name[:200]!r} is no name of a file")
    else:
        return
    raise UnsafeCheckpointError(
        f"shard name {name[:200]!r} {what}",
        file=str(index),
        cure="Do not use this checkpoint unless you trust it; if you do, put its shards into one folder and name "
        "them in the index by their plain names",
    )


def _refuse(path: AnyPath, problem: str, *, cure: str = _CURE, cause: Exception | None = None) -> NoReturn:
    raise CorruptCheckpointError(problem, file=str(path), cure=cure) from cause
