"""odewei.profile on whole models: what it says agrees with the report, and it leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import odewei
from odewei.profiling.picture import lanes_of
from odewei.profiling.spans import Kind, Span
from odewei.runtime import runtime_of
from tests import models as zoo
from tests.traps import DEPTHS, Blocks, rows, twins


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_timeline_agrees_with_the_report(depth: int | str, tmp_path: Path) -> None:
    """Bytes, passes, hits, evictions and stalls of a recording are what the report grew by, and the bits are right."""
    with twins(Blocks, tmp_path, depth, granularity="block") as (model, streamed), torch.no_grad():
        streamed(rows(0))
        before = odewei.report(streamed)
        with odewei.profile(streamed) as timeline:
            found = [streamed(rows(seed)) for seed in range(4)]
            runtime_of(streamed).driver.ledger.observer = None  # readers go on: nothing may come between the two
            after = odewei.report(streamed)
        assert zoo.same_bits(found, [model(rows(seed)) for seed in range(4)])
        summary = timeline.summary
        assert summary.passes == 4
        assert summary.uses == after.accesses - before.accesses == 32
        assert summary.hits == after.hits - before.hits
        assert summary.bytes_read == sum(layer.bytes_read for layer in timeline.layers)
        assert summary.budget_bytes == after.budget_bytes >= summary.peak_bytes > 0
        stalled = sum(layer.exposed_seconds for layer in timeline.layers)
        assert stalled == pytest.approx(after.stall_seconds - before.stall_seconds)
        assert 0 < summary.compute_seconds <= summary.inside_seconds <= summary.seconds
        names = [layer.name for layer in timeline.layers]
        assert names[:8] == [f"blocks.{index}" for index in range(8)]
        assert all(layer.uses == 4 for layer in timeline.layers[:8])
        if depth == 0:
            assert summary.bytes_read == after.bytes_read - before.bytes_read > 0
            assert {span.lane for span in timeline.spans if span.kind is Kind.READ} == {threading.current_thread().name}


def test_nobody_watches_before_and_after(tmp_path: Path) -> None:
    """The observer is there inside the with statement only, also after an exception; twice at once is refused."""
    with twins(Blocks, tmp_path, granularity="block") as (_, streamed), torch.no_grad():
        ledger = runtime_of(streamed).driver.ledger
        assert ledger.observer is None
        with contextlib.suppress(ValueError), odewei.profile(streamed) as timeline:
            streamed(rows(0))
            with pytest.raises(odewei.OdeweiError, match="profiled already"), odewei.profile(streamed):
                pass
            raise ValueError("in the middle")
        assert ledger.observer is None
        spans = timeline.spans
        streamed(rows(1))
        assert timeline.spans is spans
        assert "complete" in repr(timeline)


def test_a_timeline_can_be_looked_at_while_it_grows(tmp_path: Path) -> None:
    """Inside the with statement it tells what happened so far."""
    with (
        twins(Blocks, tmp_path, granularity="block") as (_, streamed),
        torch.no_grad(),
        odewei.profile(streamed) as timeline,
    ):
        assert timeline.summary.passes == 0
        assert timeline.advice[0].startswith("no pass ended")
        for count in (1, 2):
            streamed(rows(0))
            assert timeline.summary.passes == count


class Table(nn.Module):
    """A table of which rows are looked up, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20_000, 16)  # as large as a table has to be to be read by rows
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_rows_of_tables_are_in_it(tmp_path: Path) -> None:
    """What a look-up reads is a row of the table of layers, with its bytes, and exposed."""
    with twins(Table, tmp_path, fraction=0.05) as (_, streamed), torch.no_grad():
        with odewei.profile(streamed) as timeline:
            streamed(torch.arange(7, 3000, 31))
        rows_read = odewei.report(streamed).rows_read
        (table,) = (layer for layer in timeline.layers if layer.name == "embed.weight")
        assert table.bytes_read == rows_read * 64 > 0
        assert table.exposed_seconds > 0


