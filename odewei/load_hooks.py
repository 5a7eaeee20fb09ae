"""What a model's ``load_state_dict`` does beside copying, found out by calling it once, on tensors without values.

Modules rename keys (``weight_g`` of an older weight norm), add what older checkpoints lack (``num_batches_tracked``),
split, join and reshape weights, look at versions, take extra states that are no tensors. None of that is retold here:
the model's own ``load_state_dict`` runs on stand-ins for the weights (``op_tape``), and what it leaves in each
parameter and buffer says where that comes from. Models none of whose modules does such things are left alone.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from odewei.errors import OdeweiError, WeightMismatchError
from odewei.loaders.base import WeightInfo, WeightsLoader
from odewei.loaders.known_weights import KnownWeights
from odewei.loaders.plain_callable import CallableLoader
from odewei.matched_loader import MatchedLoader, read_stored
from odewei.name_readings import all_found, names_of, readings_of
from odewei.survey import Modules

if TYPE_CHECKING:
    from odewei.op_program import Program

__all__ = ["as_loaded"]

_EXTRA_STATE = "_extra_state"
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def as_loaded(
    modules: Modules, source: WeightsLoader | CallableLoader, *, partial: bool = False
) -> tuple[WeightsLoader | CallableLoader, Modules]:
    """``source`` with the weights as the model's ``load_state_dict`` takes them (itself, where that only copies), and
    the model's modules, which may be others then.

    The model has no weights yet. What its hooks do to it besides (extra states, buffers of their own) stays done; its
    parameters stay what they are. Names that fit by one reading only are read so (see ``find_readings``); ``partial``:
    also if that does not find all weights. A function's weights are asked for by the model's names: nothing to match.

    Raises WeightMismatchError if ``load_state_dict`` refuses the checkpoint, ModelError if it needs values that a model
    without weights does not have.
    """
    if isinstance(source, CallableLoader) or source.is_as_loaded:
        return source, modules
    model = modules.model
    if not all_found(modules, source.weights()):
        names, of_plain = names_of(model, _is_special)
        if of_plain:
            source = next(readings_of(model, source, of_plain, partial), source)
        elif names:  # hooks may do with names what they like: they come first
            return _first_that_fits(model, source, names, partial), Modules(model)
    if _only_copies(modules, source):
        return source, modules
    return _Rehearsal(model, source).run(), Modules(model)


def _first_that_fits(
    model: nn.Module, source: WeightsLoader, names: Mapping[str, list[str]], partial: bool
) -> MatchedLoader:
    """What the hooks make of the names as they are; where that is nothing, of the names read so that they fit.

    Hooks rename, so a reading need not find all weights; what the hooks make of it does (unless ``partial``).
    """
    problem: OdeweiError | None = None
    nothing: MatchedLoader | None = None
    for one in itertools.chain([source], readings_of(model, source, names, True)):
        try:
            matched = _Rehearsal(model, one).run()
        except OdeweiError as error:
            problem = problem or error
            continue
        if not matched.is_empty and (one is source or partial or matched.has_all(names.values())):
            return matched
        nothing = nothing or matched
    if problem is not None:
        raise problem
    assert nothing is not None
    return nothing


def _is_special(module: nn.Module) -> bool:
    """Whether the module does more than copying when it is loaded."""
    kind = type(module)
    return bool(
        kind._load_from_state_dict is not nn.Module._load_from_state_dict
        or "_load_from_state_dict" in vars(module)
        or module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
        or kind.set_extra_state is not nn.Module.set_extra_state
    )


def _only_copies(modules: Modules, source: WeightsLoader) -> bool:
    model = modules.model
    if type(model).load_state_dict is not nn.Module.load_state_dict or "load_state_dict" in vars(model):
        return False
    if any(map(_is_special, modules.modules)):
        return False
    # torch takes one element for a scalar, as files of torch 0.3 have them
    single = {name for name, info in source.weights().items() if info.shape == (1,)}
    return not single or not any(
        tensor is not None and tensor.dim() == 0 and (f"{prefix}.{name}" if prefix else name) in single
        for prefix, module in modules.items()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
    )


def _is_lazy(tensor: torch.Tensor) -> bool:
    return bool(nn.parameter.is_lazy(tensor))


@dataclass(slots=True)
class _Said:
    """What ``load_state_dict`` says of keys. ``is_known``: it was torch's own that said it."""

    is_known: bool = False
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def about(self, name: str) -> str | None:
        """What is wrong with a key, in torch's words."""
        return next((error for error in self.errors if f" {name}:" in error or f'"{name}"' in error), None)


