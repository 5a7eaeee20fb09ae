"""A hostile checkpoint, and what generators of them share.

A case is a pure function of its kind and its seed, so that a number is enough to make it again.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["NUMBERS", "Case", "damage", "hostile_name", "pick", "value_of_another_kind"]

NUMBERS: tuple[int, ...] = (
    *(-1, 0, 1, 2, 3, 7, 8, 255, 256, 65_535, 65_536),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**128),
    *(-(2**31), -(2**63), 10**40, 100_000_001),
)
"""Numbers at which something overflows, wraps or is cut."""

NAMES: tuple[str, ...] = (
    *("", "a", "w.npy", "__metadata__", "weight_map", "..", "../w", "/etc/passwd", "a/../../b", "C:\\w", "\\\\host\\w"),
    *("a\0b", "\x1b[2J", "é", "😀", "\ud800", "a" * 300, "con", ".", "~", "a\nb", "%s%n", "${HOME}", "\ufeff", "Ａ"),
)


@dataclass(frozen=True)
class Case:
    """Files by their names in one folder. ``start`` is the one to open; ``links`` are made besides, name to target."""

    kind: str
    start: str
    files: dict[str, bytes]
    links: tuple[tuple[str, str], ...] = ()

    @property
    def content(self) -> bytes:
        """The bytes of the file that is opened."""
        return self.files[self.start]

    def with_content(self, content: bytes) -> "Case":
        """The same with other bytes in the file that is opened."""
        return replace(self, files={**self.files, self.start: content})


def pick(rng: random.Random, *choices: tuple[int, Callable[[], Any]]) -> Any:
    """What one of the functions returns, chosen by their weights."""
    return rng.choices([make for _, make in choices], [weight for weight, _ in choices])[0]()


def hostile_name(rng: random.Random) -> str:
    """A name that means something to somebody, or an ordinary one."""
    return rng.choice(NAMES) if rng.random() < 0.5 else "".join(rng.choices("abcxyz._0/", k=rng.randint(1, 8)))


def value_of_another_kind(rng: random.Random) -> object:
    """A JSON value where something else belongs."""
    simple: Sequence[object] = (None, True, False, 1.0, 0.0, -0.0, 1e300, float("nan"), "1", "", [], {}, [[]], {"a": 1})
    return rng.choice((*simple, *NUMBERS, [rng.choice(NUMBERS)], [1, 2, 3], "F32"))


def damage(rng: random.Random, content: bytes, *, most: int = 4) -> bytes:
    """The bytes with some of them changed, cut out, repeated, or replaced by numbers that hurt."""
    found = bytearray(content)
    for _ in range(rng.randint(1, most)):
        # Headers and directories are at the ends; that is where damage tells.
        span = len(found) + 1
        at = rng.choice((rng.randrange(span), rng.randrange(min(span, 64)), max(span - 1 - rng.randrange(64), 0)))
        what = rng.randrange(7)
        if what == 0:
            found[at : at + 1] = bytes([rng.randrange(256)])
        elif what == 1 and at < len(found):
            found[at] ^= 1 << rng.randrange(8)
        elif what == 2:
            found[at:at] = rng.choice((b"\0", b" ", b"[", b"{", b'"', b"\xff", b"\xc0\x80", b"-", b"9" * 30))
        elif what == 3:
            del found[at : at + rng.choice((1, 2, 4, 8, 100))]
        elif what == 4:
            nbytes = rng.choice((2, 4, 8))
            found[at : at + nbytes] = (rng.choice(NUMBERS) % 256**nbytes).to_bytes(nbytes, "little")
        elif what == 5:
            del found[at:]
        else:
            found[at:at] = found[at : at + rng.choice((1, 8, 50))]
    return bytes(found)
