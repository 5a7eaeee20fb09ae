"""``odewei inspect``"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from .conftest import document, invoke


def test_tables_by_layer_and_by_pattern(checkpoint: Path) -> None:
    """Sums, layers and patterns with dtype and shape are there; nothing is on stderr."""
    result = invoke("inspect", checkpoint)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    for text in ("10 tensors and 2 files", "float32", "model.layers.*.up.weight", "300 × 300", "(the rest)"):
        assert text in result.stdout
    assert "model.layers.3" not in result.stdout


def test_every_tensor(checkpoint: Path) -> None:
    """With --tensors each name is a row."""
    result = invoke("inspect", checkpoint, "--tensors")
    for layer in range(8):
        assert f"model.layers.{layer}.up.weight" in result.stdout


def test_json(checkpoint: Path) -> None:
    """One document says the same in bytes; each tensor is in it when asked for."""
    found = document(invoke("inspect", checkpoint, "--json"))
    assert found["bytes"] == (2 * 1000 * 300 + 8 * 300 * 300) * 4
    assert found["tensors"] == 10
    assert [file["path"] for file in found["files"]] == [
        str(checkpoint / name) for name in ("a.safetensors", "b.safetensors")
    ]
    assert found["layers"][0] == {
        "pattern": "model.layers.*", "count": 8, "least_bytes": 360000, "most_bytes": 360000, "total_bytes": 2880000,
    }  # fmt: skip
    assert "each" not in found
    each = document(invoke("inspect", checkpoint, "--json", "--tensors"))["each"]
    assert {"name": "lm_head.weight", "dtype": "float32", "shape": [1000, 300], "bytes": 1200000} in [
        {key: value for key, value in tensor.items() if key != "file"} for tensor in each
    ]


def test_names_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    """Markup in a name is shown as it is, and what moves a cursor is not sent to one."""
    save_file({"[red]a[/red]": torch.zeros(1), "b\x1b[2Jc": torch.zeros(2)}, tmp_path / "w.safetensors")
    result = invoke("inspect", tmp_path / "w.safetensors")
    assert "[red]a[/red]" in result.stdout
    assert "\x1b" not in result.stdout
