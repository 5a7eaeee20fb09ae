"""Builds the user's model without its weights: parameters on the meta device, buffers real.

Checkpoints do not hold non-persistent buffers (rotary frequencies, masks, position ids), so these must come out as in
a normally built model; parameters must not exist, not even for a moment. While the model function runs, large factory
calls go to the meta device and small ones stay real; parameters become meta when a module registers them.

That is a guess about which tensors are parameters-to-be. Where it was wrong (a large mask came out meta, or the
function computed with a tensor that has no values) the model is built once more with every factory call real: then
only parameters become meta, one at a time, when they are registered. A function that computes with the values of its
parameters (orthogonal parametrizations, the older norms) is called a third time, and its parameters become meta only
when it has returned: it has no other way to be built, and its weights take memory for that moment.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from odewei.collector import without_collector
from odewei.errors import ModelError
from odewei.scheduler.machine import available_bytes
from odewei.survey import Modules, walk

__all__ = ["build_without_weights", "meta_tensors"]

_LARGE = 1 << 20  # elements; what is larger is taken for a parameter-to-be

_FACTORIES = frozenset(
    {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.empty_strided, torch.normal}
)

_FILLS = frozenset(
    [
        "bernoulli_",
        "constant_",
        "exponential_",
        "fill_",
        "kaiming_normal_",
        "kaiming_uniform_",
        "normal_",
        "ones_",
        "orthogonal_",
        "random_",
        "trunc_normal_",
        "uniform_",
        "xavier_normal_",
        "xavier_uniform_",
        "zero_",
        "zeros_",
    ]
)  # names, because libraries put functions of their own in the place of those in torch.nn.init


def build_without_weights(model_fn: Callable[[], nn.Module]) -> nn.Module:
    """Call ``model_fn`` so that parameters take no memory. Raises ModelError if it does not return a module.

    All parameters of the result that were created in the call are on the meta device and keep their identity (ties),
    dtype and ``requires_grad``; no buffer is. Not for use from several threads at once: building is serialised.
    """
    redirect = _LargeFactoriesToMeta()
    try:
        model = _build(model_fn, redirect)
        if not redirect.redirected and not _made_of_parameters(model):
            return model
        if not any(meta_tensors(model)):
            return model
    except Exception as error:
        if not redirect.redirected and not _misses_values(error):
            raise
    if redirect.redirected:
        try:
            model = _build(model_fn, None)  # an error of the function itself comes again, as itself
        except Exception as error:
            if not _misses_values(error):
                raise
        else:
            if not _made_of_parameters(model):
                return model
    return _build_with_values(model_fn)


def meta_tensors(model: nn.Module | Modules) -> Iterator[str]:
    """Names of tensors on the meta device that are reachable from modules and are not parameters."""
    for prefix, module in Modules.of(model).items():
        for name, buffer in module._buffers.items():
            if _is_meta(buffer):
                yield f"{prefix}.{name}" if prefix else name
        own = vars(module)
        for name in sorted(own.keys() - _OF_EVERY_MODULE):
            value = own[name]
            if not isinstance(value, _MAY_HOLD_TENSORS):
                continue
            values: Iterable[object] = (value,)
            if not isinstance(value, torch.Tensor):
                values = value.values() if isinstance(value, dict) else value
            if any(map(_is_meta, values)):
                yield f"{prefix}.{name}" if prefix else name


def _made_of_parameters(model: nn.Module) -> list[str]:
    """Names of tensors without values that no checkpoint will have: they were computed from parameters."""
    with without_collector():
        return list(_made_of_parameters_in(Modules(model)))


def _made_of_parameters_in(modules: Modules) -> Iterator[str]:
    stored = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in modules.items()
        if module._buffers
        for name in module._buffers.keys() - module._non_persistent_buffers_set
    }
    return (name for name in meta_tensors(modules) if name not in stored)


def _misses_values(error: Exception) -> bool:
    """Whether torch raised it because a tensor was on the meta device."""
    return isinstance(error, RuntimeError) and "meta" in str(error)


_MAY_HOLD_TENSORS = (torch.Tensor, list, tuple, dict)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _is_meta(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta and not isinstance(value, nn.Parameter)


def _build(model_fn: Callable[[], nn.Module], redirect: TorchFunctionMode | None) -> nn.Module:
    with _parameters_become_meta():
        if redirect is None:
            model = model_fn()
        else:
            with redirect:
                model = model_fn()
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model_fn returned {type(model).__name__}, not a torch.nn.Module",
            cure="Pass a function that builds and returns the model, for example lambda: MyModel(config)",
        )
    return model


def _build_with_values(model_fn: Callable[[], nn.Module]) -> nn.Module:
    """Build with real parameters, which become meta at the end. Raises ModelError if there is no memory for them."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    left_bytes = available_bytes() // 2

    def note(param: nn.Parameter) -> nn.Parameter:
        nonlocal left_bytes
        if param not in made:
            made[param] = _as_meta(param)
            left_bytes -= param.nbytes
            if left_bytes < 0:
                raise ModelError(
                    "the model computes with the values of its parameters while it is built, and there is no memory "
                    "for all of them",
                    cure="Have model_fn add what computes with them (parametrizations, norms) to smaller modules only",
                )
        return param

    with _registering(note):
        model = model_fn()
    for _, module, _ in walk(model):
        for name, param in module._parameters.items():
            if param is not None:
                module._parameters[name] = made.get(param, param)
    return model


