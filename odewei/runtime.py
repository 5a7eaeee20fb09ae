"""One streamed model: its source, units, scheduler, hooks; its life and its report.

The runtime holds the model weakly. The model's hooks and parameters hold its stream (``binding.WeightStream``), and
when the last of them dies the runtime closes: a part of the model, or one parameter, keeps it as the whole does.
"""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from odewei.binding import Binder, WeightStream
from odewei.buffers import load_buffers
from odewei.copies import Skeleton
from odewei.deep_copy import DeepCopy
from odewei.errors import BudgetTooSmallError, ClosedError, OptionsError, TraceError
from odewei.guards import guard, unguard
from odewei.hooks import Hooks, unhook
from odewei.host_tier import HostTier
from odewei.layout import Layout
from odewei.loaders.base import WeightInfo, WeightsLoader
from odewei.loaders.plain_callable import CallableLoader
from odewei.looked_up import LookUps
from odewei.matching import move_to
from odewei.module_binding import IdleParameters, idle_of
from odewei.options import Options
from odewei.placeholder import Home, Placeholder, become_resident
from odewei.report import Report
from odewei.saved_state import SavedState
from odewei.scheduler.budget import Reservation, format_nbytes
from odewei.scheduler.drivers import was_closed
from odewei.scheduler.reader import FileTable, UnitReader
from odewei.scheduler.records import Account
from odewei.scheduler.rows import RowCounters, RowTable
from odewei.scheduler.slabs import SlabPool
from odewei.sliced import Experts
from odewei.stock import Stock
from odewei.survey import Modules, Weight, streamed_roots, survey, walk
from odewei.tables import cache_shares, table_place
from odewei.tensor_bytes import tensor_bytes
from odewei.trace_file import read_trace, trace_path
from odewei.trace_map import units_entered
from odewei.unit_readers import SCRATCH_BYTES, UnitReaders
from odewei.units import Unit

__all__ = ["Runtime", "runtime_of", "runtimes_in"]

_log = logging.getLogger("odewei")
_runtimes: weakref.WeakKeyDictionary[nn.Module, Runtime] = weakref.WeakKeyDictionary()


def runtime_of(model: nn.Module) -> Runtime:
    """The runtime of a streamed model, or of the only one that there is in a module (a wrapper).

    Raises OptionsError for any other object.
    """
    found = runtimes_in(model)
    if not found:
        raise OptionsError(
            f"this {type(model).__name__} is not a model that odewei streams, and has none in it",
            cure="Pass what init_on_demand_weights_model or from_pretrained returned, or a module that holds it",
        )
    if len(found) > 1:
        raise OptionsError(
            f"this {type(model).__name__} holds {len(found)} streamed models",
            cure="Pass one of them",
        )
    return found[0]


def runtimes_in(model: object) -> list[Runtime]:
    """The runtimes of all streamed models of which a module holds something, each once; of other objects none."""
    if not isinstance(model, nn.Module):
        return []
    own = _runtimes.get(model)
    if own is not None:
        return [own]
    found: dict[int, Runtime] = {}
    for module in model.modules():
        root = _runtimes.get(module)
        if root is not None:
            found[id(root)] = root
        for value in idle_of(module.__dict__.get("_parameters", {})).values():
            if type(value) is Placeholder:
                runtime = value.home.stream.runtime
                found[id(runtime)] = runtime
    return list(found.values())


