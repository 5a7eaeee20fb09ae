"""The soak, quickly; and that it would notice."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from odewei.errors import OptionsError, WeightReadError
from tests.soak.all import FAULTS
from tests.soak.table import Fault, Row, Skipped, Wrong, judge, run


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute on a quiet machine
def test_every_fault_quickly() -> None:
    """Each fault, a few times: every injection is reached, and ends right or with a clean error."""
    command = [sys.executable, "-m", "tests.soak", "--quick"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=850, check=False)
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if not line.startswith("ok"))
    assert re.search(rf"^{len(FAULTS)} faults, \d+ injections reached, 0 faults not as promised", done.stdout, re.M)


def _row(inject: object) -> Row:
    return run(Fault("one", "tests", inject), False)  # type: ignore[arg-type]


def test_a_fault_that_is_not_reached_fails() -> None:
    """No injection at all, or some that the code never came by, are no success."""
    assert not _row(lambda row, full: None).is_good
    assert not _row(lambda row, full: [row.note(fired=number < 5, end="right") for number in range(10)]).is_good
    assert _row(lambda row, full: row.note(fired=True, end="right")).is_good


def test_what_goes_wrong_fails() -> None:
    """Wrong numbers and errors of any other kind fail the row; what cannot be done here does not, and says why."""

    def raising(error: BaseException) -> Row:
        def inject(row: Row, full: bool) -> None:
            row.note(fired=True, end="right")
            raise error

        return _row(inject)

    assert not raising(Wrong("numbers")).is_good
    assert not raising(KeyError("w")).is_good
    assert "WRONG" in str(raising(KeyError("w")))
    assert raising(Skipped("no such system")).is_good
    assert "no such system" in str(raising(Skipped("no such system")))


def test_clean_errors_have_a_place_and_a_cure() -> None:
    """An error of the library without one of them, and any other exception than the one thrown in, is not clean."""
    assert judge(WeightReadError("gone", file="f", cure="Look")) == "clean WeightReadError"
    assert judge(KeyboardInterrupt(), thrown_in=KeyboardInterrupt) == "clean KeyboardInterrupt"
    for error in (
        WeightReadError("gone", cure="Look"),
        OptionsError("gone", module="m"),
        KeyError("w"),
        KeyboardInterrupt(),
    ):
        with pytest.raises(Wrong):
            judge(error)
