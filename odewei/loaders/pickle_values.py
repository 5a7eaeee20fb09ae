"""What may come out of a pickle of weights: plain values, and records of tensors. Nothing here is imported by its name,
and nothing that a pickle names is called.

What torch's functions would build is written down instead: a tensor is where it lies in which storage. Objects of any
other class are :class:`Named` ones, whose parts are kept and mean nothing. The arguments of torch's functions are those
of torch/_utils.py and torch/_tensor.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pickle import UnpicklingError  # the class only: nothing here unpickles

import torch

__all__ = [
    "ForbiddenCallError",
    "Global",
    "Named",
    "OtherKey",
    "Stated",
    "StorageRecord",
    "TensorRecord",
    "Unreadable",
    "call",
]

_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "QInt8": torch.qint8,  # of tensors that cannot be read: see _quantised
    "QUInt8": torch.quint8,
    "QInt32": torch.qint32,
}
_MAX_COUNT = 2**63 - 1


class ForbiddenCallError(UnpicklingError):
    """The pickle asks to call what is not known to be harmless; its text is the name."""


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    """What the pickle asks for by name. Only the name."""

    name: str

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype, if that is what is asked for."""
        module, _, last = self.name.rpartition(".")
        found = vars(torch).get(last) if module == "torch" else None  # getattr would import parts of torch
        return found if isinstance(found, torch.dtype) else None


@dataclass(slots=True, eq=False)
class Named:
    """An object of a class that means nothing here: its name, what it was made of, and its state."""

    name: str
    arguments: object = ()
    state: object = None


class Stated(dict[object, object]):
    """A mapping that attributes are set on: state dictionaries keep versions so."""

    state: object = None


@dataclass(frozen=True, slots=True, eq=False)
class OtherKey:
    """A key of a mapping that is no text; two are never the same."""

    value: object


@dataclass(frozen=True, slots=True, eq=False)
class StorageRecord:
    """A storage of ``count`` elements, of which ``first`` are skipped; ``key`` says where it lies."""

    key: str
    dtype: torch.dtype
    count: int
    first: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class TensorRecord:
    """A tensor over a storage; ``offset`` and ``stride`` in elements. ``problem``: why its bytes are not its values."""

    storage: StorageRecord
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    problem: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Unreadable:
    """A tensor that shape, strides, dtype and bytes do not describe in full."""

    problem: str
    cure: str = field(default="Store the plain tensors it is made of under names of their own")


def storage_of(persistent_id: object) -> object:
    """What torch's persistent id stands for: ("storage", type, key, device, count, view or None)."""
    if not isinstance(persistent_id, tuple) or not persistent_id:
        raise ValueError("a persistent id is no tuple")
    if persistent_id[0] == "module":  # a whole model with the text of its program
        return persistent_id[1] if len(persistent_id) > 1 else None
    if persistent_id[0] != "storage" or len(persistent_id) not in (5, 6):
        raise ValueError("a persistent id is none of torch's")
    kind, key, count = persistent_id[1], persistent_id[2], persistent_id[4]
    dtype = _storage_dtype(kind)
    if not isinstance(key, str) or not _is_count(count):
        raise ValueError("a storage has no name or no size")
    if len(persistent_id) == 5 or persistent_id[5] is None:
        return StorageRecord(key, dtype, count)
    view = persistent_id[5]  # of torch before 0.4: a part of a storage
    if not isinstance(view, tuple) or len(view) != 3 or not _is_count(view[1]) or not _is_count(view[2]):
        raise ValueError("a view of a storage is none")
    return StorageRecord(key, dtype, view[2], view[1])


def _storage_dtype(kind: object) -> torch.dtype:
    name = kind.name if isinstance(kind, Global) else ""
    if name == "torch.storage.UntypedStorage":
        return torch.uint8
    module, _, last = name.rpartition(".")
    dtype = _STORAGES.get(last.removesuffix("Storage"))
    if dtype is None or not last.endswith("Storage") or module not in ("torch", "torch.cuda"):
        raise ValueError(f"a storage of type {name[:100]!r} is none that torch.save writes")
    return dtype


