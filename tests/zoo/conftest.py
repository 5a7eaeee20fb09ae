"""Counts of the zoo by family, shown at the end of ``make zoo``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from tests.zoo.cannot import CANNOT_RUN


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny tensors are not worth a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Passed / total by family and the reasons of the rest, when the whole zoo was asked for."""
    if not config.getoption("zoo_summary", False):
        return
    totals: Counter[str] = Counter()
    passed: Counter[str] = Counter()
    others = []
    for outcome in ("passed", "failed", "skipped", "xfailed", "xpassed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            told = dict(report.user_properties)
            family = told.get("family")
            if family is None:
                continue
            totals[str(family)] += 1
            passed[str(family)] += outcome == "passed"
            if "overdraws" in told:
                others.append(f"beyond its budget: {_name(report)}: {told['overdraws']}")
            if outcome != "passed":
                others.append(f"{outcome}: {_name(report)}: {_reason(report)}")
    terminalreporter.section("the zoo: the same bits as the resident model, passed / total")
    for family in totals:
        terminalreporter.line(f"{family:28} {passed[family]:4} / {totals[family]}")
    terminalreporter.line(f"{'all':28} {sum(passed.values()):4} / {sum(totals.values())}")
    for line in others:
        terminalreporter.line(line)
    for name, reason in CANNOT_RUN.items():
        terminalreporter.line(f"not in the zoo: {name}: {reason}")


def _name(report: pytest.TestReport | pytest.CollectReport) -> str:
    return report.nodeid.partition("::")[2]


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(getattr(report, "wasxfail", "") or getattr(crash, "message", "")).partition("\n")[0][:200]
