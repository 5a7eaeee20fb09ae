"""Builds the user's model without its weights: parameters on the meta device, everything else as ever.

Checkpoints do not hold non-persistent buffers (rotary frequencies, masks, position ids), so these must come out as in
a normally built model, and so must what the model keeps beside its modules. Weights must not exist, not even for a
moment. So while the model function runs, large tensors have no values (``without_values``), small ones are real.
Afterwards the parameters of the module tree are without values, and what is not in it has those that it would have.

The generator of random numbers stands where it would stand after an ordinary build, though most is not drawn.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from odewei.build_rest import Kept, Rest
from odewei.errors import ModelError
from odewei.scheduler.machine import available_bytes
from odewei.survey import Modules, is_plain
from odewei.tape import Tape

__all__ = [
    "build_without_weights",
    "built_without_weights",
    "initial_values",
    "is_built_to_be_loaded",
    "meta_tensors",
    "not_of_a_build",
]

_LARGE = 1 << 17  # elements; what is larger gets no values
_TINY = 1 << 8  # the same, when small parameters have grown many
_SMALL_BYTES = 16 << 20  # so much the small ones may have altogether


def build_without_weights(model_fn: Callable[[], nn.Module], *, draws: bool = True) -> nn.Module:
    """Call ``model_fn`` so that parameters take no memory. Any thread; builds may lie within each other.

    All parameters in the tree of the result that were created in the call are on the meta device and keep their
    identity (ties), dtype and ``requires_grad``; nothing else that can be reached is. The values that they would have
    can be had with ``initial_values``, until ``built_without_weights`` has ended for the model.

    Args:
        model_fn: builds the model. It runs in the caller's modes, but on the CPU and outside of inference mode.
        draws: torch's generator stands afterwards where it would stand after ``model_fn()``. False: where it stood
            before, as after a library has loaded a model without initialising it.

    Raises:
        ModelError: ``model_fn`` returns no module; or what it keeps beside its modules cannot be given its values.
    """
    before = None if draws else torch.get_rng_state()
    try:
        with not_of_a_build(), _on_the_cpu():
            build = _Build()
            try:
                model = build.run(model_fn)
            except Exception as error:
                if not _misses_values(error) or not build.tape:
                    raise
                torch.set_rng_state(build.began)
                build = _Build(with_values=True)  # an error of the function itself comes again, as itself
                model = build.run(model_fn)
            build.is_to_be_loaded = not draws
            _built.setdefault(model, build)  # a model that was built before has what is known of it
            return model
    finally:
        if before is not None:
            torch.set_rng_state(before)


@contextmanager
def built_without_weights(model_fn: Callable[[], nn.Module]) -> Iterator[nn.Module]:
    """What ``build_without_weights`` returns. What it knows of initial values is forgotten afterwards."""
    with _on_the_cpu():
        model = build_without_weights(model_fn)
        try:
            yield model
        finally:
            _built.pop(model, None)


def is_built_to_be_loaded(model: nn.Module) -> bool:
    """Whether it was built without draws, as libraries build what they load."""
    build = _built.get(model)
    return build is not None and build.is_to_be_loaded


def initial_values(model: nn.Module, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor | None]:
    """The values that ``model_fn`` gave to parameters of the model; None for those that it did not make."""
    build = _built.get(model)
    return [None] * len(parameters) if build is None else build.initial_values(parameters)


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


@contextmanager
def not_of_a_build() -> Iterator[None]:
    """What this thread does meanwhile is no part of the build under way, if there is one: a streamed part within a
    model function, which has weights of its own.
    """
    builds = [build for build in _here.builds if not build.is_suspended]
    for build in builds:
        build.suspend()
    try:
        yield
    finally:
        for build in builds:
            build.resume()


_MAY_HOLD_TENSORS = (torch.Tensor, list, tuple, dict)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _is_meta(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta and not isinstance(value, nn.Parameter)


def _misses_values(error: Exception) -> bool:
    """Whether torch raised it because a tensor had no values, in a function that does not let itself be watched."""
    said = str(error)
    return isinstance(error, RuntimeError | BufferError) and ("meta" in said or "BatchedTensor" in said)


class _Build:
    """One call of a model function. ``with_values``: all is real, and weights take memory until it has returned."""

    def __init__(self, *, with_values: bool = False) -> None:
        self.tape = Tape()
        self.began = torch.get_rng_state()
        from odewei.without_values import WithoutValues  # when a model is built: importing odewei is quick

        self._mode = None if with_values else WithoutValues(self.tape, _LARGE)
        self._small: list[nn.Parameter] = []  # made in the call, with values
        self._small_bytes = 0
        self._values: Kept = {}
        self._left_bytes = available_bytes() // 2 if with_values else None
        self.is_suspended = False
        self.is_to_be_loaded = False

    def run(self, model_fn: Callable[[], nn.Module]) -> nn.Module:
        with ExitStack() as stack:
            stack.enter_context(_noting_parameters(self))
            if self._mode is not None:
                stack.callback(self._mode.settle)  # last, when nothing is noted any more
                stack.enter_context(self._mode)
            model = model_fn()
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"model_fn returned {type(model).__name__}, not a torch.nn.Module",
                cure="Pass a function that builds and returns the model, for example lambda: MyModel(config)",
            )
        self._values = Rest(model, self.tape, self._small).settle()
        return model

    def parameter(self, data: torch.Tensor, requires_grad: bool) -> nn.Parameter:
        """What ``nn.Parameter(data, requires_grad)`` is."""
        with torch._C.DisableTorchFunction():  # modes too: these calls are nobody's business
            if data.is_meta or data.device.type != "cpu" or not is_plain(data):
                made: nn.Parameter = _new_parameter(nn.Parameter, data, requires_grad)
                return made
            if self._mode is not None and data.numel() > self._mode.large:
                made = _new_parameter(nn.Parameter, self.tape.adopt(data), requires_grad)
                return made
            made = _new_parameter(nn.Parameter, data, requires_grad)
            self._small.append(made)
            self._count(made.nbytes)
        return made

    def _count(self, nbytes: int) -> None:
        self._small_bytes += nbytes
        if self._left_bytes is not None and self._small_bytes > self._left_bytes:
            raise ModelError(
                "the model computes with the values of its parameters while it is built, and there is no memory "
                "for all of them",
                cure="Have model_fn add what computes with them (parametrizations, norms) to smaller modules only",
            )
        if self._mode is not None and self._small_bytes > _SMALL_BYTES:
            self._mode.large = _TINY

    def initial_values(self, parameters: Sequence[nn.Parameter]) -> list[torch.Tensor | None]:
        found: list[torch.Tensor | None] = []
        for parameter in parameters:
            kept = self._values.get(parameter.untyped_storage()._cdata) if parameter.is_meta else None
            found.append(None if kept is None else kept[1].detach())
        places = [place for place, parameter in enumerate(parameters) if self.tape.has(parameter)]
        for place, value in zip(places, self.tape.values([parameters[place] for place in places]), strict=True):
            found[place] = value
        return found

    def suspend(self) -> None:
        self.is_suspended = True
        if self._mode is not None:
            self._mode.settle()
            self._mode.suspended = True

    def resume(self) -> None:
        self.is_suspended = False
        if self._mode is not None:
            self._mode.suspended = False


_built: weakref.WeakKeyDictionary[nn.Module, _Build] = weakref.WeakKeyDictionary()


class _Here(threading.local):
    """Of each thread the builds under way, the innermost last."""

    def __init__(self) -> None:
        self.builds: list[_Build] = []


_here = _Here()
_patching = threading.Lock()
_patches = 0  # builds that need the patch, of all threads
_new_parameter: Any = nn.Parameter.__new__


def _new(cls: Any, data: Any = None, requires_grad: bool = True) -> Any:
    """In the place of ``nn.Parameter.__new__`` while some thread builds; for other threads it is the same."""
    if cls is nn.Parameter and _here.builds and type(data) in _PLAIN:
        build = _here.builds[-1]
        if not build.is_suspended:
            return build.parameter(data, requires_grad)
    return _new_parameter(cls, data, requires_grad)


_PLAIN = (torch.Tensor, nn.Parameter)


@contextmanager
def _noting_parameters(build: _Build) -> Iterator[None]:
    """While inside, ``build`` makes the parameters of this thread."""
    global _patches
    with _patching:
        _patches += 1
        if _patches == 1:
            nn.Parameter.__new__ = staticmethod(_new)  # type: ignore[method-assign]
    _here.builds.append(build)
    try:
        yield
    finally:
        _here.builds.pop()
        with _patching:
            _patches -= 1
            if not _patches:
                nn.Parameter.__new__ = staticmethod(_new_parameter)  # type: ignore[method-assign]


@contextmanager
def _on_the_cpu() -> Iterator[None]:
    """Neither another default device nor inference mode is any business of a model that is built: its weights come from
    files, and may be used in any mode. The grad mode stays the caller's.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            gradients = torch.is_grad_enabled()
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(gradients))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
