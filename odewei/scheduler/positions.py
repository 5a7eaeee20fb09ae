"""A set of positions in a long sequence that answers "the smallest?" and "the largest below?" without searching.

Knows integers only. Two levels of bits: words of 1,024 positions, and a summary that says which words are not empty.
Each operation touches one word and the summary, whose length is a thousandth of the stretch that the set spans, in
bits.
"""

from __future__ import annotations

__all__ = ["PositionSet"]

_SHIFT = 10
_MASK = (1 << _SHIFT) - 1


class PositionSet:
    """Positions are integers of at least 0; asking for others is allowed.

    Memory grows with the number of words in use, not with the positions.
    """

    __slots__ = ("_base", "_summary", "_words")

    def __init__(self) -> None:
        self._words: dict[int, int] = {}
        self._summary = 0  # bit i: the word number _base + i is not empty
        self._base = 0

    def add(self, position: int) -> None:
        """Put a position in; it may be there already."""
        number = position >> _SHIFT
        word = self._words.get(number, 0)
        self._words[number] = word | 1 << (position & _MASK)
        if not word:
            if not self._summary:
                self._base = number
            elif number < self._base:
                self._summary <<= self._base - number
                self._base = number
            self._summary |= 1 << number - self._base

    def discard(self, position: int) -> None:
        """Take a position out, if it is there."""
        number = position >> _SHIFT
        word = self._words.get(number, 0)
        rest = word & ~(1 << (position & _MASK))
        if rest:
            self._words[number] = rest
        elif word:
            del self._words[number]
            self._summary ^= 1 << number - self._base
            if not self._summary & 1:
                empty = (self._summary & -self._summary).bit_length() - 1
                if empty > 0:
                    self._summary >>= empty
                    self._base += empty

    def smallest(self) -> int | None:
        """The smallest position; None if the set is empty."""
        if not self._summary:
            return None
        word = self._words[self._base]
        return (self._base << _SHIFT) + (word & -word).bit_length() - 1

    def largest_below(self, position: int) -> int | None:
        """The largest position smaller than ``position``; None if there is none."""
        number = position >> _SHIFT
        word = self._words.get(number, 0) & (1 << (position & _MASK)) - 1
        if not word:
            if number <= self._base:
                return None
            lower = self._summary & (1 << number - self._base) - 1
            if not lower:
                return None
            number = self._base + lower.bit_length() - 1
            word = self._words[number]
        return (number << _SHIFT) + word.bit_length() - 1

    def __contains__(self, position: int) -> bool:
        return bool(self._words.get(position >> _SHIFT, 0) >> (position & _MASK) & 1)

    def __len__(self) -> int:
        return sum(word.bit_count() for word in self._words.values())

    def __repr__(self) -> str:
        return f"<PositionSet of {len(self)}>"
