"""The library says what it has to say through ``logging``, under its own name, and nothing in any other way."""

from __future__ import annotations

import ast
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import odewei
from tests import models

ROOT = Path(odewei.__file__).parent
FOR_PEOPLE = ("cli", "demo")  # what these print is what they are for


def library() -> Iterator[tuple[Path, ast.AST]]:
    """Every node of every module that is no command."""
    for path in ROOT.rglob("*.py"):
        if path.relative_to(ROOT).parts[0] not in FOR_PEOPLE:
            for node in ast.walk(ast.parse(path.read_text())):
                yield path, node


def called(node: ast.AST) -> str:
    """What a call calls, as it is written; empty for everything else."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def test_nothing_is_printed() -> None:
    """No module of the library prints, writes to a standard stream, or prints a traceback."""
    for path, node in library():
        assert called(node) not in ("print", "pprint", "traceback.print_exc"), f"{path}:{node.lineno}"
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in ("sys.stdout", "sys.stderr"), f"{path}:{node.lineno}"


def test_loggers_are_odeweis_and_have_no_handlers() -> None:
    """All loggers are ``odewei`` or below it; handlers, levels and formats are the application's."""
    found = 0
    for path, node in library():
        name = called(node)
        if name.endswith("getLogger"):
            argument = ast.unparse(node.args[0]) if node.args else "nothing"
            assert argument == "__name__" or argument.startswith("'odewei"), f"{path}:{node.lineno}"
            found += 1
        assert not name.endswith((".addHandler", ".basicConfig", ".setLevel")), f"{path}:{node.lineno}"
    assert found


def test_importing_and_running_say_nothing() -> None:
    """A whole life of a model writes nothing on either stream, and the logger is as it was."""
    script = (
        "import logging, torch, odewei\n"
        "model = odewei.init_on_demand_weights_model(lambda: torch.nn.Linear(8, 8), {'weight': torch.zeros(8, 8), "
        "'bias': torch.zeros(8)})\n"
        "model(torch.zeros(1, 8)); str(odewei.report(model)); odewei.close(model)\n"
        "assert not logging.getLogger('odewei').handlers and not logging.root.handlers\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_a_user_should_know_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A weight that stays because it was written to is told once, to whoever listens to ``odewei``."""
    state = models.llama().state_dict()
    with (
        models.streamed(models.llama, state, memory_budget=200_000) as model,
        caplog.at_level(logging.WARNING, "odewei"),
        torch.no_grad(),
    ):
        model.get_submodule("model.layers.0.mlp.up_proj").weight.mul_(2)
        for _ in range(3):
            model(input_ids=torch.tensor([[1, 2, 3]]))
    assert [record.name for record in caplog.records] == ["odewei"]
    assert "changed in place" in caplog.text
