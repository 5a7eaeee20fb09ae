"""The weights of one model as they are bound: what the model says of them and what the checkpoint says, in one place.

Knows names, shapes, dtypes and places. Reads nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from odewei.errors import OptionsError, WeightMismatchError
from odewei.loaders.base import WeightInfo, WeightsLoader
from odewei.loaders.names import brief
from odewei.loaders.plain_callable import CallableLoader
from odewei.matched_loader import MatchedLoader
from odewei.matching import bound_dtype, init_missing, match_weights, unused
from odewei.survey import Modules, Weight

__all__ = ["Stock"]

_log = logging.getLogger("odewei")


class Stock:
    """``weights`` in definition order; ``infos`` by their names, with others that the checkpoint has, empty where a
    function delivers them; ``nbytes``: of all of them, bound. ``missing`` are the names that the checkpoint lacks or
    has in another shape (buffers included), ``unexpected`` its entries that the model has no use for.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        infos: Mapping[str, WeightInfo],
        wanted: torch.dtype | None,
        missing: tuple[str, ...] = (),
        unexpected: tuple[str, ...] = (),
    ) -> None:
        """``wanted``: the dtype to cast to, None to bind what is stored."""
        self.weights = weights
        self.infos = infos
        self.missing, self.unexpected = missing, unexpected
        self._is_told = False
        self._wanted = wanted
        self.nbytes = sum(map(self.nbytes_of, weights))

    @classmethod
    def match(
        cls,
        model: nn.Module | Modules,
        weights: Sequence[Weight],
        source: WeightsLoader | CallableLoader,
        wanted: torch.dtype | None,
        on_missing: str,
        *,
        on_mismatch: str = "error",
        strict: bool = False,
    ) -> Stock:
        """What ``source`` has of the weights; the others are initialised, for good, or an error (see ``matching``).

        Raises WeightMismatchError if ``strict`` and the checkpoint has what the model has no use for.
        """
        if isinstance(source, CallableLoader):
            if strict or on_mismatch != "error":
                raise OptionsError(
                    "strict=True and on_mismatch='init' need to know what the checkpoint has: a function cannot say",
                    cure="Leave them out, or give a loader",
                )
            return cls(weights, {}, wanted)
        modules = Modules.of(model)
        matched = match_weights(modules, weights, source, on_missing, on_mismatch=on_mismatch)
        unexpected = unused(modules, weights, source)
        if strict and unexpected:
            raise WeightMismatchError(
                f"the checkpoint has what the model has no use for ({len(unexpected)}): {brief(unexpected)}",
                weight=unexpected[0],
                cure="Leave them out (rename= of the loader, to None), or pass strict=False",
            )
        absent = [*matched.missing, *matched.mismatched]
        if absent:
            init_missing(modules.model, absent, wanted)
        _settle(matched.settled, modules, wanted)
        names = {weight.name for weight in (*absent, *matched.settled)}
        present = [weight for weight in weights if weight.name not in names]
        stock = cls(present, matched.infos, wanted, tuple(weight.name for weight in absent), unexpected)
        stock._is_told = source.is_as_loaded and not isinstance(source, MatchedLoader)  # by whoever converted it
        return stock

    def tell(self, buffers: Sequence[str] = ()) -> None:
        """Log what is missing and what is unexpected, and note the ``buffers`` that stay as they were built."""
        self.missing = (*self.missing, *buffers)
        if self._is_told:
            return
        if self.missing:
            _log.warning(
                "the checkpoint lacks %d of the model's weights and buffers, or has them in another shape; they are "
                "as the model initialises them: %s",
                len(self.missing),
                brief(self.missing),
            )
        if self.unexpected:
            _log.warning(
                "the checkpoint has what the model has no use for (%d): %s",
                len(self.unexpected),
                brief(self.unexpected),
            )

    def of(self, weights: Sequence[Weight]) -> Stock:
        """The same for those of a copy of the model."""
        return Stock(weights, self.infos, self._wanted, self.missing, self.unexpected)

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


def _settle(settled: Sequence[Weight], modules: Modules, wanted: torch.dtype | None) -> None:
    """Make weights that the model's hooks gave values those of all places that have them, cast as others are."""
    for weight in settled:
        own = [modules.named[use.module]._parameters for use in weight.uses]
        found = (places[use.local_name] for places, use in zip(own, weight.uses, strict=True))
        given = [parameter for parameter in found if parameter is not None and not parameter.is_meta][-1]
        target = bound_dtype(given.dtype, wanted)
        if given.dtype != target:
            given = nn.Parameter(given.detach().to(target), requires_grad=given.requires_grad)
        for places, use in zip(own, weight.uses, strict=True):
            places[use.local_name] = given
