"""bitsandbytes' quantised linear modules, streamed: what a weight consists of are ordinary parameters of the module.

bitsandbytes keeps the numbers that belong to a packed weight (scales, code books) in attributes of a tensor class of
its own, or of the module, made once when all is loaded. Here they come and go as they are in the checkpoint, and for
each call a module of bitsandbytes' own is put together around what is in memory, so that it computes what it always
does.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from odewei.errors import CheckpointError, MissingWeightError, ModelError
from odewei.loaders.base import WeightInfo, WeightsLoader
from odewei.loaders.tensors import read_tensor
from odewei.pretrained.bitsandbytes_packing import PackedScales, PackedWeight, can_pack
from odewei.pretrained.naming import Group, Taken
from odewei.pretrained.tracing import traced
from odewei.survey import walk

__all__ = ["have_parameters_hold_bitsandbytes", "is_part", "settle_bitsandbytes", "with_parts_as_parameters"]

_NESTED = ("nested_absmax", "nested_quant_map")  # of scales that are quantised themselves
_SETTINGS = "weight_quant_state"  # what is no tensor, as JSON in bytes
_STORED = re.compile(
    r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state)(?:\.bitsandbytes__\w+)?$"
)


def with_parts_as_parameters(found: Mapping[str, WeightInfo]) -> dict[str, WeightInfo]:
    """The weights of a checkpoint under names that parameters can have: ``q.weight.absmax`` is ``q.weight_absmax``."""
    return {_STORED.sub(r".weight_\1", name): info for name, info in found.items()}


def is_part(name: str) -> bool:
    """Whether a parameter, by its name, belongs to a packed weight: such ones keep their dtype."""
    return name.rpartition(".")[2] in _PARTS


def have_parameters_hold_bitsandbytes(model: nn.Module) -> None:
    """Make the quantised modules of a model without weights ones that stream. ``settle_bitsandbytes`` has to follow."""
    for module in _quantised(model):
        streamed = _streamed(module.__class__)
        weight = torch.empty_like(module.weight.data, device="meta")
        module.__class__ = streamed
        module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        for name in streamed.parts:
            module.register_parameter(name, nn.Parameter(torch.empty(0, device="meta"), requires_grad=False))


def settle_bitsandbytes(
    model: nn.Module, groups: Iterable[Group], checkpoint: WeightsLoader, device: torch.device
) -> list[Group]:
    """Give packed weights, and what belongs to them, the shapes that the checkpoint has, and read what is no tensor.
    Returns the groups that make them, and all others.

    Raises MissingWeightError, CheckpointError.
    """
    modules = {name: module for name, module, _ in walk(model) if isinstance(module, _Streamed)}
    left: list[Group] = []
    own: dict[str, dict[str, Group]] = {name: {} for name in modules}
    for group in groups:
        owner, _, name = group.target.rpartition(".")
        if owner in modules and name != "bias":
            own[owner][name] = group
        else:
            left.append(group)
    for owner, module in modules.items():
        for name, group in module.settle(own[owner], checkpoint, device).items():
            info = next(iter(traced(group, model, None).values())).info
            made = torch.empty(info.shape, dtype=info.dtype, device="meta")
            module._parameters[name] = nn.Parameter(made, requires_grad=False)
            left.append(group)
    return left


class _Streamed(nn.Module):
    """Comes before a class of bitsandbytes. ``parts`` are parameters beside the weight and the bias; the first
    ``needed`` of them have to be there.
    """

    parts: tuple[str, ...]
    needed: int
    of_bitsandbytes: type[nn.Module]
    weight: torch.Tensor
    bias: torch.Tensor | None

    def settle(self, groups: dict[str, Group], checkpoint: WeightsLoader, device: torch.device) -> dict[str, Group]:
        """Drop all parts; returns the groups of the parameters that the module is to have."""
        for name in self.parts:
            del self._parameters[name]
        if weight := groups.get("weight"):
            for name in self.parts[: self.needed]:
                if name not in groups:
                    stored = weight.taken[0].info
                    raise MissingWeightError(
                        f"the weight is to be quantised, and the checkpoint lacks its {name.removeprefix('weight_')!r}",
                        weight=stored.name,
                        file=stored.file,
                        cure="Save the checkpoint again with save_pretrained, or download it again",
                    )
        return groups

    def _put_together(self, weight: torch.Tensor, **own: Any) -> Any:
        """A module of bitsandbytes' own, for one call: it changes what it has."""
        made = object.__new__(self.of_bitsandbytes)
        bias = None if self.bias is None else nn.Parameter(self.bias.detach(), requires_grad=False)
        made.__dict__.update(self.__dict__, _parameters={"weight": weight, "bias": bias}, **own)
        return made


