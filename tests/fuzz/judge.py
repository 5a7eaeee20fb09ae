"""Whether a loader has behaved with a hostile checkpoint.

It has if it raised an OdeweiError (and for safetensors, if it had a reason to), or if its tensors are those that the
format's own library finds in the same bytes; if it opened nothing outside the folder, but through a link that lies in
it, and ran nothing.
"""

import io
import json
import os
import re
import shutil
import sys
import threading
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import safetensors
import torch

from odewei.errors import OdeweiError
from odewei.loaders import WeightsLoader, open_checkpoint
from odewei.loaders.gguf_file import PLAIN, QUANTISED
from odewei.loaders.tensors import DTYPES

from .case import Case

__all__ = ["STRICTER", "Misbehaved", "judge", "watch_the_process"]

STRICTER = (
    r"the name .* occurs twice",
    r"the header does not begin with '\{'",
    r"a tensor is described by .* instead of dtype, shape, data_offsets",
    r"F4 of shape .* has rows that end within a byte",
    r"the shape .* has more elements than can be counted",
    r"dtype F6_E\dM\d packs its elements across bytes",
    r"a (name|value) is longer than \d+ bytes",
)
"""Why a file is refused here that the package safetensors accepts: docs/safety.md says the reason of each."""

_RAN = frozenset(
    {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "pickle.find_class"}
    | {"socket.connect", "os.remove", "os.rename", "ctypes.dlopen"}
)
_seen: list[tuple[str, str]] | None = None
_watched = 0  # the thread


class Misbehaved(Exception):
    """What a loader must not do."""


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _seen is not None and threading.get_ident() == _watched and (event == "open" or event in _RAN):
        _seen.append((event, str(arguments[0]) if arguments else ""))


def watch_the_process() -> None:
    """Have all opening of files and running of programs noticed. Audit hooks stay for the life of a process."""
    if not getattr(sys, "_odewei_watched", False):
        sys.addaudithook(_hook)
        sys._odewei_watched = True  # type: ignore[attr-defined]


@contextmanager
def _nothing_outside(folder: Path) -> Iterator[None]:
    """Raises Misbehaved if anything outside of ``folder`` is opened meanwhile, or something is run."""
    global _seen, _watched
    _seen, _watched = [], threading.get_ident()
    try:
        yield
    finally:
        seen, _seen = _seen, None
    for event, what in seen:
        if event != "open":
            raise Misbehaved(f"{event} was called: {what}")
        path = os.path.abspath(what)
        if not what.isdigit() and not path.startswith((f"{folder}/", sys.prefix, sys.base_prefix, "/proc/", "/sys/")):
            raise Misbehaved(f"{path} was opened, which is outside of {folder}")


def judge(case: Case, folder: Path) -> str:
    """How the loader ended: the name of an error, or "right". Raises Misbehaved; other exceptions are misbehaviour too.

    ``folder`` is emptied and used; ``watch_the_process`` comes first.
    """
    inside = folder / "in"
    _write(case, folder, inside)
    verify = "sha256" if case.kind == "sums" else "size"
    try:
        with _nothing_outside(inside), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            start = inside if case.kind == "shards" else inside / case.start  # a folder
            loader = open_checkpoint(start, verify=verify)  # type: ignore[arg-type]
            found = loader("module", list(loader.weights()))
    except OdeweiError as error:
        text = str(error)
        text.encode("utf-8", "backslashreplace")
        if len(text) > 3000 + len(str(inside)) * 4:
            raise Misbehaved(f"the message has {len(text)} characters") from error
        _check_memory(error)
        if case.kind == "safetensors":
            _check_reason(case.content, text)
        return type(error).__name__
    _check_equal(case, loader, found, inside)
    return "right"


