"""Device memory is poisoned, cached by stream and limited; host memory is pinned or it is not."""

from __future__ import annotations

import gc
import mmap
import re

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.sim.simulator import Finding, Schedule, Simulator

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def _pages(count: int) -> npt.NDArray[np.uint8]:
    return np.frombuffer(mmap.mmap(-1, count * mmap.PAGESIZE), dtype=np.uint8)


def _kinds(findings: list[Finding]) -> list[str]:
    return [finding.kind for finding in findings]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fresh_memory_is_nan(sim: Simulator, dtype: torch.dtype) -> None:
    """Memory that nobody has written to is NaN in every floating dtype."""
    assert torch.empty(100, dtype=dtype, device="sim").cpu().float().isnan().all()


def test_freed_memory_is_nan_when_it_comes_again(sim: Simulator) -> None:
    """A block that is used again holds nothing of what it held."""
    first = torch.full((1000,), 7.0, device="sim")
    address = first.data_ptr()
    del first
    second = torch.empty(1000, device="sim")
    assert second.data_ptr() == address
    assert second.cpu().isnan().all()
    assert sim.counters()["blocks used again"] >= 1


def test_freeing_is_in_order_with_earlier_work(sim: Simulator) -> None:
    """Work that was queued before a tensor was freed still finds its values, on a stream that comes late as well."""
    other = torch.Stream(device="sim")
    x = torch.full((1000,), 7.0, device="sim")
    other.wait_stream(torch.accelerator.current_stream())
    with other:
        doubled = x * 2
    torch.accelerator.current_stream().wait_stream(other)
    del x
    torch.empty(1000, device="sim").fill_(1)
    assert doubled.cpu().eq(14).all()


def test_memory_may_be_freed_before_its_stream_waits(sim: Simulator) -> None:
    """It is enough that the stream waits for the memory's last use before it allocates again."""
    compute, copy = torch.accelerator.current_stream(), torch.Stream(device="sim")
    with copy:
        weight = torch.ones(1000, device="sim")
    compute.wait_stream(copy)
    y = weight * 2
    del weight  # before anybody waits
    copy.wait_stream(compute)
    with copy:
        torch.empty(1000, device="sim").fill_(5)
    assert y.cpu().eq(2).all()


def test_memory_used_again_too_early_is_a_race(sim: Simulator) -> None:
    """Allocating what another stream may still be reading is found."""
    compute, copy = torch.accelerator.current_stream(), torch.Stream(device="sim")
    with copy:
        weight = torch.ones(1000, device="sim")
    compute.wait_stream(copy)
    y = weight * 2
    del weight
    with copy:
        torch.empty(1000, device="sim")
    (finding,) = sim.report()
    assert finding.kind == "race"
    assert re.match(r"write of \d+ bytes by allocation on stream 1 is not ordered after read", finding.text)
    del y


def test_record_stream_keeps_memory_from_being_used_again(sim: Simulator) -> None:
    """A tensor recorded on another stream is not used again before that stream is through with it."""
    other = torch.Stream(device="sim")
    x = torch.ones(1000, device="sim")
    other.wait_stream(torch.accelerator.current_stream())
    with other:
        y = x * 2
    x.record_stream(other)
    del x
    for _ in range(4):
        torch.zeros(1000, device="sim")
    other.synchronize()
    torch.zeros(1000, device="sim")
    assert y.cpu().eq(2).all()


def test_the_device_runs_out_of_memory(sim: Simulator) -> None:
    """Allocations stay within the device's memory, and the rest is an error that says how much is free."""
    gc.collect()
    before = torch.accelerator.memory_allocated()
    sim.set_device_memory(before + 8192)
    x = torch.empty(1024, device="sim")
    assert torch.accelerator.memory_allocated() == before + 4096
    assert torch.accelerator.get_memory_info() == (4096, before + 8192)
    with pytest.raises(torch.OutOfMemoryError, match="4096 are free"):
        torch.empty(1025, device="sim")
    del x
    torch.empty(2048, device="sim")
    assert torch.accelerator.max_memory_allocated() == before + 8192