class Runtime:
    """Makes a model without weights stream them. Built by ``init_on_demand_weights_model`` and copies only."""

    def __init__(
        self,
        model: nn.Module,
        source: WeightsLoader | CallableLoader,
        options: Options,
        *,
        copied: tuple[Stock, Mapping[int, Weight]] | None = None,
    ) -> None:
        """``copied``: the model is a copy of a streamed one, whose weights these are, and what parameters without
        values stand for, by their numbers (``id``); buffers and parameters with values are the copy's own.
        """
        self.options = options
        self._source = source
        self._model = weakref.ref(model)
        self.model_name = type(model).__name__
        options.budget.place(options.device)
        self.device = options.budget.device
        dtype = options.dtype or source.dtype
        modules = Modules(model)
        if copied is not None:
            self.stock = copied[0].of(survey(modules, known=copied[1]))
        else:
            from odewei.load_hooks import as_loaded  # when a model is built: importing odewei is quick

            source, modules = as_loaded(modules, source, partial=options.on_missing == "init")
            self._source = source
            self.stock = Stock.match(
                modules,
                survey(modules),
                source,
                dtype,
                options.on_missing,
                on_mismatch=options.on_mismatch,
                strict=options.strict,
            )
            self.stock.tell(load_buffers(modules, source, dtype, options.on_missing, options.on_mismatch))
            move_to(modules, self.device)
        self._buffer_bytes = _buffer_bytes(modules)
        self._weights = {weight.name: weight for weight in self.stock.weights}
        self.own: dict[str, Reservation] = {}
        """Weights that have become the user's own."""
        self.hooked: dict[str, weakref.ref[nn.Module]] = {}
        """The modules that units hang on, by the names that they had when the model was built."""
        self.budget = options.budget
        self._pool = self.budget.pool
        by_rows = self.device.type == "cpu"
        self.layout = Layout(modules, self.stock, self.budget.expect, options.granularity, by_rows=by_rows)
        self.units = self.layout.units
        self.experts = {plan.module: Experts(plan, first) for plan, first in self.layout.plans}
        self._direct = options.resolve_direct(self.stock.nbytes, self.layout.limit_bytes)
        readers: Sequence[UnitReader] = self._readers()
        names = [unit.name for unit in self.units]
        files = FileTable(direct=self._direct, scratch_bytes=SCRATCH_BYTES)
        self.host: HostTier | None = None
        if self.budget.host is not None and self.budget.accelerator is not None:
            self.host = HostTier(self.budget.host, self.budget.accelerator, names, readers, files)
            readers = self.host.units
        least_bytes = self._least_bytes([reader.nbytes for reader in readers])
        self.tables = self._tables(readers, least_bytes)
        self.order: tuple[str, ...] | None = None  # the modules that a pass enters, where that was found out before it
        with ExitStack() as undo:  # what a failure from here on would leave behind in a budget that others share
            for table in self.tables.values():
                undo.callback(table.close)
            self.binder = self._bind(modules)
            stream, self.binder.made = self.binder.made, None
            assert stream is not None, "nobody has taken it"
            stream.runtime = self
            self._stream = weakref.ref(stream)
            self.account = self._make_account(least_bytes, files)
            synchronous = options.depth == 0 and not options.shares
            if self.host is not None:
                self.host.join(options.depth, self.layout.ahead, synchronous=synchronous)
                undo.callback(self.host.leave)
            named = list(zip(names, readers, strict=True))
            self.driver = self.budget.join(self.account, named, synchronous=synchronous)
            undo.callback(self.driver.leave_for_good, self.account)
            self.binder.connect(self._access, self._leave)
            self.binder.is_inside = self.driver.ledger.is_inside
            self.binder.on_own = self._count_own
            self._state = SavedState(self._info, self._real, files)
            self.binder.saved_state, self.binder.kept_state = self._saved_state, self._kept_state
            self._hook(modules, stream)
            self._expect_saved_order(model)
            undo.pop_all()
        _runtimes[model] = self
        self._finalizer = weakref.finalize(stream, self.driver.leave_for_good, self.account)
        streamed_roots.add(model)
        self.driver.start()
        self.driver.poke()

    # -- public life -------------------------------------------------------------------------------------------------

    def report(self) -> Report:
        """What happened so far."""
        self.driver.settle()
        counters, budget = self.account.counters, self._pool.budget
        rows = RowCounters.total(self.tables.values())
        reads = self.account if self.host is None else self.host.account
        return Report(
            weight_bytes=self.stock.nbytes,
            units=len(self.units),
            budget_bytes=budget.limit_bytes,
            buffer_bytes=self._buffer_bytes,
            resident_bytes=sum(slab.nbytes for record in self.account.units if (slab := record.slab) is not None),
            peak_bytes=budget.peak_bytes,
            passes=counters.passes,
            accesses=counters.accesses,
            hits=counters.hits,
            mispredictions=counters.mispredictions,
            evictions=counters.evictions,
            bytes_read=reads.counters.bytes_read + rows.bytes_read,
            read_seconds=reads.busy.seconds,
            compute_seconds=max(0.0, counters.inside_seconds - counters.stall_seconds - rows.seconds)
            if self.host is None or not self.host.has_clock
            else counters.device_compute_seconds,
            stalls=counters.stalls + rows.stalls,
            stall_seconds=counters.stall_seconds + rows.seconds,
            overdrafts=budget.overdrafts,
            worst_overdraft_bytes=budget.worst_overdraft_bytes,
            escapes=self._pool.escapes,
            missing=self.stock.missing,
            unexpected=self.stock.unexpected,
            own_bytes=sum(reservation.nbytes for reservation in self.own.values()),
            prefetch_depth=self.options.depth,
            direct_io=self._direct,
            rows_looked_up=rows.looked_up,
            rows_read=rows.read,
            row_cache_bytes=sum(table.cache_bytes for table in self.tables.values()),
            device=str(self.device),
            bytes_copied=0 if self.host is None else counters.bytes_read,
            copy_seconds=counters.copy_seconds,
            device_wait_seconds=counters.device_wait_seconds,
            **({} if self.host is None else self.host.report()),
        )

    def expect(self, model: nn.Module, order: Sequence[str]) -> tuple[int, ...]:
        """Expect passes to enter these modules in this order. Returns the units that this uses.

        Raises TraceError if they are not modules of the model, or no unit hangs on them.
        """
        root = self._model()
        known = {name for name, _, _ in walk(model if root is None else root)} | self.hooked.keys()
        try:
            strange = next((name for name in order if name not in known), None)
            if strange is not None:
                raise ValueError(f"the model has no module {strange[:200]!r}")
            units = units_entered(order, self.units)
            if not units:
                raise ValueError("no weights hang on its modules")
        except ValueError as error:
            raise TraceError(
                f"the order of layers does not fit the model: {error}",
                module=type(model).__name__,
                cure="Save it with odewei.save_trace from a model of the same class and configuration",
            ) from error
        if self.host is not None:
            self.host.seed(units)
        self.driver.ledger.seed(self.account, units)
        self.driver.poke()
        self.order = tuple(order)
        return tuple(units)

    def names(self) -> dict[int, str]:
        """The names of the model's modules, by their numbers (``id``), whatever they are wrapped in now."""
        root = self._model()
        found = {} if root is None else {id(module): name for name, module, _ in walk(root)}
        return found | {id(module): name for name, one in self.hooked.items() if (module := one()) is not None}

    @property
    def trace_path(self) -> Path | None:
        """Where the order of the layers is kept, beside the checkpoint; None if that is in no file."""
        return None if self._source.place is None else trace_path(self._source.place)

    def close(self) -> None:
        """Stop threads and close files, now. The model's weights can no longer be used. May be called twice."""
        self._finalizer()

    def materialize(self, holder: nn.Module) -> None:
        """Load all weights for good and take the hooks out; the model is an ordinary one then, and so is all that
        ``holder`` has of it.
        """
        if not self._finalizer.alive:
            raise ClosedError("the model was closed", cure="Build it again to load it whole")
        stream = self._stream()  # until the end
        model = self._model()
        modules = {id(module): module for module in self.binder.modules()}
        for root in (holder, model):
            modules.update({id(module): module for module in (root.modules() if root is not None else ())})
        for module in modules.values():
            for value in list(idle_of(module.__dict__["_parameters"]).values()):
                if type(value) is Placeholder and value.home.stream is stream:
                    become_resident(value)
        for module in modules.values():
            self._take_off(module)
            own = module.__dict__
            if type(own["_parameters"]) is IdleParameters:
                own["_parameters"] = dict(own["_parameters"].items())
                if isinstance(module, nn.RNNBase):
                    own["_flat_weights"] = [own["_parameters"].get(name) for name in module._flat_weights_names]
        if model is not None:
            _runtimes.pop(model, None)
            streamed_roots.discard(model)
        # Nobody holds the stream any more when this returns, which closes it; unless somebody has taken a parameter
        # away and keeps it: that goes on streaming.

    def _stream_copy(self, model: nn.Module, skeleton: Skeleton) -> None:
        """Make a copy of the model stream."""
        for module in model.modules():
            self._take_off(module)
        Runtime(model, self._source, self.options.again(), copied=(self.stock, skeleton.weights))

    @staticmethod
    def _take_off(module: nn.Module) -> None:
        """Take what hangs on a module of the model, or of a copy of it, off."""
        unhook(module)
        unguard(module)
        DeepCopy.remove(module)

    # -- what its parameters ask for ---------------------------------------------------------------------------------

    def _info(self, name: str) -> tuple[WeightInfo | None, torch.dtype]:
        """Where a weight is, and the dtype that it is bound in."""
        weight = self._weights[name]
        return self.stock.infos.get(name), self.stock.dtype(weight)

    def _real(self, home: Home) -> torch.Tensor:
        return self.binder.load(home.unit, home.name)

    def _saved_state(self, home: Home) -> torch.Tensor | None:
        return self._state.tensor(home) if self.binder.changed(home) is None else None

    def _kept_state(self, home: Home) -> torch.Tensor | None:
        if (table := self.tables.get(home.name)) is not None:
            table.hold()
        return self._saved_state(home) if self._state.prepare(home) else None

    def may_be_replaced(self, unit: int) -> bool:
        """Whether a unit's weights can be read from another file: those that are read in parts cannot."""
        return unit < self.layout.hooked

    def replace(self, unit: int, infos: Mapping[str, WeightInfo], versions: Mapping[str, int]) -> None:
        """Read a unit's weights from other places from now on, where they are as the resident ones at ``versions``."""
        self.stock.replace(infos)
        self._state.forget(infos)
        record = self.account.units[unit]
        record.reader = self._unit_readers.planned_anew(self.units[unit].weights, infos, record.nbytes)
        self.binder.is_saved(unit, versions)
        self.driver.ledger.may_leave(record.id)
        self.driver.poke()

    def _count_own(self, name: str, nbytes: int) -> None:
        """A weight is the user's own from now on: there is less room for others, and the budget may be overdrawn."""
        if self._finalizer.alive:
            self.own[name] = self._pool.count(name, nbytes, self.own.get(name))

    # -- making ------------------------------------------------------------------------------------------------------

    def _readers(self) -> list[UnitReader]:
        infos = self.layout.infos(self.stock)
        num_readers, direct = self.options.num_readers, self._direct
        readers = UnitReaders(self._source, self.stock, infos, self._pool, num_readers=num_readers, direct=direct)
        self._unit_readers = readers
        return [readers.make(unit) for unit in self.units]

    def _least_bytes(self, sizes: Sequence[int]) -> int:
        """The smallest budget that works, given the bytes of each unit. Raises BudgetTooSmallError if there is less."""
        least = self.layout.least_bytes(sizes)
        needed = least + self.budget.pinned_bytes
        if needed > self.budget.limit_bytes:
            largest = max(self.layout.in_parts(), key=sizes.__getitem__)
            raise BudgetTooSmallError(
                f"the budget of {self.budget.limit_bytes} bytes ({format_nbytes(self.budget.limit_bytes)}) cannot hold "
                f"what one step of the model needs at once; its largest unit has {format_nbytes(sizes[largest])}",
                module=self.units[largest].name,
                weight=max(self.units[largest].weights, key=lambda weight: weight.numel).name,
                cure=f"The smallest memory_budget that works is {needed} bytes ({format_nbytes(needed)})",
            )
        return least

    def _tables(self, readers: Sequence[UnitReader], least_bytes: int) -> dict[str, RowTable]:
        """The tables that are only looked up, each with its part of the budget for hot rows."""
        infos, stock = self.stock.infos, self.stock
        places = [table_place(table, infos[table.name], stock.dtype(table)) for table in self.layout.tables]
        sizes = {place.weight: place.nbytes for place in places}
        everything = sum(readers[unit].nbytes for unit in self.layout.in_parts()) + sum(
            reader.nbytes for unit, reader in zip(self.units, readers, strict=True) if unit.name in sizes
        )
        free_bytes = self.budget.limit_bytes - self.budget.pinned_bytes
        shares = cache_shares(sizes, free_bytes, least_bytes, None if self.options.shares else everything)
        return {place.weight: RowTable(place, self._pool, shares[place.weight]) for place in places}

    def _make_account(self, least_bytes: int, files: FileTable) -> Account:
        account = Account(
            self.binder,
            files if self.host is None else FileTable(direct=False, scratch_bytes=0),  # the host's tier reads
            self.options.depth,
            least_bytes,
            self.layout.most_bytes,
            sum(table.cache_bytes for table in self.tables.values()),
            self.layout.ahead,
            was_written=_WarnOnce(self.binder, self.units),
            is_held=self.binder.is_held,
            on_closed=functools.partial(
                _let_go, self.binder, self.tables.values(), self._source, self.host, self._pool, self.own
            ),
        )
        for table in self.tables.values():
            table.busy = account.busy
        return account

    def _bind(self, modules: Modules) -> Binder:
        def described(weight: Weight) -> tuple[torch.dtype, tuple[int, ...] | None]:
            return self.stock.dtype(weight), self.stock.stride(weight)

        sliced = {name: weight for experts in self.experts.values() for name, weight in experts.weights.items()}
        return Binder(
            modules,
            [unit.weights for unit in self.units],
            described,
            {**{name: LookUps(table) for name, table in self.tables.items()}, **sliced},
            self.device,
            dtypes_known=not isinstance(self._source, CallableLoader),
        )

    def _hook(self, modules: Modules, stream: WeightStream) -> None:
        named, model, hooks = modules.named, modules.model, Hooks(self.driver, stream)
        for name, places in self.layout.hooked_modules().items():
            sides = [self.binder.side(place) for place in places]
            for side in sides:
                side.id = self.account.units[side.unit].id
            hooks.unit(named[name], sides)
            self.hooked[name] = weakref.ref(named[name])
        for name, experts in self.experts.items():
            experts.announce_to(self._want)
            hooks.experts(named[name], experts)
        hooks.whole_pass(model, self.account)
        guard(model)
        DeepCopy(model, self.binder.skeleton, self._stream_copy)

    def _expect_saved_order(self, model: nn.Module) -> None:
        """Use the order that was saved beside the checkpoint, if there is one and it fits."""
        path = self.trace_path
        if path is None or not os.path.exists(path):
            return
        try:
            self.expect(model, read_trace(path))
        except TraceError as error:
            _log.warning("the order of layers saved in %s is not used: %s", path, error)

    def _access(self, place: int, frame: FrameType) -> None:
        self.driver.enter(self._id(place), frame, lingers=True)

    def _leave(self, place: int) -> None:
        self.driver.leave(self._id(place))

    def _want(self, places: Sequence[int]) -> None:
        self.driver.want([self._id(place) for place in places])

    def _id(self, place: int) -> int:
        """The scheduler's id of a unit. Raises ClosedError when the model was closed."""
        units = self.account.units
        if place >= len(units):
            raise was_closed()
        return units[place].id

    def __repr__(self) -> str:
        return f"<Runtime of {len(self.units)} units, {self.budget!r}, {self.driver!r}>"


def _buffer_bytes(modules: Modules) -> int:
    """Bytes of all buffers, each counted once."""
    return tensor_bytes(found for module in modules.modules for found in module._buffers.values() if found is not None)


class _WarnOnce:
    """Whether a unit was written to, warning of the first write that keeps one in memory."""

    def __init__(self, binder: Binder, units: Sequence[Unit]) -> None:
        self.binder = binder
        self._units = units
        self._warned = False

    def __call__(self, unit: int) -> bool:
        written = self.binder.was_written(unit)
        if written and not self._warned and self.binder.on_write is None:
            self._warned = True
            _log.warning(
                "a weight of %r was changed in place: it and other changed ones stay in memory from now on",
                self._units[unit].name,
            )
        return written


def _let_go(
    binder: Binder,
    tables: Collection[RowTable],
    source: WeightsLoader | CallableLoader,
    host: HostTier | None,
    pool: SlabPool,
    own: dict[str, Reservation],
) -> None:
    binder.clear()
    for reservation in own.values():
        pool.uncount(reservation)
    if host is not None:
        host.leave()
    for table in tables:
        table.close()
    source.close()
