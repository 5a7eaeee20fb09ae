"""The order of measurements. Starts no process by itself, computes no ratio and writes no report.

A contender is one process for all token counts, and each has its own. What is compared is measured next to each other:
the resident model, odewei and its plain twin pass by pass, with a plain read around them; then the peers, each alone
(two processes that map the same files would share a page cache); then a second group of the trio's passes.

Importing takes a large part of the time. So processes that follow each other are launched together, and import at the
same time while nothing is measured; and the resident model of the main part is also the one that everything is
compared with where everything fits.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.cgroup import Limits
from benchmarks.disk import own_bytes
from benchmarks.memory import available_bytes, touch
from benchmarks.process import ContenderError, Process
from benchmarks.record import PLAIN_TWIN, Row
from benchmarks.settings import ALLOWANCE_BYTES, Settings
from benchmarks.stage import SPARE_BYTES, Stage
from benchmarks.trio import Trio

__all__ = ["Runner", "groups"]

_PAIRS = (5, 2)  # of everything that fits, times passes, at the two token counts: a short pass is a noisy one


def groups(passes: int) -> list[int]:
    """How many of ``passes`` are measured before the peers, and how many after them."""
    return [count for count in ((passes + 1) // 2, passes // 2) if count]


class Runner:
    """One run. ``rows``, ``notes`` and ``reports`` fill while :meth:`run` goes on; ``say`` gets a line a step."""

    def __init__(self, settings: Settings, limits: Limits, say: Callable[[str], None]) -> None:
        self._settings, self._say = settings, say
        self._stage = Stage(settings, limits, say)
        self.rows: list[Row] = []
        self.notes = self._stage.notes
        self.reports: dict[str, str] = {}

    def run(self) -> None:
        """Measure everything. What a contender cannot do becomes a reason in its row."""
        with self._stage.open():
            self._stage.bandwidth()
            self._cold()
            self._main_and_peers()
            for percent in self._settings.budgets:
                self._sweep(percent)
        if not self._stage.whole_cache:
            self.notes.append("The page cache could be emptied for the checkpoint's files only, not as a whole.")
        spent = sorted(self._stage.spent.items(), key=lambda item: -item[1])
        self.notes.append("Seconds went into: " + ", ".join(f"{what} {seconds:.0f}" for what, seconds in spent) + ".")

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

    def _around(self, trio: Trio, peers: Sequence[str]) -> None:
        """Passes of the trio before the peers, the peers, the rest of its passes after them."""
        before, *after = groups(self._settings.passes) if peers else [self._settings.passes]
        trio.compare(before)
        found = self._peers(peers, trio)
        for count in after:
            trio.compare(count)
        trio.finish()
        self.rows += [replace(row, beside=trio.odewei_seconds(row.tokens)) if row.rounds else row for row in found]

    @contextmanager
    def _trio(
        self, part: str, limit_bytes: int, budget_bytes: int | None, percent: int | None, tokens: Sequence[int]
    ) -> Iterator[Trio]:
        keywords = self._stage.keywords(budget_bytes, limit_bytes)
        wanted = {"odewei": keywords, PLAIN_TWIN: keywords | {"prefetch_depth": 0}}
        if part == "main":
            wanted["resident"] = {}
        with ExitStack() as stack:
            trio = Trio(self._stage, self.rows, part, limit_bytes, percent, tokens, stack)
            trio.start(wanted)
            yield trio

    def _peers(self, peers: Sequence[str], trio: Trio) -> list[Row]:
        """Each peer alone, with a plain read before it and after it. They import together, before."""
        found: list[Row] = []
        with ExitStack() as stack:
            launched: dict[str, tuple[Process, ExitStack, Path]] = {}
            for peer in peers:
                reason = self._why_not(peer)
                if reason:
                    found += [replace(row, why_not=reason) for row in self._blank(peer, trio)]
                    continue
                own = stack.enter_context(ExitStack())
                scratch = Path(own.enter_context(tempfile.TemporaryDirectory(dir=self._settings.folder)))
                process = own.enter_context(self._stage.process(peer, trio.limit_bytes))
                self._stage.launch(process, peer, {}, scratch)
                launched[peer] = (process, own, scratch)
            for peer, (process, own, _) in list(launched.items()):
                try:
                    self._stage.imported(process)
                except ContenderError as error:
                    found += self._not_run(self._blank(peer, trio), error)
                    own.close()
                    del launched[peer]
            before = self._stage.bandwidth() if launched else 0.0
            for peer, (process, own, scratch) in launched.items():
                rows = self._peer(peer, trio, process, scratch)
                own.close()
                if any(row.rounds for row in rows):
                    after = self._stage.bandwidth()
                    rows = [replace(row, bandwidths=[(before + after) / 2]) if row.rounds else row for row in rows]
                    before = after
                found += rows
        return found

    def _blank(self, peer: str, trio: Trio) -> list[Row]:
        """A peer's rows before anything was measured."""
        counts = [tokens for tokens in trio.tokens if tokens in self._settings.tokens_of(peer)]
        part = "peer" if trio.part == "main" else trio.part
        first = Row(part=part, contender=peer, tokens=counts[0], limit_bytes=trio.limit_bytes, percent=trio.percent)
        return [replace(first, tokens=tokens) for tokens in counts]

    def _not_run(self, rows: Sequence[Row], error: ContenderError) -> list[Row]:
        for row in rows[:1]:
            self._say(f"{row.contender}: not run: {error}")
        return [replace(row, why_not=f"not run: {error}") for row in rows]

    def _peer(self, peer: str, trio: Trio, process: Process, scratch: Path) -> list[Row]:
        """One peer, imported, at each token count. Its first pass is not counted."""
        left = self._blank(peer, trio)
        done: list[Row] = []
        try:
            self._stage.start(process, peer, left[0].tokens, trio.limit_bytes)
            written = own_bytes(scratch)
            if written > self._settings.weight_bytes // 100:
                self.notes.append(f"{peer} wrote {written / 1e9:.2f} GB of its own before its first pass.")
            while left:
                tokens = left[0].tokens
                self._say(f"{peer}, {tokens} tokens")
                answer = self._stage.passes(process, peer, tokens, uncounted=0, counted=self._settings.passes)
                measured = replace(
                    left.pop(0),
                    rounds=[[seconds] for seconds in answer["seconds"]],
                    read_bytes=answer["disk_bytes"],
                    bits=answer["bits"],
                    peak_bytes=process.group.peak_bytes(),
                )
                done.append(measured)
        except ContenderError as error:
            done += self._not_run(left, error)
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
        rounds, widths, bits, budget = [], [self._stage.bandwidth()], set[str](), None
        keywords = self._stage.keywords(settings.budget_bytes, settings.limit_bytes)
        try:
            with ExitStack() as stack:
                waiting = []
                self._stage.empty_cache()
                for _ in range(settings.passes):
                    own = stack.enter_context(ExitStack())
                    process = own.enter_context(self._stage.process("cold", settings.limit_bytes))
                    self._stage.launch(process, "odewei", keywords)
                    waiting.append((process, own))
                for process, own in waiting:
                    self._say("cold start")
                    self._stage.imported(process)
                    answer = self._stage.start(process, "odewei", tokens, settings.limit_bytes, checkpoint_only=True)
                    budget = process.ask("report")["report"]["budget_bytes"]
                    own.close()
                    rounds.append([answer["first_seconds"]])
                    widths.append(self._stage.bandwidth())
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
        settings, stage = self._settings, self._stage
        counts = tuple(dict.fromkeys((settings.tokens[0], settings.tokens[len(settings.tokens) // 2])))
        budget, needed = 2 * settings.weight_bytes, settings.weight_bytes + SPARE_BYTES
        left = [Row(part="fits", contender="odewei", tokens=tokens, budget_bytes=budget) for tokens in counts]
        try:
            if process is None:
                raise ContenderError("the resident model did not run")
            if available_bytes() < needed:
                raise ContenderError(f"needs {needed / 1e9:.1f} GB of memory more")
            touch(needed)
            with stage.spending("everything fits"):
                stage.ask(process, "pair", folder=str(settings.checkpoint), budget_bytes=budget)
            for times in _PAIRS[: len(counts)]:
                self._say(f"everything fits, {left[0].tokens} tokens")
                with stage.spending("everything fits"):
                    counted = times * settings.passes
                    answer = stage.ask(process, "pair_pass", tokens=left[0].tokens, counted=counted)
                row, seconds, bits = left.pop(0), answer["seconds"], answer["bits"]
                ours, theirs = [[s] for s in seconds["odewei"]], [[s] for s in seconds["resident"]]
                self.rows.append(replace(row, rounds=ours, beside=seconds["resident"], bits=bits["odewei"]))
                self.rows.append(
                    replace(row, contender="resident", budget_bytes=None, rounds=theirs, bits=bits["resident"])
                )
        except ContenderError as error:
            self.rows += [replace(row, why_not=f"not run: {error}") for row in left]


def _means(values: Sequence[float]) -> list[float]:
    """The means of neighbours."""
    return [statistics.fmean(pair) for pair in itertools.pairwise(values)]
