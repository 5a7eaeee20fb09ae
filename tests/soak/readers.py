"""Readers and loading functions that are ended by an exception of any kind."""

from __future__ import annotations

import asyncio
import functools
import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from odewei.scheduler.file_table import FileTable
from odewei.torch import init_on_demand_weights_model
from tests.soak.subject import WAYS, Net, Subject, resident, subject
from tests.soak.table import Row, Wrong, fault


class Odd(BaseException):
    """What no ordinary handler catches."""


KINDS: tuple[type[BaseException], ...] = (
    ValueError, MemoryError, RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit, StopIteration, Odd,
    asyncio.CancelledError, TimeoutError,
)  # fmt: skip


@fault("a read raises, whatever kind of exception", "readers")
def raising(row: Row, full: bool) -> None:
    real = FileTable.read
    for way in WAYS:
        with tempfile.TemporaryDirectory() as scratch, subject(row, Path(scratch) / "model", **way) as one:
            for kind, skipped in itertools.product(KINDS, range(0, 9, 1 if full else 8)):
                calls: list[int] = []

                make = functools.partial(_raise_in_reads, real, kind, skipped, calls)
                thrown = None if issubclass(kind, Exception) else kind  # in the plain twin it is the caller's own
                one.inject(make, fired=lambda c=calls, s=skipped: len(c) > s, thrown_in=thrown)  # type: ignore[misc]


def _raise_in_reads(
    real: Callable[..., None], kind: type[BaseException], skipped: int, calls: list[int]
) -> Callable[[], object]:
    """After ``skipped`` of them; ``calls`` grows with each."""

    def read(self: FileTable, *args: object) -> None:
        calls.append(1)
        if len(calls) > skipped:
            raise kind("thrown in")
        real(self, *args)

    FileTable.read = read  # type: ignore[method-assign, assignment]
    return lambda: setattr(FileTable, "read", real)


@fault("what is opened is not the file", "readers")
def not_the_file(row: Row, full: bool) -> None:
    """The descriptor is closed by the time it is used, or another file's."""
    from odewei.runtime import runtime_of

    real = os.open

    def closed(path: str, flags: int) -> int:
        fd = real(path, flags)
        os.close(fd)
        return fd

    def empty(path: str, flags: int) -> int:
        return real(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    for way, opening in itertools.product(WAYS, (closed, empty)):
        with tempfile.TemporaryDirectory() as scratch, subject(row, Path(scratch) / "model", **way) as one:
            for _ in range(10 if full else 2):
                hits: list[object] = []
                runtime_of(one.streamed).account.files.close()

                def make(opening: Callable[..., int] = opening, hits: list[object] = hits) -> Callable[[], object]:
                    def instead(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
                        if not str(path).endswith(".safetensors"):
                            return real(path, flags, *args, **kwargs)
                        hits.append(path)
                        return opening(path, flags)

                    os.open = instead  # type: ignore[assignment]
                    return lambda: setattr(os, "open", real)

                one.inject(make, fired=lambda hits=hits: bool(hits))  # type: ignore[misc]


@fault("a loading function raises, or returns nonsense", "readers")
def function(row: Row, full: bool) -> None:
    model = resident()
    state = model.state_dict()
    answers: dict[str, Callable[[list[str]], object]] = {
        "nothing": lambda names: {},
        "None": lambda names: None,
        "another shape": lambda names: {name: torch.zeros(3) for name in names},
        "another dtype": lambda names: {name: torch.zeros(state[name].shape, dtype=torch.int8) for name in names},
        "text": lambda names: dict.fromkeys(names, "weight"),
    }
    answers |= {kind.__name__: lambda names, kind=kind: _raise(kind) for kind in KINDS}  # type: ignore[misc]
    answer: list[Callable[[list[str]], object]] = []
    hits: list[str] = []

    def load(module: str, names: list[str]) -> object:
        if answer:
            hits.append(module)
            return answer[0](list(names))
        return {name: state[name] for name in names}

    budget = int(0.4 * sum(parameter.nbytes for parameter in model.parameters()))
    for depth in ("auto", 0):
        options = {"memory_budget": "700kB" if budget < 700_000 else budget, "prefetch_depth": depth}
        import odewei

        streamed = init_on_demand_weights_model(Net, load, **options).eval()  # type: ignore[arg-type]
        try:
            one = Subject(model, streamed, Path(), row)
            for name, given in itertools.islice(answers.items(), None if full else 8):
                hits.clear()

                def make(given: Callable[[list[str]], object] = given) -> Callable[[], object]:
                    answer.append(given)
                    return answer.clear

                kind = next((kind for kind in KINDS if kind.__name__ == name and not issubclass(kind, Exception)), None)
                if one.inject(make, fired=lambda: bool(hits), thrown_in=kind) == "right":
                    raise Wrong(f"a function that returned {name} went unnoticed")
        finally:
            answer.clear()
            odewei.close(streamed)


def _raise(kind: type[BaseException]) -> object:
    raise kind("thrown in")
