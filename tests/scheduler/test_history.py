"""What comes next: loops, loops within pipelines, and what a forgotten past leaves."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from odewei.scheduler import history as module
from odewei.scheduler.history import NEVER, History
from odewei.scheduler.regularity import Regularity

ACCESSES = st.lists(st.integers(0, 4), max_size=60)


def is_right(history: History, unit: int) -> bool:
    """Record an access; whether it was the predicted one."""
    return history.record(unit) is None


class NeverIrregular(Regularity):
    """Takes every unit for regular: a history is only ever told of regular ones."""

    def blame(self, unit: int) -> None:
        pass


def check_consistent(history: History) -> None:
    """All questions to one history have answers that agree."""
    upcoming = list(history.upcoming())
    for unit in range(6):
        assert history.next_use(unit) == (upcoming.index(unit) if unit in upcoming else NEVER)


@given(seed=st.lists(st.integers(0, 4), max_size=4), accesses=ACCESSES, kept=st.integers(4, 24))
@example(seed=[], accesses=[0, 1, 2, 3] * 15, kept=4)
@settings(deadline=None, max_examples=150)
def test_a_trimmed_past_still_agrees_with_itself(seed: list[int], accesses: list[int], kept: int) -> None:
    """After the older part was forgotten, distances are still those of the predicted accesses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_KEPT", kept)
        history = History(seed, NeverIrregular())
        for unit in accesses:
            expected = next(history.upcoming(), None)
            assert is_right(history, unit) == (expected == unit)
            check_consistent(history)
            assert len(history._past) <= max(kept, 4 * len(seed))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(40, 80))
@settings(deadline=None, max_examples=60)
def test_trimming_does_not_disturb_a_loop(cycle: list[int], kept: int) -> None:
    """A loop that fits well into what is kept is predicted for ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_KEPT", kept)
        history = History(cycle)
        assert all(is_right(history, unit) for unit in cycle * 60)
    assert len(history._past) <= max(kept, 4 * len(cycle))


@given(st.lists(st.integers(0, 500), min_size=1, max_size=40, unique=True))
def test_a_loop_is_known_after_one_round(cycle: list[int]) -> None:
    """The first access of the second round is the last surprise."""
    history = History()
    assert not any(is_right(history, unit) for unit in cycle)
    assert not is_right(history, cycle[0])
    for unit in cycle[1:] + cycle * 2:
        assert is_right(history, unit)
        assert history.period == len(cycle)
    assert list(history.upcoming()) == cycle


@given(st.lists(st.integers(0, 500), min_size=1, max_size=40))
def test_a_seed_that_is_right_is_right_from_the_start(seed: list[int]) -> None:
    """With a trace as its seed, the first pass has no surprises, and neither have the next ones."""
    history = History(seed)
    assert list(history.upcoming()) == seed
    assert all(is_right(history, unit) for unit in seed * 3)


@given(size=st.integers(1, 30), kept=st.integers(8, 32))
@example(size=23, kept=24)
@settings(deadline=None, max_examples=60)
def test_a_right_prediction_leaves_the_others_as_they_are(size: int, kept: int) -> None:
    """When an access is said to be predicted, the predicted future has only moved on by one, also while trimming."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_KEPT", kept)
        history = History()
        for unit in list(range(size)) * 4:
            before = list(history.upcoming())
            if is_right(history, unit):
                assert list(history.upcoming()) == [*before[1:], unit]


def test_an_encoder_runs_once_and_its_decoder_many_times() -> None:
    """After the second round of the decoder, the decoder alone is expected."""
    encoder, decoder = [0, 1, 2], [10, 11, 12, 13]
    history = History(encoder + decoder)
    for unit in encoder + decoder:
        assert is_right(history, unit)
    surprises = [unit for unit in decoder * 5 if not is_right(history, unit)]
    assert surprises == [decoder[0]]
    assert list(history.upcoming()) == decoder
    assert history.next_use(0) == NEVER


def test_a_loop_within_a_pipeline_is_followed_out_and_in() -> None:
    """The longest match tells the last step of a loop from the others: a repeated pipeline has no surprises."""
    pipeline = [1, *([5, 6] * 4), 9]
    history = History()
    for unit in pipeline * 3:
        is_right(history, unit)
    assert all(is_right(history, unit) for unit in pipeline * 3)


def test_the_more_recent_of_equal_matches_wins() -> None:
    """What followed last time is expected."""
    history = History()
    for unit in [5, 1, 6, 1, 7, 1]:
        is_right(history, unit)
    assert next(history.upcoming()) == 7


def test_nothing_is_expected_of_the_unknown() -> None:
    """Without a past nothing is predicted."""
    history = History()
    assert (history.period, list(history.upcoming()), history.next_use(1)) == (0, [], NEVER)


def test_an_unknown_unit_in_between_leaves_the_prediction_as_it_is() -> None:
    """One surprise is an insertion: what was expected still is."""
    history = History([1, 2])
    assert not is_right(history, 3)
    assert (history.next_use(1), history.next_use(2)) == (0, 1)
