"""Conversions of transformers become places in files where they can, and are computed a weight at a time where not.

Transformers' own loading, by the same rules, says what is right.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import odewei
from odewei.errors import OdeweiError, WeightMismatchError
from tests.models import llama
from tests.pretrained.checkpoints import as_loaded, edit, saved
from tests.pretrained.test_transformers_model import TEXT, check, loader_of, outputs, streamed

transformers = pytest.importorskip("transformers")
core: Any = pytest.importorskip("transformers.core_model_loading")

Weights = dict[str, torch.Tensor]
Rules = Callable[[list[Any]], None]

QKV = ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"]


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> Rules:
    """Makes these the conversions of Llama, for the test."""
    from transformers import conversion_mapping

    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # fills the table

    def use(conversions: list[Any]) -> None:
        monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llama", conversions)

    return use


def each_layer(found: Weights, change: Callable[[Weights], Weights]) -> Weights:
    """``change`` the weights of each layer, without the layer's prefix."""
    prefixes = sorted({name[: name.index(".", 13) + 1] for name in found if name.startswith("model.layers.")})
    made = {name: value for name, value in found.items() if not name.startswith("model.layers.")}
    for prefix in prefixes:
        layer = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
        made.update({prefix + name: value for name, value in change(layer).items()})
    return made


def converted(rules: Rules, folder: Path, conversions: list[Any], change: Callable[[Weights], Weights]) -> set[str]:
    """Check that a Llama checkpoint with changed layers is right. Returns the first layer's names that are computed."""
    kind = saved(llama, folder)
    original = as_loaded(kind, folder)
    edit(folder, lambda found: each_layer(found, change))
    rules(conversions)
    check(kind, folder)
    check(kind, folder, dtype=torch.bfloat16)
    with streamed(folder, dtype=torch.float32) as model:
        for name, value in original.state_dict().items():
            assert torch.equal(model.get_parameter(name), value), name
        names = loader_of(model).computed
        return {name.removeprefix("model.layers.0.") for name in names if name.startswith("model.layers.0.")}


