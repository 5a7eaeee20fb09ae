"""The simulated accelerator as tests see it: a device named "sim", schedules, findings, a virtual clock.

Loading it makes "sim" the accelerator of this process: ``torch.accelerator``, ``pin_memory()``, ``torch.Stream`` and
``torch.Event`` are then about it. That cannot be undone, so tests that use it have a process of their own.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from tests.sim.build import build

DEVICE = "sim"


@dataclass(frozen=True, slots=True)
class Schedule:
    """When queued work runs: "eager" at once, "lazy" as late as possible, "random" as a seed says."""

    kind: Literal["eager", "lazy", "random"]
    seed: int = 0

    def __str__(self) -> str:
        return f"random {self.seed}" if self.kind == "random" else self.kind


SCHEDULES = (Schedule("eager"), Schedule("lazy"), *(Schedule("random", seed) for seed in range(10)))


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that the library must not do.

    ``kind`` is one of: "race" (two accesses to the same bytes in no order), "overwritten" (a pinned source changed
    before the copy from it ran), "not pinned" (a copy that was asked not to block does), "asynchronous error" (work
    failed).
    """

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


class Clock:
    """Virtual microseconds since ``Simulator.reset``; exact, whatever the schedule. Each host thread has its own."""

    def costs(self, *, operator_us: float, bytes_per_us: float) -> None:
        """What an operator takes, and how fast each direction of the link is: 10 and 25,000 after ``reset``."""
        _ops().costs(operator_us, bytes_per_us)

    def now(self) -> float:
        """The time of this thread: what it waited for, and what it was advanced by."""
        return float(_ops().host_us())

    def advance(self, us: float) -> None:
        """This thread spends so much time, reading a file say."""
        _ops().set_host_us(self.now() + us)

    def reach(self, us: float) -> None:
        """This thread goes on no earlier than this, having waited for another thread."""
        _ops().set_host_us(max(self.now(), us))

    def device(self) -> float:
        """When the device is through with all that it was given so far."""
        return float(_ops().device_us())


class Simulator:
    """The one simulated device of this process; ``load()`` makes it."""

    def __init__(self) -> None:
        self.device = torch.device(DEVICE, 0)
        self.clock = Clock()
        self.default_stream = torch.accelerator.current_stream()

    def reset(self, schedule: Schedule) -> None:
        """Run what is queued, then begin anew with this schedule: no findings, counters and clock at zero.

        This thread is then on the default stream.
        """
        torch.accelerator.set_stream(self.default_stream)
        _ops().restart(schedule.kind, schedule.seed)

    def report(self) -> list[Finding]:
        """What was found since the last call, each finding once."""
        flat = _ops().take_findings()
        return [Finding(kind, text) for kind, text in zip(flat[::2], flat[1::2], strict=True)]

    def counters(self) -> dict[str, int]:
        """What there was since ``reset``, and what there is.

        "submitted", "host waits: <for what>", "asynchronous bytes to the device", "device bytes", "device bytes at
        most", "pinned bytes", "blocks used again", "findings".
        """
        return dict(_ops().counters())

    def host_waits(self) -> dict[str, int]:
        """How often the host waited for the device, by what for: "event", "stream", "device", or an operator's name."""
        prefix = "host waits: "
        return {name.removeprefix(prefix): n for name, n in self.counters().items() if name.startswith(prefix)}

    def set_device_memory(self, nbytes: int) -> None:
        """How much memory the device has until ``reset``, which makes it 1 GiB."""
        _ops().device_memory(nbytes)

    def host_access(self, buffer: Any, write: bool) -> None:
        """Say that the host reads or writes (all of) this pinned buffer: a tensor, or what has the buffer protocol.

        Raises ``RuntimeError`` when the memory is not pinned.
        """
        _ops().host_access(*_extent(buffer), write)

    def host_register(self, buffer: Any) -> None:
        """Pin exactly this memory, as ``cudaHostRegister`` does; whoever owns it keeps it until ``host_unregister``.

        Raises ``RuntimeError`` unless it is whole pages of 4 KiB, none of them pinned. (CUDA takes other stretches too,
        but two of them that share a page are trouble.)
        """
        _ops().host_register(*_extent(buffer))

    def host_unregister(self, buffer: Any) -> None:
        """Unpin it. A copy that is not known to be over is a race; after this none runs any more."""
        _ops().host_unregister(_extent(buffer)[0])


class _DeviceModule:
    """What torch asks for under ``torch.sim``."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """Random numbers of the device come from the CPU's generator, which torch seeds itself."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


@functools.cache
def load(compiler: str) -> Simulator:
    """Build the device if need be and make it the accelerator of this process."""
    library = build(compiler)
    torch.utils.rename_privateuse1_backend(DEVICE)
    torch.ops.load_library(str(library))
    torch._register_device_module(DEVICE, _DeviceModule())
    torch.utils.generate_methods_for_privateuse1_backend()
    torch.empty(1, pin_memory=True)  # before the first of its own torch calls no memory pinned
    return Simulator()


def _ops() -> Any:
    return torch.ops.odewei_sim


def _extent(buffer: Any) -> tuple[int, int]:
    """Address and length in bytes, of contiguous memory."""
    if isinstance(buffer, torch.Tensor):
        assert buffer.is_contiguous()
        return buffer.data_ptr(), buffer.nbytes
    flat = np.frombuffer(buffer, dtype=np.uint8)
    return flat.ctypes.data, flat.nbytes
