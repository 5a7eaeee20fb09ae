"""The fuzz of uses itself: that it finds nothing where nothing is, and every known fault; and a few sequences of it."""

from __future__ import annotations

import logging
import os
import random
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import odewei

from .action import ACTIONS
from .broken import BROKEN, ENDING, streaming
from .child import make_sequence
from .run import Finding, Played, draw_steps, given_steps, play, resident, streamed
from .seen import differences, seen
from .shrink import play_here, script, shrink
from .subjects import Plan

FOUND: dict[str, tuple[str, tuple[str, ...]]] = {
    "copies_without_values": ("deep_copy", ()),
    "forgets_parts": ("values differ", ("drop_the_model",)),
    "has_another_last_bit": ("values differ", ()),
    "has_another_last_bit_without_gradients": ("values differ", ()),
    "ignores_flags": ("parameters.*flag_", ("flag_all", "flag_a_module", "forward")),
    "ignores_hooks": ("gradient|values differ", ("hook_a_weight", "backward")),
    "is_frozen": ("as built: parameters", ()),
    "is_in_eval_mode": ("as built: modules", ()),
    "is_wrong_in_threads": ("two_threads", ("two_threads",)),
    "leaves_a_mode": ("a mode of the process", ()),
    "loses_a_gradient": ("gradients|backward|train", ()),
    "loses_large_writes": ("values differ", ("edit", "forward")),
    "loses_uncounted_writes": ("values differ", ("edit", "forward")),
    "makes_new_objects": ("same objects", ()),
    "raises_another_error": ("raises TypeError", ("load_some",)),
    "raises_nothing": ("raises nothing", ("load_some",)),
    "refuses_after_harm": ("after it was refused", ("flag_all",)),
    "refuses_without_a_cure": ("without a cure", ("flag_all",)),
    "saves_by_old_names": ("values differ", ("swap_layers", "save_by_torch")),
    "saves_copies": ("values differ", ("write_into_state",)),
    "unties_copies": ("parameters", ("tie", "forward")),
    "uses_random_numbers": ("other random numbers", ()),
}
"""What is said of each known fault, and which actions are drawn: all, where there are none."""

SUBJECTS = ("mlp", "tied", "lstm", "conv", "llama", "t5")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints are made once."""
    return tmp_path_factory.mktemp("uses")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the command runs them; what the sequences change of the process is put back."""
    threads, level = torch.get_num_threads(), logging.getLogger("odewei").level
    torch.set_num_threads(1)
    logging.getLogger("odewei").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        yield
    torch.set_num_threads(threads)
    logging.getLogger("odewei").setLevel(level)


def _first_failure(seed: int, count: int, root: Path, made_by: object, subject: str = "mlp") -> Played | None:
    for number in range(count):
        played = play(*make_sequence(seed, number, subject), root, made_by=made_by)  # type: ignore[arg-type]
        if played.finding is not None:
            return played
    return None


@pytest.mark.parametrize("subject", SUBJECTS)
def test_people_do_what_they_do(subject: str, root: Path) -> None:
    """Ten sequences on each model: the streamed one is the ordinary one, or refuses and is as it was."""
    played = _first_failure(0, 10, root, streamed, subject)
    assert played is None, f"{played.finding}\n{script(played.plan, played.steps)}"


def test_two_ordinary_models_agree(root: Path) -> None:
    """The fuzz finds nothing where there is nothing to be found."""
    played = _first_failure(1, 15, root, resident)
    assert played is None, f"{played.finding}\n{script(played.plan, played.steps)}"


@pytest.mark.parametrize("fault", sorted(BROKEN))
def test_a_known_fault_is_found(fault: str, root: Path) -> None:
    """Each way of being wrong fails some sequence soon. (Pickling is left out: it would find them all.)"""
    said, among = FOUND[fault]
    subject = "tied" if fault in ("unties_copies", "is_wrong_in_threads") else "mlp"
    for number in range(30):
        plan, steps = make_sequence(2, number, subject, among=among or set(ACTIONS) - {"pickle_the_model"})
        played = play(replace(plan, frozen=False), steps, root, made_by=streaming(BROKEN[fault]))
        if played.finding is not None:
            assert re.search(said, str(played.finding)), played.finding
            return
    pytest.fail("it was not found")


