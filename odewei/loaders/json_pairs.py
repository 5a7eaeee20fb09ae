"""JSON objects a pair at a time, so that what a file makes of memory is what is kept of it.

``json.loads`` turns each byte of a hostile file into up to thirty (``[],[],...``), and a header may have a hundred
million. Here the outermost object is walked over in place; a value is only made when its length is known and small.
Pure. The grammar is that of RFC 8259; text that is no UTF-8 or spells half a surrogate pair is refused.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator

__all__ = ["MAX_NAME_NBYTES", "JsonText", "no_duplicates"]

MAX_NAME_NBYTES = 1 << 16
"""No name in a header or an index is longer."""

_PIECE_NBYTES = 1 << 20
_BLANKS = (b" ", b"\t", b"\n", b"\r")
_BLANK = re.compile(rb"[ \t\n\r]*+")
# Stretches of a string's inside, so long that they are fast and so short that the matcher needs little memory.
_INSIDE = re.compile(
    rb"""(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]
    |\\u(?:[0-9a-cA-CefEF][0-9a-fA-F]{3}|[dD][0-7][0-9a-fA-F]{2})
    |\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}){1,4096}+""",
    re.VERBOSE,
)
_PLAIN = rb'"[^"\\\x00-\x1f]*+"[ \t\n\r]*+'
_PAIRS = re.compile(rb"(?:%b:[ \t\n\r]*+%b,[ \t\n\r]*+){1,4096}+" % (_PLAIN, _PLAIN))
_TOKEN = re.compile(rb'[^"\[\]{}]++|[\[\]{}]')
_SCALAR = re.compile(rb'[^ \t\n\r,:"\[\]{}]++')


class JsonText:
    """``text`` and how far it has been read, ``at``. All methods raise ValueError for what is not JSON.

    ``parse_int`` makes numbers of whole numbers, as for ``json.loads``.
    """

    __slots__ = ("_decode", "at", "text")

    def __init__(self, text: bytes, *, parse_int: Callable[[str], int] = int) -> None:
        self._decode = json.JSONDecoder(object_pairs_hook=no_duplicates, parse_int=parse_int).decode
        decoder = codecs.getincrementaldecoder("utf-8")()
        for start in range(0, len(text), _PIECE_NBYTES):
            decoder.decode(text[start : start + _PIECE_NBYTES])
        decoder.decode(b"", final=True)
        self.text = text
        self.at = 0
        self.skip_blanks()

    def pairs(self) -> Iterator[str]:
        """The names of the object that begins here; whoever asks reads the value, which then begins here, before the
        next. Names may repeat.
        """
        self._expect(b"{")
        if self._is_next(b"}"):
            return
        while True:
            start = self.at
            self.skip_string()
            name = self._made(start)
            self._expect(b":")
            yield name
            if not self._is_next(b","):
                self._expect(b"}")
                return

    def end(self) -> None:
        """Nothing but blanks follows."""
        if self.at != len(self.text):
            raise ValueError(f"there is more after its end, at byte {self.at}")

    def string(self) -> str:
        """The string that begins here."""
        start = self.at
        self.skip_string()
        return self._made(start)

    def skip_string(self) -> None:
        """Pass over a string of any length."""
        text, at = self.text, self.at
        if text[at : at + 1] != b'"':
            raise ValueError(f"a string is missing at byte {at}")
        at += 1
        while match := _INSIDE.match(text, at):
            at = match.end()
        if text[at : at + 1] != b'"':
            raise ValueError(f"a string is broken, or spells what is no UTF-8 text, at byte {at}")
        self.at = at + 1
        self.skip_blanks()

    def skip_texts(self) -> None:
        """Pass over an object whose values are strings, or raise ValueError for any other."""
        self._expect(b"{")
        if self._is_next(b"}"):
            return
        while True:
            while match := _PAIRS.match(self.text, self.at):
                self.at = match.end()
            self.skip_string()
            self._expect(b":")
            self.skip_string()
            if not self._is_next(b","):
                self._expect(b"}")
                return

    def value(self, most_nbytes: int) -> object:
        """The value that begins here, if it takes no more than so many bytes."""
        start, depth = self.at, 0
        while True:
            at = self.at
            mark = self.text[at : at + 1]
            if mark == b'"':
                self.skip_string()
            elif depth:
                match = _TOKEN.match(self.text, at, start + most_nbytes + 1)
                self.at = at + 1 if match is None else match.end()
                depth += (mark in (b"[", b"{")) - (mark in (b"]", b"}"))
            elif mark in (b"[", b"{"):
                depth, self.at = 1, at + 1
            else:
                match = _SCALAR.match(self.text, at)
                if match is None:
                    raise ValueError(f"a value is missing at byte {at}")
                self.at = match.end()
            if self.at - start > most_nbytes:
                raise ValueError(f"a value is longer than {most_nbytes} bytes, at byte {start}")
            if not depth:
                break
            if self.at >= len(self.text):
                raise ValueError(f"a value does not end, at byte {start}")
        part = self.text[start : self.at]
        self.skip_blanks()
        return self._decode(part.decode())

    def flat_object(self, most_nbytes: int) -> object:
        """``value``, quickly for an object that has no other in it: its end is the next brace."""
        start = self.at
        end = self.text.find(b"}", start, start + most_nbytes) + 1
        if self.text.startswith(b"{", start) and end:
            try:
                found: object = self._decode(self.text[start:end].decode())
            except ValueError:  # the brace is another's, or a string's
                return self.value(most_nbytes)
            self.at = end
            self.skip_blanks()
            return found
        return self.value(most_nbytes)

    def skip_blanks(self) -> None:
        if self.text.startswith(_BLANKS, self.at):
            match = _BLANK.match(self.text, self.at)
            assert match is not None
            self.at = match.end()

    def is_at(self, mark: bytes) -> bool:
        """Whether this comes next."""
        return self.text.startswith(mark, self.at)

    def _is_next(self, mark: bytes) -> bool:
        """Whether this comes next; then it is passed over."""
        if not self.text.startswith(mark, self.at):
            return False
        self.at += len(mark)
        self.skip_blanks()
        return True

    def _expect(self, mark: bytes) -> None:
        if not self._is_next(mark):
            raise ValueError(f"{mark.decode()!r} is missing at byte {self.at}")

    def _made(self, start: int) -> str:
        """The string that was passed over, without the blanks after it."""
        if self.at - start > MAX_NAME_NBYTES:
            end = self.text.rindex(b'"', start, self.at) + 1
            if end - start > MAX_NAME_NBYTES:
                raise ValueError(f"a name is longer than {MAX_NAME_NBYTES} bytes, at byte {start}")
        name = self.text[start : self.at].decode()
        if "\\" not in name:
            return name.rstrip()[1:-1]
        found: str = json.loads(name)
        return found


def no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """For ``json.loads(object_pairs_hook=...)``: a name that occurs twice is a ValueError, not its last value."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the name {name[:200]!r} occurs twice")
            seen.add(name)
    return found
