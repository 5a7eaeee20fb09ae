"""One sequence: every step on both models, and judged. The streamed one goes first, as it may refuse."""

from __future__ import annotations

import faulthandler
import functools
import gc
import itertools
import mmap
import random
import shutil
import sys
import threading
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

import odewei
from odewei.errors import OdeweiError

from . import copying, edits, flags, keeping, layers, own, passes, saving, wrappers  # noqa: F401  # the actions
from .action import ACTIONS, Draw, Step
from .seen import Look, Raised, Seen, attempt, differences, look_closely
from .side import Inapplicable, Side
from .subjects import Plan, copy_checkpoint, make_resident, make_streamed

__all__ = ["Finding", "Played", "Streaming", "draw_steps", "given_steps", "play"]

PATIENCE = 30.0
"""Seconds after which a step hangs: the process ends with the stacks of all threads."""


@dataclass(frozen=True)
class Finding:
    """What was not right. ``kind`` and ``action`` stay the same when a sequence is made shorter."""

    kind: str
    action: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.action}): {self.detail}"


@dataclass
class Played:
    """A sequence that was run: what was done, how each step ended, and what was not right."""

    plan: Plan
    steps: list[Step] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    finding: Finding | None = None
    seconds: float = 0.0


class _Fault(Exception):
    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


Streaming = Callable[[Plan, Path, Path], tuple[nn.Module, bool]]
"""Plan, folder of all checkpoints, the model's own checkpoint -> the model to compare, and whether it is odewei's."""


def streamed(plan: Plan, root: Path, source: Path) -> tuple[nn.Module, bool]:
    return make_streamed(plan, root, source), True


def resident(plan: Plan, root: Path, source: Path) -> tuple[nn.Module, bool]:
    """An ordinary model instead: everything has to agree."""
    return make_resident(plan, root), False


Steps = Callable[[Side], Iterator[Step]]


def given_steps(steps: Sequence[Step]) -> Steps:
    """These."""
    return lambda side: iter(steps)


def draw_steps(rng: random.Random, count: int, among: Collection[str] = ACTIONS) -> Steps:
    """So many of these actions, chosen by what the ordinary model is then."""

    def drawn(side: Side) -> Iterator[Step]:
        for _ in range(count):
            yield _draw(rng, side, among)

    return drawn


def _draw(rng: random.Random, side: Side, among: Collection[str]) -> Step:
    while True:
        able = [one for one in ACTIONS.values() if one.name in among and one.only(side)]
        chosen = rng.choices(able, [one.often for one in able])[0]
        with suppress(Inapplicable):
            return chosen.name, chosen.draw(Draw(rng, side))


def play(plan: Plan, steps: Steps, root: Path, *, made_by: Streaming = streamed, patience: float = PATIENCE) -> Played:
    """Run a sequence, up to its first fault."""
    played = Played(plan)
    started = time.perf_counter()
    folder = root / "playing"
    shutil.rmtree(folder, ignore_errors=True)
    warnings.simplefilter("ignore")
    modes = torch.get_default_dtype(), torch.is_grad_enabled()
    threads = set(_threads())
    try:
        pair = Pair(plan, root, folder, made_by, patience)
        try:
            pair.follow(steps, played)
        finally:
            pair.watched("the end", pair.end)
        if played.finding is None:
            pair.watched("what is left", lambda: _nothing_is_left(threads))
    except _Fault as fault:
        last = played.steps[-1][0] if played.steps else "building"
        played.finding = Finding(fault.kind, last, str(fault))
    finally:
        torch.set_default_dtype(modes[0])
        torch.set_grad_enabled(modes[1])
    played.seconds = time.perf_counter() - started
    return played


