"""Surgery: replacing, deleting, inserting, reordering, sharing, tying layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .action import Arguments, Draw, action
from .edits import shuffled
from .side import Inapplicable, Side

SEQUENTIAL = ("mlp", "tied", "conv", "llama", "mixtral", "bert")  # whose layers take and return one tensor


class Around(nn.Module):
    """A user's own wrapper of a layer or a model."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Scale(nn.Module):
    """An ordinary layer with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden * self.scale


@action(lambda draw: {"name": draw.module(nn.Linear), "seed": draw.seed()}, often=2)
def replace_linear(side: Side, name: str, seed: int) -> object:
    parent, last = side.parent(name)
    old = side.module(name)
    if not isinstance(old, nn.Linear):
        raise Inapplicable("no Linear any more")
    torch.manual_seed(seed)
    setattr(parent, last, nn.Linear(old.in_features, old.out_features, bias=old.bias is not None))


def _layers(side: Side, name: str, least: int) -> Any:
    layers = side.module(name)
    if not isinstance(layers, nn.ModuleList | nn.Sequential) or len(layers) < least:
        raise Inapplicable("not so many layers")
    return layers


def _pair(draw: Draw) -> Arguments:
    name = draw.layers()
    first, second = draw.rng.sample(range(len(draw.side.module(name))), 2)
    return {"name": name, "first": first, "second": second}


@action(_pair, often=1.5)
def swap_layers(side: Side, name: str, first: int, second: int) -> object:
    layers = _layers(side, name, max(first, second) + 1)
    layers[first], layers[second] = layers[second], layers[first]


@action(_pair)
def copy_layer_over(side: Side, name: str, first: int, second: int) -> object:
    """A deep copy of one layer in the place of another."""
    layers = _layers(side, name, max(first, second) + 1)
    layers[first] = copy.deepcopy(layers[second])


@action(_pair)
def share_layer(side: Side, name: str, first: int, second: int) -> object:
    """The same layer in two places."""
    layers = _layers(side, name, max(first, second) + 1)
    layers[first] = layers[second]


@action(lambda draw: {"name": draw.layers(), "index": draw.one((0, 1))}, often=1.5)
def delete_layer(side: Side, name: str, index: int) -> object:
    layers = _layers(side, name, 2)
    del layers[index]
    return len(layers)


@action(lambda draw: {"name": (name := draw.layers()), "order": shuffled(draw.rng, len(draw.side.module(name)))})
def reorder_layers(side: Side, name: str, order: list[int]) -> object:
    """Another list of the same layers."""
    parent, last = side.parent(name)
    layers = _layers(side, name, len(order))
    setattr(parent, last, type(layers)(*_unpacked(layers, [layers[index] for index in order])))


@action(lambda draw: {"name": draw.layers(), "half": draw.one((True, False))}, often=0.5)
def slice_layers(side: Side, name: str, half: bool) -> object:
    """Only the first layers, as people prune."""
    parent, last = side.parent(name)
    layers = _layers(side, name, 2)
    setattr(parent, last, layers[: max(1, len(layers) // 2)] if half else layers[1:])


def _unpacked(layers: Any, chosen: list[nn.Module]) -> list[Any]:
    return [chosen] if isinstance(layers, nn.ModuleList) else chosen


@action(
    lambda draw: {"name": draw.layers(1), "index": draw.one((0, 1))}, only=lambda side: side.plan.subject in SEQUENTIAL
)
def insert_layer(side: Side, name: str, index: int) -> object:
    """An ordinary one between those that there are."""
    _layers(side, name, 1).insert(index, Scale())


@action(lambda draw: {"name": draw.layers(1)}, often=0.7)
def append_copy(side: Side, name: str) -> object:
    """One more layer, a copy of the first."""
    layers = _layers(side, name, 1)
    layers.append(copy.deepcopy(layers[0]))


@action(lambda draw: {"name": draw.module(but=(nn.ModuleList, nn.ModuleDict))}, often=1.5)
def wrap_a_layer(side: Side, name: str) -> object:
    """The layer within another module, in its place."""
    parent, last = side.parent(name)
    setattr(parent, last, Around(side.module(name)))


@action(lambda draw: {"name": draw.module(Around)})
def unwrap_a_layer(side: Side, name: str) -> object:
    parent, last = side.parent(name)
    around = side.module(name)
    if not isinstance(around, Around):
        raise Inapplicable("not wrapped")
    setattr(parent, last, around.inner)


@action(lambda draw: {"name": draw.module(nn.Linear, nn.LayerNorm, nn.Embedding)})
def share_with_another_module(side: Side, name: str) -> object:
    """A child gets a second parent, outside of the model."""
    holder = nn.Module()
    holder.part = side.module(name)
    side.kept[f"part {name}"] = holder.part
    side.kept[f"holder of {name}"] = holder
    return [key for key, _ in holder.named_parameters()]


def _same_shapes(draw: Draw) -> Arguments:
    first = draw.parameter()
    named = dict(draw.side.model.named_parameters(remove_duplicate=False))
    shape = named[first].shape
    second = draw.one(name for name, one in named.items() if one.shape == shape and name != first)
    return {"first": first, "second": second}


@action(_same_shapes, often=1.5)
def tie(side: Side, first: str, second: str) -> object:
    """Two places have one weight from now on."""
    side.parameter(second)
    owner, _, last = second.rpartition(".")
    setattr(side.module(owner), last, side.parameter(first, "attribute"))


@action(_same_shapes, holds=True)
def swap_weights(side: Side, first: str, second: str) -> object:
    """The weights of two places change them."""
    owners = [(side.module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in (first, second)]
    a, b = side.parameter(first, "attribute"), side.parameter(second, "attribute")
    setattr(*owners[0], b)
    setattr(*owners[1], a)


@action(lambda draw: {"name": draw.parameter()}, often=1.5, holds=True)
def untie(side: Side, name: str) -> object:
    """A weight of its own, with the same values."""
    owner, _, last = name.rpartition(".")
    module = side.module(owner)
    setattr(module, last, nn.Parameter(side.parameter(name).detach().clone()))
    return getattr(module, last)


@action(
    lambda draw: {"size": draw.one((VOCABULARY_AFTER, 61, 58)), "mean": False},
    holds=True,
    only=lambda side: hasattr(side.model, "resize_token_embeddings"),
)
def resize_embeddings(side: Side, size: int, mean: bool) -> object:
    if not hasattr(side.model, "resize_token_embeddings"):
        raise Inapplicable("not a model of transformers")
    made = side.model.resize_token_embeddings(size, mean_resizing=mean)
    return made.weight.shape, side.model.config.vocab_size, side.model.get_input_embeddings().num_embeddings


VOCABULARY_AFTER = 66


@action(lambda draw: {"name": draw.module(nn.Linear)}, often=1.5, holds=True)
def lend_a_weight(side: Side, name: str) -> object:
    """An ordinary layer outside has a weight of the model."""
    layer = side.module(name)
    if type(layer) is not nn.Linear:
        raise Inapplicable("no Linear any more")
    outside = nn.Linear(layer.in_features, layer.out_features, bias=False)
    outside.weight = layer.weight
    side.kept["part lent"] = outside
    return outside.weight is dict(outside.named_parameters())["weight"]
