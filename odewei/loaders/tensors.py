"""From stored bytes to tensors in host memory: names of dtypes, what may be cast, what a plain tensor is.

Knows dtypes, shapes, strides and bytes. Knows nothing of files beyond their names in messages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from odewei.errors import CheckpointError, CorruptCheckpointError
from odewei.loaders.base import WeightInfo, WeightsLoader

__all__ = [
    "DTYPES",
    "check_plain",
    "contiguous_stride",
    "is_castable",
    "named_dtype",
    "read_tensor",
    "view_as_weight",
]

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
    "C64": "complex64",
}

_ACROSS_BYTES = frozenset({"F6_E2M3", "F6_E3M2"})

DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, torch_name) for name, torch_name in _TORCH_NAMES.items() if hasattr(torch, torch_name)
}
"""Names of dtypes in safetensors headers, as far as the installed torch has them (an element of its F4 is a pair)."""


def named_dtype(name: str, *, weight: str, file: str) -> torch.dtype:
    """The dtype that a safetensors header calls ``name``; ``weight`` and ``file`` are for the message.

    Raises CheckpointError for a dtype that exists but cannot be held in a tensor here, CorruptCheckpointError for a
    name that means nothing.
    """
    if name in DTYPES:
        return DTYPES[name]
    if name in _ACROSS_BYTES:
        raise CheckpointError(
            f"dtype {name} packs its elements across bytes, and torch has no dtype for it",
            weight=weight,
            file=file,
            cure="Save the packed bytes as U8, as most quantisation libraries do, or use a checkpoint in another dtype",
        )
    if name in _TORCH_NAMES:
        raise CheckpointError(
            f"dtype {name} is unknown to the installed torch {torch.__version__}",
            weight=weight,
            file=file,
            cure="Install a newer torch, or use a checkpoint in another dtype",
        )
    raise CorruptCheckpointError(
        f"dtype {name[:40]!r} does not exist in the safetensors format",
        weight=weight,
        file=file,
        cure="Download the file again; if it is whole, it was not written by safetensors",
    )


def is_castable(dtype: torch.dtype) -> bool:
    """Whether a ``dtype=`` option changes weights of this dtype: floating, and 16 bits or more.

    Everything else (integers, booleans, packed bits, 8-bit floats with their scales elsewhere) would lose its meaning.
    """
    return dtype.is_floating_point and dtype.itemsize >= 2


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """The stride, in elements, that torch gives a new tensor of this shape."""
    steps, step = [], 1
    for size in reversed(shape):
        steps.append(step)
        step *= max(size, 1)
    return tuple(reversed(steps))


def view_as_weight(raw: torch.Tensor, info: WeightInfo) -> torch.Tensor:
    """``raw`` (one dimension, uint8, exactly ``info.nbytes`` long) as the tensor that was stored; shares its memory."""
    flat = raw.view(info.dtype)
    stride = contiguous_stride(info.shape) if info.stride is None else info.stride
    return flat.as_strided(info.shape, stride)


def read_tensor(loader: WeightsLoader, info: WeightInfo, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Read one weight into fresh host memory of its own, aligned to 64 bytes.

    Cast to ``dtype`` (default: ``loader.dtype``, else ``info.wanted``; None: as stored) if :func:`is_castable` says
    so. Strides are as stored. The tensor is an ordinary one even when the caller is in inference mode. Raises
    WeightReadError.
    """
    wanted = dtype or loader.dtype or info.wanted
    with torch.inference_mode(False), torch.no_grad():
        raw = torch.empty(info.nbytes, dtype=torch.uint8, device="cpu")
        loader.read_into(info, raw.numpy().data)
        tensor = view_as_weight(raw, info)
        return tensor.to(wanted) if wanted is not None and is_castable(info.dtype) else tensor


def check_plain(
    value: object, *, weight: str, file: str | None = None, module: str | None = None, cure: str | None = None
) -> torch.Tensor:
    """``value`` if it is a tensor that shape, strides, dtype and bytes describe in full; Parameters are.

    Raises CheckpointError that names ``weight`` otherwise; ``cure`` replaces the one for what is no tensor at all.
    """
    if not isinstance(value, torch.Tensor):
        problem = f"a tensor was expected, this is a {type(value).__qualname__}"
        cure = cure or "Leave it out, or make it a tensor (torch.from_numpy, torch.tensor)"
    elif value.layout is not torch.strided:
        problem, cure = f"a tensor of layout {value.layout} cannot be read in pieces", "Store it with .to_dense()"
    elif value.is_quantized:
        problem = "a tensor quantised by torch keeps its scale outside its bytes"
        cure = "Store .int_repr() and the scale as two weights, or store .dequantize()"
    elif not _is_plain(value):
        problem = f"a {type(value).__qualname__} is more than one stretch of bytes, or not initialised"
        cure = "Store the plain tensors it is made of (__tensor_flatten__) under names of their own"
    else:
        return value
    raise CheckpointError(problem, module=module, weight=weight, file=file, cure=cure)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is a Tensor or a Parameter of one. Subclasses detach to themselves, Parameters to what they hold."""
    try:
        return type(tensor.detach()) is torch.Tensor
    except ValueError:  # an uninitialised parameter has no shape yet
        return False
