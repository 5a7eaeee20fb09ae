"""Modules that share, repeat, skip or hide their weights compute the resident model's bits under a small budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize

import odewei
from tests import models as zoo
from tests.traps import DEPTHS, WIDTH, Blocks, assert_same, assert_streams, linears, rows, twins


class Tied(nn.Module):
    """Ties between units, to a table, and within one module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, WIDTH)
        self.layers = linears()
        self.layers[5].weight = self.layers[1].weight
        self.layers[6].bias = self.layers[6].other = self.layers[2].bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.embed(torch.arange(3))
        for layer in self.layers:
            hidden = layer(hidden)
        return functional.linear(hidden + self.layers[6].other, self.embed.weight)


class Shared(nn.Module):
    """One module in several places, and in a place of its own."""

    def __init__(self) -> None:
        super().__init__()
        made = linears()
        self.layers = nn.ModuleList([made[0], *made, made[0], made[3]])
        self.again = made[3]
        self.around = nn.Sequential(made[5], made[5])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return self.around(self.again(hidden))


class Beside(nn.Module):
    """Uses weights of modules whose forward is never called, in every way there is to get at them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = linears()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 1, bias=False)
        self.scale = nn.Parameter(torch.rand(WIDTH))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        hidden = functional.linear(hidden, self.layers[0].weight)
        hidden = hidden @ self.layers[1].weight + self.layers[1].bias
        hidden = functional.conv1d(hidden[..., None], self.conv.weight)[..., 0]
        hidden = functional.linear(hidden, *self.layers[2].parameters())
        hidden = functional.linear(hidden, self.layers[3]._parameters["weight"])
        hidden = hidden @ dict(self.layers.named_parameters())["4.weight"]
        hidden = hidden @ self.layers.get_parameter("5.weight") * self.scale
        hidden = torch.addmm(getattr(self.layers[6], "bias"), hidden, self.layers[6].weight.T)  # noqa: B009
        for parameter in self.layers[7].parameters():
            hidden = hidden * parameter.sum()
        return torch.einsum("ni,oi->no", hidden, vars(self.layers[7])["_parameters"].get("weight"))


class Lists(nn.Module):
    """Parameters in lists and dictionaries of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.lists = nn.ModuleList(
            nn.ParameterList(torch.randn(WIDTH, size) for size in (WIDTH, WIDTH, 1)) for _ in range(4)
        )
        self.named = nn.ParameterDict({"scale": torch.rand(WIDTH), "shift": torch.rand(WIDTH)})
        self.blocks = nn.ModuleDict({"one": nn.Linear(WIDTH, WIDTH), "two": nn.Linear(WIDTH, WIDTH)})

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for matrices in self.lists:
            for index in range(2):
                hidden = torch.tanh(hidden @ matrices[index])
        for name, value in self.named.items():
            hidden = hidden * value if name == "scale" else hidden + self.named[name]
        for block in self.blocks.values():
            hidden = block(hidden)
        return hidden @ self.lists[-1][-2] @ self.lists[0][0] * self.lists[2][2:][0].sum()


class Bags(nn.Module):
    """Sums of rows of a table, which are no look-ups of single rows."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(40, WIDTH, mode=mode) for mode in ("sum", "mean", "max"))
        self.layers = linears()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(12).reshape(3, 4)
        for bag in self.bags:
            hidden = hidden + bag(ids) + bag(ids.reshape(-1), torch.tensor([0, 5, 5]))
        hidden = hidden + self.bags[0](ids, per_sample_weights=hidden[:, :4])
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class Recurrent(nn.Module):
    """Every recurrent module, some used through their second list of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, bidirectional=True, proj_size=WIDTH // 2)
        self.layers = nn.ModuleList([nn.GRU(WIDTH, WIDTH), nn.RNN(WIDTH, WIDTH), nn.GRU(WIDTH, WIDTH, bias=False)])
        self.cells = nn.ModuleList([nn.GRUCell(WIDTH, WIDTH), nn.LSTMCell(WIDTH, WIDTH), nn.RNNCell(WIDTH, WIDTH)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.lstm.flatten_parameters()
        packed = nn.utils.rnn.pack_padded_sequence(hidden[:, None], torch.tensor([3]))
        hidden = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0])[0]
        for layer in self.layers:
            hidden = layer(hidden)[0]
        hidden = self.cells[2](self.cells[1](self.cells[0](hidden[:, 0]))[0])
        return hidden + self.lstm.weight_hh_l1_reverse.sum()


