"""Editing weights, in every way that torch has."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import nn

from .action import Arguments, Draw, action
from .side import Inapplicable, Side


def _like(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """Small new values."""
    made = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
    return (made * 0.1).to(tensor.dtype)


def _no_grad(change: Callable[[nn.Parameter, int], object]) -> Callable[[nn.Parameter, int], object]:
    return torch.no_grad()(change)


def _assign(parameter: nn.Parameter, seed: int) -> None:
    parameter.data = _like(parameter, seed)


def _assign_index(parameter: nn.Parameter, seed: int) -> None:
    parameter.data[...] = _like(parameter, seed)


def _first_row(parameter: nn.Parameter, seed: int) -> None:
    parameter[0] = 0.25


def _through_view(parameter: nn.Parameter, seed: int) -> None:
    parameter.view(-1)[::2] = 0.125


def _through_detached(parameter: nn.Parameter, seed: int) -> None:
    parameter.detach().view(-1)[1:] *= 0.5


def _through_numpy(parameter: nn.Parameter, seed: int) -> None:
    parameter.detach().numpy()[...] *= 2


def _swap(parameter: nn.Parameter, seed: int) -> None:
    torch.utils.swap_tensors(parameter, nn.Parameter(_like(parameter, seed), parameter.requires_grad))


def _data_smaller(parameter: nn.Parameter, seed: int) -> None:
    parameter.data = parameter.data[..., :-1].contiguous()


def _storage(parameter: nn.Parameter, seed: int) -> None:
    parameter.untyped_storage().copy_(_like(parameter, seed).untyped_storage())


WAYS: dict[str, Callable[[nn.Parameter, int], object]] = {
    "mul_": _no_grad(lambda parameter, seed: parameter.mul_(1.25)),
    "add_ of a tensor": _no_grad(lambda parameter, seed: parameter.add_(_like(parameter, seed))),
    "copy_": _no_grad(lambda parameter, seed: parameter.copy_(_like(parameter, seed))),
    "[0] =": _no_grad(_first_row),
    "view": _no_grad(_through_view),
    "set_": _no_grad(lambda parameter, seed: parameter.set_(_like(parameter, seed))),
    "mul_ with gradients": lambda parameter, seed: parameter.mul_(1.25),
    "data.mul_": lambda parameter, seed: parameter.data.mul_(0.75),
    "data.copy_": lambda parameter, seed: parameter.data.copy_(_like(parameter, seed)),
    "data +=": lambda parameter, seed: exec("parameter.data += 0.01", {}, {"parameter": parameter}),
    "data =": _assign,
    "data[...] =": _assign_index,
    "data smaller": _data_smaller,
    "detach": _through_detached,
    "numpy": _through_numpy,
    "storage": _storage,
    "init.normal_": lambda parameter, seed: nn.init.normal_(parameter, std=0.1),
    "init.zeros_": lambda parameter, seed: nn.init.zeros_(parameter),
    "init.constant_ of data": lambda parameter, seed: nn.init.constant_(parameter.data, 0.03),
    "swap_tensors": _swap,
    "grad =": lambda parameter, seed: setattr(parameter, "grad", _like(parameter, seed)),
}
"""By name, so that arguments of a step are plain."""

RARE = ("data smaller", "mul_ with gradients", "storage")


def _edit(draw: Draw) -> Arguments:
    ways = [way for way in WAYS if way not in RARE or draw.rng.random() < 0.2]
    return {"way": draw.one(ways), "name": draw.parameter(), "via": draw.via(), "seed": draw.seed()}


def _is_refused(side: Side, way: str, name: str) -> bool:
    """Recurrent modules have weak references to their weights, of which torch swaps none; and torch reads beyond the
    memory of weights that are too small for them.
    """
    return way in ("swap_tensors", "data smaller") and isinstance(side.module(name.rpartition(".")[0]), nn.RNNBase)


@action(_edit, often=8, holds=True)
def edit(side: Side, way: str, name: str, via: str, seed: int) -> object:
    """One weight, found in one way, changed in one way; what it is at once afterwards."""
    parameter = side.parameter(name, via)
    if _is_refused(side, way, name):
        raise Inapplicable("not of a recurrent module")
    WAYS[way](parameter, seed)
    return parameter.detach().clone(), side.parameter(name, "attribute").detach().clone()


@action(
    lambda draw: {"way": draw.one(WAYS), "pattern": draw.one(("", "norm", "0", "bias")), "seed": draw.seed()},
    holds=True,
)
def edit_many(side: Side, way: str, pattern: str, seed: int) -> object:
    """All whose name fits, while iterating."""
    touched = []
    for number, (name, parameter) in enumerate(side.model.named_parameters()):
        if pattern in name:
            if _is_refused(side, way, name):
                continue
            WAYS[way](parameter, seed + number)
            touched.append(name)
    return touched


@action(
    lambda draw: {
        "name": draw.parameter(),
        "way": draw.one(("set", "register", "delete, set", "data of new")),
        "seed": draw.seed(),
    },
    often=2,
    holds=True,
)
def replace_parameter(side: Side, name: str, way: str, seed: int) -> object:
    """Another parameter in the place of one."""
    old, (owner, _, last) = side.parameter(name), name.rpartition(".")
    module = side.module(owner)
    new = nn.Parameter(_like(old, seed))
    if way == "set":
        setattr(module, last, new)
    elif way == "register":
        module.register_parameter(last, new)
    elif way == "delete, set":
        delattr(module, last)
        setattr(module, last, new)
    else:
        setattr(module, last, nn.Parameter(old.data * 0.5, requires_grad=old.requires_grad))
    return getattr(module, last) is new, getattr(module, last)


@action(lambda draw: {"name": draw.parameter(lambda name, parameter: name.endswith("bias"))}, often=0.5)
def leave_a_bias_out(side: Side, name: str) -> object:
    """``module.bias = None``."""
    side.parameter(name)
    owner, _, last = name.rpartition(".")
    setattr(side.module(owner), last, None)


@action(
    lambda draw: {
        "names": [draw.parameter() for _ in range(3)],
        "assign": draw.one((True, False)),
        "strict": draw.one((False, False, True)),
        "seed": draw.seed(),
    },
    often=2,
    holds=True,
)
def load_some(side: Side, names: list[str], assign: bool, strict: bool, seed: int) -> object:
    """``load_state_dict`` of some weights and a key that nobody has."""
    state = {name: _like(side.parameter(name).detach(), seed + number) for number, name in enumerate(names)}
    keys = side.model.load_state_dict({**state, "nobody.weight": torch.zeros(1)}, strict=strict, assign=assign)
    return sorted(keys.missing_keys), keys.unexpected_keys


@action(lambda draw: {"assign": draw.one((True, False)), "scale": draw.one((1.0, 1.0, 0.9))}, often=1.5, holds=True)
def round_trip(side: Side, assign: bool, scale: float) -> object:
    """The state dict, scaled, loaded again."""
    state = side.model.state_dict()
    state = {name: value * scale if value.is_floating_point() else value for name, value in state.items()}
    return str(side.model.load_state_dict(state, assign=assign))


@action(lambda draw: {"dtype": draw.one(("float32", "bfloat16", "float64"))}, often=0.7, holds=True)
def cast_each(side: Side, dtype: str) -> object:
    """``p.data = p.data.to(dtype)`` over all."""
    for parameter in side.model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return [str(parameter.dtype) for parameter in side.model.parameters()]


CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda model: model.half(),
    "float": lambda model: model.float(),
    "double": lambda model: model.double(),
    "to bfloat16": lambda model: model.to(torch.bfloat16),
    "to cpu": lambda model: model.to("cpu"),
    "to float32 cpu": lambda model: model.to(device="cpu", dtype=torch.float32),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "_apply": lambda model: model._apply(lambda tensor: tensor * 0.5 if tensor.is_floating_point() else tensor),
    "_apply same": lambda model: model._apply(lambda tensor: tensor),
    "share_memory": lambda model: model.share_memory(),
    "apply": lambda model: model.apply(_reset),
}


def _reset(module: nn.Module) -> None:
    if isinstance(module, nn.LayerNorm):
        module.reset_parameters()


@action(lambda draw: {"what": draw.one(CONVERSIONS), "part": draw.one(("", "", draw.module()))}, often=2.5, holds=True)
def convert(side: Side, what: str, part: str) -> object:
    """``.half()`` and its like, of the model or of a part."""
    module = side.module(part)
    return CONVERSIONS[what](module) is module


@action(lambda draw: {"scale": draw.one((1.0, 0.5))}, holds=True)
def through_a_vector(side: Side, scale: float) -> object:
    """``parameters_to_vector`` and back."""
    vector = nn.utils.parameters_to_vector(side.model.parameters()).detach()
    nn.utils.vector_to_parameters(vector * scale, side.model.parameters())
    return vector


@action(
    lambda draw: {
        "name": draw.one(name for name, _ in draw.side.model.named_buffers()),
        "way": draw.one(("in place", "set", "delete, register")),
    },
    holds=True,
)
def edit_a_buffer(side: Side, name: str, way: str) -> object:
    owner, _, last = name.rpartition(".")
    module = side.module(owner)
    if last not in module._buffers:
        raise Inapplicable("no such buffer")
    buffer = getattr(module, last)
    if not buffer.is_floating_point():
        raise Inapplicable("not a floating buffer")
    if way == "in place":
        buffer.mul_(0.5)
    elif way == "set":
        setattr(module, last, buffer * 0.5)
    else:
        delattr(module, last)
        module.register_buffer(last, buffer * 0.5)


def shuffled(rng: random.Random, count: int) -> list[int]:
    """Numbers in another order."""
    order = list(range(count))
    rng.shuffle(order)
    return order


def _storage_bytes(parameter: nn.Parameter) -> object:
    return bytes(parameter.untyped_storage())[: parameter.nbytes]


READINGS: dict[str, Callable[[nn.Parameter], object]] = {
    "norm": lambda parameter: parameter.norm(),
    "item": lambda parameter: parameter.sum().item(),
    "tolist": lambda parameter: parameter.tolist(),
    "numpy": lambda parameter: torch.from_numpy(parameter.detach().numpy().copy()),
    "data": lambda parameter: parameter.data,
    "detach": lambda parameter: parameter.detach(),
    "clone": lambda parameter: parameter.clone(),
    "[0]": lambda parameter: parameter[0],
    "iterate": lambda parameter: [float(row.sum()) for row in parameter],
    "len": lambda parameter: len(parameter),
    "T": lambda parameter: parameter.t() if parameter.dim() == 2 else parameter.view(1, -1),
    "equal": lambda parameter: torch.equal(parameter, parameter.detach().clone()),
    "format": lambda parameter: f"{parameter.flatten()[0]:.3f}",
    "to": lambda parameter: parameter.to(torch.float64),
    "same to": lambda parameter: parameter.to(parameter.dtype) is parameter,
    "stack": lambda parameter: torch.stack([parameter, parameter]),
    "out=": lambda parameter: torch.add(parameter.detach(), 1, out=torch.empty(0, dtype=parameter.dtype)),
    "copied from": lambda parameter: torch.zeros_like(parameter, requires_grad=False).copy_(parameter.detach()),
    "pointer": lambda parameter: parameter.data_ptr() == parameter.data.data_ptr() != 0,
    "storage": lambda parameter: str(_storage_bytes(parameter)),
    "facts": lambda parameter: [
        parameter.is_contiguous(), parameter.is_leaf, str(parameter.device), parameter.nbytes, parameter.is_meta,
        parameter.is_inference(), parameter.storage_offset(), str(parameter.layout), parameter.is_sparse,
        parameter.element_size(), parameter.untyped_storage().nbytes(), isinstance(parameter, nn.Parameter),
    ],
    "as a key": lambda parameter: [parameter in {parameter}, {parameter: 1}[parameter]],
}  # fmt: skip


@action(
    lambda draw: {
        "way": draw.one(READINGS),
        "name": draw.parameter(),
        "via": draw.via(),
        "how": draw.one((True, False)),
    },
    often=3,
)
def read(side: Side, way: str, name: str, via: str, how: bool) -> object:
    """What one weight says of itself and its values, with gradients or without."""
    parameter = side.parameter(name, via)
    with torch.set_grad_enabled(how):
        return READINGS[way](parameter)


@action(lambda draw: {"name": draw.parameter(), "seed": draw.seed()}, often=1.5, holds=True)
def write_into_state(side: Side, name: str, seed: int) -> object:
    """Tensors of a state dict are the model's: what is written into one is in the model."""
    side.parameter(name)
    state = side.model.state_dict()
    if name not in state:
        raise Inapplicable("under another name")
    state[name].add_(_like(state[name], seed))
    return state[name]


@action(lambda draw: {"name": draw.module(nn.Linear, nn.LayerNorm), "seed": draw.seed()}, holds=True)
def reset_a_layer(side: Side, name: str, seed: int) -> object:
    """The layer's own initialisation."""
    torch.manual_seed(seed)
    side.module(name).reset_parameters()


@action(lambda draw: {"name": draw.module(), "plain": draw.one((True, False))}, often=0.7)
def add_a_parameter(side: Side, name: str, plain: bool) -> object:
    """One that the checkpoint does not know."""
    value = torch.full((3,), 0.5)
    side.module(name).register_parameter("added", nn.Parameter(value)) if plain else side.module(name).register_buffer(
        "added", value
    )


@action(
    lambda draw: {"parts": [draw.module(nn.Linear), draw.module(nn.Linear)], "assign": draw.one((True, False))},
    holds=True,
)
def load_part_from_part(side: Side, parts: list[str], assign: bool) -> object:
    """The values of one layer for another; torch refuses another shape."""
    first, second = (side.module(part) for part in parts)
    return str(second.load_state_dict(first.state_dict(), assign=assign))
