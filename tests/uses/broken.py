"""Models that are wrong in one known way each, as a streamed model could be. The fuzz has to find every one of them."""

from __future__ import annotations

import os
import signal
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from odewei.errors import ModelError

from .run import Streaming
from .subjects import Plan, make_resident

__all__ = ["BROKEN", "ENDING", "streaming"]

Break = Callable[[nn.Module], object]


def streaming(breaks: Break) -> Streaming:
    """The ordinary model, broken."""

    def made_by(plan: Plan, root: Path, source: Path) -> tuple[nn.Module, bool]:
        model = make_resident(plan, root)
        breaks(model)
        return model, False

    return made_by


def _with(model: nn.Module, **methods: Any) -> None:
    """A class of the same name with other methods."""
    kind = type(model)
    model.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, **methods})


def _loses_uncounted_writes(model: nn.Module) -> None:
    """What torch does not count in ``_version`` is gone in the next pass."""
    kept = {id(one): (one, one.detach().clone(), one._version) for one in model.parameters()}

    def restore(*_: object) -> None:
        for parameter, value, version in kept.values():
            if parameter._version == version:
                parameter.data = value.clone()

    model.register_forward_pre_hook(restore)


def _loses_large_writes(model: nn.Module) -> None:
    """In-place writes to the last weight are gone in the third pass after them."""
    parameter = list(model.parameters())[-1]
    value, passes = parameter.detach().clone(), []

    def restore(*_: object) -> None:
        passes.append(1)
        if len(passes) % 3 == 0:
            parameter.data.copy_(value)

    model.register_forward_pre_hook(restore)


def _is_frozen(model: nn.Module) -> None:
    model.requires_grad_(False)


def _ignores_flags(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_ = lambda flag=True, parameter=parameter: parameter


def _saves_by_old_names(model: nn.Module) -> None:
    """Layers are saved as they were when the model was built."""
    old = {name: value.clone() for name, value in model.state_dict().items()}
    model.register_state_dict_post_hook(
        lambda module, state, prefix, local: state.update({k: v for k, v in old.items() if k in state and not prefix})
    )


def _loses_a_gradient(model: nn.Module) -> None:
    next(model.parameters()).register_hook(torch.zeros_like)


def _has_another_last_bit(model: nn.Module) -> None:
    model.register_forward_hook(lambda module, given, made: torch.nextafter(made, made + 1))


def _has_another_last_bit_without_gradients(model: nn.Module) -> None:
    def change(module: nn.Module, given: object, made: torch.Tensor) -> torch.Tensor:
        return made if torch.is_grad_enabled() else torch.nextafter(made, made + 1)

    model.register_forward_hook(change)


def _copies_without_values(model: nn.Module) -> None:
    def deepcopy(self: nn.Module, memo: object) -> nn.Module:
        made = type(self)()
        return made.train(self.training)

    _with(model, __deepcopy__=deepcopy)


def _is_in_eval_mode(model: nn.Module) -> None:
    model.eval()


def _refuses_after_harm(model: nn.Module) -> None:
    def requires_grad_(self: nn.Module, flag: bool = True) -> nn.Module:
        nn.Module.requires_grad_(self, flag)
        raise ModelError("no", module="model", cure="Do not")

    _with(model, requires_grad_=requires_grad_)


def _refuses_without_a_cure(model: nn.Module) -> None:
    def requires_grad_(self: nn.Module, flag: bool = True) -> nn.Module:
        raise ModelError("no", module="model")

    _with(model, requires_grad_=requires_grad_)


def _raises_another_error(model: nn.Module) -> None:
    def load_state_dict(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("no")

    _with(model, load_state_dict=load_state_dict)


def _raises_nothing(model: nn.Module) -> None:
    def load_state_dict(self: nn.Module, state: Any, strict: bool = True, assign: bool = False) -> Any:
        return nn.Module.load_state_dict(self, state, strict=False, assign=assign)

    _with(model, load_state_dict=load_state_dict)


def _uses_random_numbers(model: nn.Module) -> None:
    model.register_forward_hook(lambda *_: torch.rand(1) and None)


def _leaves_a_mode(model: nn.Module) -> None:
    model.register_forward_hook(lambda *_: torch.set_default_dtype(torch.float64))


def _makes_new_objects(model: nn.Module) -> None:
    """In each pass the first parameter is another object."""
    name = next(name for name, _ in model.named_parameters())
    owner, _, last = name.rpartition(".")

    def exchange(*_: object) -> None:
        module = model.get_submodule(owner)
        old = getattr(module, last)
        new = nn.Parameter(old.detach(), requires_grad=old.requires_grad)
        new.grad = old.grad
        setattr(module, last, new)

    model.register_forward_pre_hook(exchange)


def _ignores_hooks(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.register_hook = lambda hook: torch.utils.hooks.RemovableHandle(OrderedDict())


def _saves_copies(model: nn.Module) -> None:
    """The state dict is no view of the model."""
    model.register_state_dict_post_hook(
        lambda module, state, prefix, local: state.update(
            {name: value if value.requires_grad else value.clone() for name, value in state.items()}
        )
    )


def _is_wrong_in_threads(model: nn.Module) -> None:
    def change(module: nn.Module, given: object, made: torch.Tensor) -> torch.Tensor:
        return made if threading.current_thread() is threading.main_thread() else made * 2

    model.register_forward_hook(change)


def _forgets_parts(model: nn.Module) -> None:
    """A part without the model has no values."""

    class Alive:
        def __del__(self) -> None:
            for one in parameters:
                one.data = torch.zeros_like(one)

    parameters = list(model.parameters())
    model.alive = Alive()


def _unties_copies(model: nn.Module) -> None:
    """A weight in two places becomes two."""
    names = [name for name, _ in model.named_parameters()]

    def untie(*_: object) -> None:
        seen: set[int] = set()
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            if id(parameter) in seen and name in names:
                owner, _, last = name.rpartition(".")
                setattr(model.get_submodule(owner), last, nn.Parameter(parameter.detach().clone()))
            seen.add(id(parameter))

    model.register_forward_pre_hook(untie)


BROKEN: dict[str, Break] = {
    function.__name__.strip("_"): function
    for function in (
        _loses_uncounted_writes, _loses_large_writes, _is_frozen, _ignores_flags, _saves_by_old_names,
        _loses_a_gradient, _has_another_last_bit, _has_another_last_bit_without_gradients, _copies_without_values,
        _is_in_eval_mode, _refuses_after_harm, _refuses_without_a_cure, _raises_another_error, _raises_nothing,
        _uses_random_numbers, _leaves_a_mode, _makes_new_objects, _ignores_hooks, _saves_copies, _is_wrong_in_threads,
        _forgets_parts, _unties_copies,
    )
}  # fmt: skip


def _hangs(model: nn.Module) -> None:
    model.register_forward_hook(lambda *_: threading.Event().wait() and None)


def _ends_the_process(model: nn.Module) -> None:
    model.register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGSEGV))


ENDING: dict[str, Break] = {"hangs": _hangs, "the process ends": _ends_the_process}
"""What only another process can see."""