class _LargeFactoriesToMeta(TorchFunctionMode):
    """Sends factory calls of more than ``_LARGE`` elements to the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.redirected = False
        self._others: set[object] = set()  # functions that were met and are neither factories nor fill anything

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in self._others:  # a module calls a dozen of these for each factory
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = dict(kwargs or {})
        if getattr(func, "__name__", None) in _FILLS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor  # there is nothing to fill, and torch would take its time to do so
        elif func not in _FACTORIES:
            if getattr(func, "__closure__", None) is None:  # what a closure holds must not be kept
                self._others.add(func)
        elif "out" not in kwargs and kwargs.get("device") is None and _numel(args, kwargs) > _LARGE:
            kwargs["device"] = "meta"
            kwargs.pop("pin_memory", None)
            if kwargs.get("generator") is not None:
                del kwargs["generator"]
            self.redirected = True
        return func(*args, **kwargs)


def _numel(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The elements that a factory call asks for; 0 if it cannot be told from its arguments."""
    size = kwargs.get("size", args)
    if args and isinstance(args[0], list | tuple):
        size = args[0]
    count = 1
    for length in size if isinstance(size, list | tuple) else ():
        if not isinstance(length, int):
            return 0
        count *= length
    return count


_building = threading.Lock()


@contextmanager
def _parameters_become_meta() -> Iterator[None]:
    """While inside, this thread's modules register parameters as meta tensors. One real tensor gives one meta
    parameter.
    """
    made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def as_meta(param: nn.Parameter) -> nn.Parameter:
        with torch._C.DisableTorchFunction():  # modes too: these calls are nobody's business
            found = made.get(param)  # type: ignore[no-untyped-call]
            if found is None:
                with torch.no_grad():
                    found = made[param] = _as_meta(param)
        return found  # type: ignore[no-any-return]

    with _registering(as_meta):
        yield


@contextmanager
def _registering(change: Callable[[nn.Parameter], nn.Parameter]) -> Iterator[None]:
    """While inside, this thread's modules register what ``change`` makes of real parameters."""
    thread = threading.current_thread()
    register = nn.Module.register_parameter

    def changed(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta and threading.current_thread() is thread and _is_plain(param):
            param = change(param)
        register(module, name, param)

    with _building:
        nn.Module.register_parameter = changed  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def _is_plain(param: nn.Parameter) -> bool:
    return type(param) is nn.Parameter and param.layout is torch.strided


def _as_meta(param: nn.Parameter) -> nn.Parameter:
    empty = torch.empty_strided(param.shape, param.stride(), dtype=param.dtype, device="meta")
    made = nn.Parameter(empty, requires_grad=param.requires_grad)
    if param.__dict__:  # most have none, and each would be an object more
        made.__dict__.update(param.__dict__)
    return made
