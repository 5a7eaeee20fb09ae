"""Many inputs through one model, several at once: their passes share one stream of weights.

A pass that waits for the disk leaves the processor idle. Passes that run at the same time need the same layer at about
the same moment, because the one that is ahead has to wait for a layer and the others catch up meanwhile, and because
they begin together (see ``convoy``); so a layer is read once for all of them, and what waits for the disk costs each of
them a part only.

Knows calls, threads and torch's modes. Knows nothing of units or schedulers: whatever is called may be streamed or not.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, TypeVar

import torch

from odewei.convoy import Convoy
from odewei.errors import OptionsError
from odewei.thread_modes import ThreadModes

__all__ = ["Generates", "generate_many", "map"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Advance = Callable[[], None]

_numbers = itertools.count(1)


class Generates(Protocol[T_co]):
    """What ``generate_many`` needs of a model."""

    @property
    def generate(self) -> Callable[..., T_co]: ...


def map(
    model: Callable[..., T],
    inputs: Iterable[object],
    /,
    *,
    concurrency: int = 8,
    progress: bool = False,
    **call_kwargs: object,
) -> Generator[T, None, None]:
    """Yield ``model(input)`` for every input, in their order, with ``concurrency`` passes at once in as many threads.

    The passes share one stream of weights: K of them read hardly more than one does. Each result has the bits that the
    pass alone has. A mapping among the inputs is keyword arguments, a tuple positional ones, anything else is the only
    argument; ``call_kwargs`` go with all of them. The modes of the thread that calls ``map`` (gradients, inference
    mode, autocast, context variables) hold in the passes.

    Lazy: nothing is called before the first result is asked for, and at most ``concurrency`` inputs are taken beyond
    those in work. ``inputs`` is iterated in the thread that asks for results. An exception, of a pass or of ``inputs``,
    is raised at its position, and nothing is called after it. That, closing the generator and dropping it wait for the
    passes that are running, call no others and end the threads.

    The memory of activations is that of ``concurrency`` passes. ``progress`` shows a bar on stderr (extra ``cli``).
    Raises OptionsError for what cannot work.
    """
    return _many(functools.partial(model, **call_kwargs), inputs, inputs, concurrency, progress)


def generate_many(
    model: Generates[T],
    prompts: Iterable[torch.Tensor | Mapping[str, torch.Tensor]],
    /,
    *,
    concurrency: int = 8,
    progress: bool = False,
    **generate_kwargs: object,
) -> Generator[T, None, None]:
    """Yield ``model.generate(prompt)`` for every prompt, in their order, ``concurrency`` at once, as ``map`` does.

    Prompts may have any lengths: each runs alone, without padding, and has the bits of ``model.generate`` on it alone.
    A prompt is a tensor of ids (one dimension is a batch of one) or what a tokenizer returns. Sampling draws from
    torch's one generator in whatever order the threads come to it, so that only greedy and beam search are
    reproducible. For the rest see ``map``.
    """
    batches = (
        prompt.unsqueeze(0) if isinstance(prompt, torch.Tensor) and prompt.dim() == 1 else prompt for prompt in prompts
    )
    return _many(functools.partial(model.generate, **generate_kwargs), batches, prompts, concurrency, progress)


def _many(
    function: Callable[..., T], inputs: Iterable[object], given: Iterable[object], concurrency: int, progress: bool
) -> Generator[T, None, None]:
    """Check now, work later. ``given`` is what the user calls the inputs; perhaps it tells how many they are."""
    if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
        raise OptionsError(f"concurrency={concurrency!r} cannot work", cure="Use at least 1")
    bar = _bar(len(given) if isinstance(given, Sized) else None) if progress else nullcontext(lambda: None)
    modes = ThreadModes.here()

    convoy = Convoy(concurrency)

    def call(one: object) -> T:
        args, kwargs = _arguments(one)
        with convoy.call():
            return modes.run(function, *args, **kwargs)

    return _in_order(call, iter(inputs), concurrency, bar, convoy)


def _in_order(
    call: Callable[[object], T],
    inputs: Iterator[object],
    concurrency: int,
    bar: AbstractContextManager[Advance],
    convoy: Convoy,
) -> Generator[T, None, None]:
    name = f"odewei-map-{next(_numbers)}_"
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix=name[:-1])
    under_way: deque[Future[T]] = deque()
    more = True
    try:
        with bar as advance:
            while True:
                while more and len(under_way) < 2 * concurrency:  # so many run, so many are ready for who ends first
                    more = _take_one(inputs, pool, call, under_way, convoy)
                if not under_way:
                    return
                convoy.set_out()
                result = under_way.popleft().result()
                advance()
                yield result
                del result
    finally:
        is_own_thread = threading.current_thread().name.startswith(name)  # the collector may close a generator there
        convoy.dissolve()
        pool.shutdown(wait=not is_own_thread, cancel_futures=True)


def _take_one(
    inputs: Iterator[object],
    pool: ThreadPoolExecutor,
    call: Callable[[object], T],
    under_way: deque[Future[T]],
    convoy: Convoy,
) -> bool:
    """Start with another input. False if there is none; an error of ``inputs`` takes the place of a result."""
    try:
        one = next(inputs)
    except StopIteration:
        return False
    except Exception as error:
        failed: Future[T] = Future()
        failed.set_exception(error)
        under_way.append(failed)
        return False
    convoy.expect()
    under_way.append(pool.submit(call, one))
    return True


def _arguments(one: object) -> tuple[tuple[object, ...], dict[str, object]]:
    if isinstance(one, Mapping):
        return (), dict(one)
    return (one if isinstance(one, tuple) else (one,)), {}


def _bar(total: int | None) -> AbstractContextManager[Advance]:
    """A progress bar on stderr, shown while the context is open. Raises OptionsError where rich is missing."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        raise OptionsError(
            "progress=True needs the package rich, which is not installed", cure='pip install "odewei[cli]"'
        ) from error

    @contextmanager
    def shown() -> Iterator[Advance]:
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=total)
            yield lambda: progress.advance(task)

    return shown()
