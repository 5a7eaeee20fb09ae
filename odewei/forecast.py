"""What will stay and what will be read each pass, from a checkpoint and a budget alone.

The units are cut by what cuts a model's, from a module tree that is guessed from names (``skeleton``), and the passes
are rehearsed by the real scheduler with a counted clock (``scheduler.rehearsal``). What is guessed: that units are used
in the order of their names, once a pass and all of them (also experts that a real pass may not be routed to), and that
a pass computes nothing but products with its matrices, on the CPU. Reads headers only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from odewei.contents import pattern_of
from odewei.errors import BudgetTooSmallError, CheckpointError
from odewei.layout import Layout
from odewei.loaders.base import WeightsLoader
from odewei.memory_budget import MemoryBudget
from odewei.scheduler.budget import format_nbytes
from odewei.scheduler.reader import PlannedUnit
from odewei.scheduler.rehearsal import Enter, Leave, Rehearsal, RehearsedPass, RehearsedUnit, Step
from odewei.skeleton import BUFFERS, skeleton
from odewei.stock import Stock
from odewei.survey import Modules, survey
from odewei.tables import cache_shares
from odewei.unit_readers import UnitReaders
from odewei.units import Unit

__all__ = ["Forecast", "Matrix", "Outline", "UnitGroup", "is_tied"]

_LONGEST_CONFIG = 1 << 20
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM")
_MOST_PASSES = 10
_SAME = 0.01  # two passes that read the same but for this part are all that is to come

Matrix = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True, slots=True)
class UnitGroup:
    """``count`` units of one pattern, ``nbytes`` in all, of which ``stay`` are not read in a pass."""

    pattern: str
    count: int
    nbytes: int
    stay: int
    stay_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """One pass when it has settled; bytes and seconds.

    ``read_bytes``: what a pass reads, rows of tables (``row_bytes`` at most) included. ``seconds`` and ``stalled`` are
    rehearsed; ``floor_seconds`` is what no order of reading can beat, ``first_seconds`` the first pass.
    """

    weight_bytes: int
    budget_bytes: int
    least_bytes: int
    table_bytes: int
    units: int
    largest_bytes: int
    bandwidth: float
    computing: float
    read_bytes: int
    row_bytes: int
    seconds: float
    stalled: float
    first_seconds: float
    groups: tuple[UnitGroup, ...]

    @property
    def floor_seconds(self) -> float:
        return max(self.computing, self.read_bytes / self.bandwidth)

    @property
    def disk_bound(self) -> bool:
        """Whether reading takes longer than computing."""
        return self.read_bytes / self.bandwidth > self.computing


class Outline:
    """A checkpoint cut into units for a budget, as far as names tell.

    Raises BudgetTooSmallError for a budget that no order of reading fits, CheckpointError for one without weights.
    """

    def __init__(
        self,
        loader: WeightsLoader,
        memory_budget: int | str = "auto",
        *,
        tied: bool = False,
        num_readers: int = 4,
        direct: bool = True,
    ) -> None:
        """``tied``: the table of tokens is the head too."""
        infos = {
            name: info for name, info in loader.weights().items() if name.rpartition(".")[2] not in BUFFERS and name
        }
        if not infos:
            raise CheckpointError("the checkpoint has no weights", cure="Name another file or folder")
        modules = Modules(skeleton(infos, tied=tied))
        self._stock = Stock(survey(modules), infos, loader.dtype)
        budget = MemoryBudget(memory_budget, num_readers=num_readers)
        self._layout = Layout(modules, self._stock, budget.expect, "auto", by_rows=True)
        everything = self._layout.infos(self._stock)
        readers = UnitReaders(loader, self._stock, everything, budget.pool, num_readers=num_readers, direct=direct)
        self._units = [_rehearsed(unit, readers) for unit in self._layout.units]
        self.budget_bytes = budget.limit_bytes
        self._sizes = [unit.nbytes for unit in self._units]
        self.least_bytes = self._layout.least_bytes(self._sizes)
        if self.least_bytes > self.budget_bytes:
            raise BudgetTooSmallError(
                f"a budget of {format_nbytes(self.budget_bytes)} cannot hold what one step needs at once",
                cure=f"The smallest memory_budget that works is {self.least_bytes} bytes "
                f"({format_nbytes(self.least_bytes)})",
            )
        self._modules = list(zip(modules.names, modules.parents, strict=True))

    def matrices(self) -> dict[Matrix, int]:
        """How many matrices of each shape and dtype a pass multiplies by: tables that are only looked up are none."""
        found: dict[Matrix, int] = {}
        for place in range(self._layout.hooked):
            for matrix in self._matrices_of(place):
                found[matrix] = found.get(matrix, 0) + 1
        return found

    def forecast(
        self,
        *,
        bandwidth: float,
        tokens: int = 1,
        products: Mapping[Matrix, float] | None = None,
        depth: int | None = None,
    ) -> Forecast:
        """Rehearse passes until one reads what the one before did.

        ``bandwidth`` in bytes a second. ``products``: seconds of each product; those not given take none. ``depth``:
        units ahead, None: "auto".
        """
        tables = {weight.name: self._stock.nbytes_of(weight) for weight in self._layout.tables}
        pinned = sum(self._shares(tables).values())
        rehearsal = Rehearsal(
            self._units,
            limit_bytes=self.budget_bytes,
            bandwidth=bandwidth,
            depth=depth,
            ahead=self._layout.ahead,
            pinned_bytes=pinned,
        )
        steps = list(self._steps(products or {}))
        passes = [rehearsal.run_pass(steps)]
        try:
            while len(passes) < _MOST_PASSES and not _has_settled(passes):
                passes.append(rehearsal.run_pass(steps))
        finally:
            rehearsal.close()
        last = passes[-2:]
        row_bytes = self._row_bytes(tables, tokens)
        return Forecast(
            weight_bytes=self._stock.nbytes,
            budget_bytes=self.budget_bytes,
            least_bytes=self.least_bytes,
            table_bytes=sum(tables.values()),
            units=self._layout.hooked,
            largest_bytes=max(self._sizes[: self._layout.hooked], default=0),
            bandwidth=bandwidth,
            computing=last[-1].computing,
            read_bytes=sum(each.bytes_read for each in last) // len(last) + row_bytes,
            row_bytes=row_bytes,
            seconds=sum(each.seconds for each in last) / len(last) + row_bytes / bandwidth,
            stalled=sum(each.stalled for each in last) / len(last) + row_bytes / bandwidth,
            first_seconds=passes[0].seconds + row_bytes / bandwidth,
            groups=self._groups(passes[-1].missed),
        )

    # -- the parts ---------------------------------------------------------------------------------------------------

    def _shares(self, tables: Mapping[str, int]) -> dict[str, int]:
        return cache_shares(tables, self.budget_bytes, self.least_bytes, sum(self._sizes))

    def _row_bytes(self, tables: Mapping[str, int], tokens: int) -> int:
        """What look-ups of so many tokens read at most; a table that is kept whole is read no more."""
        shares, total = self._shares(tables), 0
        for name, nbytes in tables.items():
            info = self._stock.infos[name]
            if shares[name] < nbytes:
                total += min(info.nbytes, tokens * info.nbytes // max(1, info.shape[0]))
        return total

    def _steps(self, products: Mapping[Matrix, float]) -> Iterator[Step]:
        """One pass over the modules in the order of their names."""
        seconds = [
            sum(products.get(matrix, 0.0) for matrix in self._matrices_of(place))
            for place in range(self._layout.hooked)
        ]
        hooked = self._layout.hooked_modules()
        inside: list[tuple[int, Sequence[int]]] = []  # modules entered and not left, with their units
        for number, (name, parent) in enumerate(self._modules):
            while inside and inside[-1][0] > parent:
                yield from map(Leave, reversed(inside.pop()[1]))
            units = hooked.get(name, ())
            yield from (Enter(unit, seconds[unit]) for unit in units)
            inside.append((number, units))
        while inside:
            yield from map(Leave, reversed(inside.pop()[1]))

    def _matrices_of(self, place: int) -> Iterator[Matrix]:
        infos = (self._stock.infos[weight.name] for weight in self._layout.units[place].weights)
        return ((info.shape, self._stock.cast(info.dtype)) for info in infos if len(info.shape) == 2)

    def _groups(self, missed: frozenset[int]) -> tuple[UnitGroup, ...]:
        found: dict[str, list[int]] = {}
        for place in range(self._layout.hooked):
            found.setdefault(pattern_of(self._layout.units[place].name), []).append(place)
        groups = []
        for pattern, places in found.items():
            stay = [place for place in places if place not in missed]
            nbytes, stay_bytes = (sum(self._sizes[place] for place in some) for some in (places, stay))
            groups.append(UnitGroup(pattern, len(places), nbytes, len(stay), stay_bytes))
        return tuple(sorted(groups, key=lambda group: -group.nbytes))


def is_tied(loader: WeightsLoader) -> bool:
    """Whether the configuration beside the checkpoint, as transformers writes it, says that the head is the table.

    That is what it means if it says nothing, for a model that has a head at all.
    """
    if loader.place is None:
        return False
    try:
        with open(loader.place.parent / "config.json", "rb") as file:
            config = json.loads(file.read(_LONGEST_CONFIG))
        classes = [str(name) for name in config["architectures"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
    has_head = any(name.endswith(_WITH_HEAD) for name in classes)
    text = config.get("text_config")
    inner = text if isinstance(text, dict) else {}
    return has_head and bool(config.get("tie_word_embeddings", inner.get("tie_word_embeddings", True)))


def _rehearsed(unit: Unit, readers: UnitReaders) -> RehearsedUnit:
    reader = readers.make(unit)
    planned = reader if isinstance(reader, PlannedUnit) else readers.planned_once(unit.weights)
    read_bytes = sum(getattr(read, "needed", read.nbytes) for job in planned.plan.jobs for read in job)
    return RehearsedUnit(unit.name, reader.nbytes, read_bytes)


def _has_settled(passes: Sequence[RehearsedPass]) -> bool:
    """The scheduler needs three passes to know which units come back after how many bytes."""
    if len(passes) < 5:
        return False
    before, last = passes[-2].bytes_read, passes[-1].bytes_read
    return abs(last - before) <= _SAME * max(last, before)
