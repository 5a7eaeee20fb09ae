"""Weights in host memory."""

from pathlib import Path
from typing import Any

import pytest
import torch

from odewei.errors import CheckpointError, WeightReadError
from odewei.loaders import StateDictLoader
from odewei.loaders.tensors import DTYPES

from .conformance import COMPLEX, LoaderConformance, assert_same, random_tensor, read_bytes


class TestStateDictLoader(LoaderConformance):
    """The suite."""

    has_spans = False
    keeps_strides = True
    dtypes = DTYPES | COMPLEX

    def make(self, tensors: dict[str, torch.Tensor], folder: Path, **options: Any) -> StateDictLoader:
        return StateDictLoader(tensors, **options)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (torch.empty(2, device="meta"), "meta.*load them first"),
        (torch.eye(2).to_sparse(), "sparse"),
        ([1.0], "list"),
        (torch.ones(2).numpy(), "ndarray.*from_numpy"),
    ],
    ids=["meta", "sparse", "list", "array"],
)
def test_what_has_no_bytes_in_host_memory_is_refused(value: Any, problem: str) -> None:
    """Who asks for it gets an error that names the weight and the cure; what else there is can be read."""
    loader = StateDictLoader({"fine": torch.ones(1), "w": value})
    assert list(loader.weights()) == ["fine"]
    with pytest.raises(CheckpointError, match=problem) as caught:
        loader("module", ["w"])
    with pytest.raises(CheckpointError, match=problem):
        StateDictLoader({"w": value})
    assert caught.value.weight == "w"
    assert caught.value.cure


def test_names_are_strings() -> None:
    """A key that is no string is refused."""
    with pytest.raises(CheckpointError, match="key 3 is a int"):
        StateDictLoader({3: torch.ones(1)})  # type: ignore[dict-item]


@pytest.mark.parametrize("make", [lambda t: t, lambda t: t.t(), lambda t: t[:, 1:3], lambda t: t[::2].t()])
def test_lazy_conjugates_and_negatives_are_resolved(make: Any) -> None:
    """Tensors whose bytes are not their values come out with their values, however they are strided."""
    base = torch.complex(torch.arange(12.0).view(3, 4), torch.arange(12.0).view(3, 4) + 1)
    for tensor in (make(base.conj()), make(base.conj().imag), make(torch._neg_view(base.real.contiguous()))):
        found = StateDictLoader({"w": tensor})("module", ["w"])["w"]
        assert_same(found, tensor)
        assert not found.is_conj()
        assert not found.is_neg()


def test_parameters_inference_tensors_and_views_are_fine() -> None:
    """Parameters that need gradients, tensors made in inference mode and views are read, and give ordinary tensors."""
    with torch.inference_mode():
        made = torch.arange(4.0)
    mapping = {"parameter": torch.nn.Parameter(torch.ones(2)), "inference": made, "view": torch.arange(9.0)[3:5]}
    found = StateDictLoader(mapping)("module", list(mapping))
    for name, expected in mapping.items():
        assert_same(found[name], expected)
        assert not found[name].requires_grad
        assert not found[name].is_inference()


def test_what_is_written_later_is_read_later() -> None:
    """The tensors are shared with the mapping's owner; the mapping itself is not."""
    mapping = {"w": torch.zeros(2)}
    loader = StateDictLoader(mapping)
    mapping["w"].fill_(1)
    mapping["late"] = torch.ones(1)
    assert loader("module", ["w", "late"])["w"].tolist() == [1, 1]
    assert loader.weights().keys() == {"w"}


def test_a_tensor_that_changed_its_shape_is_noticed() -> None:
    """A weight that was resized since is an error, never other bytes than described."""
    tensor = random_tensor(torch.float32, (4,))
    loader = StateDictLoader({"w": tensor})
    info = loader.weights()["w"]
    tensor.resize_(2)
    with pytest.raises(WeightReadError, match="resized") as caught:
        read_bytes(loader, info)
    assert caught.value.weight == "w"
