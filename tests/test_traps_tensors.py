"""Tensors of every kind, wherever they come from, are handed out as the resident model has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

import odewei
from tests import models as zoo
from tests.traps import DEPTHS, WIDTH, assert_same, assert_streams, linears, rows, twins

KINDS = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip
CAST = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
SHAPES = [(), (0,), (3,), (5, 7), (0, 4), (1, 1, 13)]


class Assorted(nn.Module):
    """Parameters of every dtype and of odd shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Module() for _ in KINDS)
        for part, dtype in zip(self.parts, KINDS, strict=True):
            for index, shape in enumerate(SHAPES):
                part.register_parameter(f"p{index}", nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False))

    def forward(self) -> list[torch.Tensor]:
        return [getattr(part, f"p{index}").clone() for part in self.parts for index in range(len(SHAPES))]


def _random_bytes(model: nn.Module) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.dtype is torch.bool:
            state[name] = torch.randint(2, tensor.shape, generator=draw).bool()
        elif tensor.is_floating_point() or tensor.is_complex():
            state[name] = torch.randn(tensor.shape, generator=draw).to(tensor.dtype)
        else:
            state[name] = torch.randint(0, 120, tensor.shape, generator=draw).to(tensor.dtype)
    return state


def _as_safetensors(state: dict[str, torch.Tensor], folder: Path) -> object:
    save_file(state, folder / "model.safetensors")
    return str(folder / "model.safetensors")


def _as_torch_file(state: dict[str, torch.Tensor], folder: Path) -> object:
    torch.save(state, folder / "model.pt")
    return str(folder / "model.pt")


def _as_mapping(state: dict[str, torch.Tensor], folder: Path) -> object:
    return state