def call(called: object, arguments: object) -> object:
    """What calling would make, as a record. Raises ForbiddenCallError, ValueError for arguments that are none."""
    if isinstance(called, Named):
        return Named(called.name, arguments)
    if not isinstance(called, Global) or not isinstance(arguments, tuple):
        raise ValueError("the pickle calls what is no function, or with what are no arguments")
    made = _MAKERS.get(called.name.replace("__builtin__.", "builtins.", 1))
    if made is not None:
        try:
            return made(*arguments)
        except TypeError as error:
            raise ValueError(f"{called.name} does not take these arguments") from error
    if not _is_harmless(called.name):
        raise ForbiddenCallError(called.name)
    first = arguments[0] if arguments else None
    if called.name in _RECONSTRUCTORS and isinstance(first, Global):
        return Named(first.name, arguments[1:])
    return Named(called.name, arguments)


def _tensor(storage: object, offset: object, size: object, stride: object, *rest: object) -> TensorRecord:
    """_rebuild_tensor, and _rebuild_tensor_v2 with requires_grad, hooks, metadata."""
    if len(rest) > 3:
        raise ValueError("a tensor has too many arguments")
    dtype = storage.dtype if isinstance(storage, StorageRecord) else None
    return _record(storage, dtype, offset, size, stride, rest[2] if len(rest) > 2 else None)


def _tensor_v3(
    storage: object, offset: object, size: object, stride: object, _: object, __: object, dtype: object, *rest: object
) -> TensorRecord:
    """For dtypes that have no typed storage: the storage's elements are bytes."""
    found = dtype if isinstance(dtype, torch.dtype) else dtype.dtype if isinstance(dtype, Global) else None
    if not isinstance(storage, StorageRecord) or storage.dtype is not torch.uint8 or len(rest) > 1:
        raise ValueError("a tensor is over no storage of bytes")
    return _record(storage, found, offset, size, stride, rest[0] if rest else None)


def _record(
    storage: object, dtype: torch.dtype | None, offset: object, size: object, stride: object, metadata: object
) -> TensorRecord:
    if not isinstance(storage, StorageRecord) or dtype is None:
        raise ValueError("a tensor is over no storage, or of no dtype")
    shape, steps = _counts(size), _counts(stride)
    if not _is_count(offset) or shape is None or steps is None or len(shape) != len(steps):
        raise ValueError("a tensor has no offset, shape or strides that could be its own")
    assert isinstance(offset, int)
    return TensorRecord(storage, dtype, offset, shape, steps, _lazy(metadata))


def _lazy(metadata: object) -> str | None:
    """Why the bytes are not the values, if torch noted that beside them."""
    if isinstance(metadata, Mapping) and (metadata.get("conj") or metadata.get("neg")):
        return "the tensor was saved as a lazy conjugate or negative: its bytes are not its values"
    return None


def _parameter(data: object, *rest: object) -> object:
    if not isinstance(data, TensorRecord | Unreadable) or len(rest) not in (2, 3):
        raise ValueError("a parameter is of no tensor")
    return data


def _of_type(function: object, kind: object, arguments: object, state: object) -> object:
    """A tensor with attributes, or of a subclass."""
    if not isinstance(function, Global) or function.name not in _TENSORS or not isinstance(kind, Global):
        raise ForbiddenCallError(function.name if isinstance(function, Global) else "something that has no name")
    made = call(function, arguments)
    if kind.name in ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.Parameter"):
        return made
    return Unreadable(f"a {kind.name[:200]} is more than one stretch of bytes, or not initialised")


def _sparse(layout: object, *_: object) -> Unreadable:
    arguments = layout.arguments if isinstance(layout, Named) else ()
    name = arguments[0] if isinstance(arguments, tuple) and arguments and isinstance(arguments[0], str) else "sparse"
    return Unreadable(f"a tensor of layout {name[:40]} cannot be read in pieces", "Store it with .to_dense()")


