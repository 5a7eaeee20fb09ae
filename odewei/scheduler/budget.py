"""Budgets: every byte is reserved before it is allocated, and belongs to one owner.

Knows numbers only. Not thread-safe by itself: whoever shares a budget between threads holds a lock (the slab pool
does).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from odewei.errors import OptionsError

__all__ = ["Budget", "Reservation", "format_nbytes", "parse_nbytes"]

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)}


def parse_nbytes(text: str) -> int:
    """Bytes from text such as ``"6GiB"``, ``"1.5 GB"`` or ``"4096"``. Raises OptionsError for anything else."""
    match = re.fullmatch(r"\s*(\d[\d_]*(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS:
        raise OptionsError(f"{text!r} is not a number of bytes", cure='Write for example "6000000000", "6GB" or "6GiB"')
    return int(float(match[1]) * _UNITS[match[2].lower()])


def format_nbytes(nbytes: float) -> str:
    """Bytes for people, in binary units, three digits: ``"1.47 GiB"``."""
    power = 0
    while abs(nbytes) >= 999.5 and power < 4:
        nbytes /= 1024
        power += 1
    digits = 0 if power == 0 or abs(nbytes) >= 99.95 else 1 if abs(nbytes) >= 9.995 else 2
    return f"{nbytes:.{digits}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


@dataclass(eq=False, slots=True)
class Reservation:
    """``nbytes`` bytes of a budget, held until released once."""

    owner: str
    nbytes: int


@dataclass(eq=False)
class Budget:
    """At most ``limit_bytes`` reserved at a time; more only when asked for by name, and then counted.

    Attributes: ``used_bytes`` now, ``peak_bytes`` ever, ``overdrafts`` how often a reservation went beyond the limit
    and ``worst_overdraft_bytes`` by how much at most.
    """

    limit_bytes: int
    used_bytes: int = 0
    peak_bytes: int = 0
    overdrafts: int = 0
    worst_overdraft_bytes: int = 0
    _held: set[Reservation] = field(default_factory=set, repr=False)
    _highest_limit_bytes: int = field(default=0, repr=False)

    @property
    def free_bytes(self) -> int:
        """What can still be reserved; negative while the budget is overdrawn."""
        return self.limit_bytes - self.used_bytes

    def set_limit(self, limit_bytes: int) -> None:
        """Change the limit. What is used stays so; a smaller limit is overdrawn until enough has been released."""
        self._highest_limit_bytes = max(self._highest_limit_bytes, self.limit_bytes)
        self.limit_bytes = limit_bytes

    def reserve(self, owner: str, nbytes: int, *, beyond_limit: bool = False) -> Reservation:
        """Reserve bytes for ``owner``. Asking for more than is free without ``beyond_limit`` is a bug of the caller."""
        if nbytes > self.free_bytes:
            if not beyond_limit:
                raise AssertionError(f"{owner} asked for {nbytes} bytes of {self!r}")
            self.overdrafts += 1
            self.worst_overdraft_bytes = max(self.worst_overdraft_bytes, nbytes - self.free_bytes)
        reservation = Reservation(owner, nbytes)
        self._held.add(reservation)
        self.used_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return reservation

    def release(self, reservation: Reservation) -> None:
        """Give a reservation back. Giving it back twice is a bug of the caller (KeyError)."""
        self._held.remove(reservation)
        self.used_bytes -= reservation.nbytes

    def restate(self, held: Iterable[Reservation]) -> None:
        """What is reserved is this: an interrupt may have hit in the middle of a change."""
        self._held = set(held)
        self.used_bytes = sum(reservation.nbytes for reservation in self._held)

    def check_invariants(self) -> None:
        """Raise AssertionError unless the sums agree."""
        held = sum(reservation.nbytes for reservation in self._held)
        assert held == self.used_bytes, f"{held} bytes are held, {self.used_bytes} are counted"
        limit = max(self.limit_bytes, self._highest_limit_bytes)
        assert self.used_bytes <= limit or self.overdrafts, "over the limit, and nobody asked for it"
        assert self.peak_bytes >= self.used_bytes >= 0