class Pair:
    """The ordinary model and the other."""

    def __init__(self, plan: Plan, root: Path, folder: Path, made_by: Streaming, patience: float) -> None:
        self._patience = patience
        self._looks = (Look(), Look())
        sources = [copy_checkpoint(plan, root, _new(folder / name / "source")) for name in ("resident", "other")]
        self.ordinary = Side(plan, make_resident(plan, root), folder / "resident", sources[0], is_streamed=False)
        self._unit_bytes = _largest_block(self.ordinary.model)
        try:
            model, is_streamed = self.watched("building", lambda: made_by(plan, root, sources[1]))
        except Exception as error:
            raise _Fault(f"raises {type(error).__name__}", str(error)[:900]) from error
        self.other = Side(plan, model, folder / "other", sources[1], is_streamed=is_streamed)
        self._root = weakref.ref(model)
        if plan.frozen:
            for side in self._sides:
                if isinstance(raised := attempt(lambda side=side: side.model.requires_grad_(False)), Raised):
                    raise _Fault(f"raises {raised.kind}", repr(raised))
        self._compare("the model as built", *self._look())

    def follow(self, steps: Steps, played: Played) -> None:
        drawn = steps(self.ordinary)
        for step in drawn:
            played.steps.append(step)
            try:
                end = self.step(step)
            except Inapplicable:
                end = "not applicable"
                played.steps.pop()
            played.ends[f"{step[0]}: {end}"] += 1
            if self.ordinary.is_over:
                return
        self._compare(
            "at the end", *(self.watched("the end", lambda side=side: look_closely(side)) for side in self._sides)
        )
        self._check_memory()

    @property
    def _sides(self) -> tuple[Side, Side]:
        return self.ordinary, self.other

    def step(self, step: Step) -> str:
        """How it ended. Raises _Fault, or Inapplicable where it is for neither."""
        action = ACTIONS[step[0]]
        found = self._do(self.other, step)
        if _is_refusal(found):
            _check_clear(found)
            if self.other.is_over:
                self.ordinary.is_over = True
                return "refused"
            self._compare("after it was refused", *self._look())
            return "refused"
        numbers = torch.get_rng_state()
        expected = self._do(self.ordinary, step)
        if isinstance(expected, Inapplicable) or isinstance(found, Inapplicable):
            if type(expected) is not type(found):
                raise _Fault("another structure", f"{found!r}, not {expected!r}")
            raise Inapplicable
        if isinstance(expected, Raised) and not isinstance(found, Raised):
            raise _Fault("raises nothing", f"the ordinary model raises {expected!r}")
        if isinstance(found, Raised) and found != expected:
            notes = "\n".join(getattr(found.error, "__notes__", ()))
            raise _Fault(f"raises {found.kind}", f"{found!r}, not {expected!r}"[:900] + f"\n{notes}")
        self._compare("what it returned", expected, found)
        if not torch.equal(numbers, torch.get_rng_state()):
            raise _Fault("other random numbers", "the generator's state is another afterwards")
        if action.holds:
            for side in self._sides:
                side.holds_weights = True
        if not self.ordinary.is_over:
            self._compare("afterwards", *self._look())
            self._check_memory()
        return "raised" if isinstance(expected, Raised) else "equal"

    def _do(self, side: Side, step: Step) -> Seen | Inapplicable:
        name, arguments = step
        torch.manual_seed(5)
        modes = _modes()
        try:
            found = self.watched(name, lambda: attempt(lambda: ACTIONS[name].run(side, **arguments)))
        except Inapplicable as reason:
            return reason
        if _modes() != modes:
            raise _Fault("a mode of the process is another", f"{_modes()}, not {modes}")
        return found

    def _look(self) -> tuple[Seen, Seen]:
        found = []
        for side, look in zip(self._sides, self._looks, strict=True):
            torch.manual_seed(5)
            found.append(self.watched("looking", lambda side=side, look=look: attempt(lambda: look(side))))
        return found[0], found[1]

    def watched(self, what: str, work: Callable[[], Seen]) -> Seen:
        faulthandler.dump_traceback_later(self._patience, exit=True, file=sys.stderr)
        try:
            return work()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _compare(self, when: str, expected: Seen, found: Seen) -> None:
        lines = list(itertools.islice(differences(expected, found), 5))
        if lines:
            part = lines[0].split(":")[0].split(".")[0].split("[")[0]
            raise _Fault(f"{when}: {part}" if part else when, "; ".join(lines))

    def _check_memory(self) -> None:
        root = self._root()
        if root is None or not self.other.is_streamed:
            return
        try:
            report = odewei.report(root)
        except OdeweiError:
            return  # another model took its place
        if self.other.holds_weights:
            return
        if report.worst_overdraft_bytes > self._unit_bytes:
            raise _Fault("over the budget", f"{report.overdrafts} times, by {report.worst_overdraft_bytes} at most")
        most = report.budget_bytes + report.worst_overdraft_bytes
        if report.peak_bytes > most:
            raise _Fault("over the budget", f"{report.peak_bytes} bytes, not {report.budget_bytes}, and no overdraft")

    def end(self) -> None:
        """Nothing of the two is left."""
        models = [self.other.model, self._root(), *self.other.kept.values()]
        for side, look in zip(self._sides, self._looks, strict=True):
            side.kept.clear()
            look.forget()
        for one in models:
            if isinstance(one, nn.Module) and self.other.is_streamed:
                closed = attempt(functools.partial(odewei.close, one))
                if isinstance(closed, Raised) and not _is_refusal(closed):
                    raise _Fault("closing raises", f"{closed!r}\n" + "\n".join(closed.error.__notes__))
        for side in self._sides:
            side.model = nn.Module()


def _new(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def _modes() -> tuple[object, ...]:
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()


def _largest_block(model: nn.Module) -> int:
    """Bytes, in whole pages as it takes them, of the largest thing that may be one unit."""
    blocks = [one for each in model.modules() if isinstance(each, nn.ModuleList) for one in each]
    alone = [sum(one.nbytes for one in each.parameters(recurse=False)) for each in model.modules()]
    most = max(alone + [sum(one.nbytes for one in block.parameters()) for block in blocks])
    return -(-most // mmap.PAGESIZE) * mmap.PAGESIZE


def _is_refusal(found: Seen | Inapplicable) -> bool:
    return isinstance(found, Raised) and isinstance(found.error, OdeweiError)


def _check_clear(found: Raised) -> None:
    error = found.error
    assert isinstance(error, OdeweiError)
    if not error.cure:
        raise _Fault("a refusal without a cure", str(error))
    if error.module is None and error.weight is None and error.file is None:
        raise _Fault("a refusal that names no place", str(error))


def _nothing_is_left(before: Collection[threading.Thread]) -> None:
    """No thread of a model outlives it."""
    if set(_threads()) <= set(before):
        return
    until = time.monotonic() + 5
    new = [thread for thread in _threads() if thread not in before]
    # More than once: the class that torch makes for a parametrized layer keeps that layer, also in copies, so one model
    # is only found when another, with its threads, is gone.
    while any(thread.is_alive() for thread in new) and time.monotonic() < until:
        gc.collect()
        for thread in new:
            thread.join(0.2)
    if left := [thread.name for thread in new if thread.is_alive()]:
        raise _Fault("threads are left", ", ".join(left))


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("odewei")]
