"""Running the command, in this process and in another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from odewei import cli

Invoke = Callable[..., Result]


def invoke(*arguments: object) -> Result:
    """Run the command in this process."""
    return CliRunner().invoke(cli.group(), [str(argument) for argument in arguments], prog_name="odewei")


def document(result: Result) -> dict[str, object]:
    """The one JSON document on stdout of a command that ended well."""
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def process(*arguments: object, script: str = "from odewei import cli; cli.main()") -> subprocess.Popen[str]:
    """The command in a process of its own, with its input and output in pipes."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)


def one_line(result: Result) -> str:
    """The message of a command that failed with status 1, which is all that it printed."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    return line


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers, a table and a head, in two files with an index; about 5 MiB."""
    folder = tmp_path_factory.mktemp("cli") / "checkpoint"
    folder.mkdir()
    weights = {"model.embed_tokens.weight": torch.zeros(1000, 300), "lm_head.weight": torch.zeros(1000, 300)}
    layers = {f"model.layers.{layer}.up.weight": torch.zeros(300, 300) for layer in range(8)}
    files = {"a.safetensors": weights, "b.safetensors": layers}
    for name, held in files.items():
        save_file(held, folder / name)
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
