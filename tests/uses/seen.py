"""What is compared: values as plain data, what a model is at a moment, and where two of these differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .side import Inapplicable, Side, mode, tensors_of

__all__ = ["Raised", "Seen", "attempt", "differences", "look", "look_closely", "seen"]

Seen = Any
"""Numbers, texts, ``Bits``, ``Raised``, and lists and dictionaries of these."""


@dataclass(frozen=True)
class Bits:
    """A tensor, with its bytes."""

    kind: tuple[object, ...]
    content: bytes

    def __repr__(self) -> str:
        return f"tensor{self.kind}"


@dataclass(frozen=True)
class Raised:
    """An action that ended in an exception; ``error`` is not compared, only its type."""

    kind: str
    error: BaseException

    def __eq__(self, other: object) -> bool:
        """The same type, or a subclass on either side: compilers raise their own of what an operation raised."""
        return isinstance(other, Raised) and (
            isinstance(other.error, type(self.error)) or isinstance(self.error, type(other.error))
        )

    def __hash__(self) -> int:
        return 0

    def __repr__(self) -> str:
        return f"{self.kind}: {str(self.error)[:400]}"


def seen(value: object) -> Seen:
    """The value as plain data, which holds no memory of a model."""
    if isinstance(value, torch.Tensor):
        return _bits(value)
    if isinstance(value, dict):
        return {str(key): seen(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [seen(one) for one in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return repr(value)
    return type(value).__name__ if not isinstance(value, Path) else value.name


def _bits(tensor: torch.Tensor) -> Bits:
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    is_parameter = isinstance(tensor, nn.Parameter)
    kind = (str(tensor.dtype), tuple(tensor.shape), tensor.stride(), tensor.requires_grad, is_parameter)
    return Bits(kind, _content(tensor))


def _content(tensor: torch.Tensor) -> bytes:
    if tensor.is_meta:
        return b"meta"
    flat = tensor.detach().contiguous().reshape(-1)
    found: bytes = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return found


def attempt(work: Any) -> Seen:
    """What ``work`` returns, or the exception in which it ends."""
    try:
        return seen(work())
    except Inapplicable:
        raise
    except Exception as error:
        error.__traceback__ = _outermost(error)
        error.__context__ = error.__cause__ = None
        return Raised(type(error).__name__, error)


def _outermost(error: BaseException) -> Any:
    """No traceback: its frames would hold tensors. The place is in the message."""
    frames = []
    walked = error.__traceback__
    while walked is not None:
        code = walked.tb_frame.f_code
        frames.append(f"{Path(code.co_filename).name}:{walked.tb_lineno} in {code.co_name}")
        walked = walked.tb_next
    error.add_note("\n".join(frames[-6:]))
    return None


class Look:
    """Looks at a model again and again; between two looks it notices which parameters are other objects."""

    def __init__(self) -> None:
        self._before: dict[str, object] = {}

    def forget(self) -> None:
        """Let go of the model's parameters."""
        self._before = {}

    def __call__(self, side: Side) -> Seen:
        """What can be seen without reading a weight."""
        model = side.model
        named = list(model.named_parameters(remove_duplicate=False))
        first: dict[int, str] = {}
        same = self._before
        self._before = dict(named)
        return {
            "modules": [(name, type(module).__name__, module.training) for name, module in model.named_modules()],
            "parameters": {
                name: (
                    isinstance(one, nn.Parameter), str(one.dtype), tuple(one.shape), one.stride(), str(one.device),
                    one.requires_grad, one.is_leaf, first.setdefault(id(one), name),
                )
                for name, one in named
            },
            "gradients": {name: None if one.grad is None else seen(one.grad) for name, one in named},
            "same objects as before": [name for name, one in named if same.get(name) is one],
            "buffers": {name: seen(buffer) for name, buffer in model.named_buffers()},
        }  # fmt: skip


look = Look


def look_closely(side: Side) -> Seen:
    """All values, by every way to them, and what passes give in each mode."""
    model = side.model
    return {
        "state": attempt(lambda: dict(model.state_dict())),
        "attributes": attempt(lambda: list(_attributes(model))),
        "gradients": {name: seen(one.grad) for name, one in model.named_parameters()},
        **{f"pass in {how}": _pass(side, how) for how in ("no_grad", "grad", "inference")},
        "loss and gradients": _gradients(side),
    }


def _attributes(model: nn.Module) -> Iterator[Any]:
    """Each weight as an attribute: its value, and whether it is what iterating yields."""
    named = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name in module._parameters:
            found = getattr(module, name)
            full = f"{prefix}.{name}" if prefix else name
            yield full, found, found is named.get(full)


def _pass(side: Side, how: str) -> Seen:
    torch.manual_seed(1)
    with mode(how):
        return attempt(lambda: list(tensors_of(side.call(1))))


def _gradients(side: Side) -> Seen:
    torch.manual_seed(2)

    def work() -> object:
        side.model.zero_grad()
        loss = side.loss(2)
        loss.backward()
        return loss, {name: parameter.grad for name, parameter in side.model.named_parameters()}

    return attempt(work)


def differences(one: Seen, other: Seen, at: str = "") -> Iterator[str]:
    """Where the second differs from the first, in words; nothing if they are equal."""
    if isinstance(one, dict) and isinstance(other, dict):
        if list(one) != list(other):
            lost, new = [key for key in one if key not in other], [key for key in other if key not in one]
            yield f"{at}: lacks {lost[:4]}, has besides {new[:4]}" if lost or new else f"{at}: another order of names"
        for key in one:
            if key in other:
                yield from differences(one[key], other[key], f"{at}.{key}" if at else key)
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            yield f"{at}: {len(other)} things, not {len(one)}: {_short(other)}, not {_short(one)}"
        for index, (first, second) in enumerate(zip(one, other, strict=False)):
            yield from differences(first, second, f"{at}[{index}]")
    elif isinstance(one, Bits) and isinstance(other, Bits):
        if one.kind != other.kind:
            yield f"{at}: {other}, not {one}"
        elif one.content != other.content:
            yield f"{at}: {_changed(one, other)} in {other}"
    elif one != other:
        yield f"{at}: {_short(other)}, not {_short(one)}"


def _short(value: object) -> str:
    return repr(value)[: 500 if isinstance(value, Raised) else 120]


def _changed(one: Bits, other: Bits) -> str:
    width = max(1, len(one.content) // max(1, _numel(one)))
    pieces = [
        (one.content[at : at + width], other.content[at : at + width]) for at in range(0, len(one.content), width)
    ]
    return f"{sum(a != b for a, b in pieces)} of {len(pieces)} values differ"


def _numel(bits: Bits) -> int:
    return int(torch.Size(bits.kind[1]).numel())  # type: ignore[arg-type]