def _quantised(*_: object) -> Unreadable:
    return Unreadable(
        "a tensor quantised by torch keeps its scale outside its bytes",
        "Store .int_repr() and the scale as two weights, or store .dequantize()",
    )


def _unreadable(problem: str) -> Callable[..., Unreadable]:
    return lambda *_: Unreadable(problem)


def _size(sizes: object = ()) -> tuple[int, ...]:
    found = _counts(sizes)
    if found is None:
        raise ValueError("a torch.Size is of no sizes")
    return found


def _mapping(*arguments: object) -> dict[object, object]:
    """An OrderedDict: empty, or of pairs."""
    pairs = arguments[-1] if arguments else ()
    found = Stated()
    for pair in pairs if isinstance(pairs, list | tuple) else ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError("an OrderedDict is of no pairs")
        found[pair[0] if isinstance(pair[0], str) else OtherKey(pair[0])] = pair[1]
    return found


def _encoded(text: object, encoding: object = "utf-8") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise ValueError("a text is encoded in no way that pickle writes")
    return text.encode(encoding)


def _is_count(found: object) -> bool:
    return type(found) is int and 0 <= found <= _MAX_COUNT


def _counts(found: object) -> tuple[int, ...] | None:
    if isinstance(found, Sequence) and not isinstance(found, str | bytes) and all(map(_is_count, found)):
        return tuple(found)
    return None


_TENSORS = frozenset(f"torch._utils._rebuild_tensor{end}" for end in ("", "_v2", "_v3"))
_SUBCLASS = _unreadable("a tensor of a subclass is more than one stretch of bytes, or not initialised")
_MAKERS: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": _mapping,
    "collections.defaultdict": lambda *_: {},
    "collections.Counter": lambda *_: {},
    "builtins.dict": lambda *_: {},
    "builtins.bytes": lambda: b"",  # how protocols up to 2 say that there are none
    "torch.Size": _size,
    "_codecs.encode": _encoded,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_sparse_csr_tensor": _sparse,
    "torch._utils._rebuild_nested_tensor": _unreadable("a nested tensor cannot be read in pieces"),
    "torch._utils._rebuild_qtensor": _quantised,
    "torch._utils._rebuild_wrapper_subclass": _SUBCLASS,
    "torch._utils._rebuild_meta_tensor_no_storage": _unreadable("the tensor was saved on the meta device: no values"),
    "torch._utils._rebuild_device_tensor_from_numpy": _unreadable("the tensor lies in a NumPy array in the pickle"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _unreadable("the tensor is of a device unknown here"),
}
_RECONSTRUCTORS = frozenset({"copy_reg._reconstructor", "copyreg._reconstructor", "copyreg.__newobj__"})
_HARMLESS = _RECONSTRUCTORS | {
    *("builtins.set", "builtins.frozenset", "builtins.list", "builtins.tuple", "builtins.complex", "builtins.slice"),
    *("builtins.object", "builtins.int", "builtins.float", "builtins.str", "builtins.bool", "builtins.range"),
    *("collections.deque", "argparse.Namespace", "types.SimpleNamespace", "functools.partial", "uuid.UUID"),
    *("decimal.Decimal", "fractions.Fraction", "torch.device", "torch.serialization._get_layout"),
    *("numpy.dtype", "numpy.ndarray"),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
}
_HARMLESS_MODULES = frozenset({"datetime", "pathlib", "enum", "pathlib._local"})
_STDLIB = sys.stdlib_module_names | {"__builtin__", "__main__"}


def _is_harmless(name: str) -> bool:
    """Whether calling would only make a value. Nothing is called in any case: what is no class of values by its name
    makes a file one that asks to run code, and that is to be said.
    """
    name = name.replace("__builtin__.", "builtins.", 1)  # what protocols up to 2 call it
    module, _, last = name.rpartition(".")
    if name in _HARMLESS or module in _HARMLESS_MODULES:
        return True
    by_number = module.split(".")[0] == "torch" and last.endswith(("Tensor", "Storage"))
    return module.split(".")[0] not in _STDLIB - {"__main__"} and last.lstrip("_")[:1].isupper() and not by_number
