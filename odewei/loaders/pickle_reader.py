"""Reads pickles of weights without running them: the instructions of ``pickle``, done with records instead of calls.

Neither ``pickle`` nor ``torch.load`` is used, so that nothing that is done to them, to the environment or to the lists
of classes they trust makes code of a file run. Instructions are those of protocols 0 to 5 as the standard library's
``pickletools`` describes them. Each costs about what it takes in memory, out of a sum that is given beforehand: a byte
of a pickle can ask for sixty, and a number in it for any number.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from typing import BinaryIO

from odewei.errors import UnsafeCheckpointError
from odewei.loaders.pickle_values import (
    ForbiddenCallError,
    Global,
    Named,
    OtherKey,
    Stated,
    StorageRecord,
    TensorRecord,
    call,
    storage_of,
)

__all__ = ["PickleReader"]

_MAX_LINE = 1000
_MAX_LONG_NBYTES = 255
_CURE = "Use a safetensors checkpoint, or save only tensors: torch.save(model.state_dict(), path)"


class PickleReader:
    """Reads pickles, one after another, from ``stream``; all of them together may take ``most_nbytes`` of memory.

    ``file`` is for messages. The stream is left behind the last instruction that was read, and is never asked for more
    bytes than ``most_nbytes``.
    """

    def __init__(self, stream: BinaryIO, most_nbytes: int, *, file: str) -> None:
        self._stream, self._file = stream, file
        self._left = most_nbytes
        self.storages: dict[str, StorageRecord] = {}
        """Every storage that was asked for so far, by its key."""

    def load(self) -> object:
        """The next pickle's value. Raises ValueError for what is no pickle of weights or takes too much,
        UnsafeCheckpointError for one that would call what is no class of plain values.
        """
        self._stack: list[object] = []
        self._marks: list[list[object]] = []
        self._memo: dict[int, object] = {}
        read, steps = self._stream.read, _STEPS
        try:
            while (code := read(1)) != b".":
                step = steps.get(code)
                if step is None:
                    raise ValueError(
                        f"an instruction {code!r} that pickle does not have" if code else "it ends too early"
                    )
                step(self)
                if self._left < 0:
                    raise ValueError("it makes more objects than weights need")
            return self._pop()
        except ForbiddenCallError as error:
            raise UnsafeCheckpointError(
                f"the pickle in the file asks for {str(error)[:200]}; it was not run", file=self._file, cure=_CURE
            ) from error
        except (IndexError, KeyError, struct.error, OverflowError, UnicodeError) as error:
            raise ValueError("it ends too early, or takes what it has not put there") from error

    # -- bytes -------------------------------------------------------------------------------------------------------

    def _take(self, nbytes: int, cost: int = 0) -> bytes:
        self._left -= cost
        if self._left < nbytes:  # before memory is made for them
            raise ValueError("it makes more objects than weights need")
        found = self._stream.read(nbytes)
        if len(found) != nbytes:
            raise IndexError
        return found

    def _line(self) -> bytes:
        found = self._stream.readline(_MAX_LINE)
        if not found.endswith(b"\n"):
            raise IndexError
        self._left -= len(found)
        return found[:-1]

    def _count(self, nbytes: int) -> int:
        return int.from_bytes(self._take(nbytes), "little")

    # -- the stack ---------------------------------------------------------------------------------------------------

    def _push(self, value: object, cost: int) -> None:
        self._stack.append(value)
        self._left -= cost

    def _pop(self) -> object:
        return self._stack.pop()

    def _pop_mark(self) -> list[object]:
        items, self._stack = self._stack, self._marks.pop()
        self._left -= 16 * len(items)
        return items

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []
        self._left -= 120

    def _pop_any(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._pop_mark()

    def _put(self, place: int) -> None:
        self._memo[place] = self._stack[-1]
        self._left -= 100

    # -- what is made ------------------------------------------------------------------------------------------------

    def _text(self, nbytes: int) -> None:
        self._push(self._take(nbytes, 60 + 4 * nbytes).decode("utf-8", "surrogatepass"), 0)

    def _bytes(self, nbytes: int) -> None:
        self._push(self._take(nbytes, 60 + nbytes), 0)

    def _quoted(self) -> None:
        line = self._line()
        if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
            raise ValueError("a text has no quotes")
        try:
            self._push(codecs.escape_decode(line[1:-1])[0].decode(), 5 * len(line))
        except ValueError as error:
            raise ValueError("a text cannot be read") from error

    def _long(self, nbytes: int) -> None:
        if nbytes > _MAX_LONG_NBYTES:
            raise ValueError(f"a number has {nbytes} bytes")
        self._push(int.from_bytes(self._take(nbytes), "little", signed=True), 40 + nbytes)

    def _integer_line(self) -> None:
        line = self._line()
        if line in (b"00", b"01"):
            self._push(line == b"01", 8)
        elif len(line) > 100:
            raise ValueError("a number is too long")
        else:
            self._push(int(line.removesuffix(b"L")), 80)

    def _tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError
        items = tuple(self._stack[len(self._stack) - count :])
        del self._stack[len(self._stack) - count :]
        self._push(items, 64)

    def _global(self) -> None:
        module, name = self._line().decode(), self._line().decode()
        self._push(Global(f"{module}.{name}"), 200)

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("something is asked for by what is no name")
        self._push(Global(f"{module}.{name}"), 200 + 4 * (len(module) + len(name)))

    def _reduce(self) -> None:
        arguments, called = self._pop(), self._pop()
        self._push(call(called, arguments), 600)

    def _new(self, has_names: bool) -> None:
        names = self._pop() if has_names else None
        arguments, kind = self._pop(), self._pop()
        self._push(call(kind, arguments) if not names else Named(_name(call(kind, arguments)), (arguments, names)), 600)

    def _object(self) -> None:
        kind, *arguments = self._pop_mark()
        self._push(call(kind, tuple(arguments)), 600)

    def _instance(self) -> None:
        module, name = self._line().decode(), self._line().decode()
        self._push(call(Global(f"{module}.{name}"), tuple(self._pop_mark())), 600)

    def _build(self) -> None:
        state = self._pop()
        target = self._stack[-1]
        if isinstance(target, Named | Stated):
            target.state = state
        elif isinstance(target, TensorRecord | StorageRecord):
            raise ValueError("a tensor is given another state")
        self._left -= 100

    def _persistent(self) -> None:
        found = storage_of(self._pop())
        if isinstance(found, StorageRecord):
            first = self.storages.setdefault(found.key, found)
            if first.dtype != found.dtype:  # torch would use the first; torch.save writes no such thing
                raise ValueError(f"storage {found.key[:40]!r} has two types")
        self._push(found, 600)

    # -- what is filled ----------------------------------------------------------------------------------------------

    def _append(self, items: list[object]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Named):
            raise ValueError("something is appended to what is no list")
        self._left -= 16 * len(items)

    def _set_items(self, items: list[object]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict | Named) or len(items) % 2:
            raise ValueError("items are set of what is no mapping")
        if isinstance(target, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                target[key if isinstance(key, str | Named | Global) else OtherKey(key)] = value
        self._left -= 110 * len(items)

    def _dict(self) -> None:
        items = self._pop_mark()
        self._push({}, 232)
        self._set_items(items)

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])


def _name(made: object) -> str:
    return made.name if isinstance(made, Named) else type(made).__name__


def _skip(reader: PickleReader, nbytes: int) -> None:
    reader._take(nbytes)


_Step = Callable[[PickleReader], object]
_STEPS: dict[bytes, _Step] = {
    b"\x80": lambda r: _skip(r, 1),  # PROTO
    b"\x95": lambda r: _skip(r, 8),  # FRAME
    b"N": lambda r: r._push(None, 16),
    b"\x88": lambda r: r._push(True, 16),
    b"\x89": lambda r: r._push(False, 16),
    b"I": PickleReader._integer_line,
    b"L": PickleReader._integer_line,
    b"J": lambda r: r._push(int.from_bytes(r._take(4), "little", signed=True), 40),
    b"K": lambda r: r._push(r._count(1), 16),
    b"M": lambda r: r._push(r._count(2), 40),
    b"\x8a": lambda r: r._long(r._count(1)),
    b"\x8b": lambda r: r._long(r._count(4)),
    b"F": lambda r: r._push(float(r._line()[:100]), 40),
    b"G": lambda r: r._push(struct.unpack(">d", r._take(8))[0], 40),
    b"S": PickleReader._quoted,
    b"T": lambda r: r._text(r._count(4)),
    b"U": lambda r: r._text(r._count(1)),
    b"V": lambda r: r._push(r._line().decode("raw-unicode-escape"), 4000),
    b"X": lambda r: r._text(r._count(4)),
    b"\x8c": lambda r: r._text(r._count(1)),
    b"\x8d": lambda r: r._text(r._count(8)),
    b"B": lambda r: r._bytes(r._count(4)),
    b"C": lambda r: r._bytes(r._count(1)),
    b"\x8e": lambda r: r._bytes(r._count(8)),
    b"\x96": lambda r: r._bytes(r._count(8)),
    b"]": lambda r: r._push([], 80),
    b"}": lambda r: r._push({}, 232),
    b"\x8f": lambda r: r._push([], 80),  # a set: what is in it does not matter
    b")": lambda r: r._push((), 16),
    b"\x85": lambda r: r._tuple(1),
    b"\x86": lambda r: r._tuple(2),
    b"\x87": lambda r: r._tuple(3),
    b"(": PickleReader._mark,
    b"t": lambda r: r._push(tuple(r._pop_mark()), 64),
    b"l": lambda r: r._push(r._pop_mark(), 80),
    b"d": PickleReader._dict,
    b"\x91": lambda r: r._push(tuple(r._pop_mark()), 80),  # FROZENSET
    b"a": lambda r: r._append([r._pop()]),
    b"e": lambda r: r._append(r._pop_mark()),
    b"\x90": lambda r: r._append(r._pop_mark()),  # ADDITEMS
    b"s": PickleReader._set_item,
    b"u": lambda r: r._set_items(r._pop_mark()),
    b"0": PickleReader._pop_any,
    b"1": PickleReader._pop_mark,
    b"2": lambda r: r._push(r._stack[-1], 16),
    b"q": lambda r: r._put(r._count(1)),
    b"r": lambda r: r._put(r._count(4)),
    b"p": lambda r: r._put(int(r._line()[:20])),
    b"\x94": lambda r: r._put(len(r._memo)),
    b"h": lambda r: r._push(r._memo[r._count(1)], 8),
    b"j": lambda r: r._push(r._memo[r._count(4)], 8),
    b"g": lambda r: r._push(r._memo[int(r._line()[:20])], 8),
    b"c": PickleReader._global,
    b"\x93": PickleReader._stack_global,
    b"R": PickleReader._reduce,
    b"\x81": lambda r: r._new(False),
    b"\x92": lambda r: r._new(True),
    b"o": PickleReader._object,
    b"i": PickleReader._instance,
    b"b": PickleReader._build,
    b"Q": PickleReader._persistent,
}
