"""What is known of torch's functions while a model is built: which make tensors, fill them, draw, or only look.

By name where libraries put functions of their own in the place of torch's (those of ``torch.nn.init``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

__all__ = [
    "BY_NUMBER",
    "CHEAP",
    "FACTORIES",
    "HARMLESS",
    "IN_PLACE",
    "LIKE",
    "MAY_DRAW",
    "NORMAL",
    "OTHER_DRAWS",
    "PLAIN_FILLS",
    "TO",
    "UNIFORM",
    "has_meta",
    "is_cpu_device",
    "is_on_cpu",
    "is_view",
    "numel",
    "shape_of",
    "tensors",
]

_Func = Callable[..., Any]

FACTORIES: dict[_Func, _Func | None] = {
    torch.empty: None,
    torch.zeros: None,
    torch.ones: None,
    torch.full: None,
    torch.empty_strided: None,
    torch.rand: torch.Tensor.uniform_,
    torch.randn: torch.Tensor.normal_,
    torch.normal: torch.Tensor.normal_,
}  # and what draws as they do

LIKE: dict[_Func, _Func] = {torch.rand_like: torch.Tensor.uniform_, torch.randn_like: torch.Tensor.normal_}

UNIFORM = frozenset({"uniform_", "kaiming_uniform_", "xavier_uniform_"})
NORMAL = frozenset({"normal_", "kaiming_normal_", "xavier_normal_"})
OTHER_DRAWS = frozenset({"random_", "bernoulli_", "exponential_", "geometric_", "cauchy_", "log_normal_"})
PLAIN_FILLS = frozenset({"fill_", "zero_", "constant_", "zeros_", "ones_"})

IN_PLACE = frozenset(
    {
        "abs_", "add_", "clamp_", "clamp_max_", "clamp_min_", "clip_", "div_", "erfinv_", "exp_", "fill_diagonal_",
        "log_", "mul_", "neg_", "pow_", "sigmoid_", "sign_", "sqrt_", "sub_", "tanh_", "tril_", "triu_",
    }
)  # fmt: skip  # they change no shape
BY_NUMBER = frozenset({"add", "div", "mul", "sub", "true_divide", "__add__", "__mul__", "__radd__", "__rmul__",
                        "__sub__", "__truediv__"})  # fmt: skip  # floats stay of the same kind
CHEAP = frozenset(
    {
        "__getitem__", "__setitem__", "as_strided", "chunk", "clone", "contiguous", "copy_", "detach", "diagonal",
        "expand", "expand_as", "flatten", "movedim", "narrow", "permute", "reshape", "select", "split", "squeeze", "t",
        "to", "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as",
    }
)  # fmt: skip
# Views, which must stay views, and what torch knows the shape of by itself. For others it imports its compiler first,
# which takes seconds: small tensors rather get their values.
MAY_DRAW = (
    "rand", "normal", "uniform", "bernoulli", "dropout", "multinomial", "poisson", "exponential", "geometric", "cauchy",
    "binomial", "gumbel", "dirichlet", "gamma", "kaiming", "xavier", "orthogonal", "sparse_", "lowrank", "lobpcg",
    "rrelu", "fractional_max_pool", "attention", "lstm", "gru", "rnn",
)  # fmt: skip

HARMLESS = frozenset(
    {
        "__hash__", "__len__", "_is_view", "_set_grad_enabled", "dim", "element_size", "get_device",
        "get_default_dtype", "is_complex",
        "is_contiguous", "is_floating_point", "is_signed", "ndimension", "nelement", "numel",
        "register_hook", "requires_grad_", "set_", "size", "storage_offset", "stride", "untyped_storage",
    }
)  # fmt: skip  # they neither write nor need values

TO = frozenset({"to", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_empty",
                 "new_zeros", "new_ones", "new_full", "new_empty_strided"})  # fmt: skip


def is_on_cpu(device: object) -> bool:
    return device is None or is_cpu_device(device)


def is_cpu_device(device: object) -> bool:
    return (isinstance(device, str) and device == "cpu") or (isinstance(device, torch.device) and device.type == "cpu")


def has_meta(values: Sequence[object]) -> bool:
    """Whether one of the values, or of the members of those that are lists, is a tensor on the meta device."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.is_meta:
                return True
        elif isinstance(value, list | tuple) and any(isinstance(one, torch.Tensor) and one.is_meta for one in value):
            return True
    return False


def shape_of(leaf: object) -> object:
    """A tensor without values in the place of one with them: torch computes with both at once, without a word."""
    if not isinstance(leaf, torch.Tensor) or leaf.is_meta or leaf.layout is not torch.strided:
        return leaf
    return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")


def is_view(result: object, values: Sequence[torch.Tensor]) -> bool:
    """Whether a result shares memory with one of the values and is none of them."""
    storages = {value.untyped_storage()._cdata for value in values}
    return any(
        one.layout is torch.strided and one.untyped_storage()._cdata in storages
        for one in tensors(result)
        if not any(one is value for value in values)
    )


def tensors(values: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def numel(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The elements that a factory call asks for; 0 if it cannot be told from its arguments."""
    size = kwargs.get("size", args)
    size = next((one for one in args if isinstance(one, list | tuple)), size)
    if not isinstance(size, list | tuple) or not all(isinstance(length, int) for length in size):
        return 0
    return math.prod(size)