class Symmetric(nn.Module):
    """A parametrization by a user."""

    def forward(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.triu() + matrix.triu(1).T


class Parametrized(nn.Module):
    """Weights that are computed from others."""

    def __init__(self) -> None:
        super().__init__()
        made = linears()
        parametrizations.weight_norm(made[0])
        parametrizations.spectral_norm(made[1])
        parametrizations.orthogonal(made[2], orthogonal_map="cayley")
        parametrize.register_parametrization(made[3], "weight", Symmetric())
        parametrizations.weight_norm(made[4], dim=None)
        self.layers = made

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with parametrize.cached():
            for layer in (*self.layers, *self.layers):
                hidden = torch.tanh(layer(hidden))
        return functional.linear(hidden, self.layers[3].weight)


CASES: dict[str, Callable[[], nn.Module]] = {
    made.__name__.lower(): made for made in (Tied, Shared, Beside, Lists, Bags, Recurrent, Parametrized, Blocks)
}


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", CASES)
def test_same_bits(name: str, depth: int | str, tmp_path: Path) -> None:
    """However weights are shared, hidden and used: the resident bits, from a budget that cannot hold them."""
    with twins(CASES[name], tmp_path, depth, granularity="leaf") as (model, streamed):
        assert_same(model, streamed, *([rows(seed)] for seed in (1, 2, 1, 3)))
        assert_streams(streamed)


def test_ties_are_one_weight(tmp_path: Path) -> None:
    """A tied weight is one parameter under all its names, takes its bytes once and is read once."""
    with twins(Tied, tmp_path) as (model, streamed):
        assert odewei.report(streamed).weight_bytes == zoo.weight_bytes(model)
    path = tmp_path / "model.safetensors"
    with zoo.streamed(Tied, str(path), memory_budget="1MB", prefetch_depth=0) as streamed:
        assert_same(model, streamed, [rows(1)], [rows(2)])
        layers = streamed.layers
        assert layers[5].weight is layers[1].weight
        assert layers[6].bias is layers[6].other is layers[2].bias
        assert torch.equal(layers[1].weight, model.layers[5].weight)
        assert len(list(streamed.parameters())) == len(list(model.parameters()))
        report = odewei.report(streamed)
        assert report.bytes_read == report.weight_bytes


def test_ties_are_one_parameter_while_units_arrive(tmp_path: Path) -> None:
    """Whoever iterates the parameters sees the same objects whatever is resident, also if a unit arrives meanwhile."""
    model = zoo.resident(Tied)
    path = zoo.save(model, tmp_path / "model.safetensors")
    with zoo.streamed(Tied, str(path), memory_budget="1MB", prefetch_depth=0) as streamed:
        before = list(streamed.parameters())
        seen = []
        for parameter in streamed.parameters():
            if not seen:
                assert_same(model, streamed, [rows(1)])
                assert odewei.report(streamed).resident_bytes == zoo.weight_bytes(model)
            seen.append(parameter)
        assert len(seen) == len(list(model.parameters()))
        assert all(one is other for one, other in zip(before, seen, strict=True))
        assert all(one is other for one, other in zip(before, streamed.parameters(), strict=True))


def test_a_shared_module_is_read_once(tmp_path: Path) -> None:
    """A module in several places has one set of weights, whichever of them it is called from."""
    model = zoo.resident(Shared)
    path = zoo.save(model, tmp_path / "model.safetensors")
    with zoo.streamed(Shared, str(path), memory_budget="1MB", prefetch_depth=0) as streamed:
        assert_same(model, streamed, [rows(1)], [rows(2)])
        report = odewei.report(streamed)
        assert report.bytes_read == report.weight_bytes == zoo.weight_bytes(model)


class Routed(nn.Module):
    """Runs the layers that it is told to, in that order."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = linears()

    def forward(self, hidden: torch.Tensor, order: list[int]) -> torch.Tensor:
        for index in order:
            hidden = self.layers[index](hidden)
        return hidden


@pytest.mark.parametrize("depth", DEPTHS)
def test_any_order(depth: int | str, tmp_path: Path) -> None:
    """Layers repeated, skipped, reversed or drawn anew each pass: right, within the budget, and mispredicted."""
    draw = torch.Generator().manual_seed(0)
    orders = [[0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0], [0, 0, 0, 5, 5, 0], [3], [1, 3, 5, 7, 6, 4, 2, 0]]
    orders += [torch.randint(8, (9,), generator=draw).tolist() for _ in range(20)]
    with twins(Routed, tmp_path, depth) as (model, streamed):
        assert_same(model, streamed, *([rows(seed), order] for seed, order in enumerate(orders)))
        assert_streams(streamed)
        assert odewei.report(streamed).mispredictions > 20


@pytest.mark.parametrize("depth", DEPTHS)
def test_hooks_of_users_read_weights(depth: int | str, tmp_path: Path) -> None:
    """Hooks that were there first, or came later, see real weights of their own module and of any other."""
    with twins(Blocks, tmp_path, depth) as (model, streamed):
        seen: dict[int, list[torch.Tensor]] = {id(model): [], id(streamed): []}
        for one in (model, streamed):

            def look(module: nn.Module, *_: object, one: nn.Module = one) -> None:
                seen[id(one)] += [module.up.weight.sum(), one.blocks[-1].down.bias.clone(), *module.parameters()]

            for block in one.blocks:
                block.register_forward_pre_hook(look, prepend=True)
                block.register_forward_hook(look)
        assert_same(model, streamed, [rows(1)], [rows(2)])
        assert zoo.same_bits([one + 0 for one in seen[id(streamed)]], [one + 0 for one in seen[id(model)]])


@pytest.mark.parametrize("depth", DEPTHS)
def test_norms_that_are_learnt_in_forward(depth: int | str, tmp_path: Path) -> None:
    """In training mode spectral norm changes its buffers in every pass: they stay changed, as the resident ones."""
    with twins(Parametrized, tmp_path, depth, granularity="leaf") as (model, streamed):
        for one in (model, streamed):
            one.train()
        assert_same(model, streamed, *([rows(seed)] for seed in range(4)))
        model.eval(), streamed.eval()
        assert_same(model, streamed, [rows(5)])
        assert zoo.same_bits(list(streamed.buffers()), list(model.buffers()))
        assert_streams(streamed)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=["weight", "spectral"])
def test_norms_that_are_hooks(norm: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    """The older norms, which put a plain tensor in the weight's place before each forward, are right too."""

    def build() -> nn.Module:
        return nn.Sequential(*(norm(layer) for layer in linears()))

    with twins(build, tmp_path) as (model, streamed):
        assert_same(model, streamed, [rows(1)], [rows(2)])
        assert_streams(streamed)


class Aside(nn.Module):
    """Keeps parameters outside of torch's dictionaries: in an attribute's list, and in a function."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.layers = linears()
        weight = self.layers[2].weight
        self.list = [weight] if where == "list" else []
        self.function = (lambda hidden: functional.linear(hidden, weight)) if where == "function" else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        for weight in self.list:
            hidden = functional.linear(hidden, weight)
        return self.function(hidden) if self.function else hidden


@pytest.mark.parametrize("where", ["list", "function"])
def test_parameters_that_the_model_keeps_aside(where: str, tmp_path: Path) -> None:
    """A parameter that was taken aside while the model was built computes with its values, not with garbage."""
    with twins(lambda: Aside(where), tmp_path) as (model, streamed):
        assert_same(model, streamed, [rows(1)], [rows(2)])
