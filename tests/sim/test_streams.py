"""Streams, events and schedules behave as those of an accelerator, and the virtual clock is exact."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.sim.simulator import Schedule, Simulator

LAZY = Schedule("lazy")


def test_lazy_work_waits_until_it_is_needed(simulator: Simulator) -> None:
    """On the lazy schedule an event is over only after somebody has waited for it."""
    simulator.reset(LAZY)
    host = torch.zeros(4, pin_memory=True)
    host.copy_(torch.ones(4, device="sim") * 3, non_blocking=True)
    done = torch.accelerator.current_stream().record_event()
    assert host.isnan().all()
    assert not done.query()
    done.synchronize()
    assert done.query()
    simulator.host_access(host, False)
    assert host.tolist() == [3, 3, 3, 3]
    assert simulator.report() == []


def test_eager_work_is_over_when_it_is_queued(simulator: Simulator) -> None:
    """On the eager schedule an event is over as soon as it is recorded."""
    simulator.reset(Schedule("eager"))
    x = torch.ones(4, device="sim") + 1
    assert torch.accelerator.current_stream().record_event().query()
    assert x.tolist() == [2, 2, 2, 2]


def test_polling_ends(sim: Simulator) -> None:
    """Whoever asks an event again and again is told at last that it is over, also across streams that wait."""
    copy = torch.Stream(device="sim")
    x = torch.ones(8, device="sim")
    for _ in range(5):
        copy.wait_stream(torch.accelerator.current_stream())
        with copy:
            x = x + 1
        torch.accelerator.current_stream().wait_stream(copy)
        x = x + 1
    done = torch.accelerator.current_stream().record_event()
    polls = 0
    while not done.query():
        polls += 1
        assert polls < 1000
    assert sim.host_waits() == {}
    assert x.tolist() == [11] * 8


def test_polling_runs_only_what_is_asked_for(simulator: Simulator) -> None:
    """On the lazy schedule, other streams stay where they are while somebody polls."""
    simulator.reset(LAZY)
    asked, *others = [torch.Stream(device="sim") for _ in range(6)]
    ends = []
    for stream in others:
        with stream:
            torch.ones(8, device="sim") + 1  # several tasks, so that asking below does not end them
        ends.append(stream.record_event())
    with asked:
        for _ in range(20):
            torch.ones(8, device="sim")
    done = asked.record_event()
    while not done.query():
        pass
    assert not any(end.query() for end in ends)


def test_reset_is_a_new_beginning(simulator: Simulator) -> None:
    """After ``reset`` nothing runs any more, nothing that happened before can race, and time and counters are zero."""
    simulator.reset(LAZY)
    host = torch.ones(8, pin_memory=True)
    with torch.Stream(device="sim"):
        on_device = host.to("sim", non_blocking=True)
    simulator.clock.advance(9)
    simulator.reset(Schedule("eager"))
    simulator.host_access(host, True)
    host.fill_(2)
    assert simulator.report() == []
    assert (simulator.clock.now(), simulator.clock.device(), simulator.host_waits()) == (0, 0, {})
    assert on_device.cpu().eq(1).all()


def test_a_stream_waits_for_what_was_recorded_by_then(sim: Simulator) -> None:
    """An event recorded again after a stream was made to wait for it does not make the stream wait longer."""
    first, second = torch.Stream(device="sim"), torch.Stream(device="sim")
    event = torch.Event(enable_timing=True)
    sim.clock.costs(operator_us=100, bytes_per_us=1000)
    with first:
        a = torch.ones(2, device="sim")  # 100 µs
        event.record(first)
    second.wait_event(event)
    with first:
        a = a + 1
        event.record(first)
    waited = torch.Event(enable_timing=True)
    waited.record(second)
    waited.synchronize()
    assert sim.clock.now() == pytest.approx(100)
    first.synchronize()
    assert sim.clock.now() == pytest.approx(200)
    assert waited.elapsed_time(event) * 1000 == pytest.approx(100)


def test_streams_are_of_a_pool(sim: Simulator) -> None:
    """As on CUDA, so many streams can be made, and then the first comes again."""
    streams = [torch.Stream(device="sim") for _ in range(33)]
    assert len({stream.stream_id for stream in streams}) == 32
    assert streams[32] == streams[0]


def test_random_schedules_differ_and_repeat(simulator: Simulator) -> None:
    """Seeds give different orders, and a seed gives the same order again."""

    def how_far(seed: int) -> list[bool]:
        simulator.reset(Schedule("random", seed))
        streams = [torch.Stream(device="sim") for _ in range(3)]
        x = torch.zeros(1, device="sim")
        events = []
        for _ in range(8):
            for stream in streams:
                with stream:
                    x.add_(0)
                events.append(stream.record_event())
        over = [event.query() for event in events]
        torch.accelerator.synchronize()
        simulator.report()
        return over

    orders = [how_far(seed) for seed in range(10)]
    assert len({tuple(order) for order in orders}) > 5
    assert [how_far(seed) for seed in range(10)] == orders


def test_host_waits_are_counted(sim: Simulator) -> None:
    """Every wait of the host for the device is counted under its reason, and no other is."""
    x = torch.ones(3).to("sim")
    y = (x + 1) * 2
    torch.accelerator.current_stream().wait_event(torch.accelerator.current_stream().record_event())
    assert sim.host_waits() == {"copy to the device": 1}
    assert y[0].item() == 4
    assert len(torch.nonzero(y)) == 3
    torch.accelerator.synchronize()
    assert sim.host_waits() == {"copy to the device": 1, "item": 1, "aten::nonzero": 1, "device": 1}


def test_an_error_of_queued_work_is_raised_at_a_wait(simulator: Simulator) -> None:
    """An index out of range is found on the device: the call returns, and the next wait raises, with no C++ stack."""
    simulator.reset(LAZY)
    table = torch.ones(3, 2, device="sim")
    torch.nn.functional.embedding(torch.tensor([7]).to("sim"), table)
    with pytest.raises(RuntimeError, match=r"work on the simulated device failed.*index out of range") as caught:
        torch.accelerator.synchronize()
    assert "Exception raised from" not in str(caught.value)
    assert [finding.kind for finding in simulator.report()] == ["asynchronous error"]
    torch.accelerator.synchronize()


def test_each_thread_has_its_stream_and_its_time(sim: Simulator) -> None:
    """A thread that sets its stream or spends time changes no other thread's."""
    seen: list[object] = []

    def work() -> None:
        seen.append(torch.accelerator.current_stream().stream_id)
        sim.clock.advance(50)
        seen.append(sim.clock.now())

    sim.clock.advance(5)
    with torch.Stream(device="sim"):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [0, 50]
    assert sim.clock.now() == 5
    sim.clock.reach(50)
    sim.clock.reach(20)
    assert sim.clock.now() == 50


