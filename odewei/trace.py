"""A dry run: the order in which units are entered, found out without reading one weight.

The model's forward runs with *fake* parameters, which have shape, dtype and device but no values. What is computed
from inputs and buffers alone is computed for real (masks, positions); whatever a weight has touched is a fake again.
Nothing else may use the model meanwhile. A forward that decides by values that depend on weights (routed experts on
the host, early exits) cannot run like this; the first real pass then finds the order out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from odewei.errors import TraceError
from odewei.runtime import Runtime, runtime_of

__all__ = ["Trace", "trace"]


@dataclass(frozen=True, slots=True)
class Trace:
    """The names of the units in the order in which one pass enters them, repeats included."""

    units: tuple[str, ...]


def trace(model: nn.Module, /, *args: object, **kwargs: object) -> Trace:
    """Run ``model(*args, **kwargs)`` without weights, and expect the next passes to go the same way.

    No weight is read. Inputs are not changed; outputs are thrown away. Raises TraceError, with its cause, when the
    forward needs values; the model works all the same.
    """
    runtime = runtime_of(model)
    entered: list[int] = []
    with torch.no_grad(), runtime.binder.suspended(), _without_weights(model, runtime, entered):
        try:
            model.forward(*_copies(args), **_copies(kwargs))
        except Exception as error:
            raise TraceError(
                f"the forward needs values that a dry run does not have: {type(error).__name__}: {error}",
                module=type(model).__name__,
                cure="Leave trace() out: the first real pass finds the order out",
            ) from error
    runtime.seed(entered)
    return Trace(tuple(runtime.units[unit].name for unit in entered))


def _copies(inputs: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.clone, inputs)


@contextmanager
def _without_weights(model: nn.Module, runtime: Runtime, entered: list[int]) -> Iterator[None]:
    """Swap every parameter for a fake one, buffers for copies, and the hooks for ones that take notes; then back."""
    made: dict[int, nn.Parameter] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(parameter: Any) -> nn.Parameter | None:
        if parameter is None:
            return None
        if id(parameter) not in made:
            with mode:
                like = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="cpu")
            made[id(parameter)] = nn.Parameter(like, requires_grad=False)
        return made[id(parameter)]

    modules = dict(model.named_modules())
    saved = {name: {slot: module.__dict__[slot] for slot in _slots(module)} for name, module in modules.items()}
    notes = _note_takers(runtime.hooked_modules(), entered)
    try:
        for name, module in modules.items():
            own = module.__dict__
            own["_parameters"] = {key: fake(value) for key, value in dict.items(own["_parameters"])}
            own["_buffers"] = _copies(own["_buffers"])
            if "_flat_weights" in own:
                own["_flat_weights"] = [own["_parameters"][key] for key in module._flat_weights_names]
            own["_forward_pre_hooks"] = {-1: notes[name]} if name in notes else {}
            own["_forward_hooks"] = {}
        for unit in runtime.hooked_modules().get("", ()):
            entered.append(unit)
        yield
    finally:
        for name, module in modules.items():
            module.__dict__.update(saved[name])


def _slots(module: nn.Module) -> Sequence[str]:
    slots = ("_parameters", "_buffers", "_forward_pre_hooks", "_forward_hooks", "_flat_weights")
    return [slot for slot in slots if slot in module.__dict__]


def _note_takers(hooked: Mapping[str, Sequence[int]], entered: list[int]) -> dict[str, Any]:
    def taker(units: Sequence[int]) -> Any:
        def note(module: nn.Module, args: Any) -> None:
            entered.extend(units)

        return note

    return {name: taker(units) for name, units in hooked.items()}
