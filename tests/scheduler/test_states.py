"""The table of states."""

import itertools
import re

import pytest

from odewei.scheduler import states
from odewei.scheduler.states import MOVES, IllegalMoveError, State, check_move

_MOVING = {State.READING, State.STAGED, State.COPYING}
_LEGAL = {(old, new) for old, targets in MOVES.items() for new in targets}


@pytest.mark.parametrize(("old", "new"), sorted(_LEGAL, key=str))
def test_legal_moves_pass(old: State, new: State) -> None:
    """Every move of the table is made without a word."""
    check_move("block.3", old, new)


@pytest.mark.parametrize(("old", "new"), sorted(set(itertools.product(State, State)) - _LEGAL, key=str))
def test_other_moves_raise(old: State, new: State) -> None:
    """Every other move, staying included, is a bug that names the unit and both states."""
    with pytest.raises(IllegalMoveError, match=f"block.3.*{old.value}.*{new.value}"):
        check_move("block.3", old, new)


def test_the_table_is_complete() -> None:
    """Every state has a row, and can be left."""
    assert set(MOVES) == set(State)
    assert all(MOVES.values())


@pytest.mark.parametrize("start", State)
def test_every_state_leads_to_every_other(start: State) -> None:
    """No state is a trap, and none is out of reach."""
    reached: set[State] = set()
    todo = [start]
    while todo:
        found = MOVES[todo.pop()] - reached
        reached |= found
        todo += found
    assert reached == set(State)


def test_only_what_moves_can_fail() -> None:
    """FAILED follows the moving states, each of them, and no other."""
    assert {old for old, new in _LEGAL if new is State.FAILED} == _MOVING


def test_the_picture_shows_the_moves() -> None:
    """What the picture of the docstring draws in a line is in the table, and it draws every state."""
    picture = [line for line in (states.__doc__ or "").splitlines() if line.startswith("    ")]
    assert set(re.findall("[A-Z]{5,}", " ".join(picture))) == {state.name for state in State}
    for line in picture:
        for old, new in re.findall(r"(?=\b([A-Z]{5,}) ──► ([A-Z]{5,}))", line):
            assert State[new] in MOVES[State[old]]
