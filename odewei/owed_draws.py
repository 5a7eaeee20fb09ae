"""Draws that were left out while a model is built: how many words a fill takes, and a generator that catches up.

A weight without values needs no random numbers, but what is drawn after it must come out as if it had them. So the
draws of skipped fills are counted, and made up for (``settle``) before the next real draw and at the end.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from odewei.generator_jump import advanced, draws_since_seed

__all__ = ["OwedDraws", "Position", "draws_of_fill", "draws_of_truncated_normal"]

Fill = Callable[..., object]


@dataclass(frozen=True, slots=True, eq=False)
class Position:
    """Where a generator stands: so many draws after a state it was in."""

    generator: torch.Generator
    since: torch.Tensor
    draws: int

    def state(self, before: Position | None = None, at: torch.Tensor | None = None) -> torch.Tensor:
        """The generator's state. ``at`` is that of ``before``, from where the way may be shorter."""
        if before is not None and at is not None and before.since is self.since and before.draws <= self.draws:
            return advanced(at, self.draws - before.draws)
        return advanced(self.since, self.draws)

    @contextmanager
    def taken(self, state: torch.Tensor) -> Iterator[None]:
        """Meanwhile the generator is in ``state``; afterwards it is as it was."""
        kept = self.generator.get_state()
        self.generator.set_state(state)
        try:
            yield
        finally:
            self.generator.set_state(kept)


class OwedDraws:
    """What one generator owes. Whoever draws from it settles first.

    While it owes, the generator is in a state that nothing else puts it in, another for each position. So it shows when
    somebody seeds it, whatever the seed, or puts it back to where it was (``torch.random.fork_rng``).
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._since = generator.get_state()
        self._owed = 0
        self._marks: dict[int, tuple[torch.Tensor, int]] = {}  # of states that stand for others: those

    def owe(self, draws: int) -> Position:
        """Note that so many draws are left out. Returns where they would have begun."""
        position = self.position()
        self._owed += draws
        marked = _marked(self._since, len(self._marks) + 1)
        self._marks[_number(marked)] = self._since, self._owed
        self._generator.set_state(marked)
        return position

    def position(self) -> Position:
        """Where the generator would be."""
        state = self._generator.get_state()
        if not self._marks:
            if not torch.equal(state, self._since):
                self._since = state
        else:
            self._since, self._owed = self._marks.get(_number(state), (state, 0))
        return Position(self._generator, self._since, self._owed)

    def settle(self) -> None:
        """Bring the generator to where it would be."""
        if self._marks and self.position().draws:
            self._since = advanced(self._since, self._owed)
            self._owed = 0
            self._generator.set_state(self._since)


def _marked(state: torch.Tensor, number: int) -> torch.Tensor:
    """A state that nothing leads to but this: another for each number. Its seed is the same."""
    made = state.clone()
    made[_MARK : _MARK + 4] ^= torch.tensor(list(number.to_bytes(4, "little")), dtype=torch.uint8)
    return made


def _number(state: torch.Tensor) -> int:
    return hash(state.numpy().tobytes())


_MARK = 24 + 8 * 100  # any word of the block


def draws_of_fill(fill: Fill, tensor: torch.Tensor, args: tuple[object, ...], kwargs: Mapping[str, Any]) -> int | None:
    """Words that ``fill(tensor, *args, **kwargs)``, a method of tensors, draws; None where that cannot be said.

    Measured on few elements: torch's fills draw for one element after the other, or for sixteen at a time with a rule
    of their own for what is left over, which differs by dtype.
    """
    numel = tensor.numel()
    if not tensor.is_contiguous() or numel < 64:
        return None
    settings = tuple(sorted(kwargs.items()))
    try:
        rest = _measured(fill, tensor.dtype, 32 + numel % 16, args, settings)
        sixteen = _measured(fill, tensor.dtype, 48, args, settings) - _measured(fill, tensor.dtype, 32, args, settings)
    except (TypeError, RuntimeError):  # an argument that is a tensor, say
        return None
    return rest + (numel // 16 - 2) * sixteen


def draws_of_truncated_normal(tensor: torch.Tensor, mean: float, std: float, low: float, high: float) -> int | None:
    """Words that ``torch.nn.init.trunc_normal_`` draws; None where that depends on the numbers.

    It draws anew what falls outside. torch's normal numbers are less than nine standard deviations from the mean (a
    double cannot be closer to zero), so that with wide bounds nothing does.
    """
    if std > 0 and min(mean - low, high - mean) > 9.0 * std and math.isfinite(mean):
        return draws_of_fill(torch.Tensor.normal_, tensor, (), {})
    return None


@functools.lru_cache(maxsize=256)
def _measured(
    fill: Fill, dtype: torch.dtype, numel: int, args: tuple[object, ...], kwargs: tuple[tuple[str, Any], ...]
) -> int:
    generator = torch.Generator()
    generator.manual_seed(0)
    fill(torch.zeros(numel, dtype=dtype, device="cpu"), *args, generator=generator, **dict(kwargs))
    return draws_since_seed(generator)
