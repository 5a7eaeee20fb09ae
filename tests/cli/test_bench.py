"""``odewei bench``, and the JSON of the commands that run something."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from odewei.demo import real_size

from .conftest import document, invoke, one_line

TINY = ("--size", "2MiB", "--passes", "1")


def test_a_tiny_benchmark(tmp_path: Path) -> None:
    """All modes are measured at each number of tokens, with the same bits; a second run uses the same checkpoint."""
    result = invoke("bench", *TINY, "--cache-dir", tmp_path, "--tokens", "1", "--tokens", "3")
    assert result.exit_code == 0, result.output
    for text in ("GB/s", "1 tokens a pass", "3 tokens a pass", "no prefetch", "resident", "yes"):
        assert text in result.stdout
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    found = document(invoke("bench", *TINY, "--cache-dir", tmp_path, "--tokens", "2", "--json"))
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")} == files
    assert found["equal"] is True
    assert found["disk"]["bandwidth"] > 0
    (run,) = found["runs"]
    streamed, twin, resident = (run["modes"][index] for index in (1, 0, 2))
    assert resident["read_bytes"] == 0
    assert streamed["read_bytes"] > 0 < twin["read_bytes"]
    for mode in run["modes"]:
        assert mode["floor_seconds"] >= resident["median_seconds"]


def test_it_needs_no_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is plain torch."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"] or ["transformers"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert invoke("bench", *TINY, "--cache-dir", tmp_path, "--tokens", "1").exit_code == 0


def test_other_bits_are_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the streamed model gives other bits, that is said, and the command fails."""
    load_resident = real_size._load_resident

    def other(model: torch.nn.Module, settings: real_size.RealSizeSettings) -> None:
        load_resident(model, settings)
        model.get_parameter("lm_head.weight").data[0, 0] += 1

    monkeypatch.setattr(real_size, "_load_resident", other)
    result = invoke("bench", *TINY, "--cache-dir", tmp_path, "--tokens", "1")
    assert result.exit_code == 1
    assert "DIFFERENT" in result.stdout


def test_a_size_that_no_model_has(tmp_path: Path) -> None:
    """The smallest that works is named."""
    assert "smallest" in one_line(invoke("bench", "--size", "1KiB", "--cache-dir", tmp_path))


def test_json_of_the_demonstration(tmp_path: Path) -> None:
    """One document on stdout; what people read is not there."""
    arguments = ("--only", "real-size", *TINY, "--tokens", "2", "--cache-dir", tmp_path)
    found = document(invoke("demo", *arguments, "--json"))
    assert found["equal"] is True
    assert found["real_weights"] is None
    assert [mode["equal"] for mode in found["real_size"]["modes"]] == [True] * 3


def test_json_of_align(checkpoint: Path, tmp_path: Path) -> None:
    """The files that were written, with their sizes; their names are told on stderr meanwhile."""
    result = invoke("align", checkpoint, tmp_path / "copy", "--json")
    found = document(result)
    files = sorted((tmp_path / "copy").glob("*.safetensors"))
    assert found["files"] == [{"path": str(file), "bytes": file.stat().st_size} for file in files]
    assert result.stderr.count("wrote ") == 2