def test_a_saved_timeline_is_a_trace_of_events(tmp_path: Path) -> None:
    """The file is JSON with named tracks, spans that do not overlap on a track, and memory against the budget."""
    with twins(Blocks, tmp_path, granularity="block") as (_, streamed), torch.no_grad():
        with odewei.profile(streamed) as timeline:
            for seed in range(3):
                streamed(rows(seed))
        timeline.save(tmp_path / "t.json")
        trace = json.loads((tmp_path / "t.json").read_text())
    events = trace["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    assert all(isinstance(event["pid"], int) and isinstance(event["tid"], int) for event in events)
    tracks = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    kinds = {name.split(":")[0] for name in tracks.values()}
    assert {"reading", "computing", "waiting", "passes"} <= kinds
    for tid in tracks:
        own = sorted((event["ts"], event["dur"]) for event in events if event["ph"] == "X" and event["tid"] == tid)
        assert own
        for (begin, seconds), (following, _) in pairwise(own):
            assert begin + seconds <= following + 1e-3
    memory = [event["args"] for event in events if event["name"] == "bytes of weights"]
    budgets = {event["args"]["budget"] for event in events if event["name"] == "budget"}
    assert budgets == {odewei.report(streamed).budget_bytes}
    assert max(sum(level.values()) for level in memory) <= max(budgets)
    assert trace["otherData"]["summary"]["passes"] == 3
    assert trace["otherData"]["advice"] == list(timeline.advice)


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    """A PNG with a line for each reader and each kind of work."""
    pytest.importorskip("matplotlib")
    with twins(Blocks, tmp_path, granularity="block") as (_, streamed), torch.no_grad():
        with odewei.profile(streamed) as timeline:
            streamed(rows(0))
        timeline.plot(tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    kinds = {kind for kind, _ in lanes_of(timeline.spans)}
    assert kinds == {Kind.READ, Kind.COMPUTE, Kind.STALL, Kind.PASS}


def test_a_picture_has_no_end_of_lanes() -> None:
    """Of many threads those that did most have a line, in order of kinds."""
    spans = [Span(Kind.PASS, f"thread {index}", "pass", 0.0, 1.0 + index) for index in range(60)]
    lanes = lanes_of([Span(Kind.READ, "reader", "x", 0.0, 100.0), *spans])
    assert len(lanes) == 24
    assert lanes[0] == (Kind.READ, "reader")
    assert (Kind.PASS, "thread 0") not in lanes


def test_a_picture_without_matplotlib_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install; the table and the trace need nothing."""
    with (
        twins(Blocks, tmp_path, granularity="block") as (_, streamed),
        torch.no_grad(),
        odewei.profile(streamed) as timeline,
    ):
        streamed(rows(0))
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(odewei.OdeweiError, match=r"odewei\[plot\]"):
        timeline.plot(tmp_path / "t.png")


def test_a_printed_timeline_is_a_table_with_advice(tmp_path: Path) -> None:
    """A line a layer, the sum, the facts and at least one arrow; a long table is cut to what matters."""
    with (
        twins(Blocks, tmp_path, granularity="block") as (_, streamed),
        torch.no_grad(),
        odewei.profile(streamed) as timeline,
    ):
        streamed(rows(0))
    lines = str(timeline).splitlines()
    assert lines[0].startswith("layer ")
    assert lines[0].endswith("computing s")
    assert [line.split()[0] for line in lines[2:10]] == [f"blocks.{index}" for index in range(8)]
    assert any(line.startswith("sum ") for line in lines)
    assert any(line.startswith("floor ") for line in lines)
    assert lines[-1].startswith("→ ")


def test_all_models_of_a_budget_are_recorded(tmp_path: Path) -> None:
    """Layers of two models that share a budget are told apart by the model's number."""
    budget = odewei.MemoryBudget("1MiB")
    path = zoo.save(zoo.resident(Blocks), tmp_path / "m.safetensors")
    with (
        zoo.streamed(Blocks, str(path), memory_budget=budget) as one,
        zoo.streamed(Blocks, str(path), memory_budget=budget) as two,
        torch.no_grad(),
        odewei.profile(two) as timeline,
    ):
        one(rows(0))
        two(rows(0))
    assert {layer.name for layer in timeline.layers} >= {"1: blocks.0", "2: blocks.7"}
    assert timeline.summary.passes == 2


@pytest.mark.parametrize("all_threads", [False, True])
def test_ranges_appear_in_a_profile_of_torch(all_threads: bool, tmp_path: Path) -> None:
    """Waits are ranges in torch's profile, reads are where it profiles all threads; none is made without a profiler."""
    config = torch._C._profiler._ExperimentalConfig(profile_all_threads=all_threads)
    with twins(Blocks, tmp_path, granularity="block") as (_, streamed), torch.no_grad():
        streamed(rows(0))
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], experimental_config=config
        ) as profiler:
            for seed in range(3):
                streamed(rows(seed))
    names = {event.name for event in profiler.events() or ()}
    assert any(name.startswith("odewei.wait blocks.") for name in names)
    assert any(name.startswith("odewei.read blocks.") for name in names) == all_threads
