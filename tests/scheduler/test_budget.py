"""Numbers of bytes as text, and budgets."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from odewei.errors import OptionsError
from odewei.scheduler.budget import Budget, Reservation, format_nbytes, parse_nbytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("1_000", 1000),
        (" 7 b ", 7),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("6GB", 6 * 1000**3),
        ("6gib", 6 * 1024**3),
        ("1.5 MB", 1_500_000),
        ("0.5TiB", 1024**4 // 2),
        ("2tb", 2 * 1000**4),
    ],
)
def test_text_is_read_as_bytes(text: str, nbytes: int) -> None:
    """Decimal and binary units are told apart, whatever their case."""
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GB", "1e9", "6 G", "6 gigs", "1.2.3MB", "0x10", "_1", "nan", "inf"])
def test_other_text_is_refused_by_name(text: str) -> None:
    """What is not a number of bytes raises, and the message shows it and what to write."""
    with pytest.raises(OptionsError, match=r"not a number of bytes.*GiB") as caught:
        parse_nbytes(text)
    assert repr(text) in str(caught.value)


@given(st.integers(0, 1 << 50))
@example(1000 << 10)
@example(1 << 40)
def test_what_is_shown_can_be_read_again(nbytes: int) -> None:
    """What is shown says the number within half a unit of its third digit, without an exponent."""
    assert parse_nbytes(format_nbytes(nbytes)) == pytest.approx(nbytes, rel=0.006, abs=0.5)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000 << 10, "0.98 MiB"), (1_580_000_000, "1.47 GiB"), (-2048, "-2.00 KiB")],
)
def test_bytes_are_shown_in_binary_units(nbytes: int, text: str) -> None:
    """People see three digits and the largest unit that fits."""
    assert format_nbytes(nbytes) == text


class BudgetMachine(RuleBasedStateMachine):
    """A budget beside a plain list of what is held."""

    def __init__(self) -> None:
        super().__init__()
        self.budget = Budget(100)
        self.held: list[Reservation] = []
        self.peak = self.overdrafts = self.worst = 0

    def _reserved(self, reservation: Reservation) -> None:
        self.held.append(reservation)
        self.peak = max(self.peak, sum(one.nbytes for one in self.held))

    @rule(nbytes=st.integers(0, 120))
    def reserve(self, nbytes: int) -> None:
        if nbytes <= self.budget.free_bytes:
            self._reserved(self.budget.reserve("owner", nbytes))
        else:
            with pytest.raises(AssertionError, match="owner"):
                self.budget.reserve("owner", nbytes)

    @rule(nbytes=st.integers(0, 120))
    def reserve_beyond_the_limit(self, nbytes: int) -> None:
        over = sum(one.nbytes for one in self.held) + nbytes - 100
        if over > 0:
            self.overdrafts += 1
            self.worst = max(self.worst, over)
        self._reserved(self.budget.reserve("owner", nbytes, beyond_limit=True))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        reservation = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.budget.release(reservation)
        with pytest.raises(KeyError):
            self.budget.release(reservation)

    @invariant()
    def sums_agree(self) -> None:
        self.budget.check_invariants()
        assert self.budget.used_bytes == sum(one.nbytes for one in self.held)
        assert self.budget.free_bytes == 100 - self.budget.used_bytes
        assert (self.budget.peak_bytes, self.budget.overdrafts) == (self.peak, self.overdrafts)
        assert self.budget.worst_overdraft_bytes == self.worst


TestBudget = BudgetMachine.TestCase
TestBudget.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize(("name", "value"), [("used_bytes", 7), ("peak_bytes", 0), ("limit_bytes", 1)])
def test_sums_that_disagree_are_noticed(name: str, value: int) -> None:
    """The check of invariants fails when a sum is not that of what is held."""
    budget = Budget(10)
    budget.reserve("owner", 5)
    budget.check_invariants()
    setattr(budget, name, value)
    with pytest.raises(AssertionError):
        budget.check_invariants()


def test_equal_reservations_are_told_apart() -> None:
    """Two reservations of one size and owner are two."""
    budget = Budget(10)
    first, second = budget.reserve("owner", 5), budget.reserve("owner", 5)
    budget.release(first)
    budget.release(second)
    assert budget.used_bytes == 0