class _Rehearsal:
    """One call of a model's ``load_state_dict`` on stand-ins."""

    def __init__(self, model: nn.Module, source: WeightsLoader) -> None:
        from odewei.op_tape import OpTape  # few models need it, and importing odewei is to stay quick

        self._model, self._source = model, source
        self._tape = OpTape(functools.partial(read_stored, source))
        self._before: dict[tuple[int, str], torch.Tensor] = {}
        self._modules = Modules(model)  # holds them, so that numbers stay theirs
        self._infos: dict[str, WeightInfo] = {}
        self._programs: dict[str, Program] = {}
        self._settled: set[str] = set()
        self._excused: set[str] = set()
        self._mismatched: dict[str, str] = {}

    def run(self) -> MatchedLoader:
        for prefix, module in self._modules.items():
            for name, tensor in _own(module):
                self._before[id(module), name] = tensor
                if isinstance(tensor, torch.Tensor) and tensor.is_meta and not _is_lazy(tensor):
                    self._tape.without_values(tensor, f"{prefix}.{name}" if prefix else name)
        try:
            with _without_swapping():
                said = self._load()
                for prefix, module in Modules(self._model).items():
                    self._look_at(prefix, module, said)
                    self._settle_attributes(module)
        finally:
            self._restore()
        known = self._source.weights()
        refused = known.refused if isinstance(known, KnownWeights) else {}
        lacking = {name: error for name, error in refused.items() if name not in self._infos}
        return MatchedLoader(
            self._source,
            KnownWeights(self._infos, lacking) if lacking else self._infos,
            self._programs,
            settled=frozenset(self._settled),
            excused=frozenset(self._excused),
            mismatched=self._mismatched,
            unexpected=tuple(dict.fromkeys(said.unexpected)),
        )

    def _state(self) -> OrderedDict[str, object]:
        state: OrderedDict[str, object] = OrderedDict()
        for name, info in self._source.weights().items():
            is_extra = name.rpartition(".")[2] == _EXTRA_STATE
            state[name] = read_stored(self._source, info) if is_extra else self._tape.source(info)
        state.update(self._source.values())
        metadata = self._source.metadata()
        if metadata:
            state._metadata = copy.deepcopy(metadata)  # type: ignore[attr-defined]  # torch writes into it
        return state

    def _load(self) -> _Said:
        said, model = _Said(), self._model

        def note_keys(module: nn.Module, incompatible: Any) -> None:
            said.is_known, said.missing, said.unexpected = True, incompatible[0], incompatible[1]

        def note_errors(*arguments: Any) -> None:
            said.errors = arguments[-1]

        handles = [
            model.register_load_state_dict_post_hook(note_keys),  # type: ignore[no-untyped-call]
            model._register_load_state_dict_pre_hook(note_errors),  # type: ignore[no-untyped-call]
        ]
        try:
            state = self._state()
            with self._tape.watching(), warnings.catch_warnings():
                # A model that copies by itself copies into tensors without values; what it copies is noted.
                warnings.filterwarnings("ignore", message=r"for .*: copying from a non-meta parameter")
                _call(model, state)
        except OdeweiError:
            raise
        except Exception as error:
            if not said.is_known:  # it did not come to an end
                raise self._refused(str(error), error) from error
            said.errors = said.errors or [str(error)]
        finally:
            for handle in handles:
                handle.remove()
        return said

    def _look_at(self, prefix: str, module: nn.Module, said: _Said) -> None:
        """Find out where what is in the module's parameters and buffers now comes from."""
        for local_name, tensor in _own(module):
            name = f"{prefix}.{local_name}" if prefix else local_name
            before = self._before.get((id(module), local_name))
            is_parameter = local_name in module._parameters
            was_written = tensor.is_meta and not _is_lazy(tensor) and self._tape.was_written(tensor)
            is_new = tensor is not before or was_written
            if local_name in module._non_persistent_buffers_set:
                if self._tape.has_values(tensor):
                    setattr(module, local_name, self._tape.value(tensor))
            elif is_new and not _is_lazy(tensor) and self._tape.has_values(tensor):
                info, program = self._tape.describe(name, tensor)
                self._infos[name] = info
                if program is not None:
                    self._programs[name] = program
            elif is_new and not tensor.is_meta:
                self._settled.add(name)
            elif (problem := said.about(name)) is not None:
                self._mismatched[name] = problem
            elif said.is_known and name not in said.missing:
                (self._excused if is_parameter else self._settled).add(name)

    def _settle_attributes(self, module: nn.Module) -> None:
        """Give values to what hooks made of weights and keep in plain attributes."""
        own = vars(module)
        for name in own.keys() - _OF_EVERY_MODULE:
            new = self._with_values(own[name])
            if new is not own[name]:
                own[name] = new

    def _with_values(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and not _is_lazy(value) and self._tape.has_values(value):
            return self._tape.value(value)
        if type(value) not in (list, tuple, dict):
            return value
        items = list(value.values() if isinstance(value, dict) else value)
        new = [self._with_values(one) for one in items]
        if all(one is other for one, other in zip(new, items, strict=True)):
            return value
        return dict(zip(value, new, strict=True)) if isinstance(value, dict) else type(value)(new)

    def _restore(self) -> None:
        """Put the model's own parameters and buffers back, where stand-ins of their shape took their places."""
        for module in self._modules.modules:
            for name, tensor in _own(module):
                before = self._before.get((id(module), name))
                if before is None or tensor is before or _is_lazy(before) or not self._tape.has(tensor):
                    continue
                if tensor.shape == before.shape:
                    setattr(module, name, before)  # as torch does it: some modules keep second lists

    def _refused(self, problem: str, error: Exception) -> WeightMismatchError:
        return WeightMismatchError(
            f"load_state_dict of {type(self._model).__name__} does not take the checkpoint: "
            f"{type(error).__name__}: {problem[:500]}",
            cure="If the ordinary model loads it, stream that model's state_dict(), saved or as it is; if not, "
            "checkpoint and model do not belong together",
        )


def _call(model: nn.Module, state: Mapping[str, object]) -> None:
    """Call ``load_state_dict`` with those of the usual keywords that it has, in case it is the model's own."""
    keywords: dict[str, bool] = {"strict": False, "assign": True}
    has = inspect.signature(model.load_state_dict).parameters.values()
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in has):
        keywords = {name: value for name, value in keywords.items() if name in {one.name for one in has}}
    model.load_state_dict(state, **keywords)


def _own(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers that the module has, by their names in it."""
    return [
        (name, tensor) for name, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None
    ]


@contextmanager
def _without_swapping() -> Iterator[None]:
    """Meanwhile torch puts new parameters in the places of old ones, instead of swapping what is in them."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(False)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