def test_chunks_of_the_first_dimension_are_places(rules: Rules, tmp_path: Path) -> None:
    """A fused gate and up projection is read as the two stretches that it is."""

    def fuse(layer: Weights) -> Weights:
        gate, up = layer.pop("mlp.gate_proj.weight"), layer.pop("mlp.up_proj.weight")
        return {**layer, "mlp.w13.weight": torch.cat([gate, up])}

    chunk = core.WeightConverter("mlp.w13.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [core.Chunk(dim=0)])
    assert converted(rules, tmp_path, [chunk], fuse) == set()


def test_splits_of_unequal_sizes_are_places(rules: Rules, tmp_path: Path) -> None:
    """A fused query, key and value is read as three stretches of the sizes that the model has."""

    def fuse(layer: Weights) -> Weights:
        return {"qkv": torch.cat([layer.pop(name) for name in QKV]), **layer}

    assert converted(rules, tmp_path, [core.WeightConverter("qkv", QKV, [core.Split(dim=0)])], fuse) == set()


def test_chunks_of_another_dimension_are_computed(rules: Rules, tmp_path: Path) -> None:
    """Columns side by side are no stretches of a file."""

    def fuse(layer: Weights) -> Weights:
        gate, up = layer.pop("mlp.gate_proj.weight"), layer.pop("mlp.up_proj.weight")
        return {**layer, "mlp.w13.weight": torch.cat([gate, up], dim=1)}

    chunk = core.WeightConverter("mlp.w13.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [core.Chunk(dim=1)])
    assert converted(rules, tmp_path, [chunk], fuse) == {"mlp.gate_proj.weight", "mlp.up_proj.weight"}


def test_joined_weights_are_places(rules: Rules, tmp_path: Path) -> None:
    """A weight that the checkpoint has in pieces, along either dimension, is gathered."""

    def cut(layer: Weights) -> Weights:
        left, right = layer.pop("mlp.down_proj.weight").chunk(2, dim=1)
        upper, lower = layer.pop("mlp.up_proj.weight").chunk(2, dim=0)
        return {**layer, "left": left, "right": right, "upper": upper, "lower": lower}

    join = [
        core.WeightConverter(["left", "right"], "mlp.down_proj.weight", [core.Concatenate(dim=1)]),
        core.WeightConverter(["upper", "lower"], "mlp.up_proj.weight", [core.Concatenate(dim=0)]),
    ]
    assert converted(rules, tmp_path, join, cut) == set()


def test_a_transposed_weight_is_computed(rules: Rules, tmp_path: Path) -> None:
    """Transposing moves every element, so it is done in the reader's thread."""

    def turn(layer: Weights) -> Weights:
        return {"mlp.up_t": layer.pop("mlp.up_proj.weight").T, **layer}

    transpose = core.WeightConverter("mlp.up_t", "mlp.up_proj.weight", [core.Transpose(0, 1)])
    assert converted(rules, tmp_path, [transpose], turn) == {"mlp.up_proj.weight"}


def test_transposing_that_asks_for_the_shape(rules: Rules, tmp_path: Path) -> None:
    """An operation that looks at the model's shapes and does nothing is a plain read."""
    check_dims = core.WeightConverter(
        "mlp.up_proj.weight", "mlp.up_proj.weight", [core.Transpose(0, 1, check_dims=True)]
    )
    assert converted(rules, tmp_path, [check_dims], dict) == set()


def test_permuting_for_rope_is_computed(rules: Rules, tmp_path: Path) -> None:
    """Rows in the order of the original Llama are put into transformers' order; what the chunks leave is a place."""
    heads, half = 4, 6

    def original_order(weight: torch.Tensor) -> torch.Tensor:
        return weight.view(heads, 2, half, -1).transpose(1, 2).reshape(weight.shape)

    def turn(layer: Weights) -> Weights:
        return {"wq": original_order(layer.pop(QKV[0])), **layer}

    assert converted(rules, tmp_path, [core.WeightConverter("wq", QKV[0], [core.PermuteForRope()])], turn) == {QKV[0]}


def test_interleaved_rows_are_computed(rules: Rules, tmp_path: Path) -> None:
    """Two matrices whose rows alternate are taken apart, each by itself."""

    def interleave(layer: Weights) -> Weights:
        gate, up = layer.pop("mlp.gate_proj.weight"), layer.pop("mlp.up_proj.weight")
        return {**layer, "w13": torch.stack([gate, up], dim=1).flatten(0, 1)}

    both = core.WeightConverter(
        "w13", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [core.Interleave(dim=0), core.Chunk(dim=0)]
    )
    assert converted(rules, tmp_path, [both], interleave) == {"mlp.gate_proj.weight", "mlp.up_proj.weight"}


def test_an_operation_that_odewei_has_never_seen(rules: Rules, tmp_path: Path) -> None:
    """What any other operation makes is computed, also one that changes its source in place."""

    class Halve(core.ConversionOps):  # type: ignore[misc, name-defined]
        def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **kwargs: Any) -> Any:
            (found,) = input_dict.values()
            tensor = found[0] if isinstance(found, list) else found
            return {target_patterns[0]: tensor.clone().mul_(0.5) if self.copies else tensor.mul_(0.5)}

        def __init__(self, copies: bool) -> None:
            self.copies = copies

    def double(layer: Weights) -> Weights:
        return {"up2": layer.pop("mlp.up_proj.weight") * 2, "down2": layer.pop("mlp.down_proj.weight") * 2, **layer}

    halve = [
        core.WeightConverter("up2", "mlp.up_proj.weight", [Halve(True)]),
        core.WeightConverter("down2", "mlp.down_proj.weight", [Halve(False)]),
    ]
    assert converted(rules, tmp_path, halve, double) == {"mlp.up_proj.weight", "mlp.down_proj.weight"}


def test_a_conversion_that_does_not_fit(rules: Rules, tmp_path: Path) -> None:
    """Sources that an operation refuses are an error that names the weights, before anything is read."""
    saved(llama, tmp_path)

    def cut(layer: Weights) -> Weights:
        return {**layer, "left": torch.ones(3, 2), "right": torch.ones(4, 2)}

    edit(tmp_path, lambda found: each_layer(found, cut))
    rules([core.WeightConverter(["left", "right"], "mlp.up_proj.weight", [core.Concatenate(dim=1)])])
    with pytest.raises(WeightMismatchError, match=r"mlp\.up_proj\.weight.*left.*model\.safetensors"):
        odewei.from_pretrained(tmp_path)


def test_a_computed_weight_of_a_file_that_is_cut_short(rules: Rules, tmp_path: Path) -> None:
    """A source that cannot be read any more is an error of the pass that needs it, and names the file."""
    saved(llama, tmp_path)

    def turn(layer: Weights) -> Weights:
        return {"mlp.up_t": layer.pop("mlp.up_proj.weight").T, **layer}

    edit(tmp_path, lambda found: each_layer(found, turn))
    rules([core.WeightConverter("mlp.up_t", "mlp.up_proj.weight", [core.Transpose(0, 1)])])
    with streamed(tmp_path, prefetch_depth=0) as model:
        file = tmp_path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-4096])
        with pytest.raises(OdeweiError, match=r"model\.safetensors"):
            outputs(model, **TEXT)


def test_a_copy_of_a_model_with_computed_weights(rules: Rules, tmp_path: Path) -> None:
    """copy.deepcopy streams by itself with the same conversions."""
    import copy

    saved(llama, tmp_path)

    def turn(layer: Weights) -> Weights:
        return {"mlp.up_t": layer.pop("mlp.up_proj.weight").T, **layer}

    edit(tmp_path, lambda found: each_layer(found, turn))
    rules([core.WeightConverter("mlp.up_t", "mlp.up_proj.weight", [core.Transpose(0, 1)])])
    with streamed(tmp_path) as model:
        expected = outputs(model, **TEXT)
        other = copy.deepcopy(model)
    try:
        assert torch.equal(outputs(other, **TEXT)[0], expected[0])
    finally:
        odewei.close(other)
