"""A copy of a safetensors checkpoint that is read with less work: the data of each file begins at a page.

Files place their data at multiples of 8 bytes, and kernels need weights at multiples of 64, so bytes that were read
directly have to be moved by a little. Where a model computes on every core, that takes a tenth of a pass. The format
(https://github.com/huggingface/safetensors#format) lets a header end in blanks: with enough of them the data begins at
a page, and as the sizes of nearly all weights are multiples of 64, nothing has to be moved.

Knows files; the copy is an ordinary checkpoint for everybody.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from odewei.errors import CheckpointError, CheckpointNotFoundError, OptionsError
from odewei.loaders.checkpoint_index import read_index
from odewei.loaders.remote_path import is_url
from odewei.loaders.safetensors_file import read_header
from odewei.scheduler.host_memory import PAGE

__all__ = ["align"]

_INDEX = ".safetensors.index.json"
_SUFFIX = ".safetensors"
_LENGTH_NBYTES = 8
_COPIED_AT_ONCE = 16 << 20


def align(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    on_file: Callable[[Path], object] = lambda file: None,
) -> list[Path]:
    """Write a copy of a checkpoint into ``folder``, which is made if need be. Returns its files of weights.

    ``source`` is a .safetensors file, an index of such files, or a folder; of a folder all other files are copied too
    (configuration, tokenizer), of its subfolders none. It takes as much disk as the checkpoint. ``on_file`` is called
    with each file that has been written.

    Raises CheckpointError for files that are not whole or no safetensors, CheckpointNotFoundError, and OptionsError if
    something of the same name is in the folder: nothing is ever overwritten.
    """
    if is_url(source):
        raise OptionsError("only a local checkpoint can be aligned", cure="Download it first")
    weights, others = _files(Path(source))
    root, target = (Path(source) if os.path.isdir(source) else Path(source).parent), Path(folder)
    copies = {file: target / file.relative_to(root) for file in (*weights, *others)}
    for copy in copies.values():
        if copy.exists():
            raise OptionsError(f"{copy} is there already", cure="Name a new folder for the copy")
    for file in weights:
        read_header(file)  # refuses what is not whole, before anything is written
    for file in weights:
        _write(copies[file], file, _align_file)
        on_file(copies[file])
    for file in others:
        _write(copies[file], file, shutil.copyfile)
    return [copies[file] for file in weights]


def _files(source: Path) -> tuple[list[Path], list[Path]]:
    """The files of weights, and what else belongs to the checkpoint."""
    if source.is_dir():
        files = sorted(entry for entry in source.iterdir() if entry.is_file())
        weights = [file for file in files if file.name.endswith(_SUFFIX)]
        others = [file for file in files if not file.name.endswith((_SUFFIX, ".bin", ".pt", ".pth"))]
        if not weights:
            raise CheckpointNotFoundError(
                "the folder has no .safetensors file", file=str(source), cure="Name the folder of the checkpoint"
            )
        return weights, others
    if source.name.endswith(_INDEX):
        index = read_index(source, source.parent, "weight_map")
        index.check_shards()
        weights = [shard for shard in index.by_shard() if isinstance(shard, Path)]
        others = [source]
    else:
        weights, others = [source], []
    for file in weights:
        if file.suffix != _SUFFIX:
            raise CheckpointError(
                "only safetensors files can be aligned", file=str(file), cure="Convert the checkpoint first"
            )
    return weights, others


def _align_file(source: Path, target: Path) -> None:
    with open(source, "rb") as stream, open(target, "xb") as copy:
        header = stream.read(int.from_bytes(stream.read(_LENGTH_NBYTES), "little"))
        header += b" " * (-(_LENGTH_NBYTES + len(header)) % PAGE)
        copy.write(len(header).to_bytes(_LENGTH_NBYTES, "little"))
        copy.write(header)
        shutil.copyfileobj(stream, copy, _COPIED_AT_ONCE)


def _write(file: Path, source: Path, copy: Callable[[Path, Path], object]) -> None:
    """Have ``copy`` write the file under another name first, so that there is never half of one."""
    unfinished = file.with_name(f".{file.name}.unfinished")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        copy(source, unfinished)
        unfinished.rename(file)
    except OSError as error:
        raise CheckpointError(
            f"the copy cannot be written: {error.strerror or error}",
            file=str(file),
            cure="Check that the disk has room and that this user may write there",
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)
