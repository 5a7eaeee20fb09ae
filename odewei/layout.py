"""What of a model comes and goes together, and in which order it stands. Pure: reads modules, changes nothing.

The units of a model, in this order, from which their places follow:

- *ahead*: what passes are expected to use, so that it is read ahead;
- experts in lists, of which few are used at a time;
- whole tables and whole weights of experts, which are only needed when somebody does what cannot be done in parts;
- *pieces*: the experts that are cut out of such weights.

All but the last two kinds hang on modules (*hooked*).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from odewei.experts import ExpertPlan, find_experts, largest_expert_bytes, listed_experts, slack_bytes
from odewei.loaders.base import WeightInfo
from odewei.options import Granularity
from odewei.scheduler.host_memory import PAGE
from odewei.stock import Stock
from odewei.survey import Modules, Weight
from odewei.tables import find_tables
from odewei.units import Unit, hooked_modules, partition, smallest_budget

__all__ = ["Layout"]

_FAIR_SHARE = 4  # a unit may take this part of the budget: one in use, others on their way


class Layout:
    """The units of one model. ``limit_bytes`` is the budget that they were cut for, ``most_bytes`` what all of them
    need, ``plans`` the experts that are cut out of weights with the place of each one's first piece.
    """

    def __init__(
        self,
        modules: Modules,
        stock: Stock,
        budget_for: Callable[[int], int],
        granularity: Granularity,
        *,
        by_rows: bool,
    ) -> None:
        """``budget_for`` so many bytes is the budget that there is. ``by_rows``: read tables by rows, where that is
        possible.
        """
        self.tables = find_tables(modules, stock.weights, stock.infos) if by_rows else []
        looked_up = {weight.name for weight in self.tables}
        others = [weight for weight in stock.weights if weight.name not in looked_up]
        sizes = stock.sizes()
        plans = find_experts(modules, others, stock.infos, stock.bound)
        fused = [weight for plan in plans for weight in plan.weights]
        self.most_bytes = _with_slack(stock) + slack_bytes(plans)
        self.limit_bytes = budget_for(self.most_bytes)
        room_bytes = max(0, self.limit_bytes - largest_expert_bytes(plans, sizes))  # it is there besides its block
        apart = {weight.name for weight in fused}
        blocks = [weight for weight in others if weight.name not in apart]
        units = partition(modules, blocks, sizes, room_bytes // _FAIR_SHARE, granularity)
        listed = listed_experts(modules, units)
        self.units = [units[place] for place in sorted(range(len(units)), key=listed.__getitem__)]
        self.ahead = listed.count(False)
        self.hooked = len(units)
        self.units += [Unit(weight.name, (weight,), ()) for weight in (*self.tables, *fused)]
        self.pieces = len(self.units)
        self.plans: list[tuple[ExpertPlan, int]] = []
        for plan in plans:
            self.plans.append((plan, len(self.units)))
            self.units += plan.units()

    def infos(self, stock: Stock) -> Mapping[str, WeightInfo]:
        """Where everything is, pieces included."""
        if not self.plans:
            return stock.infos
        return {
            **stock.infos,
            **{name: info for plan, _ in self.plans for name, info in plan.infos(stock.infos).items()},
        }

    def hooked_modules(self) -> dict[str, list[int]]:
        """The units that each hooked module takes leases of, by the module's name."""
        return hooked_modules(self.units)

    def weights(self) -> Iterator[tuple[int, Weight]]:
        """Those that modules have, with their units' places."""
        for place, unit in enumerate(self.units[: self.pieces]):
            yield from ((place, weight) for weight in unit.weights)

    def in_parts(self) -> list[int]:
        """The units that hold everything once, as far as that can be in parts: neither whole tables nor experts."""
        return [*range(self.hooked), *range(self.pieces, len(self.units))]

    def least_bytes(self, sizes: Sequence[int]) -> int:
        """The smallest budget that works, given the bytes that each unit takes."""
        experts = [plan.one_at_a_time() for plan, _ in self.plans]
        expert_bytes = [max(sizes[first : first + plan.count]) for plan, first in self.plans]
        return smallest_budget([*self.units, *experts], [*sizes, *expert_bytes])

    def __repr__(self) -> str:
        return f"<Layout of {len(self.units)} units, {self.ahead} of them ahead>"


def _with_slack(stock: Stock) -> int:
    """What all weights need with their alignment, so that a budget for everything holds everything."""
    return stock.nbytes + len(stock.weights) * 3 * PAGE
