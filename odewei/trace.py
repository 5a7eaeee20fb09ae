"""The order in which units are entered: found out by a dry run that reads no weight, kept, and used again.

In a dry run the model's forward runs with *fake* parameters, which have shape, dtype and device but no values. What is
computed from inputs and buffers alone is computed for real (masks, positions); whatever a weight has touched is a fake
again. Nothing else may use the model meanwhile. A forward that decides by values that depend on weights (routed experts
on the host, early exits) cannot run like this; the first real pass then finds the order out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from odewei.errors import OptionsError, TraceError
from odewei.module_binding import idle_of
from odewei.runtime import Runtime, runtime_of
from odewei.trace_file import read_trace, write_trace
from odewei.trace_map import holders, modules_entered, units_entered

__all__ = ["Trace", "load_trace", "save_trace", "trace"]


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
    entered: list[str] = []
    with torch.no_grad(), _without_weights(model, runtime, entered):
        try:
            model.forward(*_copies(args), **_copies(kwargs))
        except Exception as error:
            raise TraceError(
                f"the forward needs values that a dry run does not have: {type(error).__name__}: {error}",
                module=type(model).__name__,
                cure="Leave trace() out: the first real pass finds the order out",
            ) from error
    if not units_entered(entered, runtime.units):
        return Trace(())  # all weights are used without the forward of their modules
    return _expect(model, runtime, entered)


def save_trace(model: nn.Module, path: str | os.PathLike[str] | None = None) -> Path:
    """Keep the order of a streamed model's layers in a file, and return its path.

    The order is that of the latest ``trace`` or ``load_trace`` (a file that was found beside the checkpoint counts as
    loaded); without one, that of the passes so far. It fits the model whatever its budget and granularity; only one
    that comes from passes is as coarse as the units were. ``path`` None: beside the checkpoint, where every later model
    from it finds the order by itself. The file is small JSON, and replaced in one step.

    Raises TraceError when the file cannot be written, or too few passes have shown no order yet; OptionsError when
    ``path`` is None and the weights are in no file.
    """
    runtime = runtime_of(model)
    chosen = _path(runtime, path)
    write_trace(chosen, _recorded(model, runtime) if runtime.order is None else runtime.order)
    return chosen


def load_trace(model: nn.Module, path: str | os.PathLike[str] | None = None) -> Trace:
    """Expect the next passes to go the way that ``save_trace`` kept. No weight is read.

    ``path`` None: the file beside the checkpoint. Raises TraceError when there is no such file, or it is damaged or
    does not fit the model; OptionsError when ``path`` is None and the weights are in no file.
    """
    runtime = runtime_of(model)
    chosen = _path(runtime, path)
    try:
        return _expect(model, runtime, read_trace(chosen))
    except TraceError as error:
        raise TraceError(error.problem, module=error.module, file=str(chosen), cure=error.cure) from error


def _expect(model: nn.Module, runtime: Runtime, order: Sequence[str]) -> Trace:
    return Trace(tuple(runtime.units[unit].name for unit in runtime.expect(model, order)))


def _path(runtime: Runtime, path: str | os.PathLike[str] | None) -> Path:
    found = runtime.trace_path if path is None else Path(path)
    if found is None:
        raise OptionsError(
            "there is no place beside the weights to keep the order of the layers, for they are in no file",
            cure="Pass path=",
        )
    return found


def _recorded(model: nn.Module, runtime: Runtime) -> list[str]:
    """What the scheduler has seen. Raises TraceError before it knows: after a first pass that went another way than
    definition order, what comes next is still a guess.
    """
    counters = runtime.account.counters
    known = counters.passes > 1 or (counters.passes == 1 and not counters.mispredictions)
    order = modules_entered(runtime.driver.ledger.recent_pass(runtime.account), runtime.units) if known else []
    if not order:
        raise TraceError(
            "the order of the layers is not known yet",
            module=type(model).__name__,
            cure="Call odewei.trace(model, ...) with inputs of a pass, or run the model twice, and save it then",
        )
    return order


def _copies(inputs: Any) -> Any:
    return tree_map_only(torch.Tensor, torch.clone, inputs)


@contextmanager
def _without_weights(model: nn.Module, runtime: Runtime, entered: list[str]) -> Iterator[None]:
    """Swap every parameter for a fake one, buffers for copies, and the hooks for ones that take notes; then back.

    The names of the modules entered that units hang on are appended to ``entered``: those that they had when the
    streamed model was built, wherever they are now.
    """
    names = runtime.names()
    noted = frozenset(holders(runtime.units))
    made: dict[int, nn.Parameter] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(parameter: Any) -> nn.Parameter | None:
        if parameter is None:
            return None
        if id(parameter) not in made:
            with mode:
                like = torch.empty_strided(
                    parameter.shape, parameter.stride(), dtype=parameter.dtype, device=parameter.device
                )
            made[id(parameter)] = nn.Parameter(like, requires_grad=False)
        return made[id(parameter)]

    modules = dict(model.named_modules())
    saved = {name: {slot: module.__dict__[slot] for slot in _slots(module)} for name, module in modules.items()}
    try:
        for module in modules.values():
            own = module.__dict__
            own["_parameters"] = {key: fake(value) for key, value in idle_of(own["_parameters"]).items()}
            own["_buffers"] = _copies(own["_buffers"])
            if "_flat_weights" in own:
                own["_flat_weights"] = [own["_parameters"][key] for key in module._flat_weights_names]
            hooked = names.get(id(module))
            own["_forward_pre_hooks"] = {-1: _note_taker(hooked, entered)} if hooked in noted else {}
            own["_forward_hooks"] = {}
        if (hooked := names.get(id(model))) in noted:
            entered.append(hooked)  # its forward is called without its hooks
        yield
    finally:
        for name, module in modules.items():
            module.__dict__.update(saved[name])


def _slots(module: nn.Module) -> Sequence[str]:
    slots = ("_parameters", "_buffers", "_forward_pre_hooks", "_forward_hooks", "_flat_weights")
    return [slot for slot in slots if slot in module.__dict__]


def _note_taker(name: str, entered: list[str]) -> Any:
    def note(module: nn.Module, args: Any) -> None:
        entered.append(name)

    return note
