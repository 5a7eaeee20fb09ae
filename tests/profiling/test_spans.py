"""Notes become spans: nested units, several threads, interrupts, late reports, memory."""

from __future__ import annotations

from odewei.profiling.spans import BETWEEN, Kind, Level, level_changes

from .notes import Copied, Entered, Left, LookedUp, Moved, Read, Stalled, State, look, short


def test_computing_is_from_entering_to_leaving_without_what_was_waited() -> None:
    """A stall splits the computing of its unit, and what is in no unit is between units."""
    spans = look(
        Entered(1, 1.0, None, 1), Entered(1, 2.0, 0, 2), Stalled(1, 0, 2.0, 5.0), Left(1, 7.0, 0), Left(1, 8.0, None)
    )  # fmt: skip
    assert short(spans, Kind.COMPUTE) == [("one", BETWEEN, 1, 2), ("one", "outer", 5, 7), ("one", BETWEEN, 7, 8)]
    assert short(spans, Kind.STALL) == [("one", "outer", 2, 5)]
    assert short(spans, Kind.PASS) == [("one", "pass", 1, 8)]


def test_a_unit_within_a_unit_has_its_time_for_itself() -> None:
    """The outer unit's computing stops where the inner one is entered and goes on where it is left."""
    spans = look(Entered(1, 0.0, 0, 1), Entered(1, 2.0, 1, 2), Left(1, 3.0, 1), Left(1, 6.0, 0))
    assert short(spans, Kind.COMPUTE) == [("one", "outer", 0, 2), ("one", "inner", 2, 3), ("one", "outer", 3, 6)]


def test_threads_have_lanes_of_their_own() -> None:
    """What two threads do at once is told apart, in whatever order it was noted."""
    spans = look(Entered(1, 0.0, 0, 1), Entered(2, 1.0, 0, 1), Left(1, 5.0, 0), Left(2, 4.0, 0))
    assert sorted(short(spans, Kind.COMPUTE)) == [("one", "outer", 0, 5), ("two", "outer", 1, 4)]


def test_what_an_interrupt_left_behind_ends_with_what_its_thread_did_last() -> None:
    """A thread that enters at a depth at which it seems to be already had been interrupted: that time is nobody's."""
    spans = look(
        Entered(1, 0.0, None, 1), Entered(1, 1.0, 0, 2),  # and an interrupt some time later
        Entered(1, 50.0, None, 1), Entered(1, 51.0, 2, 2), Left(1, 53.0, 2), Left(1, 54.0, None),
    )  # fmt: skip
    assert short(spans, Kind.COMPUTE) == [
        ("one", BETWEEN, 0, 1), ("one", BETWEEN, 50, 51), ("one", "next", 51, 53), ("one", BETWEEN, 53, 54),
    ]  # fmt: skip
    assert short(spans, Kind.PASS) == [("one", "pass", 50, 54)]


def test_leaving_a_unit_leaves_those_inside_it() -> None:
    """A unit whose inner one was left behind ends both, as its leases do."""
    spans = look(Entered(1, 0.0, 0, 1), Entered(1, 1.0, 1, 2), Left(1, 3.0, 0), Entered(1, 5.0, 2, 1), Left(1, 6.0, 2))
    assert short(spans, Kind.COMPUTE) == [("one", "outer", 0, 1), ("one", "inner", 1, 3), ("one", "next", 5, 6)]


def test_a_recording_that_begins_in_the_middle_of_a_pass() -> None:
    """The pass counts from the beginning of the recording, and what comes after it is right."""
    spans = look(Entered(1, 4.0, 0, 2), Left(1, 6.0, 0), Left(1, 7.0, None), Left(1, 8.0, 1))
    assert short(spans, Kind.COMPUTE) == [("one", "outer", 4, 6), ("one", BETWEEN, 6, 7)]
    assert short(spans, Kind.PASS) == [("one", "pass", 0, 7)]


def test_spans_are_cut_to_the_recording() -> None:
    """A read that began before the recording begins with it; one that is over before is left out."""
    spans = look(Read(9, 0, -3.0, 2.0, 10), Read(9, 1, -3.0, -1.0, 10), Read(9, 1, 8.0, 30.0, 10), until=20.0)
    assert short(spans, Kind.READ) == [("reader", "outer", 0, 2), ("reader", "inner", 8, 20)]


def test_what_the_device_tells_late_is_put_where_it_belongs() -> None:
    """Copies and the device's computing come in any order; then the forward's thread has only launched."""
    spans = look(
        Entered(1, 0.0, 0, 1), Left(1, 1.0, 0),
        Copied(2, 7.0, 8.0, 64), Copied(0, 3.0, 5.0, None), Copied(0, 1.0, 3.0, 64),
    )  # fmt: skip
    assert short(spans, Kind.COPY) == [("copies", "outer", 1, 3), ("copies", "next", 7, 8)]
    assert short(spans, Kind.COMPUTE) == [("device", "outer", 3, 5)]
    assert short(spans, Kind.LAUNCH) == [("one", "outer", 0, 1)]


def test_rows_are_read_by_the_thread_that_waits_for_them() -> None:
    """A look-up is both a read and a stall of the forward's thread."""
    spans = look(Entered(1, 0.0, None, 1), LookedUp(1, "table", 2.0, 3.0, 64), Left(1, 4.0, None))
    assert short(spans, Kind.READ) == short(spans, Kind.STALL) == [("one", "table", 2, 3)]
    assert short(spans, Kind.COMPUTE) == [("one", BETWEEN, 0, 2), ("one", BETWEEN, 3, 4)]


def test_memory_follows_the_states_of_the_units() -> None:
    """What is read is on its way, then there, then gone; a change of the budget is one too."""
    levels = level_changes(
        [
            Moved(11.0, 1, State.READING, 30, 100),
            Moved(12.0, 1, State.STAGED, 30, 100),  # changes nothing
            Moved(13.0, 1, State.RESIDENT, 30, 100),
            Moved(14.0, 0, State.ABSENT, 20, 90),
        ],
        {0: (State.RESIDENT, 20), 2: (State.COPYING, 5)},
        start=10.0,
        budget_bytes=100,
    )
    assert levels == [Level(0, 20, 5, 100), Level(1, 20, 35, 100), Level(3, 50, 5, 100), Level(4, 30, 5, 90)]
