"""The weights of one model as they are bound: what the model says of them and what the checkpoint says, in one place.

Knows names, shapes, dtypes and places. Reads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from odewei.loaders.base import WeightInfo, WeightsLoader
from odewei.loaders.plain_callable import CallableLoader
from odewei.matching import bound_dtype, init_missing, match_weights
from odewei.survey import Weight

__all__ = ["Stock"]


class Stock:
    """``weights`` in definition order; ``infos`` by their names, with others that the checkpoint has, empty where a
    function delivers them; ``nbytes``: of all of them, bound.
    """

    def __init__(self, weights: Sequence[Weight], infos: Mapping[str, WeightInfo], wanted: torch.dtype | None) -> None:
        """``wanted``: the dtype to cast to, None to bind what is stored."""
        self.weights = weights
        self.infos = infos
        self._wanted = wanted
        self.nbytes = sum(map(self.nbytes_of, weights))

    @classmethod
    def match(
        cls,
        model: nn.Module,
        weights: Sequence[Weight],
        source: WeightsLoader | CallableLoader,
        wanted: torch.dtype | None,
        on_missing: str,
    ) -> Stock:
        """What ``source`` has of the weights; the others are initialised, for good, or an error (see ``matching``)."""
        if isinstance(source, CallableLoader):
            return cls(weights, {}, wanted)
        matched = match_weights(weights, source, on_missing)
        if matched.missing:
            init_missing(model, matched.missing, wanted)
        absent = {weight.name for weight in matched.missing}
        return cls([weight for weight in weights if weight.name not in absent], matched.infos, wanted)

    def of(self, weights: Sequence[Weight]) -> Stock:
        """The same for those of a copy of the model."""
        return Stock(weights, self.infos, self._wanted)

    def replace(self, infos: Mapping[str, WeightInfo]) -> None:
        """The weights that these are of have other places now, and are there as they are bound."""
        self.infos = {**self.infos, **infos}

    def nbytes_of(self, weight: Weight) -> int:
        """One of them, bound."""
        return weight.numel * self.dtype(weight).itemsize

    def sizes(self) -> dict[str, int]:
        """Of each weight its bytes when bound, made anew."""
        return {weight.name: self.nbytes_of(weight) for weight in self.weights}

    def cast(self, stored: torch.dtype) -> torch.dtype:
        """The dtype that a stored one is bound in, where the loader has no wish for the weight."""
        return bound_dtype(stored, self._wanted)

    def bound(self, info: WeightInfo) -> torch.dtype:
        """The dtype that a weight of the checkpoint, or a part of one, is bound in."""
        return bound_dtype(info.dtype, self._wanted or info.wanted)

    def dtype(self, weight: Weight) -> torch.dtype:
        """The dtype that a weight is bound in, as far as is known before it is loaded."""
        info = self.infos.get(weight.name)
        if info is not None:
            return self.bound(info)
        return weight.dtype if self._wanted is None else self.cast(weight.dtype)

    def stride(self, weight: Weight) -> tuple[int, ...] | None:
        """Its strides when bound; None: contiguous."""
        info = self.infos.get(weight.name)
        return None if info is None else info.stride

    def __repr__(self) -> str:
        return f"<Stock of {len(self.weights)} weights, {self.nbytes} bytes>"
