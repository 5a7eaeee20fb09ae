"""The merged futures of threads: who counts, and what is near."""

from odewei.scheduler.history import NEVER
from odewei.scheduler.outlook import Outlook


def test_a_trace_replaces_the_guess_of_all_threads() -> None:
    """After a seed, every thread expects the seed's order, also those that come later."""
    outlook = Outlook([0, 1, 2])
    for thread in ("one", "two"):
        outlook.enter(thread)
        outlook.record(thread, 0)
    outlook.seed([2, 1, 0])
    assert [outlook.next_use(unit) for unit in (2, 1, 0)] == [0, 2, 4]  # two threads share the accesses
    assert all(outlook.record(thread, unit) is None for thread in ("one", "two") for unit in (2, 1, 0))
    assert Outlook([5, 6]).first_missing(lambda unit: unit == 6) == (6, 1)


def test_a_new_thread_expects_what_the_latest_does() -> None:
    """The period of the thread that ran last is the seed of a new one."""
    outlook = Outlook()
    for unit in (7, 8, 9) * 2:
        outlook.record("old", unit)
    assert all(outlook.record("new", unit) is None for unit in (7, 8, 9))


def test_an_idle_thread_neither_holds_nor_fetches() -> None:
    """What only a thread outside of every forward would need does not count."""
    outlook = Outlook()
    for thread, units in (("idle", (1, 2)), ("busy", (3, 4))):
        outlook.enter(thread)
        for unit in units * 2:
            outlook.record(thread, unit)
    assert outlook.next_use(1) == 0
    outlook.leave("idle")
    assert outlook.next_use(1) == NEVER
    assert outlook.first_missing(lambda unit: unit in (1, 2)) is None


def test_the_nearest_use_over_all_threads_counts() -> None:
    """Threads in the same loop at different places share one stream of units."""
    outlook = Outlook(range(10))
    for thread, steps in (("ahead", 6), ("behind", 2)):
        outlook.enter(thread)
        for unit in range(steps):
            outlook.record(thread, unit)
    assert outlook.next_use(2) == 0  # by the one behind
    assert outlook.next_use(6) == 0  # by the one ahead
    assert outlook.first_missing(lambda unit: unit in (3, 9))[0] == 3
