"""Readers and loading functions that are ended by an exception of any kind."""

from __future__ import annotations

import asyncio
import functools
import io
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import aiofiles
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


@fault("a file object fails", "readers")
def file_object(row: Row, full: bool) -> None:
    """What aiofiles opens has no descriptor, is closed, or cannot be had; the reader opens the file itself."""
    from odewei.runtime import runtime_of

    class NoNumber(io.FileIO):
        def fileno(self) -> int:
            raise OSError(9, "no descriptor")

    class Closed(io.FileIO):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[arg-type]
            self.close()

    real = aiofiles.open
    for way, kind in itertools.product([way for way in WAYS if way["prefetch_depth"]], (NoNumber, Closed)):
        with tempfile.TemporaryDirectory() as scratch, subject(row, Path(scratch) / "model", **way) as one:
            for _ in range(10 if full else 2):
                hits: list[object] = []
                runtime_of(one.streamed).account.files.close()

                def make(kind: type[io.FileIO] = kind, hits: list[object] = hits) -> Callable[[], object]:
                    async def opening(path: object, *args: object, **kwargs: object) -> object:
                        hits.append(path)

                        class Opened:
                            _file = kind(str(path))

                        return Opened

                    aiofiles.open = opening
                    return lambda: setattr(aiofiles, "open", real)

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
