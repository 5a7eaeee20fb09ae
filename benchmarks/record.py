"""What a run measured: frozen values that become JSON as they are. Knows nothing of how it was measured.

Seconds and bytes are as measured, one list a round; a round is passes that are one figure, most often a single one.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["PLAIN_TWIN", "Record", "Row"]

PLAIN_TWIN = "odewei, prefetch_depth=0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One contender at one setting.

    - ``part``: "main" (budget as small as the limit allows), "peer", "sweep" (over budgets), "fits" (everything in
      memory), "cold" (a fresh process: build and first pass).
    - ``rounds``: seconds of each counted pass. ``read_bytes``: a pass, one number a round; odewei's own count, or
      what the kernel read from disks for the process.
    - ``bandwidths``: bytes a second of the plain read, one a round, the mean of the nearest reads before and after it;
      for a peer the two around all of its passes.
    - ``beside``: seconds of whom the contender is compared with, measured around it: odewei before and after the peers;
      the resident model pass by pass where everything fits.
    - ``why_not``: why there are no figures, or not all of them.
    """

    part: str
    contender: str
    tokens: int
    limit_bytes: int | None = None
    budget_bytes: int | None = None
    percent: int | None = None
    rounds: Sequence[Sequence[float]] = ()
    read_bytes: Sequence[float] = ()
    bandwidths: Sequence[float] = ()
    beside: Sequence[float] = ()
    bits: Sequence[str] = ()
    peak_bytes: int | None = None
    why_not: str = ""

    @property
    def is_odewei(self) -> bool:
        """Whether the promise of the same bits holds for it."""
        return self.contender in ("odewei", PLAIN_TWIN)

    @property
    def seconds(self) -> list[float]:
        """Seconds a pass, one number a round."""
        return [statistics.fmean(passes) for passes in self.rounds]

    @property
    def median_seconds(self) -> float | None:
        """The median over rounds; None where nothing was measured."""
        return statistics.median(self.seconds) if self.rounds else None

    @property
    def median_bytes(self) -> float | None:
        """Bytes read a pass, the median over rounds."""
        return statistics.median(self.read_bytes) if self.read_bytes else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run. ``file_bytes``: of the checkpoint; ``unit_bytes``: the largest thing read as one."""

    machine: dict[str, str]
    command: str
    weight_bytes: int
    file_bytes: int
    unit_bytes: int
    tokens: Sequence[int]
    passes: int
    notes: Sequence[str]
    reports: dict[str, str]
    rows: Sequence[Row]

    def find(self, part: str, contender: str, tokens: int | None = None, percent: int | None = None) -> Row | None:
        """The first such row; None for ``tokens`` or ``percent`` means any."""
        return next(iter(self.all(part, contender, tokens, percent)), None)

    def all(
        self, part: str, contender: str | None = None, tokens: int | None = None, percent: int | None = None
    ) -> Iterable[Row]:
        """All such rows, in the order in which they were measured."""
        for row in self.rows:
            if (
                row.part == part
                and contender in (None, row.contender)
                and tokens in (None, row.tokens)
                and percent in (None, row.percent)
            ):
                yield row