def _write(case: Case, folder: Path, inside: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    inside.mkdir(parents=True)
    for name, content in case.files.items():
        path = inside / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    for name, target in case.links:
        (inside / name).symlink_to(target)


def _check_memory(error: BaseException | None) -> None:
    """A refusal because memory ran out is none."""
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise Misbehaved(f"memory ran out: {error!r}") from error
        error = error.__cause__ or error.__context__


def _check_reason(content: bytes, text: str) -> None:
    """What the package safetensors accepts may be refused for the reasons in ``STRICTER`` only."""
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return
    if not any(re.search(reason, text, re.DOTALL) for reason in STRICTER) and not _repeats_a_name(content):
        raise Misbehaved(f"refused, though the package safetensors accepts it: {text[:300]}")


def _repeats_a_name(content: bytes) -> bool:
    """Whether a header has a name twice. The last one counts for the package, and what is wrong with the first does not
    matter to it; here the first is looked at first.
    """
    counts: list[bool] = []
    length = int.from_bytes(content[:8], "little")
    json.loads(
        content[8 : 8 + length], object_pairs_hook=lambda pairs: counts.append(len(dict(pairs)) != len(pairs)) or {}
    )
    return any(counts)


def _check_equal(case: Case, loader: WeightsLoader, found: dict[str, torch.Tensor], inside: Path) -> None:
    """The tensors are those that the format's own library finds."""
    if case.kind == "safetensors":
        expected = _by_safetensors(case.content)
    elif case.kind in ("index", "sums"):
        expected = {name: torch.tensor([49, 50, 51], dtype=torch.uint8) for name in found if name in "abc"}
    elif case.kind == "npy":
        expected = {"w": _of_numpy(np.load(io.BytesIO(case.content), allow_pickle=False))}
    elif case.kind == "npz":
        with np.load(io.BytesIO(case.content), allow_pickle=False) as archive:
            names = [name.removesuffix(".npy") for name in archive.zip.namelist() if not name.endswith("/")]
            try:
                expected = {name: _of_numpy(archive[name]) for name in names}
            except zipfile.BadZipFile as error:
                if "Bad CRC-32" not in str(error):
                    raise
                return  # of entries that lie in the file as they are, the archive's checksum is not compared
    elif case.kind in ("torch", "pickle"):
        by_torch = _by_torch(case.content)
        if by_torch is None:
            return
        expected = by_torch
    elif case.kind == "shards":
        parts = [_by_safetensors(content) for name, content in case.files.items() if name.endswith(".safetensors")]
        expected = {name: tensor for part in parts for name, tensor in part.items()}
        if len(expected) != sum(map(len, parts)):
            raise Misbehaved("a name in two shards was accepted")
    else:
        expected = _by_gguf(inside / case.start)
    if found.keys() != expected.keys():
        raise Misbehaved(f"found {sorted(found)}, expected {sorted(expected)}")
    for name, tensor in expected.items():
        mine = found[name]
        if (mine.dtype, mine.shape) != (tensor.dtype, tensor.shape):
            raise Misbehaved(f"{name!r} is {mine.dtype} {tuple(mine.shape)}, not {tensor.dtype} {tuple(tensor.shape)}")
        if tensor.numel() > 1 << 21:  # a few elements, expanded
            mine, tensor = _elements(mine), _elements(tensor)
        if _bytes(mine) != _bytes(tensor):
            raise Misbehaved(f"{name!r} has other elements than it should have")


def _by_torch(content: bytes) -> dict[str, torch.Tensor] | None:
    """The tensors of the file by their names; None where torch does not read it: more is read here, and nothing run."""
    try:
        loaded = torch.load(io.BytesIO(content), weights_only=True)
    except Exception:
        return None
    if any(isinstance(one, dict) for one in loaded.values()):
        return None  # nested: which one is taken is looked at by other tests
    found = {name: one for name, one in loaded.items() if isinstance(name, str) and isinstance(one, torch.Tensor)}
    return {name: one.detach() for name, one in found.items() if one.layout is torch.strided and not one.is_conj()}


def _by_safetensors(content: bytes) -> dict[str, torch.Tensor]:
    try:
        loaded = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise Misbehaved(f"accepted, though the package safetensors refuses it: {error}") from error
    expected = {}
    for name, info in loaded:
        shape = list(info["shape"])
        if info["dtype"] == "F4":
            shape[-1] //= 2
        data = torch.frombuffer(bytearray(info["data"]), dtype=torch.uint8) if info["data"] else torch.empty(0).byte()
        expected[name] = data.view(DTYPES[info["dtype"]]).view(shape)
    return expected


def _by_gguf(path: Path) -> dict[str, torch.Tensor]:
    from gguf import GGUFReader, dequantize

    found = {}
    for tensor in GGUFReader(path).tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        if tensor.tensor_type.value in QUANTISED:
            with np.errstate(all="ignore"):
                data = dequantize(np.array(tensor.data), tensor.tensor_type) if tensor.data.size else np.zeros(0, "f4")
            found[tensor.name] = torch.from_numpy(data).reshape(shape)
        else:
            raw = torch.from_numpy(np.array(tensor.data).reshape(-1).view(np.uint8))
            found[tensor.name] = raw.view(PLAIN[tensor.tensor_type.value]).reshape(shape)
    return found


def _of_numpy(array: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> torch.Tensor:
    if array.dtype == np.bool_:  # a byte that is neither 0 nor 1 would become 1
        return torch.from_numpy(np.array(array.view(np.uint8), order="C")).view(torch.bool)
    return torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))


def _elements(tensor: torch.Tensor) -> torch.Tensor:
    """What is there once of each expanded dimension."""
    shape = [1 if step == 0 else size for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.as_strided(shape, tensor.stride())


def _bytes(tensor: torch.Tensor) -> bytes:
    if tensor.numel() == 0:
        return b""
    if tensor.dtype is torch.bool:
        tensor = tensor.view(torch.uint8)
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)  # contiguous(), of one element, keeps any stride
    return flat.copy_(tensor.detach().reshape(-1)).view(torch.uint8).numpy().tobytes()
