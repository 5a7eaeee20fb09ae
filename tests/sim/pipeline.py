"""A small program of the kind that the simulator is for: layers stream through pinned buffers and device memory.

It is written against torch's API for any accelerator, and each of its rules of order can be taken out. It stands for a
library; tests of the simulator use it to see that every broken rule is found.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Sequence

import torch
from torch.nn import functional

from tests.sim.simulator import Simulator


class Bug(enum.Enum):
    """The rules that can be taken out."""

    COPY_NOT_AWAITED = "compute does not wait for the copy"
    SLOT_OVERWRITTEN = "a device slot is overwritten early"
    FREED_IN_USE = "memory is freed while another stream uses it"
    WRONG_STREAM = "memory is allocated on the compute stream and filled on the copy stream"
    PINNED_REFILLED = "a pinned buffer is refilled early"
    PAGEABLE = "a copy is asked not to block, from pageable memory"
    RESULT_READ_EARLY = "the result is read before it has arrived"


class Pipeline:
    """Computes ``tanh(x @ w.T + b)`` for one layer after another; a layer is the bytes of w and b, one after the other.

    Device memory is ``slots`` slots used in turn, or, with ``slots=None``, memory from the allocator for each layer.
    """

    def __init__(
        self, sim: Simulator, layers: Sequence[torch.Tensor], *, slots: int | None, bug: Bug | None = None
    ) -> None:
        self.sim, self.layers, self.bug = sim, layers, bug
        self.compute = torch.accelerator.current_stream()
        self.copy = torch.Stream(device=sim.device)
        size = layers[0].numel()
        pin = bug is not Bug.PAGEABLE
        self.buffers = [torch.empty(size, pin_memory=pin) for _ in range(2)]
        self.buffer_copied: list[torch.Event | None] = [None, None]
        self.slots = None if slots is None else [torch.empty(size, device=sim.device) for _ in range(slots)]
        self.slot_used: list[torch.Event | None] = [None] * (slots or 0)
        self.freed: torch.Event | None = None  # all memory freed so far was in use no later than this
        self.copy.wait_stream(self.compute)  # which the slots were allocated on

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The result, on the device. With a second slot, a layer is fetched before the one before it computes."""
        ahead = 0 if self.slots is not None and len(self.slots) == 1 else 1
        fetched: deque[tuple[torch.Tensor, torch.Event]] = deque()
        for index in range(len(self.layers)):
            while len(fetched) <= ahead and index + len(fetched) < len(self.layers):
                fetched.append(self._fetch(index + len(fetched)))
            memory, copy_done = fetched.popleft()
            if self.bug is not Bug.COPY_NOT_AWAITED:
                self.compute.wait_event(copy_done)
            width = x.shape[1]
            x = torch.tanh(functional.linear(x, memory[:-width].view(width, width), memory[-width:]))
            del memory
            self._used(index)
        return x

    def result(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` on the host, copied as a library would copy it."""
        landed = torch.empty(x.shape, pin_memory=True)
        landed.copy_(x, non_blocking=True)
        if self.bug is not Bug.RESULT_READ_EARLY:
            self.compute.synchronize()
        self.sim.host_access(landed, False)
        return landed.clone()

    def _fetch(self, index: int) -> tuple[torch.Tensor, torch.Event]:
        buffer = self.buffers[index % 2]
        copied = self.buffer_copied[index % 2]
        if copied is not None and self.bug is not Bug.PINNED_REFILLED:
            copied.synchronize()
        if buffer.is_pinned():
            self.sim.host_access(buffer, True)
        buffer.numpy()[:] = self.layers[index].numpy()  # the read from disk
        memory = self._memory(index)
        with self.copy:
            memory.copy_(buffer, non_blocking=True)
        self.buffer_copied[index % 2] = copy_done = self.copy.record_event()
        return memory, copy_done

    def _memory(self, index: int) -> torch.Tensor:
        if self.slots is not None:
            slot = index % len(self.slots)
            used = self.slot_used[slot]
            if used is not None and self.bug is not Bug.SLOT_OVERWRITTEN:
                self.copy.wait_event(used)
            return self.slots[slot]
        size = self.layers[index].numel()
        if self.bug is Bug.WRONG_STREAM:  # the allocator orders it on that stream only
            return torch.empty(size, device=self.sim.device)
        if self.freed is not None and self.bug is not Bug.FREED_IN_USE:
            self.copy.wait_event(self.freed)
        with self.copy:
            return torch.empty(size, device=self.sim.device)

    def _used(self, index: int) -> None:
        compute_done = self.compute.record_event()
        if self.slots is not None:
            self.slot_used[index % len(self.slots)] = compute_done
        self.freed = compute_done


def make_layers(count: int, width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count * 1000 + width)
    return [torch.randn(width * width + width, generator=generator) / width**0.5 for _ in range(count)]


def expected(layers: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What the pipeline must give, bit for bit: the same operators on the CPU."""
    width = x.shape[1]
    for layer in layers:
        x = torch.tanh(functional.linear(x, layer[:-width].view(width, width), layer[-width:]))
    return x