def test_registered_memory_is_pinned_exactly(sim: Simulator) -> None:
    """Registered pages are pinned as far as they go, take no more than their bytes, and copy without blocking."""
    slab = _pages(3)
    before = sim.counters()["pinned bytes"]
    tensor = torch.from_numpy(slab)
    assert not tensor.is_pinned()
    sim.host_register(slab)
    assert tensor.is_pinned()
    assert sim.counters()["pinned bytes"] == before + slab.nbytes
    sim.host_access(memoryview(slab)[100:300], True)
    tensor[100:300] = 9
    on_device = tensor[100:300].to("sim", non_blocking=True)
    assert sim.host_waits() == {}
    torch.accelerator.synchronize()
    sim.host_unregister(slab)
    assert not tensor.is_pinned()
    assert sim.counters()["pinned bytes"] == before
    assert on_device.cpu().eq(9).all()


def test_memory_is_registered_once(sim: Simulator) -> None:
    """Whole pages can be registered that are not yet, and unregistered that are."""
    slab = _pages(2)
    with pytest.raises(RuntimeError, match="was not registered"):
        sim.host_unregister(slab)
    sim.host_register(slab)
    with pytest.raises(RuntimeError, match="pinned already"):
        sim.host_register(slab[mmap.PAGESIZE :])
    with pytest.raises(RuntimeError, match="whole pages"):
        sim.host_register(slab[64:])
    sim.host_unregister(slab)


def test_unregistering_under_a_copy_is_a_race(sim: Simulator) -> None:
    """Memory that a copy may still read must not be unregistered; the copy is then run first, so nothing crashes."""
    slab = _pages(1)
    slab[:] = 1
    sim.host_register(slab)
    on_device = torch.from_numpy(slab).to("sim", non_blocking=True)
    sim.host_unregister(slab)
    assert _kinds(sim.report()) == ["race"]
    slab[:] = 2
    assert on_device.cpu().eq(1).all()


def test_pinned_memory_comes_again_when_its_copy_is_over(sim: Simulator) -> None:
    """A pinned tensor may be dropped under a running copy: its memory is not handed out before the copy is over."""
    copies = []
    for value in range(6):
        host = torch.empty(1000, pin_memory=True)
        sim.host_access(host, True)
        copies.append(host.fill_(value).to("sim", non_blocking=True))
        del host
    for value, copy in enumerate(copies):
        assert copy.cpu().eq(value).all()


def test_refilling_under_a_copy_is_a_race(sim: Simulator) -> None:
    """The hook finds a refill that nobody waited for; after a wait, or a query that said so, it is in order."""
    host = torch.zeros(1000, pin_memory=True)
    for how in ("nothing", "wait", "query"):
        on_device = host.to("sim", non_blocking=True)
        done = torch.accelerator.current_stream().record_event()
        if how == "wait":
            done.synchronize()
        while how == "query" and not done.query():
            pass
        sim.host_access(host, True)
        assert _kinds(sim.report()) == (["race"] if how == "nothing" else [])
        del on_device


def test_reading_at_the_same_time_is_no_race(sim: Simulator) -> None:
    """Two streams and the host may read the same memory in any order."""
    host = torch.ones(1000, pin_memory=True)
    x = torch.ones(1000, device="sim")
    torch.accelerator.synchronize()
    for _ in range(2):
        with torch.Stream(device="sim"):
            host.to("sim", non_blocking=True)
            x.add(1)
    sim.host_access(host, False)
    assert sim.report() == []


def test_the_hook_wants_pinned_memory(sim: Simulator) -> None:
    """Memory that the device cannot see is not worth a word: saying so is a mistake in the caller."""
    with pytest.raises(RuntimeError, match="not pinned"):
        sim.host_access(torch.zeros(4), True)


def test_copies_that_block_are_found(simulator: Simulator) -> None:
    """A copy that is asked not to block, from or to memory where it must, is found in either direction."""
    simulator.reset(Schedule("lazy"))
    x = torch.ones(64, 64)
    on_device = x.to("sim", non_blocking=True)
    x.pin_memory()[:, ::2].to("sim", non_blocking=True)  # not one piece
    x.copy_(on_device, non_blocking=True)
    assert _kinds(simulator.report()) == ["not pinned"] * 3
    x.pin_memory().t().to("sim", non_blocking=True)
    on_device.to("cpu", non_blocking=True)  # torch makes pinned memory for this one
    torch.accelerator.synchronize()
    assert simulator.report() == []
