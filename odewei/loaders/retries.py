"""Trying again what failed for a reason that may pass. Knows time only; what may pass is the caller's to say."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Retries", "TransientError"]

_Value = TypeVar("_Value")


class TransientError(Exception):
    """It may work when it is tried again, after ``after_seconds`` if the other side said so."""

    def __init__(self, problem: str, *, after_seconds: float = 0.0) -> None:
        super().__init__(problem)
        self.problem = problem
        self.after_seconds = after_seconds


@dataclass(frozen=True, slots=True)
class Retries:
    """At most ``attempts`` in all. The wait doubles from ``first_seconds`` to ``longest_seconds``; each is shortened by
    up to half at random, so that readers that failed together do not come back together.
    """

    attempts: int = 5
    first_seconds: float = 0.5
    longest_seconds: float = 30.0
    sleep: Callable[[float], None] = time.sleep

    def run(self, attempt: Callable[[], _Value]) -> _Value:
        """What ``attempt`` returns; the last TransientError if all attempts raised one. Other errors pass at once."""
        for number in range(self.attempts - 1):
            try:
                return attempt()
            except TransientError as error:
                wait = min(self.first_seconds * 2.0**number, self.longest_seconds) * random.uniform(0.5, 1.0)
                self.sleep(max(wait, min(error.after_seconds, self.longest_seconds)))
        return attempt()
