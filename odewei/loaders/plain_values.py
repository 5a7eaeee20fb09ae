"""What a pickle holds beside weights, as plain Python values, as far as it is such. Nothing of it is ever called."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from odewei.loaders.pickle_values import OtherKey, Stated, TensorRecord

__all__ = ["plain_metadata", "plain_value"]

_PLAIN = (int, float, complex, str, bytes, bool, type(None))
_METADATA = "_metadata"


def plain_value(value: object, tensor: Callable[[TensorRecord], torch.Tensor] | None = None) -> object:
    """The value that records stand for. Raises ValueError for anything but numbers, texts, bytes, and lists, tuples and
    mappings of these; and for tensors, unless ``tensor`` makes them of their records.
    """
    if isinstance(value, TensorRecord) and tensor is not None and value.problem is None:
        return tensor(value)
    if type(value) in _PLAIN:
        return value
    if type(value) in (list, tuple):
        assert isinstance(value, list | tuple)
        return type(value)(plain_value(one, tensor) for one in value)
    if isinstance(value, Mapping):
        return {_key(key): plain_value(one, tensor) for key, one in value.items()}
    raise ValueError(f"a {type(value).__name__} is no plain value")


def plain_metadata(values: Mapping[object, object]) -> object:
    """The versions of modules that ``state_dict()`` leaves on the mapping it makes; None if there are none."""
    state = values.state if isinstance(values, Stated) else None
    found = state.get(_METADATA) if isinstance(state, Mapping) else None
    try:
        return plain_value(found)
    except ValueError:
        return None


def _key(key: object) -> object:
    found = plain_value(key.value if isinstance(key, OtherKey) else key)
    if isinstance(found, list | dict):
        raise ValueError("a key that cannot be one")
    return found
