"""Weights that are in host memory already, behind the same seam as files.

Knows tensors. The mapping's tensors are shared, not copied: what is written into them later is read later.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from odewei.errors import CheckpointError, WeightReadError
from odewei.loaders.base import WeightInfo, WeightsLoader
from odewei.loaders.known_weights import KnownWeights, named
from odewei.loaders.names import Rename
from odewei.loaders.tensors import check_plain, contiguous_stride

__all__ = ["StateDictLoader"]


class StateDictLoader(WeightsLoader):
    """The tensors of a mapping such as ``model.state_dict()``. No weight has a span.

    Strides are kept where the tensor's elements lie densely, in whatever order; other tensors (slices, expanded ones)
    are handed out contiguous. What is not a plain tensor in host memory is a CheckpointError for who asks for it, and
    at once where nothing else is there.
    """

    def __init__(
        self,
        mapping: Mapping[str, torch.Tensor],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        rename: Rename | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(device=device, dtype=dtype, rename=rename, prefix=prefix)
        self._tensors: dict[str, torch.Tensor] = {}
        refused: dict[str, CheckpointError] = {}
        for name, value in mapping.items():
            try:
                self._tensors[name] = _checked(name, value)
            except CheckpointError as error:
                if not isinstance(name, str):
                    raise
                refused[name] = error
        if refused and not self._tensors:
            raise next(iter(refused.values()))
        found = KnownWeights({name: _info(name, tensor) for name, tensor in self._tensors.items()}, refused)
        self._infos = named(found, self._names, None)
        values = {name: value for name, value in mapping.items() if not isinstance(value, torch.Tensor)}
        self._values = self._names.values(values)
        self._metadata = self._names.metadata(getattr(mapping, "_metadata", {}))

    def values(self) -> Mapping[str, object]:
        return self._values

    def metadata(self) -> Mapping[str, Mapping[str, object]]:
        return self._metadata

    def weights(self) -> Mapping[str, WeightInfo]:
        return self._infos

    def read_into(self, info: WeightInfo, buffer: memoryview) -> None:
        tensor = self._tensors[info.name]
        if _info(info.name, tensor) != info:
            raise WeightReadError(
                f"the tensor was resized or retyped while the model was using it (now {_info(info.name, tensor)})",
                weight=info.name,
                cure="Give the loader tensors of their own, or build the model again",
            )
        if buffer.nbytes != info.nbytes:
            raise ValueError(f"{info.name} has {info.nbytes} bytes, the buffer {buffer.nbytes}")
        if info.nbytes:
            with torch.inference_mode(False), torch.no_grad():
                torch.frombuffer(buffer, dtype=torch.uint8).copy_(_stored_bytes(tensor, info))

    def __repr__(self) -> str:
        return f"<StateDictLoader of {len(self._infos)} weights>"


def _checked(name: object, value: object) -> torch.Tensor:
    if not isinstance(name, str):
        raise CheckpointError(f"the key {name!r} is a {type(name).__qualname__}", cure="Names of weights are strings")
    tensor = check_plain(value, weight=name)
    if tensor.device.type != "cpu":
        cure = "It has no values: load them first" if tensor.is_meta else "Move it to host memory with .cpu()"
        raise CheckpointError(f"the tensor is on the device {str(tensor.device)!r}", weight=name, cure=cure)
    return tensor


def _info(name: str, tensor: torch.Tensor) -> WeightInfo:
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    keeps = stride != contiguous_stride(shape) and _is_dense(shape, stride)
    return WeightInfo(name, tensor.dtype, shape, None, stride if keeps else None)


def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the elements fill one stretch of memory, each once. Steps over dimensions of size 1 do not matter."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return 0 not in shape


def _stored_bytes(tensor: torch.Tensor, info: WeightInfo) -> torch.Tensor:
    """The elements in the order of memory that ``info`` promises, as uint8 of one dimension."""
    plain = tensor.detach().resolve_conj().resolve_neg()  # these keep the strides of dense tensors
    flat = plain.contiguous().view(-1) if info.stride is None else plain.as_strided((plain.numel(),), (1,))
    return flat.view(torch.uint8)
