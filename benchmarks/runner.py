"""The order of measurements. Starts processes and asks them; computes no ratio and writes no report.

A contender is one process for all token counts, and each has its own. What is compared is measured next to each other:
the resident model, odewei and its plain twin after each other, with a plain read around them; then the peers, each
alone (two processes that map the same files would share a page cache); then a second group of odewei's passes.

Starting takes a third of the time. So processes that follow each other are launched together, and import at the same
time while nothing is measured; and the resident model of the main part is also the one that everything is compared
with where everything fits.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.cgroup import Limits
from benchmarks.disk import drop_files, drop_page_cache, own_bytes
from benchmarks.memory import available_bytes, touch
from benchmarks.process import ContenderError, Process, started
from benchmarks.record import PLAIN_TWIN, Row
from benchmarks.settings import ALLOWANCE_BYTES, Settings

__all__ = ["Runner", "groups"]

_SPARE_BYTES = 1_000_000_000
_PAIRS = (5, 2)  # of everything that fits, times passes, at the two token counts: a short pass is a noisy one


def groups(passes: int) -> list[int]:
    """How many of ``passes`` are measured before the peers, and how many after them."""
    return [count for count in ((passes + 1) // 2, passes // 2) if count]


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
        if not self._whole_cache:
            self.notes.append("The page cache could be emptied for the checkpoint's files only, not as a whole.")

    def _main_and_peers(self) -> None:
        settings = self._settings
        with self._trio("main", settings.limit_bytes, settings.budget_bytes, None, settings.tokens) as trio:
            self._around(trio, settings.peers)
            self.reports["odewei"] = trio.text()
            trio.end_all_but_resident()
            self._fits(trio.processes.get("resident"))

    def _sweep(self, percent: int) -> None:
        budget = self._settings.sweep_budget_bytes(percent)
        with self._trio("sweep", budget + ALLOWANCE_BYTES, budget, percent, self._settings.tokens[:1]) as trio:
            self._around(trio, self._settings.sweep_peers if percent == max(self._settings.budgets) else ())

    def _around(self, trio: _Trio, peers: Sequence[str]) -> None:
        """The trio's passes before the peers, the peers, the rest of odewei's passes after them."""
        passes = self._settings.passes
        before, *after = groups(passes) if peers else [passes]
        trio.compare(before, of_others=passes)
        found = self._peers(peers, trio)
        for count in after:
            trio.compare(count)
        trio.finish()
        self.rows += [replace(row, beside=trio.odewei_seconds(row.tokens)) if row.rounds else row for row in found]

    @contextmanager
    def _trio(
        self, part: str, limit_bytes: int, budget_bytes: int | None, percent: int | None, tokens: Sequence[int]
    ) -> Iterator[_Trio]:
        keywords = self._keywords(budget_bytes, limit_bytes)
        wanted = {"odewei": keywords, PLAIN_TWIN: keywords | {"prefetch_depth": 0}}
        if part == "main":
            wanted["resident"] = {}
        with ExitStack() as stack:
            trio = _Trio(self, part, limit_bytes, percent, tokens, stack)
            trio.start(wanted)
            yield trio

    def _keywords(self, budget_bytes: int | None, limit_bytes: int) -> dict[str, Any]:
        """odewei's keywords. Its "auto" sees real limits only; without one it gets what the limit would have left."""
        if budget_bytes is None and self._limits.memory is None:
            budget_bytes = limit_bytes - ALLOWANCE_BYTES
        return {} if budget_bytes is None else {"memory_budget": budget_bytes}

    def _peers(self, peers: Sequence[str], trio: _Trio) -> list[Row]:
        """Each peer alone, with a plain read before it and after it."""
        found = []
        before = self._bandwidth() if peers else 0.0
        for peer in peers:
            rows = self._peer(peer, trio)
            if any(row.rounds for row in rows):
                after = self._bandwidth()
                rows = [replace(row, bandwidths=[(before + after) / 2]) if row.rounds else row for row in rows]
                before = after
            found += rows
        return found

    def _peer(self, peer: str, trio: _Trio) -> list[Row]:
        """One peer at each token count. Its first pass is not counted."""
        counts = [tokens for tokens in trio.tokens if tokens in self._settings.tokens_of(peer)]
        part = "peer" if trio.part == "main" else trio.part
        first = Row(part=part, contender=peer, tokens=counts[0], limit_bytes=trio.limit_bytes, percent=trio.percent)
        left = [replace(first, tokens=tokens) for tokens in counts]
        done: list[Row] = []
        why_not = self._why_not(peer)
        if why_not:
            return [replace(row, why_not=why_not) for row in left]
        with tempfile.TemporaryDirectory(dir=self._settings.folder) as scratch, ExitStack() as stack:
            try:
                process = stack.enter_context(self._process(peer, trio.limit_bytes))
                self._launch(process, peer, {}, Path(scratch))
                self._start(process, peer, left[0].tokens, trio.limit_bytes)
                written = own_bytes(Path(scratch))
                if written > self._settings.weight_bytes // 100:
                    self.notes.append(f"{peer} wrote {written / 1e9:.2f} GB of its own before its first pass.")
                while left:
                    self._say(f"{peer}, {left[0].tokens} tokens")
                    answer = process.ask("pass", tokens=left[0].tokens, uncounted=0, counted=self._settings.passes)
                    measured = replace(
                        left.pop(0),
                        rounds=[[seconds] for seconds in answer["seconds"]],
                        read_bytes=answer["disk_bytes"],
                        bits=answer["bits"],
                        peak_bytes=process.group.peak_bytes(),
                    )
                    done.append(measured)
            except ContenderError as error:
                self._say(f"{peer}: not run: {error}")
                done += [replace(row, why_not=f"not run: {error}") for row in left]
        return done

    def _why_not(self, peer: str) -> str:
        settings = self._settings
        if peer in settings.needs_disk_again:
            needed = (2 * settings.weight_bytes + 500_000_000) / 1e9
            return f"not run: it writes all weights to the disk once more; allow that with --disk {needed:.1f}GB"
        return ""

    def _cold(self) -> None:
        """Fresh processes, started with an empty page cache: build and first pass; imports are not counted."""
        settings, tokens = self._settings, self._settings.tokens[0]
        rounds, widths, bits, budget = [], [self._bandwidth()], set[str](), None
        keywords = self._keywords(settings.budget_bytes, settings.limit_bytes)
        try:
            with ExitStack() as stack:
                waiting = []
                self._whole_cache &= drop_page_cache(self._files)
                for _ in range(settings.passes):
                    own = stack.enter_context(ExitStack())
                    process = own.enter_context(self._process("cold", settings.limit_bytes))
                    self._launch(process, "odewei", keywords)
                    waiting.append((process, own))
                for process, own in waiting:
                    self._say("cold start")
                    answer = self._start(process, "odewei", tokens, settings.limit_bytes, imports_again=False)
                    budget = process.ask("report")["report"]["budget_bytes"]
                    own.close()
                    rounds.append([answer["first_seconds"]])
                    widths.append(self._bandwidth())
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
                bandwidths=_means(widths),
                bits=sorted(bits),
            )
        )

    def _fits(self, process: Process | None) -> None:
        """All weights fit: odewei and the resident model by turns, in the resident model's process without a limit."""
        settings = self._settings
        counts = tuple(dict.fromkeys((settings.tokens[0], settings.tokens[len(settings.tokens) // 2])))
        budget, needed = 2 * settings.weight_bytes, settings.weight_bytes + _SPARE_BYTES
        left = [Row(part="fits", contender="odewei", tokens=tokens, budget_bytes=budget) for tokens in counts]
        try:
            if process is None:
                raise ContenderError("the resident model did not run")
            if available_bytes() < needed:
                raise ContenderError(f"needs {needed / 1e9:.1f} GB of memory more")
            touch(needed)
            process.ask("pair", folder=str(settings.checkpoint), budget_bytes=budget)
            for times in _PAIRS[: len(counts)]:
                self._say(f"everything fits, {left[0].tokens} tokens")
                answer = process.ask("pair_pass", tokens=left[0].tokens, counted=times * settings.passes)
                row, seconds, bits = left.pop(0), answer["seconds"], answer["bits"]
                ours, theirs = [[s] for s in seconds["odewei"]], [[s] for s in seconds["resident"]]
                self.rows.append(replace(row, rounds=ours, beside=seconds["resident"], bits=bits["odewei"]))
                self.rows.append(
                    replace(row, contender="resident", budget_bytes=None, rounds=theirs, bits=bits["resident"])
                )
        except ContenderError as error:
            self.rows += [replace(row, why_not=f"not run: {error}") for row in left]

    @contextmanager
    def _process(self, label: str, limit_bytes: int | None) -> Iterator[Process]:
        self._count += 1
        with self._limits.group(f"{self._count}-{label}", limit_bytes) as group, started(group) as process:
            yield process

    def _launch(self, process: Process, contender: str, keywords: dict[str, Any], scratch: Path | None = None) -> None:
        """Let it import, without waiting; :meth:`_start` has to follow."""
        settings = self._settings
        name = "odewei" if contender == PLAIN_TWIN else contender
        where = {"folder": str(settings.checkpoint), "scratch": str(scratch or settings.folder)}
        process.tell("prepare", contender=name, keywords=keywords, **where)

    def _start(
        self, process: Process, contender: str, tokens: int, needed_bytes: int, *, imports_again: bool = True
    ) -> dict[str, Any]:
        """Wait for its imports, empty the page cache, touch memory, build, first pass.

        The whole page cache, which holds the libraries' own code as well, or (not ``imports_again``) that of the
        checkpoint: where the first pass is timed, code is what the imports have left it.
        """
        self._say(f"{contender}: build")
        process.answer()
        if imports_again:
            self._whole_cache &= drop_page_cache(self._files)
        else:
            drop_files(self._files)
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
class _Found:
    """What one contender's passes at one token count have given so far, one item a pass."""

    seconds: list[float] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    bandwidths: list[float] = field(default_factory=list)
    bits: set[str] = field(default_factory=set)
    budget_bytes: int | None = None
    peak_bytes: int | None = None


@dataclass(slots=True)
class _Trio:
    """odewei, its plain twin and, in the main part, the resident model: alive together, asked by turns."""

    runner: Runner
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
        for name, process in launched.items():
            with self._or_a_row("not run", name):
                needed = self.runner._settings.weight_bytes if name == "resident" else self.limit_bytes
                self.runner._start(process, name, self.tokens[0], needed)
                self.processes[name] = process

    def _launch(self, name: str, keywords: dict[str, Any]) -> Process:
        runner, is_resident = self.runner, name == "resident"
        needed = runner._settings.weight_bytes + 2 * _SPARE_BYTES
        if is_resident and available_bytes() < needed:
            raise ContenderError(f"needs {needed / 1e9:.1f} GB of memory")
        stack = self.stack if is_resident else self._others
        label = name.replace(", ", "-").replace("=", "-")
        process = stack.enter_context(runner._process(label, None if is_resident else self.limit_bytes))
        runner._launch(process, name, keywords)
        return process

    def compare(self, passes: int, *, of_others: int = 0) -> None:
        """Passes of odewei and of the others at each token count, a plain read before and after."""
        where = self.part if self.percent is None else f"{self.part} {self.percent} %"
        before = self.runner._bandwidth()
        for tokens in self.tokens:
            self.runner._say(f"{where}, {tokens} tokens")
            asked: list[_Found] = []
            for name, process in list(self.processes.items()):
                count = passes if name == "odewei" else of_others
                with self._or_a_row("failed", name, tokens):
                    asked += [self._ask(name, process, tokens, count)] if count else []
            after = self.runner._bandwidth()
            for found in asked:
                found.bandwidths += [(before + after) / 2] * (len(found.seconds) - len(found.bandwidths))
            before = after

    def _ask(self, name: str, process: Process, tokens: int, passes: int) -> _Found:
        """Passes in a row, after one that is not counted: it warms up, and uses what odewei read ahead while idle."""
        answer = process.ask("pass", tokens=tokens, uncounted=1, counted=passes)
        found = self._found.setdefault((tokens, name), _Found())
        found.seconds += answer["seconds"]
        found.nbytes += answer["disk_bytes" if name == "resident" else "read_bytes"]
        found.bits.update(answer["bits"])
        found.peak_bytes = process.group.peak_bytes()
        if name != "resident":
            found.budget_bytes = process.ask("report")["report"]["budget_bytes"]
        return found

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
            self.runner._say(f"{name}: {how}: {error}")
            self._add(name, self.tokens[0] if tokens is None else tokens, why_not=f"{how}: {error}")

    def _add(self, name: str, tokens: int, **values: Any) -> None:
        limit = None if name == "resident" else self.limit_bytes
        row = Row(part=self.part, contender=name, tokens=tokens, limit_bytes=limit, percent=self.percent, **values)
        self.runner.rows.append(row)


def _means(values: Sequence[float]) -> list[float]:
    """The means of neighbours."""
    return [statistics.fmean(pair) for pair in itertools.pairwise(values)]