class _Streamed4bit(_Streamed):
    """``settings`` are what bitsandbytes says of the weight beside tensors. ``is_packed``: the weight is in the order
    that bitsandbytes makes for processors with AVX512-BF16.
    """

    parts = (_SETTINGS, "weight_absmax", "weight_quant_map", *(f"weight_{part}" for part in _NESTED))
    needed = 3
    in_features: int
    out_features: int
    settings: Mapping[str, Any]
    is_packed = False

    def settle(self, groups: dict[str, Group], checkpoint: WeightsLoader, device: torch.device) -> dict[str, Group]:
        groups = super().settle(groups, checkpoint, device)
        if "weight" not in groups:
            return {}
        self.settings = _settings(self, groups.pop(_SETTINGS).taken[0].info, checkpoint)
        stored = groups["weight"].taken[0].info.dtype
        return self._packed(groups) if device.type == "cpu" and can_pack(stored, self.settings) else groups

    def _packed(self, groups: dict[str, Group]) -> dict[str, Group]:
        """Have the weight come in the order that computing on this processor wants."""
        nested = [groups.pop(f"weight_{part}") for part in _NESTED if f"weight_{part}" in groups]
        weight, scales = groups["weight"], groups["weight_absmax"]
        groups["weight"] = Group(weight.target, PackedWeight(self.settings), [_known_by_part(weight)])
        sources = [_known_by_part(group) for group in (scales, *nested)]
        groups["weight_absmax"] = Group(scales.target, PackedScales(self.settings), sources)
        kept = {key: value for key, value in self.settings.items() if not key.startswith("nested")}
        self.settings, self.is_packed = {**kept, "dtype": "bfloat16"}, True
        return groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        import bitsandbytes as bnb

        if self.is_packed and torch.is_grad_enabled() and x.requires_grad:
            raise ModelError(
                "four-bit weights are streamed to this processor in an order that has no gradients",
                cure="Use torch.no_grad() or torch.inference_mode(), or a checkpoint of eight bits",
            )
        data = self.weight.detach()
        parts = {
            name.removeprefix("weight_"): getattr(self, name).detach()
            for name in self.parts[1:]
            if name in self._parameters
        }
        weight = bnb.nn.Params4bit.from_prequantized(data, {**parts, **self.settings}, device=data.device)
        weight.quant_state.packing_format_for_cpu = self.is_packed
        made: torch.Tensor = self._put_together(weight, quant_state=weight.quant_state).forward(x)
        return made


class _Streamed8bit(_Streamed):
    parts = ("SCB",)
    needed = 1
    SCB: torch.Tensor
    state: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        import bitsandbytes as bnb

        data = self.weight.detach()
        weight = bnb.nn.Int8Params(data, requires_grad=False, CB=data, SCB=self.SCB.detach())
        made: torch.Tensor = self._put_together(weight, state=copy.copy(self.state)).forward(x)
        return made


_PARTS = frozenset((*_Streamed4bit.parts, *_Streamed8bit.parts))


def _settings(module: _Streamed4bit, info: WeightInfo, checkpoint: WeightsLoader) -> Mapping[str, Any]:
    """What the checkpoint says of a weight beside tensors. Raises CheckpointError if that is not of this module."""
    try:
        found = json.loads(bytes(read_tensor(checkpoint, info).tolist()))
        right = found["shape"] == [module.out_features, module.in_features] and found["blocksize"] > 0
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _not_its_settings(info) from error
    if not right:
        raise _not_its_settings(info)
    assert isinstance(found, dict)
    return found


def _not_its_settings(info: WeightInfo) -> CheckpointError:
    return CheckpointError(
        "what it says of a quantised weight (shape, block size) does not fit the module",
        weight=info.name,
        file=info.file,
        cure="Use the configuration that the checkpoint was made with, or download it again",
    )


def _known_by_part(group: Group) -> Taken:
    return Taken(group.taken[0].info, group.target.rpartition(".")[2].removeprefix("weight_"), None)


def _quantised(model: nn.Module) -> Iterator[Any]:
    import bitsandbytes as bnb

    for _, module, _ in walk(model):
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            yield module


@functools.cache
def _streamed(of_bitsandbytes: Any) -> Any:
    """The class of a streamed module; it is one of ``of_bitsandbytes`` too, for whoever asks."""
    import bitsandbytes as bnb

    kind = _Streamed4bit if issubclass(of_bitsandbytes, bnb.nn.Linear4bit) else _Streamed8bit
    return type(f"Streamed{of_bitsandbytes.__name__}", (kind, of_bitsandbytes), {"of_bitsandbytes": of_bitsandbytes})
