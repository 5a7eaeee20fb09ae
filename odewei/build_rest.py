"""What is left when a model function has returned: parameters in the tree lose their values, all else gets its own.

A module may be kept in a list, a closure, a cache; a mask is an attribute. None of this is in a checkpoint. What is
small has values anyway; what is large is found as a tensor on the build's tape that is alive and no parameter of the
tree.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.utils.spectral_norm import SpectralNorm

from odewei.errors import ModelError
from odewei.scheduler.budget import format_nbytes
from odewei.scheduler.machine import available_bytes
from odewei.survey import Modules
from odewei.tape import Tape

__all__ = ["Kept", "Rest"]

_PLAIN = (torch.Tensor, nn.Parameter)

Kept = dict[int, tuple[torch.UntypedStorage, nn.Parameter]]


class Rest:
    """Of one model. ``small`` are parameters that were made with values, wherever they are now; it is emptied."""

    def __init__(self, model: nn.Module, tape: Tape, small: list[nn.Parameter]) -> None:
        self._tape = tape
        self._small = small
        self._modules = Modules(model)

    def settle(self) -> Kept:
        """Do it. Returns the values of the small ones in the tree, by the number of the storage that the parameter has
        now; the parameters themselves are not kept.

        Raises ModelError for what cannot be had: a view of a weight that is kept beside it, or values that are too
        many for the memory.
        """
        with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
            tree = self._tree()
            kept, shared = self._empty_small(tree)
            self._small.clear()  # those that were thrown away go now
            if shared:
                self._refuse_views(kept, shared, tree)
            if self._tape:
                self._fill_hidden(tree)
        return kept

    def _tree(self) -> dict[int, tuple[str, nn.Parameter]]:
        tree: dict[int, tuple[str, nn.Parameter]] = {}
        for prefix, module in self._modules.items():
            for name, parameter in module._parameters.items():
                if type(parameter) is nn.Parameter and id(parameter) not in tree:
                    tree[id(parameter)] = (f"{prefix}.{name}" if prefix else name), parameter
        return tree

    def _empty_small(self, tree: dict[int, tuple[str, nn.Parameter]]) -> tuple[Kept, dict[int, str]]:
        """Each stays the object that it is, for all who have it; what it held goes to another. Returns these, and the
        names of those whose memory somebody else has, too.
        """
        kept: Kept = {}
        shared: dict[int, str] = {}
        for parameter in self._small:
            if id(parameter) in tree and not parameter.is_meta:
                empty = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device="meta")
                real = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                torch._C._swap_tensor_impl(parameter, real)
                storage = parameter.untyped_storage()
                kept[storage._cdata] = storage, real
                memory = real.untyped_storage()
                if torch._C._storage_Use_Count(memory._cdata) > 2:  # of the tensor, and of the object just made
                    shared[memory._cdata] = tree[id(parameter)][0]
        return kept, shared

    def _refuse_views(self, kept: Kept, shared: dict[int, str], tree: dict[int, tuple[str, nn.Parameter]]) -> None:
        """Two weights may lie in one memory, but nothing else in that of a weight."""
        gc.collect()
        known = {id(real) for _, real in kept.values()} | self._renewed()
        for found in gc.get_objects():
            if type(found) not in _PLAIN or found.is_meta or id(found) in known or id(found) in tree:
                continue
            name = shared.get(found.untyped_storage()._cdata) if found.layout is torch.strided else None
            if name is not None:
                raise _view(name)

    def _fill_hidden(self, tree: dict[int, tuple[str, nn.Parameter]]) -> None:
        """Give values to all that is alive and not in the tree."""
        if not self._hidden(tree):
            return
        gc.collect()  # what the function threw away needs none
        hidden = self._hidden(tree)
        weights = {self._tape.storage(parameter): name for name, parameter in tree.values()}
        renewed = self._renewed()
        for tensor in hidden:
            name = weights.get(self._tape.storage(tensor))
            if name is not None and id(tensor) not in renewed:
                raise _view(name)
        if hidden:
            self._check_room(hidden)
            for tensor, value in zip(hidden, self._tape.values(hidden), strict=True):
                _put(tensor, value)

    def _renewed(self) -> set[int]:
        """Views that torch's older spectral norm keeps where the weight was, and makes anew in each forward."""
        return {
            id(vars(module).get(hook.name))
            for module in self._modules.modules
            for hook in module._forward_pre_hooks.values()
            if isinstance(hook, SpectralNorm)
        }

    def _hidden(self, tree: dict[int, tuple[str, nn.Parameter]]) -> list[torch.Tensor]:
        return [
            found
            for found in gc.get_objects()
            if type(found) in _PLAIN and found.is_meta and id(found) not in tree and self._tape.has(found)
        ]

    def _check_room(self, hidden: list[torch.Tensor]) -> None:
        nbytes = self._tape.nbytes({storage for tensor in hidden if (storage := self._tape.storage(tensor))})
        if nbytes > available_bytes() // 2:
            largest = max(hidden, key=lambda tensor: tensor.nbytes)
            raise ModelError(
                f"{len(hidden)} tensors that are no parameters of the model's modules take {format_nbytes(nbytes)}, "
                f"for which there is no memory; the largest is {self._describe(largest)}",
                cure="Register the modules that are kept in lists, closures or caches (nn.ModuleList, an attribute), "
                "so that their weights are read from the checkpoint",
            )

    def _describe(self, tensor: torch.Tensor) -> str:
        names = list(self._names_of(tensor))
        return names[0] if names else f"a {type(tensor).__name__} of shape {tuple(tensor.shape)}"

    def _names_of(self, tensor: torch.Tensor) -> Iterator[str]:
        for prefix, module in self._modules.items():
            for name, value in (*module._buffers.items(), *vars(module).items()):
                if value is tensor:
                    yield f"{prefix}.{name}" if prefix else name


def _view(name: str) -> ModelError:
    return ModelError(
        "a view of a weight is kept beside it, which would not have the weight's values",
        weight=name,
        cure="Take the view in forward, from the parameter itself",
    )


def _put(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Have the object that has no values be the one that has."""
    if isinstance(tensor, nn.Parameter):
        value = nn.Parameter(value, requires_grad=tensor.requires_grad)
    elif tensor.requires_grad:
        value.requires_grad_()
    torch._C._swap_tensor_impl(tensor, value)
