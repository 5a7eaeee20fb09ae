"""What a pickle of torch would do, found out without doing it.

torch's own reader of weights (``weights_only=True``) runs no code, but some of what it may call makes as much memory
as a number in the file says (``bytearray``, ``torch.Tensor``), and a pickle of one-byte instructions makes sixty bytes
of each. So the instructions are first gone through with a stack that holds only what is asked for by name. Pure. The
instructions are those of the standard library's ``pickletools``, as far as torch's reader has them
(torch/_weights_only_unpickler.py).
"""

from __future__ import annotations

import struct

from odewei.errors import UnsafeCheckpointError

__all__ = ["scan_pickle"]

_Tag = str | tuple["_Tag", ...] | None
"""What lies on the stack: a name that was asked for, a tuple, anything else."""

_FROM_TYPE = "torch._tensor._rebuild_from_type_v2"  # calls its first argument
_NUMBERS = {"J": 4, "K": 1, "M": 2, "G": 8}
_EMPTY = frozenset("])}\x8f")
_CONSTANTS = frozenset("N\x88\x89")
_TUPLES = {"\x85": 1, "\x86": 2, "\x87": 3}
_FREE_NBYTES = 32 << 20
_STORAGE_NBYTES = 8192


def scan_pickle(data: bytes, storages: int, *, file: str) -> None:
    """Raise unless reading ``data`` takes bounded memory: 32 MiB and 8 KiB for each of ``storages``, the archive's.

    ValueError for what is no pickle of weights, UnsafeCheckpointError for a call that makes memory by number.
    """
    try:
        _Scan(data, _FREE_NBYTES + _STORAGE_NBYTES * storages, file).run()
    except (IndexError, struct.error, KeyError) as error:
        raise ValueError("the pickle ends too early, or takes what it has not put there") from error


class _Scan:
    def __init__(self, data: bytes, most_nbytes: int, file: str) -> None:
        self._data, self._file = data, file
        self._at = 0
        self._left = most_nbytes
        self._stack: list[_Tag] = []
        self._marks: list[list[_Tag]] = []
        self._memo: dict[int, _Tag] = {}

    def run(self) -> None:
        """Go through all instructions up to the end of the pickle."""
        while True:
            code = chr(self._data[self._at])
            self._at += 1
            if code == ".":
                return
            self._step(code)
            if self._left < 0:
                raise ValueError("the pickle makes more objects than weights need")

    def _step(self, code: str) -> None:
        stack = self._stack
        if code in "qr":
            self._memo[self._number(1 if code == "q" else 4)] = stack[-1]
            self._left -= 100
        elif code in "hj":
            stack.append(self._memo[self._number(1 if code == "h" else 4)])
            self._left -= 8
        elif code in _NUMBERS:
            self._push(40, skipped=_NUMBERS[code])
        elif code == "X":
            nbytes = self._number(4)
            self._push(60 + 3 * nbytes, skipped=nbytes)
        elif code in "U\x8a":
            nbytes = self._number(1)
            self._push(60 + nbytes, skipped=nbytes)
        elif code == "c":
            stack.append(f"{self._line()}.{self._line()}")
            self._left -= 16
        elif code in _EMPTY:
            self._push(232)
        elif code in _CONSTANTS:
            self._push(8)
        else:
            self._combine(code)

    def _combine(self, code: str) -> None:
        """Instructions that take from the stack."""
        stack = self._stack
        if code in _TUPLES:
            count = _TUPLES[code]
            if len(stack) < count:
                raise IndexError
            stack[-count:] = [tuple(stack[-count:])]
            self._left -= 64
        elif code == "(":
            self._marks.append(stack)
            self._stack = []
            self._left -= 64
        elif code in "teu":
            items, self._stack = stack, self._marks.pop()
            if code == "t":
                self._stack.append(tuple(items))
            self._left -= 64 + 100 * len(items)
        elif code in "R\x81":
            arguments, called = stack.pop(), stack.pop()
            self._check_call(called, arguments)
            self._push(600)
        elif code in "Qa":
            stack.pop()
            if code == "Q":
                stack[len(stack) :] = [None]
            self._left -= 600 if code == "Q" else 16
        elif code == "s":
            del stack[-2:]
            self._left -= 100
        elif code == "b":
            stack.pop()
            self._left -= 100
        elif code == "\x80":
            self._number(1)
        else:
            raise ValueError(f"the pickle has an instruction {code!r}, which torch.save does not write")

    def _check_call(self, called: _Tag, arguments: _Tag) -> None:
        if isinstance(called, str) and _makes_by_number(called):
            self._refuse(called)
        if called == _FROM_TYPE and isinstance(arguments, tuple) and arguments:
            inner = arguments[0]
            if not isinstance(inner, str) or inner == _FROM_TYPE or _makes_by_number(inner):
                self._refuse(inner if isinstance(inner, str) else "something that has no name")

    def _refuse(self, called: str) -> None:
        raise UnsafeCheckpointError(
            f"the pickle in the file calls {called[:200]}, which makes as much memory as a number says; it was not run",
            file=self._file,
            cure="Use a safetensors checkpoint, or save only tensors: torch.save(model.state_dict(), path)",
        )

    def _push(self, cost: int, *, skipped: int = 0) -> None:
        self._at += skipped
        if self._at > len(self._data):
            raise IndexError
        self._stack.append(None)
        self._left -= cost

    def _number(self, nbytes: int) -> int:
        part = self._data[self._at : self._at + nbytes]
        if len(part) < nbytes:
            raise IndexError
        self._at += nbytes
        return int.from_bytes(part, "little")

    def _line(self) -> str:
        end = self._data.index(b"\n", self._at, self._at + 1000)
        line = self._data[self._at : end].decode("utf-8")
        self._at = end + 1
        return line


def _makes_by_number(name: str) -> bool:
    module, _, last = name.rpartition(".")
    return last == "bytearray" or (module.split(".")[0] == "torch" and last.endswith(("Tensor", "Storage")))
