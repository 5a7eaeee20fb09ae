"""odewei, its plain twin and the resident model, measured side by side: one pass each in turn.

A machine's speed drifts within minutes. Passes that take turns all meet the same drift, so that the n-th pass of one
is rightly compared with the n-th of another. odewei reads ahead while the others have their turn, which its own passes
would not leave it time for; so before each of its counted passes there is one that is not counted, which uses that up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.memory import available_bytes
from benchmarks.process import ContenderError, Process
from benchmarks.record import Row
from benchmarks.stage import SPARE_BYTES, Stage

__all__ = ["Trio"]


@dataclass(slots=True)
class _Found:
    """What one contender's passes at one token count have given so far, one item a pass."""

    seconds: list[float] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    bandwidths: list[float] = field(default_factory=list)
    bits: set[str] = field(default_factory=set)
    budget_bytes: int | None = None
    peak_bytes: int | None = None


@dataclass(slots=True)
class Trio:
    """odewei, its plain twin and, in the main part, the resident model: alive together, asked by turns. ``stack`` is
    whose end they do not outlive; ``rows`` is where their rows go.
    """

    stage: Stage
    rows: list[Row]
    part: str
    limit_bytes: int
    percent: int | None
    tokens: Sequence[int]
    stack: ExitStack
    processes: dict[str, Process] = field(default_factory=dict)
    _others: ExitStack = field(default_factory=ExitStack)
    _found: dict[tuple[int, str], _Found] = field(default_factory=dict)

    def start(self, wanted: dict[str, dict[str, Any]]) -> None:
        """Launch all, then start one after the other; where that fails, a row says why and the others go on."""
        self.stack.enter_context(self._others)  # ends before the resident model does
        launched = {}
        for name, keywords in wanted.items():
            with self._or_a_row("not run", name):
                launched[name] = self._launch(name, keywords)
        for name, process in list(launched.items()):
            with self._or_a_row("not run", name):
                self.stage.imported(process)
                needed = self.stage.settings.weight_bytes if name == "resident" else self.limit_bytes
                self.stage.start(process, name, self.tokens[0], needed)
                self.processes[name] = process

    def compare(self, passes: int) -> None:
        """So many passes of each at each token count, in turn; a plain read before and after."""
        where = self.part if self.percent is None else f"{self.part} {self.percent} %"
        before = self.stage.bandwidth()
        for tokens in self.tokens:
            self.stage.say(f"{where}, {tokens} tokens")
            for number in range(passes):
                for name, process in list(self.processes.items()):
                    with self._or_a_row("failed", name, tokens):
                        self._pass(name, process, tokens, uncounted=1 if name == "odewei" or number == 0 else 0)
            after = self.stage.bandwidth()
            for found in (found for (count, _), found in self._found.items() if count == tokens):
                found.bandwidths += [(before + after) / 2] * (len(found.seconds) - len(found.bandwidths))
            before = after

    def _launch(self, name: str, keywords: dict[str, Any]) -> Process:
        stage, is_resident = self.stage, name == "resident"
        needed = stage.settings.weight_bytes + 2 * SPARE_BYTES
        if is_resident and available_bytes() < needed:
            raise ContenderError(f"needs {needed / 1e9:.1f} GB of memory")
        stack = self.stack if is_resident else self._others
        label = name.replace(", ", "-").replace("=", "-")
        process = stack.enter_context(stage.process(label, None if is_resident else self.limit_bytes))
        stage.launch(process, name, keywords)
        return process

    def _pass(self, name: str, process: Process, tokens: int, *, uncounted: int) -> None:
        """One counted pass, right after those that are not."""
        answer = self.stage.passes(process, name, tokens, uncounted=uncounted, counted=1)
        found = self._found.setdefault((tokens, name), _Found())
        found.seconds += answer["seconds"]
        found.nbytes += answer["disk_bytes" if name == "resident" else "read_bytes"]
        found.bits.update(answer["bits"])
        found.peak_bytes = process.group.peak_bytes()
        if name != "resident":
            found.budget_bytes = process.ask("report")["report"]["budget_bytes"]

    def finish(self) -> None:
        """Write the rows of those that made all their passes."""
        for (tokens, name), found in self._found.items():
            if name in self.processes:
                self._add(
                    name,
                    tokens,
                    budget_bytes=found.budget_bytes,
                    rounds=[[seconds] for seconds in found.seconds],
                    read_bytes=found.nbytes,
                    bandwidths=found.bandwidths,
                    bits=sorted(found.bits),
                    peak_bytes=found.peak_bytes,
                )

    def odewei_seconds(self, tokens: int) -> list[float]:
        """Seconds of odewei's passes so far; none if it has failed."""
        return self._found[tokens, "odewei"].seconds if "odewei" in self.processes else []

    def text(self) -> str:
        """odewei's own report."""
        return str(self.processes["odewei"].ask("report")["text"]) if "odewei" in self.processes else ""

    def end_all_but_resident(self) -> None:
        """Give back the memory of the others."""
        self._others.close()
        self.processes = {name: process for name, process in self.processes.items() if name == "resident"}

    @contextmanager
    def _or_a_row(self, how: str, name: str, tokens: int | None = None) -> Iterator[None]:
        """What a contender cannot do becomes a row that says why, and it is asked no more."""
        try:
            yield
        except ContenderError as error:
            self.processes.pop(name, None)
            self.stage.say(f"{name}: {how}: {error}")
            self._add(name, self.tokens[0] if tokens is None else tokens, why_not=f"{how}: {error}")

    def _add(self, name: str, tokens: int, **values: Any) -> None:
        limit = None if name == "resident" else self.limit_bytes
        row = Row(part=self.part, contender=name, tokens=tokens, limit_bytes=limit, percent=self.percent, **values)
        self.rows.append(row)
