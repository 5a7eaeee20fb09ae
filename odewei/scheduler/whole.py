"""Books that an interrupt cannot leave half changed.

A signal handler that raises (Ctrl-C is one) ends whatever Python code the main thread is in, between any two calls,
also in the middle of a change of several things that belong together. Nothing in Python can put that off. So each
method that changes such things is marked: when one is ended by anything but an error of this library, the next marked
method first has the object put right what can be derived, from what cannot be half done.

Knows nothing of what it guards.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from odewei.errors import OdeweiError

__all__ = ["Books", "whole"]

P = ParamSpec("P")
R = TypeVar("R")
B = TypeVar("B", bound="Books")


class Books(ABC):
    """Has ``lock``, which may be taken again by the thread that has it."""

    lock: Any  # a threading.RLock
    _changing = False
    _torn = False

    @abstractmethod
    def _mend(self) -> None:
        """Derive anew what can be derived. Called under the lock; may itself be interrupted, and is called again
        then.
        """


def whole(method: Callable[Concatenate[B, P], R]) -> Callable[Concatenate[B, P], R]:
    """Marks a method of books that changes them or needs them whole. It may call others; it runs under the lock."""

    @functools.wraps(method)
    def guarded(self: B, *args: P.args, **kwargs: P.kwargs) -> R:
        with self.lock:
            if self._changing:  # by this thread: a marked method that calls another, or a finalizer in one
                return method(self, *args, **kwargs)
            if self._torn:
                self._mend()
                self._torn = False
            self._changing = True  # from here to the end no statement calls anything but the method
            try:
                return method(self, *args, **kwargs)
            except OdeweiError:  # raised before anything was changed
                raise
            except BaseException:
                self._torn = True
                raise
            finally:
                self._changing = False

    return guarded  # type: ignore[return-value]  # a method, whose first argument has a name