def _as_function(state: dict[str, torch.Tensor], folder: Path) -> object:
    def load(module: str, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        return {name: state[name] for name in names}

    return load


SOURCES: list[Callable[[dict[str, torch.Tensor], Path], object]] = [
    _as_safetensors, _as_torch_file, _as_mapping, _as_function,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as stored", "cast"])
@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("source", SOURCES)
def test_every_kind(
    source: Callable[[dict[str, torch.Tensor], Path], object],
    depth: int | str,
    dtype: torch.dtype | None,
    tmp_path: Path,
) -> None:
    """0-dim, empty and odd tensors of every dtype come out, at multiples of 64 bytes; dtype= casts floats only."""
    state = _random_bytes(Assorted())
    expected = [one.to(dtype) if dtype is not None and one.dtype in CAST else one for one in state.values()]
    options = {"memory_budget": 1024, "prefetch_depth": depth, "dtype": dtype, "granularity": "leaf"}
    with zoo.streamed(Assorted, source(state, tmp_path), **options) as streamed:
        for _ in range(3):
            assert zoo.same_bits(streamed(), expected)
        report = odewei.report(streamed)
        assert report.bytes_read > 2 * report.weight_bytes
        assert report.peak_bytes <= report.budget_bytes
        for part in streamed.parts:
            for index in range(len(SHAPES)):
                found = getattr(part, f"p{index}")
                assert found.data_ptr() % 64 == 0
                assert isinstance(found, nn.Parameter)
                assert not found.requires_grad
        assert [one.dtype for one in streamed.parameters()] == [one.dtype for one in expected]


class Packed(nn.Module):
    """A quantised layer as libraries write them: packed integers, scales, zero points; and one in 8-bit floats."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.randint(0, 255, (WIDTH, WIDTH // 2), dtype=torch.uint8), requires_grad=False)
        self.scale = nn.Parameter(torch.rand(WIDTH, 1), requires_grad=False)
        self.zero = nn.Parameter(torch.tensor(7, dtype=torch.int8), requires_grad=False)
        self.mask = nn.Parameter(torch.rand(WIDTH) > 0.5, requires_grad=False)
        self.small = nn.Parameter(torch.randn(WIDTH, WIDTH).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        whole = torch.stack([self.packed & 15, self.packed >> 4], -1).flatten(1).to(torch.int8) - self.zero
        hidden = functional.linear(hidden, whole * self.scale).masked_fill(self.mask, 0)
        return torch.tanh(functional.linear(hidden, self.small.float()))


@pytest.mark.parametrize("depth", DEPTHS)
def test_quantised_by_hand(depth: int | str, tmp_path: Path) -> None:
    """Layers of packed, boolean and 8-bit floating weights compute the resident's bits under a small budget."""

    def build() -> nn.Module:
        return nn.Sequential(*(Packed() for _ in range(8)))

    torch.manual_seed(0)
    model = build()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with zoo.streamed(build, _as_safetensors(state, tmp_path), memory_budget=3000, prefetch_depth=depth) as streamed:
        assert_same(model, streamed, [rows(1)], [rows(2)], [rows(3)])
        assert_streams(streamed)


class Strided(nn.Module):
    """Weights that were saved transposed, or with the channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = linears()
        self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden))
        image = hidden.repeat(1, 4).reshape(len(hidden), 4, 4, 4)
        for convolution in self.convolutions:
            image = convolution(image)
        return image


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("source", SOURCES[1:3])
def test_strides(source: Callable[[dict[str, torch.Tensor], Path], object], depth: int | str, tmp_path: Path) -> None:
    """A weight has the strides that it was saved with, as load_state_dict(assign=True) gives it."""
    model = zoo.resident(Strided)
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 2:
            tensor = tensor.t().contiguous().t()
        state[name] = tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
    model.load_state_dict(state, assign=True)
    with zoo.streamed(Strided, source(state, tmp_path), memory_budget=4096, prefetch_depth=depth) as streamed:
        strides = {name: tensor.stride() for name, tensor in model.named_parameters()}
        assert {name: tensor.stride() for name, tensor in streamed.named_parameters()} == strides
        assert_same(model, streamed, [rows(1)], [rows(2)])
        assert {name: streamed.get_parameter(name).stride() for name in strides} == strides
        assert streamed.layers[0].weight.stride() == (1, WIDTH)
        assert streamed.convolutions[0].weight.stride() == (36, 1, 12, 4)


class Counting(nn.Module):
    """Buffers of all kinds: in the checkpoint or not, written in place or replaced in forward, absent."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(4))
        self.layers = linears()
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("shift", torch.linspace(0, 1, WIDTH), persistent=False)
        self.register_buffer("cache", torch.zeros(0, WIDTH), persistent=False)
        self.register_buffer("absent", None)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        for index, layer in enumerate(self.layers):
            hidden = torch.tanh(layer(self.norms[index % 4](hidden)) + self.shift)
        self.cache = torch.cat([self.cache, hidden])
        return self.cache * self.calls


@pytest.mark.parametrize("depth", DEPTHS)
def test_buffers(depth: int | str, tmp_path: Path) -> None:
    """Buffers are the checkpoint's or as built; what a forward writes into them, or puts in their place, stays."""
    model = zoo.resident(Counting)
    for one in model.norms:
        one.running_mean.uniform_(-1, 1), one.running_var.uniform_(1, 2), one.num_batches_tracked.fill_(9)
    model.calls.fill_(41)
    path = zoo.save(model, tmp_path / "model.safetensors")
    with zoo.streamed(Counting, str(path), memory_budget=4096, prefetch_depth=depth) as streamed:
        assert zoo.same_bits(list(streamed.buffers()), list(model.buffers()))
        assert odewei.report(streamed).buffer_bytes == sum(one.nbytes for one in model.buffers())
        assert_same(model, streamed, [rows(1)])
        for one in (model, streamed):
            one.train()
        assert_same(model, streamed, *([rows(seed)] for seed in range(2, 6)))
        for one in (model, streamed):
            one.eval()
        assert_same(model, streamed, [rows(6)])
        assert zoo.same_bits(list(streamed.buffers()), list(model.buffers()))
        assert streamed.absent is None
        assert streamed.norms[0].num_batches_tracked == 9 + 2 * 4
        assert_streams(streamed)


class Asking(nn.Module):
    """Asks its parameters what they are, wherever code asks that, and goes by the answers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = linears()
        self.answers: list[object] = []

    def ask(self) -> None:
        for parameter in self.parameters():
            self.answers += [parameter.device, parameter.dtype, parameter.is_meta, parameter.shape, parameter.ndim]
            self.answers += [parameter.layout, parameter.requires_grad, parameter.is_floating_point(), parameter.nbytes]
            self.answers += [parameter.is_contiguous(), parameter.stride(), parameter.numel(), parameter.element_size()]
            self.answers += [parameter.is_leaf, parameter.grad, len(parameter), parameter.is_sparse, parameter.is_cpu]
            self.answers += [torch.empty_like(parameter, device="meta").dtype, parameter.device.type == "cpu"]
        self.answers += [{one.dtype for one in self.state_dict().values()}]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        first = next(self.parameters())
        hidden = hidden.to(first.device, first.dtype)
        for layer in self.layers:
            self.ask()
            hidden = layer(hidden.to(layer.weight.device, layer.weight.dtype))
        return hidden


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["as stored", "cast"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_asking_for_device_and_dtype(depth: int | str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    """Before, in and after a forward parameters answer as resident ones do, never "meta", whoever is here just now."""
    with twins(Asking, tmp_path, depth, dtype=dtype, granularity="leaf") as (model, streamed):
        model.to(dtype)
        for _ in range(2):
            model.ask(), streamed.ask()
            assert_same(model, streamed, [rows(1)])
        assert streamed.answers == model.answers
        assert not any(one.is_meta for one in (*streamed.parameters(), *streamed.buffers()))


def test_nothing_on_meta_can_be_reached(tmp_path: Path) -> None:
    """Products with weights of absent modules have their values: torch would raise nothing and return garbage."""
    with twins(Strided, tmp_path, 0) as (model, streamed), torch.no_grad():
        for index in range(8):
            hidden = rows(index)
            weight, expected = streamed.layers[index].weight, model.layers[index].weight
            assert torch.equal(functional.linear(hidden, weight), functional.linear(hidden, expected))
            assert torch.equal(hidden @ next(streamed.layers[index].parameters()), hidden @ expected)
        image, weight = torch.randn(1, 4, 4, 4), model.convolutions[2].weight
        expected = functional.conv2d(image, weight)
        assert torch.equal(functional.conv2d(image, streamed.convolutions[2].weight), expected)
        assert torch.equal(
            functional.conv2d(image, dict(streamed.named_parameters())["convolutions.2.weight"]), expected
        )