def test_threads_share_the_device(sim: Simulator) -> None:
    """Threads that compute, wait, poll and free at the same time neither stop each other nor change a result."""
    wrong: list[str] = []

    def work(seed: int) -> None:
        torch.manual_seed(seed)
        stream = torch.Stream(device="sim")
        with stream:
            for step in range(30):
                host = torch.full((16, 16), float(seed + step), pin_memory=True)
                x = host.to("sim", non_blocking=True)
                y = torch.nn.functional.softmax(x @ x, dim=-1).sum()  # meta kernels in C++ and in Python
                done = stream.record_event()
                while not done.query():
                    pass
                if y.item() != pytest.approx(16):
                    wrong.append(f"{seed} {step}: {y.item()}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_reading_and_copying_on_the_clock(sim: Simulator) -> None:
    """Time that the host spends reading delays the copy, and copies in one direction share one link."""
    sim.clock.costs(operator_us=10, bytes_per_us=100)
    buffers = [torch.zeros(250, pin_memory=True) for _ in range(2)]  # 1,000 bytes: 10 µs each
    for buffer in buffers:
        sim.clock.advance(4)
        with torch.Stream(device="sim"):
            buffer.to("sim", non_blocking=True)
    assert sim.clock.now() == 8
    assert sim.clock.device() == pytest.approx(4 + 10 + 10)
