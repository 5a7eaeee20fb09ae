"""The order of measurements. Starts processes and asks them; computes no ratio and writes no report.

What is compared is measured next to each other: the resident model, odewei and its plain twin take turns, with a plain
read between the rounds; each peer runs alone (two processes that map the same files would share a page cache), with a
plain read and odewei before it and after it.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.cgroup import Limits
from benchmarks.disk import drop_page_cache
from benchmarks.memory import available_bytes, touch
from benchmarks.process import ContenderError, Process, started
from benchmarks.record import PLAIN_TWIN, Row
from benchmarks.settings import ALLOWANCE_BYTES, Settings

__all__ = ["Runner"]

_SPARE_BYTES = 1_000_000_000
_AIRLLM_PASSES = 3
_STREAMED_PASSES = 2  # of odewei, in a row and counted, after one that is not


class Runner:
    """One run. ``rows``, ``notes`` and ``reports`` fill while :meth:`run` goes on; ``say`` gets a line a step."""

    def __init__(self, settings: Settings, limits: Limits, say: Callable[[str], None]) -> None:
        self._settings, self._limits, self._say = settings, limits, say
        self._files = sorted(settings.checkpoint.glob("*.safetensors"))
        self._reader: Process | None = None
        self._count = 0
        self._whole_cache = True
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.reports: dict[str, str] = {}

    def run(self) -> None:
        """Measure everything. What a contender cannot do becomes a reason in its row."""
        with self._process("plain-read", None) as self._reader:
            self._bandwidth()
            self._cold()
            self._main_and_peers()
            for percent in self._settings.budgets:
                self._sweep(percent)
        self._reader = None
        self._fits()
        if not self._whole_cache:
            self.notes.append("The page cache could be emptied for the checkpoint's files only, not as a whole.")

    def _main_and_peers(self) -> None:
        settings = self._settings
        with self._trio("main", settings.limit_bytes, settings.budget_bytes, None) as trio:
            for tokens in settings.tokens:
                trio.compare(tokens)
            self.reports["odewei"] = trio.text()
            trio.end_all_but_odewei()
            for peer in settings.peers:
                self._peer(peer, trio, settings.tokens_of(peer), "peer", None)

    def _sweep(self, percent: int) -> None:
        budget = self._settings.sweep_budget_bytes(percent)
        with self._trio("sweep", budget + ALLOWANCE_BYTES, budget, percent) as trio:
            trio.compare(self._settings.tokens[0])
            trio.end_all_but_odewei()
            if percent == max(self._settings.budgets):
                for peer in self._settings.sweep_peers:
                    self._peer(peer, trio, self._settings.tokens[:1], "sweep", percent)

    @contextmanager
    def _trio(self, part: str, limit_bytes: int, budget_bytes: int | None, percent: int | None) -> Iterator[_Trio]:
        with ExitStack() as stack:
            trio = _Trio(self, part, limit_bytes, percent, stack)
            trio.start("odewei", self._keywords(budget_bytes, limit_bytes))
            trio.start(PLAIN_TWIN, self._keywords(budget_bytes, limit_bytes) | {"prefetch_depth": 0})
            if part == "main":
                trio.start("resident", {})
            yield trio

    def _keywords(self, budget_bytes: int | None, limit_bytes: int) -> dict[str, Any]:
        """odewei's keywords. Its "auto" sees real limits only; without one it gets what the limit would have left."""
        if budget_bytes is None and self._limits.memory is None:
            budget_bytes = limit_bytes - ALLOWANCE_BYTES
        return {} if budget_bytes is None else {"memory_budget": budget_bytes}

    def _peer(self, peer: str, trio: _Trio, counts: tuple[int, ...], part: str, percent: int | None) -> None:
        """One peer, alone, at each token count; odewei's passes before and after it."""
        rows = [Row(part=part, contender=peer, tokens=n, limit_bytes=trio.limit_bytes, percent=percent) for n in counts]
        why_not = self._why_not(peer)
        if why_not:
            self.rows += [replace(row, why_not=why_not) for row in rows]
            return
        passes = min(self._settings.passes, _AIRLLM_PASSES) if peer == "airllm" else self._settings.passes
        with tempfile.TemporaryDirectory(dir=self._settings.folder) as scratch, ExitStack() as stack:
            process = None
            for row in rows:
                try:
                    before, beside = self._bandwidth(), trio.beside(row.tokens)
                    if process is None:
                        process = stack.enter_context(self._process(peer, trio.limit_bytes))
                        self._start(process, peer, {}, row.tokens, trio.limit_bytes, Path(scratch))
                    self._say(f"{peer}, {row.tokens} tokens")
                    answer = process.ask("pass", tokens=row.tokens, uncounted=1, counted=passes)
                    beside += trio.beside(row.tokens)
                    bandwidth = (before + self._bandwidth()) / 2
                except ContenderError as error:
                    self._say(f"{peer}: not run: {error}")
                    left = rows[rows.index(row) :]
                    self.rows += [replace(each, why_not=f"not run: {error}") for each in left]
                    return
                measured = replace(
                    row,
                    rounds=[[seconds] for seconds in answer["seconds"]],
                    read_bytes=answer["disk_bytes"],
                    bandwidths=[bandwidth],
                    beside=beside,
                    bits=answer["bits"],
                    peak_bytes=process.group.peak_bytes(),
                )
                self.rows.append(measured)

    def _why_not(self, peer: str) -> str:
        settings = self._settings
        if peer in settings.needs_disk_again:
            needed = (2 * settings.weight_bytes + 500_000_000) / 1e9
            return f"not run: it writes all weights to the disk once more; allow that with --disk {needed:.1f}GB"
        return ""

    def _cold(self) -> None:
        """Fresh processes, nothing in the page cache: build and first pass; imports are not counted."""
        settings, tokens = self._settings, self._settings.tokens[0]
        rounds, bandwidths, bits, budget = [], [], set[str](), None
        try:
            for _ in range(settings.passes):
                self._say("cold start")
                before = self._bandwidth()
                with self._process("cold", settings.limit_bytes) as process:
                    keywords = self._keywords(settings.budget_bytes, settings.limit_bytes)
                    answer = self._start(process, "odewei", keywords, tokens, settings.limit_bytes)
                    budget = process.ask("report")["report"]["budget_bytes"]
                rounds.append([answer["first_seconds"]])
                bandwidths.append((before + self._bandwidth()) / 2)
                bits.update(answer["bits"])
        except ContenderError as error:
            self.notes.append(f"Cold start, odewei: {error}")
        self.rows.append(
            Row(
                part="cold",
                contender="odewei",
                tokens=tokens,
                limit_bytes=settings.limit_bytes,
                budget_bytes=budget,
                rounds=rounds,
                bandwidths=bandwidths[: len(rounds)],
                bits=sorted(bits),
            )
        )

    def _fits(self) -> None:
        """All weights fit: odewei and the resident model by turns in one process without a limit."""
        settings = self._settings
        counts = tuple(dict.fromkeys((settings.tokens[0], settings.tokens[len(settings.tokens) // 2])))
        budget, needed = 2 * settings.weight_bytes, 2 * settings.weight_bytes + _SPARE_BYTES
        for tokens in counts:
            row = Row(part="fits", contender="odewei", tokens=tokens, budget_bytes=budget)
            if available_bytes() < needed:
                self.rows.append(replace(row, why_not=f"not run: needs {needed / 1e9:.1f} GB of memory"))
                continue
            self._say(f"everything fits, {tokens} tokens")
            try:
                with self._process("fits", None) as process:
                    touch(needed)
                    process.ask("pair", folder=str(settings.checkpoint), budget_bytes=budget)
                    answer = process.ask("pair_pass", tokens=tokens, counted=8 * settings.passes)
            except ContenderError as error:
                self.rows.append(replace(row, why_not=f"not run: {error}"))
                continue
            seconds, bits = answer["seconds"], answer["bits"]
            ours, theirs = [[s] for s in seconds["odewei"]], [[s] for s in seconds["resident"]]
            self.rows.append(replace(row, rounds=ours, beside=seconds["resident"], bits=bits["odewei"]))
            self.rows.append(
                replace(row, contender="resident", budget_bytes=None, rounds=theirs, bits=bits["resident"])
            )

    @contextmanager
    def _process(self, label: str, limit_bytes: int | None) -> Iterator[Process]:
        self._count += 1
        with self._limits.group(f"{self._count}-{label}", limit_bytes) as group, started(group) as process:
            yield process

    def _start(
        self,
        process: Process,
        contender: str,
        keywords: dict[str, Any],
        tokens: int,
        needed_bytes: int,
        scratch: Path | None = None,
    ) -> dict[str, Any]:
        """Import, empty the page cache, touch memory, build, first pass."""
        settings = self._settings
        name = "odewei" if contender == PLAIN_TWIN else contender
        where = {"folder": str(settings.checkpoint), "scratch": str(scratch or settings.folder)}
        self._say(f"{contender}: build")
        process.ask("prepare", contender=name, keywords=keywords, **where)
        self._whole_cache &= drop_page_cache(self._files)
        touch(needed_bytes + _SPARE_BYTES)
        return process.ask("start", tokens=tokens)

    def _bandwidth(self) -> float:
        """Bytes a second of a plain read, now."""
        assert self._reader is not None
        answer = self._reader.ask("read", files=[str(file) for file in self._files], tries=4)
        if not answer["direct"] and not any("direct" in note for note in self.notes):
            self.notes.append("The file system takes no direct reads: the plain read went through the page cache.")
        return float(answer["nbytes"] / answer["seconds"])


@dataclass(slots=True)
class _Trio:
    """odewei, its plain twin and, in the main part, the resident model: alive together, asked by turns."""

    runner: Runner
    part: str
    limit_bytes: int
    percent: int | None
    stack: ExitStack
    processes: dict[str, Process] = field(default_factory=dict)
    _others: ExitStack = field(default_factory=ExitStack)

    def start(self, name: str, keywords: dict[str, Any]) -> None:
        """Start one; where that fails, a row says why and the others go on."""
        runner, settings = self.runner, self.runner._settings
        is_resident = name == "resident"
        needed = settings.weight_bytes if is_resident else self.limit_bytes
        if not self.processes:
            self.stack.enter_context(self._others)  # ends before odewei does
        try:
            if is_resident and available_bytes() < needed + 2 * _SPARE_BYTES:
                raise ContenderError(f"needs {needed / 1e9 + 2:.1f} GB of memory")
            stack = self.stack if name == "odewei" else self._others
            label = name.replace(", ", "-").replace("=", "-")
            process = stack.enter_context(runner._process(label, None if is_resident else self.limit_bytes))
            runner._start(process, name, keywords, settings.tokens[0], needed)
            self.processes[name] = process
        except ContenderError as error:
            runner._say(f"{name}: not run: {error}")
            self._add(name, settings.tokens[0], why_not=f"not run: {error}")

    def compare(self, tokens: int) -> None:
        """Rounds of all of them, after one that is not counted, a plain read between the rounds."""
        runner = self.runner
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in self.processes}
        widths: list[float] = []
        for index in range(runner._settings.passes + 1):
            runner._say(
                f"{self.part}{'' if self.percent is None else f' {self.percent} %'}, {tokens} tokens, round {index}"
            )
            for name, process in list(self.processes.items()):
                try:
                    answer = self._ask(name, process, tokens)
                except ContenderError as error:
                    del self.processes[name]
                    runner._say(f"{name}: failed: {error}")
                    self._add(name, tokens, why_not=f"failed: {error}")
                    continue
                if index:
                    found[name].append(answer)
            widths.append(runner._bandwidth())
        bandwidths = [statistics.fmean(pair) for pair in itertools.pairwise(widths)]
        for name, process in self.processes.items():
            answers = found[name]
            which = "disk_bytes" if name == "resident" else "read_bytes"
            self._add(
                name,
                tokens,
                budget_bytes=None if name == "resident" else process.ask("report")["report"]["budget_bytes"],
                rounds=[answer["seconds"] for answer in answers],
                read_bytes=[statistics.fmean(answer[which]) for answer in answers],
                bandwidths=bandwidths,
                bits=sorted({bits for answer in answers for bits in answer["bits"]}),
                peak_bytes=process.group.peak_bytes(),
            )

    def beside(self, tokens: int) -> list[float]:
        """Seconds a pass of odewei now: one number; none if it has failed."""
        if "odewei" not in self.processes:
            return []
        return [statistics.fmean(self._ask("odewei", self.processes["odewei"], tokens)["seconds"])]

    def text(self) -> str:
        """odewei's own report."""
        return str(self.processes["odewei"].ask("report")["text"]) if "odewei" in self.processes else ""

    def end_all_but_odewei(self) -> None:
        """Give back the memory of the others."""
        self._others.close()
        self.processes = {name: process for name, process in self.processes.items() if name == "odewei"}

    def _ask(self, name: str, process: Process, tokens: int) -> dict[str, Any]:
        if name == "odewei":  # what it read ahead while it was not asked is used up by the pass that is not counted
            return process.ask("pass", tokens=tokens, uncounted=1, counted=_STREAMED_PASSES)
        return process.ask("pass", tokens=tokens, uncounted=0, counted=1)

    def _add(self, name: str, tokens: int, **values: Any) -> None:
        limit = None if name == "resident" else self.limit_bytes
        row = Row(part=self.part, contender=name, tokens=tokens, limit_bytes=limit, percent=self.percent, **values)
        self.runner.rows.append(row)
