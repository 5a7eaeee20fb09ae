"""``odewei profile``: what it writes and prints, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from torch import nn

import odewei
from odewei import cli
from odewei.profiling import picture
from odewei.torch import init_on_demand_weights_model
from tests import models as zoo

pytest.importorskip("transformers")


def _invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli.group(), ["profile", *map(str, arguments)], prog_name="odewei")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, dict[str, object]]]:
    """Have the command open small models, ``t5`` or ``convnet`` by these names; what it asked for."""
    asked: list[tuple[str, dict[str, object]]] = []
    builds: dict[str, Callable[[], nn.Module]] = {"t5": zoo.t5, "convnet": zoo.ConvNet}

    def from_pretrained(path: str, **options: object) -> nn.Module:
        asked.append((path, options))
        build = builds.get(path, zoo.llama)
        file = zoo.save(zoo.resident(build), tmp_path / "model.safetensors")
        return init_on_demand_weights_model(build, str(file), **options).eval()

    monkeypatch.setattr(odewei, "from_pretrained", from_pretrained, raising=False)
    return asked


def test_a_table_a_trace_and_a_picture(opened: list[tuple[str, dict[str, object]]], tmp_path: Path) -> None:
    """The table and the advice are on stdout, what was written is on stderr, and the files are there."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "folder"
    result = _invoke("a/b", "--tokens", 5, "--passes", 2, "--memory-budget", "200kB", "--out", out)
    assert result.exit_code == 0, result.output
    assert opened == [("a/b", {"memory_budget": "200kB", "device": "cpu"})]
    assert result.stdout.startswith("layer ")
    assert "2 passes in" in result.stdout
    assert "→ " in result.stdout
    assert [line.split()[0] for line in result.stderr.splitlines()] == ["wrote", "wrote"]
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert sum(event.get("cat") == "pass" for event in events) == 2
    assert (out / "timeline.png").stat().st_size > 1000


@pytest.mark.usefixtures("opened")
def test_json_is_one_document(tmp_path: Path) -> None:
    """--json prints the figures and nothing else on stdout; an encoder-decoder gets both of its inputs."""
    result = _invoke("t5", "--json", "--at-once", 2, "--passes", 3, "--tokens", 4, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["summary"]["passes"] == 6
    assert document["advice"]
    assert {"name", "nbytes", "bytes_read", "compute_seconds"} <= document["layers"][0].keys()
    assert document["files"][0] == str(tmp_path / "trace.json")


@pytest.mark.usefixtures("opened")
def test_without_matplotlib_there_is_no_picture_and_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else is written, and stderr names the extra."""

    def missing(*_: object) -> None:
        raise odewei.errors.OptionsError("a picture needs matplotlib", cure='pip install "odewei[plot]"')

    monkeypatch.setattr(picture, "draw", missing)
    result = _invoke("a/b", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "odewei[plot]" in result.stderr
    assert not (tmp_path / "timeline.png").exists()
    assert (tmp_path / "trace.json").exists()


@pytest.mark.usefixtures("opened")
@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("convnet",), 1, "does not take tokens only"),
        (("a/b", "--memory-budget", "much"), 1, "is not a number of bytes"),
        (("a/b", "--memory-budget", "1"), 1, "The smallest memory_budget that works"),
        (("a/b", "--out", __file__), 2, "is a file"),
        (("a/b", "--tokens", "0"), 2, "--tokens"),
        ((), 2, "CHECKPOINT"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], status: int, words: str, tmp_path: Path) -> None:
    """A model that takes no tokens, a budget that cannot work, a bad place to write: a message and no traceback."""
    where = () if "--out" in arguments else ("--out", tmp_path)
    result = _invoke(*arguments, *where)
    assert result.exit_code == status, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
