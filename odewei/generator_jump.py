"""Moves a generator of torch (MT19937, on the CPU) ahead by any number of draws without drawing them.

Knows the layout of ``torch.Generator.get_state()`` and nothing of models. A block of 624 words follows from the one
before by a linear map over GF(2), so a later block is a sum of the words that come next, chosen by the polynomial
``x^n mod p`` where p is the map's characteristic polynomial: H. Haramoto, M. Matsumoto, T. Nishimura, F. Panneton,
P. L'Ecuyer, "Efficient Jump Ahead for F2-Linear Random Number Generators", INFORMS Journal on Computing 20(3), 2008.
p is sparse (135 terms), so that reducing by it is a few shifts. It is computed once, from the generator's own bits
(J. Massey, "Shift-register synthesis and BCH decoding", 1969), which takes a tenth of a second.
"""

from __future__ import annotations

import functools
import struct

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["advanced", "draws_since_seed"]

_BLOCK = 624  # words that are made together
_DEGREE = 19937  # bits of the state
_HEAD = struct.Struct("=QiiQ")  # seed, words left of the block, whether seeded, the next word
_WORDS = slice(_HEAD.size, _HEAD.size + 8 * _BLOCK)  # each in 8 bytes
_PLAIN = 1 << 22  # so many draws are drawn in the time that a jump takes
_CHUNK = 1 << 16

_Words = npt.NDArray[np.uint32]


def advanced(state: torch.Tensor, draws: int) -> torch.Tensor:
    """The state of a generator that was in ``state`` and drew ``draws`` words of 32 bits. ``state`` stays as it is."""
    if draws <= _PLAIN:
        return _drawn(state, draws)
    raw = bytearray(state.numpy().tobytes())
    seed, left, seeded, _ = _HEAD.unpack_from(raw)
    blocks, used = divmod(draws - left, _BLOCK)  # left counts one more than there is: the word that makes a new block
    words = np.frombuffer(raw[_WORDS], dtype=np.uint64).astype(np.uint32)
    raw[_WORDS] = _ahead(words, (blocks + 1) * _BLOCK).astype(np.uint64).tobytes()
    _HEAD.pack_into(raw, 0, seed, _BLOCK - used, seeded, used + 1)
    return torch.frombuffer(raw, dtype=torch.uint8)


def draws_since_seed(generator: torch.Generator) -> int:
    """Words that were drawn since ``generator`` was seeded, if that were fewer than 624."""
    _, left, _, following = _HEAD.unpack_from(generator.get_state().numpy().tobytes())
    return _BLOCK + 1 - left if following else 0


def _drawn(state: torch.Tensor, draws: int) -> torch.Tensor:
    """The plain way: by drawing. ``uniform_`` takes one word for each float."""
    generator = torch.Generator()
    generator.set_state(state)
    scratch = torch.empty(min(draws, _CHUNK), dtype=torch.float32, device="cpu")
    for start in range(0, draws, _CHUNK):
        scratch[: draws - start].uniform_(generator=generator)
    return generator.get_state()


def _ahead(words: _Words, distance: int) -> _Words:
    """The block that lies ``distance`` words after ``words``."""
    # From the second word on, because 31 bits of the first are no part of the state: the words after it depend on none.
    chosen = np.flatnonzero(np.frombuffer(_bits(_power(distance - 1)), dtype=np.uint8) == ord("1")) + 1
    following = _sequence(words, _DEGREE + _BLOCK + 1)
    windows = np.lib.stride_tricks.sliding_window_view(following, _BLOCK)
    found = np.zeros(_BLOCK, dtype=np.uint32)
    for start in range(0, len(chosen), 1024):
        found ^= np.bitwise_xor.reduce(windows[chosen[start : start + 1024]], axis=0)
    return found


def _sequence(words: _Words, count: int) -> _Words:
    """``words`` and what the generator makes after them, ``count`` in all."""
    made = np.empty(count, dtype=np.uint32)
    made[:_BLOCK] = words
    for start in range(_BLOCK, count, 227):  # a word needs the one 227 places before it
        until = min(start + 227, count)
        here = slice(start - _BLOCK, until - _BLOCK)
        mixed = (made[here] & 0x80000000) | (made[here.start + 1 : here.stop + 1] & 0x7FFFFFFF)
        made[start:until] = made[start - 227 : until - 227] ^ (mixed >> 1) ^ ((mixed & 1) * np.uint32(0x9908B0DF))
    return made


@functools.lru_cache(maxsize=16)
def _power(exponent: int) -> int:
    """x to the ``exponent``, modulo p; bit i of polynomials is the coefficient of x^i."""
    result = 1
    for digit in f"{exponent:b}":
        result = _reduced(int(f"{result:b}", 4))  # a square over GF(2) has zeros between the bits
        if digit == "1":
            result = _reduced(result << 1)
    return result


def _reduced(polynomial: int) -> int:
    while (high := polynomial >> _DEGREE) != 0:
        polynomial &= (1 << _DEGREE) - 1
        for exponent in _terms():
            polynomial ^= high << exponent
    return polynomial


@functools.cache
def _terms() -> tuple[int, ...]:
    """The exponents of p, without its first."""
    first = np.arange(1, _BLOCK + 1, dtype=np.uint32)  # any state that is not zero
    bits = (_sequence(first, 2 * _DEGREE + 2)[1:] & 1).tolist()
    connection, before, length, shift, window = 1, 1, 0, 1, 0
    for place, bit in enumerate(bits):
        window = (window << 1 | bit) & ((2 << _DEGREE) - 1)
        if (connection & window).bit_count() & 1 == 0:
            shift += 1
        elif 2 * length <= place:
            connection, before, length, shift = connection ^ before << shift, connection, place + 1 - length, 1
        else:
            connection ^= before << shift
            shift += 1
    assert length == _DEGREE
    return tuple(length - place for place in range(1, length + 1) if connection >> place & 1)


def _bits(polynomial: int) -> bytes:
    """Its coefficients as text, the lowest first."""
    return f"{polynomial:b}"[::-1].encode()
