"""dtypes and plain tensors."""

import pytest
import torch

from odewei.errors import CheckpointError, CorruptCheckpointError
from odewei.loaders.tensors import DTYPES, check_plain, contiguous_stride, named_dtype

from .conformance import SHAPES


def test_names_of_dtypes_mean_what_safetensors_means() -> None:
    """Our table of dtypes is the one of the reference implementation."""
    from safetensors.torch import _TYPES

    assert all(_TYPES[name] is dtype for name, dtype in DTYPES.items() if name in _TYPES)
    assert len(DTYPES) == 20


@pytest.mark.parametrize("name", ["F6_E2M3", "F6_E3M2"])
def test_dtypes_across_bytes_are_refused_by_name(name: str) -> None:
    """The refusal names weight, file, dtype and a cure, and does not call the file corrupt."""
    with pytest.raises(CheckpointError, match=rf"{name}.*'w'.*'f'.*U8") as caught:
        named_dtype(name, weight="w", file="f")
    assert not isinstance(caught.value, CorruptCheckpointError)


def test_a_dtype_that_this_torch_lacks_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older torch is told apart from a corrupt file."""
    monkeypatch.delitem(DTYPES, "F8_E8M0")
    with pytest.raises(CheckpointError, match=r"F8_E8M0.*newer torch"):
        named_dtype("F8_E8M0", weight="w", file="f")


def test_an_invented_dtype_is_corruption() -> None:
    """A name that no format has is a corrupt header."""
    with pytest.raises(CorruptCheckpointError, match="F33"):
        named_dtype("F33", weight="w", file="f")


@pytest.mark.parametrize("shape", [*SHAPES, (2, 0, 3), (0, 0)])
def test_contiguous_stride_is_the_one_of_torch(shape: tuple[int, ...]) -> None:
    """The stride of a contiguous tensor is computed as torch does."""
    assert contiguous_stride(shape) == torch.empty(shape).stride()


class _Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("text", "str"),
        (None, "NoneType"),
        (torch.eye(2).to_sparse(), "sparse"),
        (torch.ones(2).as_subclass(_Subclass), "_Subclass"),
        (torch.nn.Parameter(torch.ones(2).as_subclass(_Subclass)), "_Subclass"),
        (torch.nn.UninitializedParameter(), "UninitializedParameter"),
    ],
    ids=["text", "none", "sparse", "subclass", "parameter of a subclass", "uninitialised"],
)
def test_what_bytes_do_not_describe_is_refused(value: object, problem: str) -> None:
    """Anything but a plain tensor is refused with its name, module and file."""
    with pytest.raises(CheckpointError, match=problem) as caught:
        check_plain(value, weight="w", file="f", module="m")
    assert (caught.value.weight, caught.value.file, caught.value.module) == ("w", "f", "m")
    assert caught.value.cure


@pytest.mark.filterwarnings("ignore")
def test_quantised_tensors_are_refused() -> None:
    """A tensor quantised by torch, whose scale is not in its bytes, is refused."""
    with pytest.raises(CheckpointError, match="scale"):
        check_plain(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), weight="w")


def test_wrapper_subclasses_are_refused() -> None:
    """A tensor that is made of other tensors is refused, not read as if it had bytes."""
    from torch.testing._internal.two_tensor import TwoTensor

    with pytest.raises(CheckpointError, match="TwoTensor"):
        check_plain(TwoTensor(torch.ones(2), torch.ones(2)), weight="w")


def test_parameters_and_buffers_are_plain() -> None:
    """Parameters, with or without gradients, and buffers are what weights are made of."""
    for value in (torch.nn.Parameter(torch.ones(2)), torch.nn.Buffer(torch.ones(2)), torch.ones(2)):
        assert check_plain(value, weight="w") is value