@pytest.mark.parametrize("fault", sorted(ENDING))
def test_a_process_that_ends_is_a_finding(fault: str) -> None:
    """A hang and a crash are reported with the steps that lead there; then the next sequence is played."""
    count, patience = ("1", "5") if fault == "hangs" else ("2", "30")
    options = ["--sequences", count, "--subject", "mlp", "--no-shrink", "--patience", patience, "--seed", "1"]
    command = [sys.executable, "-m", "tests.uses", *options, "--model", fault]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert fault in ended.stdout
    assert f"{count} sequences, {count} failed" in ended.stdout
    assert "from tests.uses.shrink import replay" in ended.stdout


def test_memory_is_noticed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the budget, or than one unit above it, is a finding; not when the user has written weights."""

    def over(peak: int, overdraft: int) -> None:
        found = SimpleNamespace(budget_bytes=1000, peak_bytes=peak, overdrafts=1, worst_overdraft_bytes=overdraft)
        monkeypatch.setattr(odewei, "report", lambda model: found)

    def found(*names: str) -> Finding | None:
        arguments = {"forward": {"how": "no_grad", "seed": 1}, "keep_state": {}}
        steps = given_steps([(name, arguments[name]) for name in names])
        return play(Plan("mlp"), steps, root, made_by=lambda *given: (resident(*given)[0], True)).finding

    over(1001, 0)
    assert found("forward", "forward").kind == "over the budget"  # type: ignore[union-attr]
    over(10**6, 10**6)
    assert found("forward").kind == "over the budget"  # type: ignore[union-attr]
    assert found("keep_state") is None


def test_a_failing_sequence_is_made_shorter(root: Path) -> None:
    """Of many steps that one stays which it takes, and the printed program fails in the same way."""
    broken = streaming(BROKEN["ignores_flags"])
    steps = [("forward", {"how": "no_grad", "seed": 1})] * 4 + [("flag_all", {"flag": False})]
    played = play(Plan("mlp", granularity="leaf"), given_steps(steps), root, made_by=broken)
    assert played.finding is not None
    plan, fewer, finding = shrink(played.plan, played.steps, played.finding, play_here(root, broken))
    assert fewer == [("flag_all", {"flag": False})]
    assert (plan.granularity, plan.prefetch_depth, finding.action) == ("auto", 0, "flag_all")
    assert "('flag_all', {'flag': False})," in script(plan, fewer)


def test_a_sequence_is_its_number(root: Path) -> None:
    """The same seed and number make the same steps, others another."""
    assert _steps(3, root) == _steps(3, root)
    assert _steps(3, root) != _steps(4, root)


def _steps(number: int, root: Path) -> list[object]:
    return list(play(*make_sequence(0, number, "mlp"), root, made_by=resident).steps)


def test_many_actions_are_reached(root: Path) -> None:
    """There are seventy actions, and most of them are drawn soon."""
    rng = random.Random(0)
    reached = set()
    for subject in ("mlp", "conv", "llama"):
        played = play(Plan(subject), draw_steps(rng, 70), root, made_by=resident)
        reached |= {name.partition(":")[0] for name in played.ends}
    assert len(ACTIONS) > 70
    assert len(reached) > 45


def test_differences_are_told() -> None:
    """Bytes, shapes, flags, names and their order."""
    one, other = torch.zeros(3), torch.tensor([0.0, -0.0, 0.0])
    assert list(differences(seen({"a": one}), seen({"a": other}))) == [
        "a: 1 of 3 values differ in tensor('torch.float32', (3,), (1,), False, False)"
    ]
    assert list(differences(seen([one]), seen([torch.nn.Parameter(one)])))
    assert list(differences(seen({"a": 1, "b": 2}), seen({"b": 2, "a": 1}))) == [": another order of names"]
    assert not list(differences(seen([one, {"a": None}]), seen([one.clone(), {"a": None}])))
