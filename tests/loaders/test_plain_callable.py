"""Functions as sources of weights, and what else can be one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from odewei.errors import CheckpointError, CheckpointNotFoundError, MissingWeightError, OptionsError
from odewei.loaders import CallableLoader, SafetensorsLoader, StateDictLoader, as_source


def load(answer: object, names: Sequence[str] = ("a",)) -> dict[str, torch.Tensor]:
    return CallableLoader(lambda module, names: answer).load("block.0", names)  # type: ignore[arg-type, return-value]


def test_the_function_gets_the_module_and_the_names() -> None:
    """It is called once, with the module's name and a list of names."""
    calls: list[object] = []

    def function(module_name: str, names: Sequence[str]) -> dict[str, torch.Tensor]:
        calls.append((module_name, names))
        return {name: torch.ones(1) for name in names}

    loader = CallableLoader(function)
    assert loader.load("block.0", ("a", "b")).keys() == {"a", "b"}
    assert calls == [("block.0", ["a", "b"])]
    assert (loader.device, loader.dtype) == (None, None)
    assert "function" in repr(loader)
    loader.close()


def test_what_it_returns_beyond_the_names_is_kept() -> None:
    """Extra tensors stay in the answer, and tensors are the function's own objects."""
    answer = {"a": torch.ones(1), "extra": torch.nn.Parameter(torch.ones(2))}
    found = load(answer)
    assert found.keys() == answer.keys()
    assert all(found[name] is answer[name] for name in answer)


def test_a_weight_that_is_not_returned_is_named() -> None:
    """The error names module and weight, and what was returned, shortened."""
    with pytest.raises(MissingWeightError, match=r"asked for 2 and returned 'a'.*'block\.0'.*'b'") as caught:
        load({"a": torch.ones(1)}, ["a", "b"])
    assert (caught.value.module, caught.value.weight) == ("block.0", "b")
    with pytest.raises(MissingWeightError, match="returned nothing"):
        load({})
    with pytest.raises(MissingWeightError, match=r"'x0'.*'x4' and 95 more"):
        load({f"x{i}": torch.ones(1) for i in range(100)})


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (None, r"returned a NoneType, not a mapping"),
        ([torch.ones(1)], "returned a list"),
        ({"a": [1.0]}, "list.*'a'"),
        ({"a": torch.ones(1).numpy()}, r"ndarray.*'a'.*from_numpy"),
        ({"a": torch.empty(1, device="meta")}, "meta.*'a'"),
        ({"a": torch.eye(2).to_sparse()}, "sparse.*'a'"),
        ({"a": torch.ones(1), 3: torch.ones(1)}, "key 3"),
    ],
    ids=["none", "list", "list as a tensor", "array", "meta", "sparse", "number as a name"],
)
def test_answers_of_another_form_are_refused(answer: object, problem: str) -> None:
    """The error says what was returned and names module and weight."""
    with pytest.raises(CheckpointError, match=problem) as caught:
        load(answer)
    assert caught.value.module == "block.0"
    assert caught.value.cure


def test_what_the_function_raises_passes_unchanged() -> None:
    """The very exception reaches the caller."""
    error = ConnectionError("no network")

    def function(module_name: str, names: Sequence[str]) -> dict[str, torch.Tensor]:
        raise error

    with pytest.raises(ConnectionError) as caught:
        CallableLoader(function).load("block.0", ["a"])
    assert caught.value is error


def test_weights_are_made_outside_of_inference_mode_and_gradients() -> None:
    """Whatever mode the caller is in, what is made in the function can be used in any later one (trap 15)."""
    with torch.inference_mode():
        kept = torch.ones(2)

    def function(module_name: str, names: Sequence[str]) -> dict[str, torch.Tensor]:
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
        return {"made": torch.nn.Parameter(torch.ones(2)) * 2, "kept": kept}

    with torch.inference_mode():
        found = CallableLoader(function).load("block.0", ["made", "kept"])
    for tensor in found.values():
        assert not tensor.is_inference()
        assert not tensor.requires_grad


def test_everything_that_can_be_a_source_becomes_one(tmp_path: Path) -> None:
    """Loaders pass, mappings, paths and functions are wrapped."""
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    loader = SafetensorsLoader(tmp_path / "model.safetensors")
    function = CallableLoader(lambda module, names: {})
    assert as_source(loader) is loader
    assert as_source(function) is function
    assert isinstance(as_source({"a": torch.ones(1)}), StateDictLoader)
    assert isinstance(as_source(torch.nn.Linear(1, 1).state_dict()), StateDictLoader)
    assert isinstance(as_source(tmp_path), SafetensorsLoader)
    assert isinstance(as_source(str(tmp_path / "model.safetensors")), SafetensorsLoader)
    assert isinstance(as_source(lambda module, names: {}), CallableLoader)
    assert isinstance(as_source(loader.__call__), CallableLoader)


@pytest.mark.parametrize("source", [None, 3, SafetensorsLoader, b"path", [torch.ones(1)]], ids=repr)
def test_what_cannot_be_a_source_is_refused(source: Any) -> None:
    """The error says what was given and what can be; a class that was not called is told."""
    with pytest.raises(OptionsError, match=r"cannot be read from (a|the class) .*Give a loader"):
        as_source(source)


def test_a_path_without_a_checkpoint_is_not_found(tmp_path: Path) -> None:
    """A source that is a path must exist."""
    with pytest.raises(CheckpointNotFoundError):
        as_source(str(tmp_path / "no.safetensors"))
