"""The whole benchmark, on a tiny checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_whole_run_writes_a_report(tmp_path: Path) -> None:
    """One call leaves a report, its JSON and a plot, with odewei, its twin and a peer measured and the bits right."""
    sizes = ["--size", "8MB", "--limit", "900MB", "--budget", "4MB", "--tokens", "1", "--passes", "1"]
    which = ["--budgets", "50", "--peers", "mmap", "--sweep-peers", ""]
    where = ["--folder", str(tmp_path / "cache"), "--results", str(tmp_path / "results")]
    assert main([*sizes, *which, *where]) == 0
    names = sorted(file.suffix for file in (tmp_path / "results").iterdir())
    assert names == [".json", ".md", ".png"]
    record = json.loads(next((tmp_path / "results").glob("*.json")).read_text())
    measured = {(row["part"], row["contender"]) for row in record["rows"] if row["rounds"]}
    assert {("main", "odewei"), ("main", "odewei, prefetch_depth=0"), ("peer", "mmap"), ("cold", "odewei")} <= measured
    report = next((tmp_path / "results").glob("*.md")).read_text()
    assert str(tmp_path) not in report
