"""Trying again."""

import pytest

from odewei.loaders.retries import Retries, TransientError
from tests.servers import Waits


def failing(errors: list[Exception]) -> tuple[list[int], object]:
    """An attempt that raises these in turn and then returns; and the numbers of the attempts."""
    made: list[int] = []

    def attempt() -> str:
        made.append(len(made))
        if errors:
            raise errors.pop(0)
        return "done"

    return made, attempt


def test_the_wait_doubles_up_to_the_longest() -> None:
    """Each is shortened by at most half."""
    waits = Waits()
    made, attempt = failing([TransientError("x")] * 6)
    assert Retries(7, 1.0, 10.0, waits).run(attempt) == "done"  # type: ignore[arg-type]
    assert len(made) == 7
    for wait, most in zip(waits.seconds, [1, 2, 4, 8, 10, 10], strict=True):
        assert most / 2 <= wait <= most


def test_the_last_error_passes_and_others_at_once() -> None:
    """After all attempts the last error is raised; what is not transient is not tried again."""
    waits = Waits()
    last = TransientError("last")
    made, attempt = failing([TransientError("x"), last, TransientError("never")])
    with pytest.raises(TransientError) as caught:
        Retries(2, sleep=waits).run(attempt)  # type: ignore[arg-type]
    assert (caught.value, len(made), len(waits.seconds)) == (last, 2, 1)
    made, attempt = failing([ValueError("x")])
    with pytest.raises(ValueError, match="x"):
        Retries(5, sleep=waits).run(attempt)  # type: ignore[arg-type]
    assert (len(made), len(waits.seconds)) == (1, 1)


def test_the_other_side_may_ask_for_a_wait_up_to_the_longest() -> None:
    """A longer wait than ours is kept; one beyond the longest is not."""
    waits = Waits()
    _, attempt = failing([TransientError("x", after_seconds=5.0), TransientError("x", after_seconds=500.0)])
    assert Retries(3, 0.1, 20.0, waits).run(attempt) == "done"  # type: ignore[arg-type]
    assert waits.seconds == [5.0, 20.0]
