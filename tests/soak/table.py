"""The table of faults: what an injection is, how it is judged, and what is printed of it."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from odewei.errors import OdeweiError

__all__ = ["FAULTS", "Fault", "Row", "Skipped", "Wrong", "fault", "judge"]


class Wrong(AssertionError):
    """Neither right nor a clean error."""


class Skipped(Exception):
    """The fault cannot be made on this machine; the message says why."""


@dataclass(frozen=True, slots=True)
class Fault:
    """``inject(full)`` makes one kind of fault, a few times or (``full``) often; it fills a Row."""

    name: str
    kind: str
    inject: Callable[[Row, bool], None]


@dataclass
class Row:
    """What happened: how many injections were made, how many were reached, and how those ended.

    ``notes`` are figures to print.
    """

    name: str
    injected: int = 0
    fired: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: str = ""
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        return bool(self.skipped) or (not self.wrong and self.fired > 0 and self.fired >= 0.9 * self.injected)

    def note(self, *, fired: bool, end: str) -> None:
        """One injection has ended, as ``end`` says."""
        self.injected += 1
        self.fired += fired
        if fired:
            self.ends[end] += 1

    def __str__(self) -> str:
        if self.skipped:
            return f"skip  {self.name:<44} {self.skipped}"
        ends = ", ".join(f"{count} {end}" for end, count in sorted(self.ends.items()))
        head = "ok   " if self.is_good else "WRONG"
        lines = [f"{head} {self.name:<44} {self.fired:>5} of {self.injected} reached: {ends} ({self.seconds:.1f} s)"]
        if self.fired < 0.9 * self.injected or not self.fired:
            lines.append("      the fault was not reached")
        lines += [f"      {note}" for note in self.notes]
        lines += [f"      wrong: {wrong}" for wrong in self.wrong[:5]]
        return "\n".join(lines)


FAULTS: list[Fault] = []


def fault(name: str, kind: str) -> Callable[[Callable[[Row, bool], None]], Callable[[Row, bool], None]]:
    """Enter a function in the table."""

    def enter(inject: Callable[[Row, bool], None]) -> Callable[[Row, bool], None]:
        FAULTS.append(Fault(name, kind, inject))
        return inject

    return enter


def run(one: Fault, full: bool) -> Row:
    """Make the fault; whatever goes wrong is in the row."""
    row = Row(f"{one.kind}: {one.name}")
    started = time.perf_counter()
    try:
        one.inject(row, full)
    except Skipped as reason:
        row.skipped = str(reason)
    except Wrong as error:
        row.wrong.append(str(error))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        row.wrong.append("".join(traceback.format_exception(error)))
    row.seconds = time.perf_counter() - started
    return row


def judge(error: BaseException, *, thrown_in: type[BaseException] | None = None) -> str:
    """What an exception that came out of a pass is called. Raises Wrong for one that is not clean."""
    if thrown_in is not None and type(error) is thrown_in:
        return f"clean {thrown_in.__name__}"
    if thrown_in is not None and type(error.__cause__) is thrown_in and isinstance(error, OdeweiError):
        return f"clean {type(error).__name__} of {thrown_in.__name__}"
    if not isinstance(error, OdeweiError):
        raise Wrong(f"{type(error).__name__} came out: {error}") from error
    if not error.cure:
        raise Wrong(f"an error without a cure: {error}") from error
    if error.module is None and error.weight is None and error.file is None:
        raise Wrong(f"an error that names no place: {error}") from error
    return f"clean {type(error).__name__}"
