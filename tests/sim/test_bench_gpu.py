"""The benchmark for accelerators runs from end to end where there is any, if only a simulated one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_gpu
from tests.sim import accelerated
from tests.sim.simulator import Schedule, Simulator


def test_the_benchmark_for_accelerators(
    simulator: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of odewei's rows run and have the resident model's bits; a peer that cannot run says why."""
    simulator.reset(Schedule("eager"))
    accelerated.use(lambda: accelerated.SimMemory(simulator))
    monkeypatch.setattr(bench_gpu, "link", lambda device: 1e9)
    options = ["--size", "12MB", "--budgets", "0.5", "--tokens", "2", "--passes", "1", "--host", "64MiB"]
    assert bench_gpu.main([*options, "--folder", str(tmp_path), "--results", str(tmp_path / "results")]) == 0
    (file,) = (tmp_path / "results").glob("*.json")
    rows = json.loads(file.read_text())["rows"]
    found = {row["contender"]: row for row in rows}
    assert len(found) == 5
    for name, row in found.items():
        assert (row["ms"] is None) == bool(row["note"]), name
    assert found["odewei, 50%"]["equal"]
    assert found["odewei, 50%, plain twin"]["equal"]
    assert found["resident"]["ms"] is not None
    assert "| odewei, 50% | 2 |" in capsys.readouterr().out
    simulator.report()  # what peers do is theirs
