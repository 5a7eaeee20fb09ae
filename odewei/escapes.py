"""Parameters that somebody still holds when their unit leaves memory: what is written into them is not lost.

``module.weight`` hands out the real parameter, without a lease, for as long as the caller likes. When its unit comes
back, the very same parameter is bound again, with whatever was written into it meanwhile. If the caller has let go of
it before that, its values are kept only if they were changed.

Knows parameters and numbers of units. The driver's thread calls; a parameter may die in any thread at any moment.
"""

from __future__ import annotations

import weakref

import torch
from torch import nn

__all__ = ["Escapes"]

Parameters = dict[str, nn.Parameter]


class Escapes:
    """By unit and name of the weight."""

    def __init__(self) -> None:
        self._held: dict[int, dict[str, _Held]] = {}

    def note(self, unit: int, parameters: Parameters) -> None:
        """A unit leaves. ``parameters`` are emptied; who else has one of them holds it.

        One that was written to since the unit was chosen to leave is kept, whether or not somebody holds it.
        """
        found = {}
        while parameters:
            name, parameter = parameters.popitem()
            held = _Held(parameter)
            del parameter
            if held.parameter() is not None or held.is_written():
                found[name] = held
            else:
                held.end()
        if found:
            self._held[unit] = found

    def bring_back(self, unit: int, parameters: Parameters) -> None:
        """A unit is here again: replace those of its fresh ``parameters`` that are held, or were written to."""
        for name, held in self._held.pop(unit, {}).items():
            parameter = held.parameter()
            if parameter is None:
                parameter = held.written()
            if parameter is not None:
                parameters[name] = parameter
            held.end()

    def is_written(self, unit: int, name: str) -> bool:
        """Whether a weight whose unit is absent was written to."""
        held = self._held.get(unit, {}).get(name)
        return held is not None and held.is_written()

    def has(self, unit: int, name: str, parameter: object) -> bool:
        """Whether this is the parameter that was handed out for a weight whose unit is absent."""
        held = self._held.get(unit, {}).get(name)
        return held is not None and held.parameter() is parameter

    def __repr__(self) -> str:
        return f"<Escapes of {len(self._held)} units>"


class _Held:
    """One parameter, and its values until it dies; after that only if they were written to."""

    __slots__ = ("_reference", "_values")

    def __init__(self, parameter: nn.Parameter) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self._values: torch.Tensor | None = parameter.detach()  # counts writes together with the parameter
        self._reference: weakref.ref[nn.Parameter] | None = weakref.ref(parameter, self._died)

    def parameter(self) -> nn.Parameter | None:
        """The parameter, if it is alive."""
        return None if self._reference is None else self._reference()

    def written(self) -> nn.Parameter | None:
        """A new parameter over the values, if they were written to."""
        values = self._values
        if values is None or not values._version:
            return None
        with torch.inference_mode(False), torch.no_grad():
            return nn.Parameter(values, requires_grad=False)

    def is_written(self) -> bool:
        values = self._values
        return values is not None and values._version > 0

    def end(self) -> None:
        """Keep nothing any more; the reference and its callback would keep each other."""
        self._reference = self._values = None

    def _died(self, _: object) -> None:
        if self._values is not None and not self._values._version:
            self._values = None
