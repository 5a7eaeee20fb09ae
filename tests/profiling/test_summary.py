"""Sums of recordings, and rows for layers."""

from __future__ import annotations

from odewei.profiling.summary import layers_of

from .notes import NAMES, Copied, Entered, Left, Read, Stalled, look, summary_of

NOTES = (
    Read(9, 0, 0.0, 4.0, 40),
    Entered(1, 2.0, None, 1),
    Entered(1, 2.0, 0, 2),
    Stalled(1, 0, 2.0, 5.0),  # one second of it while nothing is read
    Read(9, 2, 6.0, 8.0, 20),
    Left(1, 9.0, 0),
    Entered(1, 9.0, 2, 2),
    Left(1, 10.0, 2),
    Left(1, 10.0, None),
)


def test_the_sums_of_one_thread() -> None:
    """Computing, reading, what is hidden, exposed and idle add up."""
    found = summary_of(*NOTES)
    assert (found.passes, found.most_at_once, found.uses, found.hits) == (1, 1, 2, 1)
    assert (found.inside_seconds, found.compute_seconds, found.exposed_seconds, found.idle_seconds) == (8, 5, 3, 1)
    assert (found.read_seconds, found.hidden_seconds, found.bytes_read, found.bandwidth) == (6, 2, 60, 10)
    assert (found.floor_seconds, found.ratio_to_floor) == (6, 8 / 6)


def test_two_threads_at_once_are_counted_by_the_time_that_goes_by() -> None:
    """Two seconds in which two threads compute are two seconds; a wait behind another's computing is not exposed."""
    found = summary_of(
        Entered(1, 0.0, None, 1), Entered(2, 0.0, None, 1), Entered(2, 0.0, 0, 2), Stalled(2, 0, 0.0, 1.0),
        Left(2, 2.0, 0), Left(1, 2.0, None), Left(2, 4.0, None),
    )  # fmt: skip
    assert (found.passes, found.most_at_once) == (2, 2)
    assert (found.inside_seconds, found.compute_seconds, found.exposed_seconds) == (4, 4, 0)


def test_a_slow_copy_is_a_floor_too() -> None:
    """Where copying to the device takes longest, no scheduler can be faster than it."""
    found = summary_of(*NOTES, Copied(0, 20.0, 40.0, 60))
    assert (found.copy_seconds, found.bytes_copied, found.floor_seconds) == (20, 60, 20)


def test_a_row_for_each_layer_in_order_of_first_use() -> None:
    """Each row has the layer's bytes, hits, hidden and exposed reading and its own computing."""
    rows = layers_of(look(*NOTES), NOTES, NAMES, {"outer": 44, "next": 22})
    assert [row.name for row in rows] == ["outer", "next"]
    outer, following = rows
    assert (outer.nbytes, outer.uses, outer.hits, outer.hit_rate, outer.bytes_read) == (44, 1, 0, 0.0, 40)
    assert (outer.read_seconds, outer.hidden_seconds, outer.exposed_seconds, outer.compute_seconds) == (4, 2, 3, 4)
    assert (following.hit_rate, following.hidden_seconds, following.exposed_seconds) == (1.0, 2, 0)
