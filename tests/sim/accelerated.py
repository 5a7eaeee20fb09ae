"""Streamed models on the simulated device: memory that tells the detector what the host does, and small models."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np

from odewei.scheduler import accelerator
from odewei.scheduler.host_memory import Bytes, HostMemory, Memory, RegisteredMemory
from tests.sim.simulator import DEVICE, Simulator


class SimMemory(RegisteredMemory):
    """Registered with the simulated device, which is told of every refill. ``refuse``: no memory can be pinned."""

    def __init__(self, sim: Simulator) -> None:
        super().__init__(self._register_with, self._unregister_from)
        self.sim = sim
        self.refuse = False

    def about_to_fill(self, memory: Memory) -> None:
        if _flat(memory).ctypes.data in self._pinned:
            self.sim.host_access(_flat(memory), True)

    def _register_with(self, address: int, nbytes: int) -> bool:
        if not self.refuse:
            self.sim.host_register(_at(address, nbytes))
        return not self.refuse

    def _unregister_from(self, address: int, nbytes: int) -> None:
        self.sim.host_unregister(_at(address, nbytes))


def use(memory: Callable[[], HostMemory]) -> None:
    """Have models on the simulated device use this memory on the host."""
    accelerator.pin_with(DEVICE, memory)


def _flat(memory: Memory) -> Bytes:
    return np.frombuffer(memory, np.uint8)


def _at(address: int, nbytes: int) -> Bytes:
    return np.frombuffer((ctypes.c_uint8 * nbytes).from_address(address), np.uint8)
