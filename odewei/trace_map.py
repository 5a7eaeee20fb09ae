"""From the modules that a pass enters to the units that it uses, and back. Pure: names and numbers only.

What a pass enters does not depend on how the model is cut, what it uses does. So the order is kept as names of modules,
and mapped to the units of whatever partition it meets.
"""

from __future__ import annotations

from collections.abc import Sequence

from odewei.units import Unit, ancestry, hooked_modules

__all__ = ["LONGEST", "holders", "modules_entered", "units_entered"]

LONGEST = 1 << 20
"""The most entries that an order may have: a short file must not unfold to a history that fills the memory."""


def holders(units: Sequence[Unit]) -> set[str]:
    """The modules with a weight of some unit at or below them."""
    owners = {use.module for unit in units for weight in unit.weights for use in weight.uses}
    return {module for owner in owners for module in ancestry(owner)}


def units_entered(modules: Sequence[str], units: Sequence[Unit]) -> list[int]:
    """The units that are used when ``modules`` are entered in this order.

    Entering a module uses the units hooked on it. A module without any stands for all units hooked beneath it, in
    definition order, unless ``modules`` names one that they hang on: then it is a mere holder of them. Raises
    ValueError if there are more than ``LONGEST``.
    """
    hooked = hooked_modules(units)
    named = set(modules)
    mere_holders = {above for module in named & hooked.keys() for above in ancestry(module)}
    whole = named - hooked.keys() - mere_holders
    beneath: dict[str, dict[int, None]] = {module: {} for module in whole}
    for index, unit in enumerate(units) if whole else ():
        for module in unit.hooked:
            for above in ancestry(module):
                if above in whole:
                    beneath[above][index] = None
    found: list[int] = []
    for module in modules:
        found.extend(hooked[module] if module in hooked else beneath.get(module, ()))
        if len(found) > LONGEST:
            raise ValueError(f"it stands for more than {LONGEST} units")
    return found


def modules_entered(entered: Sequence[int], units: Sequence[Unit]) -> list[str]:
    """Modules that use the units in this order when they are entered: those that ``units_entered`` maps back to it.

    A unit that was used by itself, but shares all its modules with others, is left out.
    """
    hooked = hooked_modules(units)
    left_out = [0] * (len(entered) + 1)  # the fewest units that have to be left out from a place on
    chosen: list[tuple[int, str | None]] = [(1, None)] * len(entered)
    for place in reversed(range(len(entered))):  # from the end: the longest that fits here may spoil what follows
        best = left_out[place + 1] + 1, 0
        for module in units[entered[place]].hooked:
            used = hooked[module]
            if list(entered[place : place + len(used)]) == used:
                worth = left_out[place + len(used)], -len(used)
                if worth < best:
                    best, chosen[place] = worth, (len(used), module)
        left_out[place] = best[0]
    found: list[str] = []
    place = 0
    while place < len(entered):
        step, name = chosen[place]
        if name is not None:
            found.append(name)
        place += step
    return found
