"""Books that are interrupted in the middle of a change are whole again at the next."""

from __future__ import annotations

import threading

import pytest

from odewei.errors import OptionsError
from odewei.scheduler.whole import Books, whole


class Two(Books):
    """Two numbers that belong together; ``mended`` counts."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.left = self.right = self.mended = 0
        self.fault: BaseException | None = None

    @whole
    def add(self, count: int) -> int:
        self.left += count
        if self.fault is not None:
            raise self.fault
        self.right += count
        return self.left

    @whole
    def twice(self, count: int) -> int:
        return self.add(count) + self.add(count)

    @whole
    def sum(self) -> int:
        return self.left + self.right

    def _mend(self) -> None:
        self.mended += 1
        if self.fault is not None:
            raise self.fault
        self.right = self.left


@pytest.mark.parametrize("method", ["add", "twice"])
def test_what_was_cut_short_is_mended_by_the_next(method: str) -> None:
    """The exception comes out as it is; whoever comes next finds whole books, mended once."""
    books = Two()
    books.fault = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        getattr(books, method)(3)
    assert (books.left, books.right, books.mended) == (3, 0, 0)
    books.fault = None
    assert [books.sum(), books.sum(), books.mended] == [6, 6, 1]


def test_a_mending_that_is_interrupted_is_done_again() -> None:
    """Two interrupts in a row leave nothing half done."""
    books = Two()
    books.fault = KeyboardInterrupt()
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            books.add(1)
    books.fault = None
    assert books.sum() == 2
    assert books.mended == 3


def test_errors_said_on_purpose_tear_nothing() -> None:
    """An error of this library is raised before anything changes: nothing is mended after it."""
    books = Two()
    books.fault = OptionsError("no")
    with pytest.raises(OptionsError):
        books.add(0)
    books.fault = None
    assert books.sum() == 0
    assert books.mended == 0


def test_a_method_within_a_method_mends_nothing() -> None:
    """What a method has half changed is its own until it ends."""
    books = Two()
    assert books.twice(2) == 6
    assert (books.left, books.right, books.mended) == (4, 4, 0)
