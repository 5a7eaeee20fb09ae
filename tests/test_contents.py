"""What a checkpoint has in it, by layer and by pattern."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from odewei.contents import Contents, layer_of, pattern_of
from odewei.loaders import SafetensorsLoader
from odewei.loaders.state_dict import StateDictLoader


def test_names_that_differ_in_numbers_are_one_pattern() -> None:
    """Only whole parts of a name that are numbers are left open; the first of them ends the layer's name."""
    assert pattern_of("model.layers.31.mlp.experts.7.w1.weight") == "model.layers.*.mlp.experts.*.w1.weight"
    assert pattern_of("block4.conv2d.weight") == "block4.conv2d.weight"
    assert layer_of("model.layers.31.mlp.experts.7.w1.weight") == "model.layers.31"
    assert layer_of("norm.weight") == layer_of("bias") == "(the rest)"


def test_sums_by_layer_pattern_dtype_and_file(tmp_path: Path) -> None:
    """Every byte is in one row of each table, the largest rows first."""
    weights = {f"layers.{layer}.weight": torch.zeros(4, 4) for layer in range(3)}
    weights |= {"layers.3.weight": torch.zeros(5, 4), "head": torch.zeros(7, dtype=torch.int8)}
    save_file(weights, tmp_path / "w.safetensors")
    contents = Contents.of(SafetensorsLoader(tmp_path / "w.safetensors").weights())
    assert contents.nbytes == 3 * 64 + 80 + 7
    assert contents.count == 5
    assert contents.dtypes == {"float32": 272, "int8": 7}
    assert contents.files == {str(tmp_path / "w.safetensors"): (tmp_path / "w.safetensors").stat().st_size}
    layers = [(found.pattern, found.count, found.least_bytes, found.most_bytes) for found in contents.layers]
    assert layers == [("layers.*", 4, 64, 80), ("(the rest)", 1, 7, 7)]
    tensors = [(found.pattern, found.shape, found.count, found.total_bytes) for found in contents.tensors]
    assert tensors == [("layers.*.weight", (4, 4), 3, 192), ("layers.*.weight", (5, 4), 1, 80), ("head", (7,), 1, 7)]
    assert sum(found.total_bytes for found in contents.layers) == contents.nbytes


def test_tensors_in_no_file_and_none_at_all() -> None:
    """What is in memory has no file; nothing is nothing."""
    assert Contents.of(StateDictLoader({"a": torch.zeros(2)}).weights()).files == {}
    nothing = Contents.of({})
    assert (nothing.nbytes, nothing.count, nothing.layers, nothing.tensors) == (0, 0, (), ())
