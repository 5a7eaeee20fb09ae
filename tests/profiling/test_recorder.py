"""The scheduler's observer: notes in order, by thread, and not without end."""

from __future__ import annotations

import threading

from odewei.profiling.recorder import Copied, Entered, Left, Moved, Recorder
from odewei.scheduler.budget import Budget
from odewei.scheduler.observer import Observer
from odewei.scheduler.states import State


def _recorder(most_notes: int = 100) -> Recorder:
    clock = iter(range(1000))
    return Recorder(Budget(70), clock=lambda: float(next(clock)), most_notes=most_notes)


def test_what_is_told_is_noted_with_its_thread_and_time() -> None:
    """Notes have the clock's time, the thread's number and name, and the budget of that moment."""
    recorder = _recorder()
    observer: Observer = recorder
    observer.entered(3, 1)
    thread = threading.Thread(target=observer.left, args=(3,), name="odewei-other")
    thread.start()
    thread.join()
    observer.moved(3, State.RESIDENT, 8)
    observer.copied(3, 0.5, 0.75, 8)
    observer.computed(3, 0.75, 1.0)
    mine = threading.get_ident()
    entered, left, *rest = recorder.notes
    assert entered == Entered(mine, 0.0, 3, 1)
    assert isinstance(left, Left)
    assert (left.at, left.unit, recorder.threads[left.thread]) == (1.0, 3, "other")
    assert rest == [Moved(2.0, 3, State.RESIDENT, 8, 70), Copied(3, 0.5, 0.75, 8), Copied(3, 0.75, 1.0, None)]


def test_a_recording_has_an_end() -> None:
    """After so many notes the others are only counted."""
    recorder = _recorder(most_notes=2)
    for _ in range(5):
        recorder.entered(None, 1)
    assert (len(recorder.notes), recorder.lost) == (2, 3)
