"""What odewei needs of an accelerator, in torch's words for any of them: streams, events, memory.

The rules of order are the methods of :class:`Accelerator`, one each; nothing else in odewei knows of streams:

- what computes with a unit comes after its copy (``let_use``);
- memory is given to a unit on the copy stream, after what computed so far (``wait_for_computing``, ``allocate``);
- a copy that nobody waits for is from pinned memory (``copy``);
- pinned memory is filled again when the copy from it has landed (``has_landed``, ``wait``).

Only torch's generic API is used: ``torch.cuda.Stream`` and ``torch.Stream`` are unequal for one and the same stream.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from odewei.errors import OptionsError
from odewei.scheduler.host_memory import HostMemory, RegisteredMemory, TorchPinnedMemory

__all__ = ["Accelerator", "Copy", "PlainAccelerator", "accelerator_for", "pin_with"]


class Copy:
    """One unit's way to the device. ``landed``: it is known to be over. Times are of the device's clock, but for
    ``submitted``, which is of ``time.perf_counter``.
    """

    __slots__ = ("done", "landed", "nbytes", "source", "started", "submitted")

    def __init__(self, nbytes: int, source: torch.Tensor) -> None:
        self.nbytes = nbytes
        self.source: torch.Tensor | None = source  # its memory stays until the copy has landed
        self.submitted = time.perf_counter()
        self.started: torch.Event | None = None
        self.done: torch.Event | None = None
        self.landed = False

    def seconds(self) -> float:
        """How long it took on the device, after it has landed; 0 where the device has no clock for that."""
        if self.started is None or self.done is None or not self.done.query():
            return 0.0
        return self.started.elapsed_time(self.done) / 1e3


class Accelerator:
    """One device with streams. Methods may be called from any thread, and none but ``wait`` and
    ``wait_for_copies`` waits for the device.

    ``memory`` is what slabs on the host are made of. There is one copy stream, for as long as this object lives.
    """

    has_streams = True

    def __init__(self, device: torch.device, memory: HostMemory) -> None:
        self.device = device
        self.memory = memory
        self._copying = torch.Stream(device=device)
        self._computing: dict[int, torch.Stream] = {}  # by their ids
        self._lock = threading.Lock()

    def note_stream(self) -> None:
        """The calling thread computes, on its current stream."""
        stream = torch.accelerator.current_stream(self.device)
        if stream.stream_id not in self._computing:
            with self._lock:
                self._computing = {**self._computing, stream.stream_id: stream}
            stream.wait_stream(self._copying)  # of what the others have waited for already

    def let_use(self, copy: Copy) -> None:
        """What any stream computes from now on finds the unit there."""
        assert copy.done is not None
        for stream in self._computing.values():
            stream.wait_event(copy.done)

    def wait_for_computing(self) -> None:
        """What the copy stream does from now on comes after everything that was computed so far."""
        for stream in self._computing.values():
            self._copying.wait_stream(stream)

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Bytes on the device, for the copy stream to write. Raises torch.OutOfMemoryError."""
        with self._on_copy_stream():
            return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Copy:
        """Begin to copy bytes from the host. From pageable memory it has landed when this returns."""
        copy = Copy(source.numel(), source)
        copy.started, copy.done = torch.Event(self.device, enable_timing=True), self._event()
        pinned = source.is_pinned()
        with self._on_copy_stream():
            copy.started.record()
            self._copy(target, source, pinned)
            copy.done.record()
        copy.landed = not pinned
        return copy

    def has_landed(self, copy: Copy) -> bool:
        """Whether the copy is over, by now. Raises RuntimeError if the device is in trouble."""
        return copy.done is not None and copy.done.query()

    def wait(self, copy: Copy) -> None:
        """Return when the copy is over. Lets other threads run meanwhile."""
        if not copy.landed and copy.done is not None:
            copy.done.synchronize()

    def wait_for_copies(self) -> None:
        """Return when all copies that were begun are over. Raises RuntimeError if the device is in trouble."""
        self._copying.synchronize()

    def mark(self) -> torch.Event | None:
        """A moment in the current stream of this thread, on the device's clock."""
        event = self._event()
        event.record()
        return event

    def available_bytes(self) -> int:
        """What can still be had of the device's memory, what torch keeps for later included."""
        free, _ = torch.accelerator.get_memory_info(self.device)
        kept = torch.accelerator.memory_reserved(self.device) - torch.accelerator.memory_allocated(self.device)
        return int(free) + max(0, kept)

    def note(self) -> str:
        """What it cannot do, in words."""
        return self.memory.note()

    @contextmanager
    def _on_copy_stream(self) -> Iterator[None]:
        """This thread is on the copy stream meanwhile.

        ``with stream`` keeps what was before in the stream object, where several threads would overwrite it.
        """
        index, before = torch.accelerator.current_device_index(), torch.accelerator.current_stream(self.device)
        torch.accelerator.set_stream(self._copying)
        try:
            yield
        finally:
            torch.accelerator.set_stream(before)
            torch.accelerator.set_device_index(index)

    def _copy(self, target: torch.Tensor, source: torch.Tensor, pinned: bool) -> None:
        target.copy_(source, non_blocking=pinned)

    def _event(self) -> torch.Event:
        return torch.Event(self.device, enable_timing=True)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.device}, {len(self._computing)} streams compute>"


class PlainAccelerator(Accelerator):
    """A device without streams of its own, or without pinned memory (mps): everything in the one order there is.

    Right, but nothing is copied while it computes.
    """

    has_streams = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory = HostMemory()
        self._computing = {}

    def note_stream(self) -> None:
        pass

    def let_use(self, copy: Copy) -> None:
        pass

    def wait_for_computing(self) -> None:
        pass

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Copy:
        copy = Copy(source.numel(), source)
        target.copy_(source)
        copy.landed = True
        return copy

    def wait_for_copies(self) -> None:
        pass

    def mark(self) -> torch.Event | None:
        return None

    def note(self) -> str:
        return "no streams or pinned memory: copies and computing take turns"

    def available_bytes(self) -> int:
        if self.device.type == "mps":
            return int(torch.mps.recommended_max_memory()) - int(torch.mps.driver_allocated_memory())
        return super().available_bytes()


def _cuda_memory() -> HostMemory:
    cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    portable = 1  # pinned for all contexts
    return RegisteredMemory(
        lambda address, nbytes: int(cudart.cudaHostRegister(address, nbytes, portable)) == 0,
        lambda address, nbytes: cudart.cudaHostUnregister(address),
    )


_PLAIN = {"mps"}
_host_memory: dict[str, Callable[[], HostMemory]] = {"cuda": _cuda_memory}


def pin_with(device_type: str, memory: Callable[[], HostMemory]) -> None:
    """Have devices of a type copy from memory that this makes. Without it, and without CUDA, torch pins."""
    _host_memory[device_type] = memory


def accelerator_for(device: torch.device) -> Accelerator:
    """How to use a device that is not the CPU. Raises OptionsError if there is no such device."""
    found: torch.device | None = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type != device.type or (device.index or 0) >= torch.accelerator.device_count():
        have = "the CPU" if found is None else f"the CPU and {torch.accelerator.device_count()} x {found.type!r}"
        raise OptionsError(
            f"device={str(device)!r}: there is no such device here; torch {torch.__version__} finds {have}",
            cure="Pass the device that there is, or leave device= out",
        )
    if ":" not in str(device):
        device = torch.device(device.type, torch.accelerator.current_device_index())
    if device.type in _PLAIN:
        return PlainAccelerator(device)
    return Accelerator(device, _host_memory.get(device.type, TorchPinnedMemory)())
