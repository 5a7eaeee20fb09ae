"""The ledger under any order of calls: nothing is lost, nothing is counted twice, nothing goes beyond the limit."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from odewei.errors import ClosedError, WeightReadError
from odewei.scheduler.history import NEVER
from odewei.scheduler.plan import Window
from odewei.scheduler.states import State

from .fakes import Setup, enter_and_get_lost, running_frame

SIZES = [4096, 8192, 4096, 64, 12288, 4096, 0, 8192]
UNITS = st.integers(0, len(SIZES) - 1)


class LedgerMachine(RuleBasedStateMachine):
    """A ledger whose forwards read what they need, beside a plain list of leases and of what users hold."""

    setup: Setup

    @initialize(
        limit=st.sampled_from([12288, 16384, 24576, 32768, 65536]),
        order=st.permutations(range(len(SIZES))),
        depth=st.integers(0, 3),
    )
    def make(self, limit: int, order: list[int], depth: int) -> None:
        self.setup = Setup(SIZES, limit)
        self.setup.account.window = Window(depth, limit)
        self.setup.seed(order)
        self.setup.account.was_written = lambda unit: unit in self.written
        self.leases: list[tuple[int, bool]] = []  # unit, and whether its frame has ended
        self.written: set[int] = set()
        self.kept: list[tuple[int, torch.Tensor]] = []

    def _expect_stale_ones_returned(self) -> None:
        while self.leases and self.leases[-1][1]:
            self.leases.pop()

    def _pinned_bytes(self) -> int:
        """What cannot leave: leased, written to, or held by a user (its old slab, if it was read again since)."""
        ledger = self.setup.ledger
        leased = {unit for unit, _ in self.leases} | {unit for unit in self.written if unit in self.setup.client.bound}
        held = {tensor.data_ptr(): unit for unit, tensor in self.kept if SIZES[unit]}
        bound = {self.setup.client.bound[unit]["w"].data_ptr() for unit in leased}
        return sum(ledger.units[unit].nbytes for unit in leased) + sum(
            SIZES[unit] for pointer, unit in held.items() if pointer not in bound
        )

    @rule(unit=UNITS)
    def enter(self, unit: int) -> None:
        self._expect_stale_ones_returned()
        overdrafts = self.setup.budget.overdrafts
        overdrawn = self.setup.budget.free_bytes < 0
        present = unit in self.setup.client.bound
        self.setup.driver.enter(unit, running_frame())
        self.leases.append((unit, False))
        self.setup.client.weight(unit)
        fits = not overdrawn and self._pinned_bytes() <= self.setup.budget.limit_bytes
        if fits or present:
            assert self.setup.budget.overdrafts == overdrafts, "it went beyond the limit though there was room"

    @rule(unit=UNITS)
    def enter_and_get_lost(self, unit: int) -> None:
        self._expect_stale_ones_returned()
        enter_and_get_lost(self.setup, unit)
        self.leases.append((unit, True))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        unit = data.draw(st.sampled_from([unit for unit, _ in self.leases]))
        self.setup.driver.leave(unit)
        while self.leases.pop()[0] != unit:
            pass

    @rule(unit=UNITS)
    def leave_what_was_not_entered(self, unit: int) -> None:
        if unit not in {unit for unit, _ in self.leases}:
            self.setup.driver.leave(unit)

    @rule()
    def prefetch(self) -> None:
        self.setup.prefetch()

    @rule(unit=UNITS)
    def fail_ahead(self, unit: int) -> None:
        self.setup.units[unit].fault = lambda: ValueError("the disk is on fire")
        self.setup.prefetch()
        self.setup.units[unit].fault = None

    @rule(unit=UNITS)
    def fail_and_try_again(self, unit: int) -> None:
        if unit in self.setup.client.bound:
            return
        self._expect_stale_ones_returned()
        self.setup.units[unit].fault = lambda: ValueError("the disk is on fire")
        with pytest.raises(WeightReadError, match="on fire") as caught:
            self.setup.driver.enter(unit, running_frame())
        assert isinstance(caught.value.__cause__, ValueError)
        assert caught.value.module == f"unit{unit}"
        self.setup.units[unit].fault = None
        self.setup.check()
        self.enter(unit)

    @precondition(lambda self: self.setup.client.bound)
    @rule(data=st.data())
    def keep_a_tensor(self, data: st.DataObject) -> None:
        unit = data.draw(st.sampled_from(sorted(self.setup.client.bound)))
        self.kept.append((unit, self.setup.client.weight(unit)[:1]))

    @precondition(lambda self: self.kept)
    @rule()
    def drop_a_tensor(self) -> None:
        self.kept.pop(0)

    @precondition(lambda self: self.setup.client.bound and not self.written)
    @rule(data=st.data())
    def write_to_a_unit(self, data: st.DataObject) -> None:
        self.written.add(data.draw(st.sampled_from(sorted(self.setup.client.bound))))

    @rule(order=st.permutations(range(len(SIZES))))
    def seed(self, order: list[int]) -> None:
        self.setup.seed(order)

    @invariant()
    def everything_adds_up(self) -> None:
        setup = self.setup
        setup.check()
        assert setup.ledger.leases() == len(self.leases)
        assert setup.client.bound.keys() == {
            unit.id for unit in setup.ledger.units.values() if unit.state is State.RESIDENT
        }
        assert {unit for unit, _ in self.leases} <= setup.client.bound.keys()
        assert self.written <= setup.client.bound.keys(), "a unit that was written to has left"
        assert not setup.ledger.tally.demanded
        for unit in setup.client.bound:
            setup.client.weight(unit)
        for unit, tensor in self.kept:
            assert bool((tensor == unit).all()), "a tensor that a user holds was overwritten"
        used = {tensor["w"].data_ptr() for unit, tensor in setup.client.bound.items() if SIZES[unit]}
        assert len(used) == len([unit for unit in setup.client.bound if SIZES[unit]])

    @invariant()
    def nothing_missing_is_passed_over(self) -> None:
        ledger = self.setup.ledger
        absent = [unit.id for unit in ledger.units.values() if unit.state is State.ABSENT]
        irregular = ledger.outlook._regularity.is_irregular
        absent = [unit for unit in absent if not irregular(unit)]
        found = ledger.outlook.first_missing(absent.__contains__)
        nearest = min(map(ledger.outlook.next_use, absent), default=NEVER)
        assert (NEVER if found is None else found[1]) == nearest

    def teardown(self) -> None:
        if hasattr(self, "setup"):
            self.setup.driver.close()
            with pytest.raises(ClosedError):
                self.setup.driver.enter(0, running_frame())
            self.setup.check()


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
