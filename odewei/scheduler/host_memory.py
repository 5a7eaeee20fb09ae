"""Where the memory of slabs comes from: anonymous pages, pinned ones for an accelerator where that can be had.

Knows pages and how to pin them; nothing of units. An accelerator copies from pinned pages while everybody goes on; from
others only while somebody waits.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["HUGE_PAGE", "PAGE", "Bytes", "HostMemory", "Memory", "RegisteredMemory", "TorchPinnedMemory", "round_up"]

PAGE = 4096
"""Direct reads start and end at multiples of this in the file and in memory."""

HUGE_PAGE = 2 << 20
_SMALL_ALIGNMENT = 64

Bytes = npt.NDArray[np.uint8]
Memory = mmap.mmap | bytearray | Bytes
_Kind = TypeVar("_Kind", mmap.mmap, bytearray, Bytes)

_log = logging.getLogger("odewei")


class HostMemory:
    """Pages that the system may move or swap. Methods may be called from any thread, also by finalizers."""

    smallest_bytes = 0
    """A request takes at least so much."""

    def allocate(self, nbytes: int) -> tuple[Memory, int]:
        """Memory, and the offset in it from which ``nbytes`` bytes lie as they should: at a multiple of 64, from a
        page on at a page, from a huge page on at a huge page.
        """
        if nbytes < PAGE:
            return _aligned(bytearray(nbytes + _SMALL_ALIGNMENT), _SMALL_ALIGNMENT)
        return _mapped(nbytes)

    def resize(self, memory: Memory, nbytes: int) -> bool:
        """Make it another size, keeping its pages, if that can be done; what they hold may be lost. Nobody may have a
        view of it.
        """
        if not isinstance(memory, mmap.mmap):
            return False
        try:
            memory.resize(round_up(nbytes, HUGE_PAGE))
            _trim(memory, nbytes)
        except (BufferError, SystemError, OSError):  # a view is just dying; no mremap here; no addresses left
            return False
        return True

    def free(self, memory: Memory) -> None:
        """It is used no more; its pages go back when the last reference to it has."""

    def note(self) -> str:
        """What is wrong with it, in words; nothing mostly."""
        return ""

    def about_to_fill(self, memory: Memory) -> None:
        """The processor is going to write into it. A seam for tests that know when a device reads it."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


class RegisteredMemory(HostMemory):
    """Whole pages, pinned exactly, as ``cudaHostRegister`` does it.

    ``register`` and ``unregister`` take the address and the length in bytes; ``register`` returns False, or raises
    RuntimeError, where the system refuses (limits): those pages stay pageable, which is said once.
    """

    smallest_bytes = PAGE

    def __init__(self, register: Callable[[int, int], bool], unregister: Callable[[int, int], object]) -> None:
        self._register, self._unregister = register, unregister
        self._pinned: dict[int, int] = {}  # length by address
        self._warned = False

    def allocate(self, nbytes: int) -> tuple[Memory, int]:
        memory, offset = _mapped(max(nbytes, PAGE))
        self._pin(memory)
        return memory, offset

    def resize(self, memory: Memory, nbytes: int) -> bool:
        self._unpin(memory)  # before the pages move
        resized = super().resize(memory, nbytes)
        self._pin(memory)
        return resized

    def free(self, memory: Memory) -> None:
        self._unpin(memory)

    def note(self) -> str:
        return "memory could not be pinned: copies are slower, and one waits for each" if self._warned else ""

    def _pin(self, memory: Memory) -> None:
        address, nbytes = _extent(memory)
        try:
            done = self._register(address, nbytes)
        except RuntimeError:
            done = False
        if done:
            self._pinned[address] = nbytes
        elif not self._warned:
            self._warned = True
            _log.warning(
                "the system refuses to pin %d bytes for copies to the accelerator; they are copied from pageable "
                "memory instead, which is slower (a limit of locked memory? see: ulimit -l)",
                nbytes,
            )

    def _unpin(self, memory: Memory) -> None:
        address, _ = _extent(memory)
        nbytes = self._pinned.pop(address, None)
        if nbytes is not None:
            self._unregister(address, nbytes)


class TorchPinnedMemory(HostMemory):
    """Pinned by torch, for accelerators that pages cannot be registered with. Torch may round sizes up."""

    smallest_bytes = PAGE

    def allocate(self, nbytes: int) -> tuple[Memory, int]:
        flat = torch.empty(max(nbytes, PAGE) + PAGE, dtype=torch.uint8, pin_memory=True)
        return _aligned(flat.numpy(), PAGE)


def round_up(nbytes: int, multiple: int) -> int:
    """The next multiple at or above ``nbytes``."""
    return -(-nbytes // multiple) * multiple


def _mapped(nbytes: int) -> tuple[mmap.mmap, int]:
    if nbytes < HUGE_PAGE:
        return _aligned(_map(nbytes), PAGE)
    memory, offset = _aligned(_map(round_up(nbytes, HUGE_PAGE)), HUGE_PAGE)  # recent kernels align these themselves
    if offset != 0:
        memory, offset = _aligned(_map(nbytes + HUGE_PAGE), HUGE_PAGE)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            memory.madvise(mmap.MADV_NOHUGEPAGE, offset + nbytes // HUGE_PAGE * HUGE_PAGE)
        return memory, offset
    with contextlib.suppress(SystemError, OSError):  # no mremap here: the last huge page stays whole
        _trim(memory, nbytes)
    return memory, 0


def _trim(memory: mmap.mmap, nbytes: int) -> None:
    """Cut memory of whole huge pages, so that what is not full of bytes takes small pages."""
    if nbytes == len(memory):
        return
    whole = nbytes // HUGE_PAGE * HUGE_PAGE
    if hasattr(mmap, "MADV_DONTNEED"):  # a huge page that is there would stay whole in the system's books
        memory.madvise(mmap.MADV_DONTNEED, whole)
    memory.resize(nbytes)


def _map(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
    if nbytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _extent(memory: Memory) -> tuple[int, int]:
    """Address and length in bytes of all of it."""
    flat = np.frombuffer(memory, np.uint8)
    return flat.ctypes.data, flat.nbytes


def _aligned(memory: _Kind, boundary: int) -> tuple[_Kind, int]:
    """With the first offset that lies at a multiple of ``boundary``."""
    return memory, -_extent(memory)[0] % boundary
