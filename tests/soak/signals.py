"""Signals in the middle of a pass: real ones whose handlers raise, and an interrupt at every place of the library."""

from __future__ import annotations

import functools
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.interrupts import Alarm, Interrupt, Interrupter, Lost, kept_for_nobody
from tests.soak.subject import WAYS, Subject, ids, subject
from tests.soak.table import Row, Skipped, Wrong, fault, judge


def _raise_alarm(*_: object) -> None:
    raise Alarm


def _send_interrupt(delay: float) -> None:
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGINT)


@fault("SIGALRM at a random moment, its handler raises", "signals")
def alarm(row: Row, full: bool) -> None:
    _must_be_main()
    rng = random.Random(0)
    before = signal.signal(signal.SIGALRM, _raise_alarm)
    try:
        for way in WAYS:
            with tempfile.TemporaryDirectory() as scratch, subject(row, Path(scratch) / "model", **way) as one:
                seconds = _seconds_of(one)
                for _ in range(500 if full else 20):
                    delay = rng.uniform(1e-5, seconds)
                    _one_signal(one, Alarm, functools.partial(signal.setitimer, signal.ITIMER_REAL, delay))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@fault("SIGINT from another thread: KeyboardInterrupt", "signals")
def interrupt(row: Row, full: bool) -> None:
    _must_be_main()
    rng = random.Random(1)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for way in WAYS:
            with tempfile.TemporaryDirectory() as scratch, subject(row, Path(scratch) / "model", **way) as one:
                seconds = _seconds_of(one)
                for _ in range(250 if full else 8):
                    sender = threading.Thread(target=_send_interrupt, args=(rng.uniform(0, seconds),))
                    _one_signal(one, KeyboardInterrupt, sender.start, waits=True)
                    sender.join()
    finally:
        signal.signal(signal.SIGINT, before)


@fault("an interrupt at every place of the library", "signals")
def everywhere(row: Row, full: bool) -> None:
    """As a signal's handler would raise it there, whether or not it is an error; of all places some."""
    for way in WAYS:
        with tempfile.TemporaryDirectory() as scratch, subject(row, Path(scratch) / "model", **way) as one:
            watched = Interrupter()
            with watched.watching():
                one.passes(1)
            places = set()
            step = max(1, watched.seen // (150 if full else 6))
            with Lost() as lost:
                for kind in (Interrupt, Alarm):
                    for at in range(0, watched.seen, step):
                        interrupter = Interrupter(at, kind)
                        with interrupter.watching():
                            end = _pass(one, kind)
                        if interrupter.fired:
                            places.add(interrupter.where)
                        row.note(fired=interrupter.fired, end=end)
                        one.recovered()
                        if way["prefetch_depth"] == 0 and (kept := kept_for_nobody(one.streamed)):
                            raise Wrong(f"memory is kept for {kept} after {interrupter.where}")
            row.notes.append(f"{way}: {len(places)} places; {lost.count} were in finalizers, where Python drops them")


def _pass(one: Subject, kind: type[BaseException]) -> str:
    """How one pass ends: right, or by what was thrown in."""
    try:
        if not one.right(1):
            raise Wrong("wrong numbers")
    except Wrong:
        raise
    except BaseException as thrown:
        end = judge(thrown, thrown_in=kind)
        thrown.__traceback__ = None
        return end
    return "right"


def _one_signal(one: Subject, kind: type[BaseException], send: Callable[[], object], *, waits: bool = False) -> None:
    """Pass until the signal has come. One that falls into a finalizer is dropped by Python, and the pass is right."""
    end = "right"
    with Lost() as lost:
        try:
            send()
            for _ in range(3):
                if not one.right(2):
                    raise Wrong("wrong numbers")
            if waits:
                time.sleep(0.05)
        except Wrong:
            raise
        except BaseException as thrown:
            end = judge(thrown, thrown_in=kind)
            thrown.__traceback__ = None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    one.row.note(fired=end != "right" or lost.count > 0, end=end)
    one.recovered()


def _seconds_of(one: Subject) -> float:
    started = time.perf_counter()
    with torch.no_grad():
        for seed in range(5):
            one.streamed(ids(seed))
    return (time.perf_counter() - started) / 5


def _must_be_main() -> None:
    if threading.current_thread() is not threading.main_thread():
        raise Skipped("handlers of signals run in the main thread only")
