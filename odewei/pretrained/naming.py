"""Which weights of a checkpoint go into which weights of a model of transformers. Pure: names and dtypes, no bytes.

The rules are those by which transformers 5 loads a checkpoint (its ``core_model_loading``): in the natural order of the
names, all renamings are applied, then at most one conversion, then the prefix of the base model is added or taken off
where only that fits; a name that was right as it was is kept. The rules themselves (patterns, operations) are taken
from transformers as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from odewei.loaders.base import WeightInfo
from odewei.loaders.known_weights import KnownWeights, again

__all__ = ["Group", "Taken", "grouped"]


@dataclass(frozen=True, slots=True)
class Taken:
    """A weight of the checkpoint on its way into the model: ``pattern`` is what a conversion knows it by, ``dtype``
    what it is cast to before (None: as stored).
    """

    info: WeightInfo
    pattern: str
    dtype: torch.dtype | None


@dataclass(slots=True)
class Group:
    """What becomes one weight, called ``target``, or several of which ``target`` is the first. ``conversion`` is
    transformers' own, None where there is only a name to change.
    """

    target: str
    conversion: Any
    taken: list[Taken] = field(default_factory=list)


def grouped(
    found: Mapping[str, WeightInfo],
    expected: Mapping[str, torch.Tensor],
    transforms: Sequence[Any],
    base_prefix: str,
    cast: Callable[[str, WeightInfo, Any], torch.dtype | None],
) -> tuple[list[Group], dict[str, WeightInfo]]:
    """The groups that make weights of the model, in the order in which they are begun, and what is left over, by the
    names that it would have in the model.

    ``expected`` is the state dictionary of the model without weights, ``transforms`` are transformers' for it;
    ``cast(target, info, conversion)`` says which dtype a weight is cast to. Raises the CheckpointError of a weight
    that the model needs and nobody can read.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, Group] = {}
    left: dict[str, WeightInfo] = {}
    refused = found.refused if isinstance(found, KnownWeights) else {}
    for name in sorted({*found, *refused}, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, base_prefix, expected)
        if target not in expected and name in expected:
            target, pattern = rename_source_key(name, [], [], base_prefix, expected)
        if name in refused:
            if target in expected:
                raise again(refused[name])  # it is not missing, so nothing may be put in its place
            continue
        if target not in expected:
            left[target] = found[name]
            continue
        conversion = None if pattern is None else by_pattern[pattern]
        group = groups.setdefault(target, Group(target, conversion))
        info = found[name]
        group.taken.append(Taken(info, pattern or name, cast(target, info, group.conversion)))
    return list(groups.values()), left
