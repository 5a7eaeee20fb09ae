"""The plain way: the forward thread reads what it needs. What the prefetching driver is compared with."""

from __future__ import annotations

import threading

from odewei.scheduler.drivers import Driver
from odewei.scheduler.forks import is_held_by_nobody_here
from odewei.scheduler.ledger import Ledger
from odewei.scheduler.records import Account, UnitRecord, Waiter
from odewei.scheduler.slab import Slab

__all__ = ["SynchronousDriver"]


class SynchronousDriver(Driver):
    """The plain twin: the forward thread reads what it needs when it needs it, job after job. Starts no thread.

    Serves one model.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__(ledger)
        self._turn = threading.RLock()  # one thread reads at a time
        self._reading = False
        self._torn = False  # an interrupt has ended a turn

    def after_fork(self) -> None:
        super().after_fork()
        if is_held_by_nobody_here(self._turn):
            self._turn = threading.RLock()
            self.ledger.close_forked()

    def start(self) -> None:
        pass

    def poke(self) -> None:
        if not self.ledger.adapts:
            return
        self.ledger.adapt()
        if self.ledger.pool.budget.free_bytes < 0:
            with self._turn:
                self._begin_turn()
                while (decision := self.ledger.next_shedding()) is not None:
                    self._make_room(decision)
                self._torn = False

    def leave_for_good(self, account: Account) -> None:
        self.close()

    def _begin_to_serve(self, waiter: Waiter) -> None:
        self._serve(waiter)

    def _serve(self, waiter: Waiter) -> None:
        with self._turn:
            if self._reading:
                raise self._used_by_its_reader()
            self._begin_turn()
            self.ledger.adapt()
            while not waiter.done.is_set():
                decision = self.ledger.next_decision()
                assert decision is not None, "a forward waits, and nothing can be done"
                slab = self._make_room(decision)
                if slab is not None and decision.fetch is not None:
                    self._read(self.ledger.units[decision.fetch], slab)
            self._torn = False

    def _begin_turn(self) -> None:
        """Until this turn has ended as it should, it counts as interrupted."""
        if self._torn:
            self._mend()
        self._torn = True

    def _read(self, record: UnitRecord, slab: Slab) -> None:
        self.ledger.begin_read(record.id, slab)
        nbytes = 0
        self._reading = True
        try:
            with record.account.busy:
                view = slab.view()
                for job in record.reader.jobs():
                    nbytes += self._run_job(record, job, view, record.account.files)
                del view
        except BaseException as error:
            self._give_up(record, slab, error, nbytes)
            if not isinstance(error, Exception):
                raise
            return
        finally:
            self._reading = False
        self._publish(record, slab, nbytes)

    def close(self) -> None:
        with self._turn:
            if self._torn and not self._reading:  # a reader that closes its own model does not interrupt itself
                self._mend()
            super().close()
